"""Plugins with which SGLang and vLLM load converted checkpoints.

``slices`` cuts a rank's share out of the file and knows no engine; ``sglang`` and ``vllm`` hold
each engine's hooks and nothing else.
"""
