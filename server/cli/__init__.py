"""The `deshift` command: one file per group of subcommands."""
