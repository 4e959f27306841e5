"""Subcommands of `python -m evaluation`."""
