"""The `ucm` command."""
