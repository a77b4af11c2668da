"""The command line: `commands` parses and calls, `display` shows, `process` is the process."""
