"""What names vLLM: the connector, and what is read of its objects."""
