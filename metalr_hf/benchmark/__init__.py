"""Measures what a tuned optimizer step costs in time and memory."""
