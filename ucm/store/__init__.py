"""Names, pages, slots, tiers and the node cache. Nothing in here knows vLLM."""
