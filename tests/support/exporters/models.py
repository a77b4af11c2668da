"""Tiny random MoE models, of the classes that transformers has for real ones.

Both exporters quantize what `make` makes, each with the transformers of its own environment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

H, I, E = 256, 128, 8  # noqa: E741 - the project's names of the three sizes

COMMON: dict[str, Any] = {
    "hidden_size": H,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
DENSE = {"head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": I}
MIXTRAL = {"intermediate_size": I, "num_local_experts": E}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_value_head_dim": 32,
    "shared_expert_intermediate_size": I,
}
QWEN_TOKENS = {
    "image_token_id": 500,
    "video_token_id": 501,
    "vision_end_token_id": 502,
    "vision_start_token_id": 503,
}
QWEN_VISION = {
    "deepstack_visual_indexes": [],
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "num_position_embeddings": 16,
    "out_hidden_size": H,
    "patch_size": 16,
}


def deepseek_v3() -> Any:
    config = transformers.DeepseekV3Config(
        **COMMON | {"num_key_value_heads": 4},
        first_k_dense_replace=1,
        intermediate_size=256,
        kv_lora_rank=64,
        moe_intermediate_size=I,
        n_group=2,
        n_routed_experts=E,
        n_shared_experts=1,
        q_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        topk_group=1,
        v_head_dim=32,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def ernie4_5_moe() -> Any:
    config = transformers.Ernie4_5_MoeConfig(
        **{key: size for key, size in COMMON.items() if key != "num_experts_per_tok"},
        **DENSE,
        moe_k=2,
        moe_layer_start_index=1,
        moe_num_experts=E,
        moe_num_shared_experts=1,
    )
    return transformers.Ernie4_5_MoeForCausalLM(config)


def gemma4() -> Any:
    text = (COMMON | DENSE) | {
        "enable_moe_block": True,
        "global_head_dim": 64,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": I,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_experts": E,
        "num_kv_shared_layers": 0,
        "pad_token_id": 0,
        "top_k_experts": 2,
        "vocab_size_per_layer_input": 512,
    }
    vision = {
        "head_dim": 16,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "num_key_value_heads": 4,
        "patch_size": 16,
        "position_embedding_size": 16,
    }
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    return transformers.Gemma4ForConditionalGeneration(config)


def glm4_moe() -> Any:
    config = transformers.Glm4MoeConfig(
        **COMMON, **DENSE, first_k_dense_replace=1, n_routed_experts=E
    )
    return transformers.Glm4MoeForCausalLM(config)


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(
        **COMMON, head_dim=64, intermediate_size=256, num_local_experts=E
    )
    return transformers.GptOssForCausalLM(config)


def llama4() -> Any:
    text = COMMON | {
        "attention_chunk_size": 64,
        "head_dim": 64,
        "interleave_moe_layer_step": 1,
        "intermediate_size": I,
        "intermediate_size_mlp": 256,
        "num_experts_per_tok": 1,
        "num_local_experts": E,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 64,
        "image_size": 28,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "patch_size": 14,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
        "vision_output_dim": 64,
    }
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    return transformers.Llama4ForConditionalGeneration(config)


def minimax_m2() -> Any:
    config = transformers.MiniMaxM2Config(**COMMON, **MIXTRAL, head_dim=64)
    return transformers.MiniMaxM2ForCausalLM(config)


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**COMMON, **MIXTRAL))


def nemotron_h() -> Any:
    config = transformers.NemotronHConfig(
        **{key: size for key, size in COMMON.items() if key != "num_hidden_layers"},
        **DENSE | {"moe_intermediate_size": 2 * I},  # vLLM cuts it at multiples of 128
        layers_block_type=["mamba", "moe", "attention", "moe"],
        mamba_head_dim=32,
        mamba_num_heads=8,
        moe_shared_expert_intermediate_size=I,
        n_groups=8,
        n_routed_experts=E,
        n_shared_experts=1,
        ssm_state_size=32,
    )
    return transformers.NemotronHForCausalLM(config)


def qwen2_moe() -> Any:
    config = transformers.Qwen2MoeConfig(
        **COMMON,
        intermediate_size=256,
        moe_intermediate_size=I,
        num_experts=E,
        shared_expert_intermediate_size=I,
    )
    return transformers.Qwen2MoeForCausalLM(config)


def qwen3_5_moe() -> Any:
    config = transformers.Qwen3_5MoeConfig(
        # SGLang reads the interval, and that deepstack_visual_indexes are none. Published models
        # have both, transformers writes neither.
        text_config={
            **COMMON,
            **DENSE,
            **LINEAR_ATTENTION,
            "full_attention_interval": 2,
            "num_experts": E,
        },
        vision_config=QWEN_VISION,
        **QWEN_TOKENS,
    )
    return transformers.Qwen3_5MoeForConditionalGeneration(config)


def qwen3_moe() -> Any:
    config = transformers.Qwen3MoeConfig(**COMMON, **DENSE, num_experts=E)
    return transformers.Qwen3MoeForCausalLM(config)


def qwen3_next() -> Any:
    config = transformers.Qwen3NextConfig(**COMMON, **DENSE, **LINEAR_ATTENTION, num_experts=E)
    return transformers.Qwen3NextForCausalLM(config)


def qwen3_vl_moe() -> Any:
    rope = {"rope_type": "default", "mrope_section": [12, 10, 10]}
    config = transformers.Qwen3VLMoeConfig(
        # vLLM reads norm_topk_prob. Published models have it, transformers does not write it.
        text_config={
            **COMMON,
            **DENSE,
            "norm_topk_prob": True,
            "num_experts": E,
            "rope_scaling": rope,
        },
        vision_config=QWEN_VISION | {"deepstack_visual_indexes": [0]},
        **QWEN_TOKENS,
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


# Both releases of transformers ask this of a Llama 4 that has been given no image.
MoeCausalLMOutputWithPast.image_outputs = None

MAKERS: tuple[Callable[[], Any], ...] = (
    deepseek_v3,
    ernie4_5_moe,
    gemma4,
    glm4_moe,
    gpt_oss,
    llama4,
    minimax_m2,
    mixtral,
    nemotron_h,
    qwen2_moe,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    qwen3_vl_moe,
)


def make(family: str) -> Any:
    """The model of a family in bf16; its weights depend on nothing but its sizes."""
    torch.manual_seed(0)
    makers = {maker.__name__: maker for maker in MAKERS}
    model = makers[family]().to(torch.bfloat16).eval()
    model.config.architectures = [type(model).__name__]
    for parameter in model.parameters():
        if parameter.dim() > 1:  # what a class leaves at zero has no scale
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def tokens() -> torch.Tensor:
    """What the models are calibrated with: [4, 32], int64."""
    return torch.randint(
        0, COMMON["vocab_size"], (4, 32), generator=torch.Generator().manual_seed(0)
    )
