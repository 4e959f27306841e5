"""Heads that are compared, with their memory, rows and plots."""
