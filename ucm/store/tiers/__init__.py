"""Where pages are kept: the contract of a tier, and each kind of one."""
