"""The node cache: one process per node that owns the slots and does all I/O."""
