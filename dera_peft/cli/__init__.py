"""The `dera` command."""
