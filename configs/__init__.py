"""Settings of a run: `configs.schema` says what there is, `configs.load` reads YAML and the command line."""
