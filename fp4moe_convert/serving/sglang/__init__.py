"""SGLang's plugin: `hooks`."""
