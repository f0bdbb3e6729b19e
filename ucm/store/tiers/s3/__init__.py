"""Pages as objects in a bucket."""
