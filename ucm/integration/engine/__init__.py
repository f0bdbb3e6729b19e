"""What the scheduler half of any engine does. Knows no engine and no torch."""
