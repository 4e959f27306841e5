"""The subcommands of `python -m data`."""
