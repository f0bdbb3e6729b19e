"""The proxy between prefill and decode instances."""
