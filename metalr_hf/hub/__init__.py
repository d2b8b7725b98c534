"""What a published model says, and what goes up."""
