"""What a model folder is: its configuration, its shards, and which tensors are experts."""
