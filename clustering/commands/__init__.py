"""The command line's subcommands: a module each, with `add(subparsers)` and `run(arguments) -> exit code`."""
