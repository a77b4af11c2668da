"""vLLM's plugin: `hooks`."""
