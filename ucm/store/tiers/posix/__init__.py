"""The tier on directories that every node mounts."""
