"""Keys, certificates, and the files that they come from."""
