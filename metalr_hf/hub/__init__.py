"""The model card, and what is uploaded to the Hub."""
