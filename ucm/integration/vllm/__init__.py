"""UCM as a vLLM connector."""
