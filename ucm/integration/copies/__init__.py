"""Copies between a device's KV blocks and the slots. Knows torch and no engine."""
