"""vLLM's own offloading with the node cache below it: a secondary tier that several nodes share."""
