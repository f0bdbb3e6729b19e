"""Talking to the node cache of this machine, whoever does."""
