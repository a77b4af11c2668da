"""SGLang's and vLLM's own MoE code on a machine without a GPU. Runs in their environments only."""
