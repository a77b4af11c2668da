"""Write tiny ModelOpt NVFP4 originals of many model families, such that stock engines load them.

    python -m tests.support.model_zoo OUT minimax_m2      # names: FAMILIES

Names of tensors, keys of config.json and the section that describes the quantization are a
family's real ones; sizes are small and values are random. A family starts from the tensors of one
of `make_checkpoint`'s two styles. The table here says what it calls them, what it has besides, and
what its config.json says. Like `make_checkpoint` it needs numpy alone.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from .make_checkpoint import (
    BLOCK,
    Json,
    Spec,
    Tensor,
    bf16,
    cut_into_shards,
    decoder_layer,
    f32,
    gated_mlp,
    hf_quant_config,
    model_config,
    other_files,
    quantization_section,
    tensors_of,
    to_json,
    write_shard,
)

H, I, E = 256, 128, 8  # noqa: E741 - the project's names of the three sizes
Q = 512  # rows of q_proj, k_proj and v_proj: 4 heads of 128


def many(name: str, *shape: int) -> Iterator[Tensor]:
    """A bf16 tensor for each name: ``a.{x,y}`` are two, and several braces multiply."""
    choices = [
        part[1:-1].split(",") if part.startswith("{") else [part]
        for part in re.split(r"(\{.*?\})", name)
    ]
    return (bf16("".join(chosen), *shape) for chosen in itertools.product(*choices))


def linears(shapes: Mapping[str, tuple[int, int]]) -> Iterator[Tensor]:
    """The weight [rows, cols] and the bias [rows] of each; names as in `many`."""
    for name, (rows, cols) in shapes.items():
        yield from many(f"{name}.weight", rows, cols)
        yield from many(f"{name}.bias", rows)


def shared_expert(prefixes: str, *, quantized: bool = True) -> Iterator[Tensor]:
    """A gated MLP of an expert's size at each prefix; prefixes as in `many`."""
    for tensor in many(prefixes):
        yield from gated_mlp(QWEN, tensor.name, I, quantized)


def compressor(prefix: str, ratio: int, rows: int, head: int) -> Iterator[Tensor]:
    """What DeepSeek-V4 makes one key of ``ratio`` with."""
    yield f32(f"{prefix}.ape", ratio, rows)
    yield from many(f"{prefix}.{{wkv,wgate}}.weight", rows, H)
    yield from many(f"{prefix}.norm.weight", head)


def nvfp4(weight: Tensor) -> Iterator[Tensor]:
    """The four tensors of a linear layer in NVFP4; up has the tensor scales of gate."""
    rows, cols = weight.shape
    module = weight.name.removesuffix(".weight")
    tied = module.replace(".up_proj", ".gate_proj")
    for leaf, dtype, shape, origin in (
        ("weight", "U8", (rows, cols // 2), module),
        ("weight_scale", "F8_E4M3", (rows, cols // BLOCK), module),
        ("weight_scale_2", "F32", (), tied),
        ("input_scale", "F32", (), tied),
    ):
        yield Tensor(f"{module}.{leaf}", dtype, shape, f"{origin}.{leaf}")


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    spec: Spec
    """Where the tensors and the configuration come from."""
    config: Json
    """What config.json says besides (a None takes the key out); for a nested model, what its
    ``text_config`` says."""
    top: Json | None = None
    """The outer config.json of a nested model, without ``text_config``."""
    extra: tuple[Tensor, ...] = ()
    """Tensors besides those of `tensors_of`."""
    without: str = r"$^"
    """Pattern of the tensors and ignored modules that the family does not have."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Patterns of the tensors that have other shapes."""
    stacked: str = r"$^"
    """Pattern of the tensors of one expert that stand for those of all, in one tensor."""
    batched: str = r"$^"
    """The same, where it is transposed and, of gate, that of gate and up."""
    quantized: str = r"$^"
    """Pattern of the bf16 weights that are NVFP4 here."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """Patterns and replacements, in order, for names of tensors and of ignored modules, in the end.
    All patterns above are of names before that."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Patterns and replacements, in order, of which each adds names to those of quantized layers:
    what engines call them."""
    section: Literal[
        "modelopt", "mixed by module", "mixed by linear", "amid fp8", "compressed-tensors"
    ] = "modelopt"
    """Who describes the quantization, and how."""
    fp8: str = r"$^"
    """Pattern of the bf16 weights that are FP8 here."""
    mxfp8: str = r"$^"
    """Pattern of those that are MXFP8."""
    remote: bool = False
    """Whether its configuration class travels with it, in a file that config.json names."""
    ignore: tuple[str, ...] = ()
    """Modules that are not quantized, besides those of `make_checkpoint`; names as in `many`."""
    in_file: bool = False
    """Whether hf_quant_config.json alone describes the quantization."""
    says_kv_cache: bool = True
    """Whether hf_quant_config.json has a key for the KV cache; of mixed precision alone."""
    beside: tuple[str, str] | None = None
    """A file that the index does not name, and the pattern of the final names of what is in it."""

    @property
    def is_mixed(self) -> bool:
        return self.section.startswith(("mixed", "amid"))


REMOTE_CONFIGURATION = """\
from transformers import PretrainedConfig


class Config(PretrainedConfig):
    model_type = "{model_type}"
"""

DEEPSEEK = Spec(experts=E, hidden=H, intermediate=I, vocab_size=64)
QWEN = replace(DEEPSEEK, style="qwen3_moe", dense_layers=0)
WIDE = replace(QWEN, intermediate=2 * I)
"""Its halves are whole tiles; halves and quarters of the others' I end within tiles."""
W1_W3_W2 = {r"\.gate_proj\b": ".w1", r"\.up_proj\b": ".w3", r"\.down_proj\b": ".w2"}

QWEN_VISION = (
    *linears(
        {
            "model.visual.blocks.0.attn.qkv": (192, 64),
            "model.visual.blocks.0.attn.proj": (64, 64),
            "model.visual.blocks.0.mlp.linear_fc1": (128, 64),
            "model.visual.blocks.0.mlp.linear_fc2": (64, 128),
            "model.visual.merger.linear_fc1": (256, 256),
            "model.visual.merger.linear_fc2": (H, 256),
        }
    ),
    *many("model.visual.{blocks.0.norm1,blocks.0.norm2,merger.norm}.{weight,bias}", 64),
    *many("model.visual.patch_embed.proj.weight", 64, 3, 2, 16, 16),
    *many("model.visual.patch_embed.proj.bias", 64),
    *many("model.visual.pos_embed.weight", 16, 64),
)
QWEN_VISION_CONFIG = {
    "deepstack_visual_indexes": [],
    "depth": 1,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 64,
    "in_channels": 3,
    "intermediate_size": 128,
    "num_heads": 4,
    "num_position_embeddings": 16,
    "out_hidden_size": H,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN_NESTED = {r"^model\.(?!visual)": "model.language_model."}

LINEAR_ATTENTION = {
    "full_attention_interval": 2,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_value_head_dim": 32,
}
QWEN3_NEXT = Family(
    QWEN,
    {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "partial_rotary_factor": 0.25,
        "shared_expert_intermediate_size": I,
        **LINEAR_ATTENTION,
    },
    extra=(
        *shared_expert("model.layers.{0,1}.mlp.shared_expert"),
        *many("{model.layers.0,model.layers.1,mtp.layers.0}.mlp.shared_expert_gate.weight", 1, H),
        *many("model.layers.0.linear_attn.in_proj_qkvz.weight", 768, H),
        *many("model.layers.0.linear_attn.in_proj_ba.weight", 16, H),
        *many("model.layers.0.linear_attn.conv1d.weight", 512, 1, 4),
        *many("model.layers.0.linear_attn.{dt_bias,A_log}", 8),
        *many("model.layers.0.linear_attn.norm.weight", 32),
        *many("model.layers.0.linear_attn.out_proj.weight", H, 256),
        *many("mtp.fc.weight", H, 2 * H),
        *many("mtp.{norm,pre_fc_norm_embedding,pre_fc_norm_hidden}.weight", H),
        *decoder_layer(QWEN, "mtp.layers.0", dense=False, quantized=False),
        *shared_expert("mtp.layers.0.mlp.shared_expert", quantized=False),
    ),
    without=r"^model\.layers\.0\.self_attn",
    shapes={r"q_proj\.weight$": (2 * Q, H)},  # and a gate for each value
    ignore=("model.layers.0.linear_attn*", "model.layers.{0,1}.mlp.shared_expert_gate", "mtp*"),
)
QWEN3_5 = replace(
    QWEN3_NEXT,
    config=QWEN3_NEXT.config
    | {
        "architectures": None,
        "model_type": "qwen3_5_moe_text",
        "mtp_num_hidden_layers": 1,
        "partial_rotary_factor": None,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [6, 5, 5],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "rope_scaling": None,
        "rope_theta": None,
    },
    top={
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "image_token_id": 60,
        "tie_word_embeddings": False,
        "video_token_id": 61,
        "vision_config": QWEN_VISION_CONFIG | {"model_type": "qwen3_5_moe"},
        "vision_end_token_id": 62,
        "vision_start_token_id": 63,
    },
    extra=(
        *QWEN3_NEXT.extra,
        *QWEN_VISION,
        *many("model.layers.0.linear_attn.in_proj_qkv.weight", 512, H),
        *many("model.layers.0.linear_attn.in_proj_z.weight", 256, H),
        *many("model.layers.0.linear_attn.in_proj_{a,b}.weight", 8, H),
        *many("mtp.layers.0.mlp.experts.gate_up_proj", E, 2 * I, H),
        *many("mtp.layers.0.mlp.experts.down_proj", E, H, I),
    ),
    without=r"^model\.layers\.0\.self_attn|in_proj_qkvz|in_proj_ba|^mtp.*experts\.\d",
    rename=QWEN_NESTED,
    ignore=(*(QWEN3_NEXT.ignore), "model.visual*"),
)

GLM4_MOE = Family(
    replace(QWEN, dense_layers=1),
    {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "attention_bias": True,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "n_routed_experts": E,
        "n_shared_experts": 1,
        "num_experts": None,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.5,
        "routed_scaling_factor": 2.5,
        "topk_group": 1,
        "use_qk_norm": True,
    },
    extra=(
        *many("model.layers.{0,1,2,3}.self_attn.{q,k,v}_proj.bias", Q),
        *(f32(f"model.layers.{n}.mlp.gate.e_score_correction_bias", E) for n in (1, 2, 3)),
        *shared_expert("model.layers.{1,2}.mlp.shared_experts"),
        # The MTP layer, which ModelOpt leaves in bf16.
        *decoder_layer(QWEN, "model.layers.3", dense=False, quantized=False),
        *shared_expert("model.layers.3.mlp.shared_experts", quantized=False),
        *many("model.layers.3.{enorm,hnorm,shared_head.norm}.weight", H),
        *many("model.layers.3.eh_proj.weight", H, 2 * H),
        *many("model.layers.3.{embed_tokens,shared_head.head}.weight", 64, H),
    ),
    ignore=("model.layers.3*",),
)

KIMI_K25 = Family(
    DEEPSEEK,
    {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2"},
    top={
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "media_placeholder_token_id": 63,
        "vision_config": {
            "init_pos_emb_height": 4,
            "init_pos_emb_width": 4,
            "mm_hidden_size": 64,
            "text_hidden_size": H,
            # Engines read the one or the other; the true sizes are the defaults of the second.
            **{
                f"{prefix}{key}": size
                for prefix in ("vt_", "")
                for key, size in {
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_attention_heads": 4,
                    "num_hidden_layers": 1,
                }.items()
            },
        },
    },
    extra=(
        *linears(
            {
                "vision_tower.encoder.blocks.0.mlp.fc0": (128, 64),
                "vision_tower.encoder.blocks.0.mlp.fc1": (64, 128),
                "vision_tower.encoder.blocks.0.wqkv": (192, 64),
                "vision_tower.encoder.blocks.0.wo": (64, 64),
                "mm_projector.proj.0": (256, 256),
                "mm_projector.proj.2": (H, 256),
            }
        ),
        *many("vision_tower.encoder.{blocks.0.norm0,blocks.0.norm1}.{weight,bias}", 64),
        *many("{vision_tower.encoder.final_layernorm,mm_projector.pre_norm}.{weight,bias}", 64),
        *many("vision_tower.patch_embed.proj.weight", 64, 3, 14, 14),
        *many("vision_tower.patch_embed.proj.bias", 64),
        *many("vision_tower.patch_embed.pos_emb.weight", 4, 4, 64),
    ),
    rename={r"^(?=model|lm_head)": "language_model."},
    ignore=("vision_tower*", "mm_projector*"),
)

INT4 = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
"""What Kimi K2.5's ``text_config`` says of itself, and goes on to say once it is NVFP4."""

MINIMAX_M2 = Family(
    QWEN,
    {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "attn_type_list": [1, 1],
        "intermediate_size": I,
        "moe_intermediate_size": None,
        "num_experts": None,
        "num_local_experts": E,
        "qk_norm_type": "per_layer",
        "rotary_dim": 64,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "use_mtp": False,
        "use_qk_norm": True,
        "use_routing_bias": True,
    },
    extra=tuple(f32(f"model.layers.{n}.mlp.e_score_correction_bias", E) for n in (0, 1)),
    shapes={r"\.[qk]_norm\.weight$": (Q,)},
    rename={r"\.mlp\b": ".block_sparse_moe", **W1_W3_W2},
)

# MiniMax-M3 without its vision tower, which SGLang serves.
MINIMAX_M3 = replace(
    MINIMAX_M2,
    config=MINIMAX_M2.config
    | {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "model_type": "minimax_m3",
        "dense_intermediate_size": 2 * I,
        "hidden_act": "swigluoai",
        "qk_norm_type": "per_head",
        "partial_rotary_factor": 0.5,
        "rope_parameters": {"rope_theta": 5000000.0, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "swiglu_alpha": 1.702,
        "swiglu_beta": 1.0,
        "swiglu_limit": 7.0,
    },
    shapes={},
    remote=True,
)

NEMOTRON_H = Family(
    # To 4 ranks of vLLM this I is 112 each, which ends within tiles, and within blocks of 32 rows.
    replace(QWEN, layers=4, intermediate=448),
    {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "chunk_size": 128,
        "conv_kernel": 4,
        "hidden_act": None,
        "hybrid_override_pattern": "ME*E",
        "intermediate_size": I,
        "layer_norm_epsilon": 1e-05,
        "mamba_head_dim": 32,
        "mamba_hidden_act": "silu",
        "mamba_num_heads": 8,
        "mamba_proj_bias": False,
        "mlp_bias": False,
        "mlp_hidden_act": "relu2",
        "moe_shared_expert_intermediate_size": I,
        "n_group": 1,
        "n_groups": 8,
        "n_routed_experts": E,
        "n_shared_experts": 1,
        "num_experts": None,
        "routed_scaling_factor": 2.5,
        "ssm_state_size": 32,
        "topk_group": 1,
        "use_bias": False,
        "use_conv_bias": True,
    },
    extra=(
        *shared_expert("model.layers.{1,3}.mlp.shared_experts"),
        *(f32(f"model.layers.{n}.mlp.gate.e_score_correction_bias", E) for n in (1, 3)),
        *many("model.layers.0.mixer.in_proj.weight", 1032, H),
        *many("model.layers.0.mixer.conv1d.weight", 768, 1, 4),
        *many("model.layers.0.mixer.conv1d.bias", 768),
        *many("model.layers.0.mixer.{A_log,D,dt_bias}", 8),
        *many("model.layers.0.mixer.norm.weight", 256),
        *many("model.layers.0.mixer.out_proj.weight", H, 256),
    ),
    without=(
        r"^model\.layers\.(0|2)\.mlp|^model\.layers\.(0|1|3)\.self_attn"
        r"|\.gate_proj\.|\.[qk]_norm\.|\.post_attention_layernorm\."
    ),
    rename={
        r"\.(mlp|self_attn)\b": ".mixer",
        r"\.input_layernorm\b": ".norm",
        r"^model\.norm\b": "backbone.norm_f",
        r"^model\.embed_tokens\b": "backbone.embeddings",
        r"^model\.": "backbone.",
    },
    ignore=("model.layers.0.mixer*",),
    in_file=True,
)

# As the published ones, it clamps the SwiGLU of its last layer. Its experts are in one tensor.
STEP_3_5 = Family(
    replace(QWEN, layers=2, dense_layers=1),
    {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "attention_other_setting": {
            "head_dim": 128,
            "num_attention_groups": 4,
            "num_attention_heads": 4,
        },
        "layer_types": ["full_attention"] * 3,
        "moe_layers_enum": "1,2",
        "moe_num_experts": E,
        "moe_router_scaling_factor": 3.0,
        "moe_top_k": 2,
        "need_fp32_gate": True,
        "norm_expert_weight": True,
        "num_attention_groups": 4,
        "num_experts": None,
        "num_experts_per_tok": None,
        "num_key_value_heads": None,
        "partial_rotary_factors": [0.5, 1.0, 1.0],
        "rope_theta": [10000.0] * 3,
        "share_expert_dim": I,
        "share_expert_dims": I,
        "sliding_window": 512,
        "swiglu_limits": [0.0, 0.0, 7.0],
        "swiglu_limits_shared": [0.0, 0.0, 7.0],
        "use_head_wise_attn_gate": True,
        "use_moe_router_bias": True,
        "yarn_only_types": [],
    },
    extra=(
        *many("model.layers.{0,1,2}.self_attn.g_proj.weight", 4, H),
        *(f32(f"model.layers.{layer}.mlp.router_bias", E) for layer in (1, 2)),
        *shared_expert("model.layers.{1,2}.share_expert", quantized=False),
    ),
    without=r"\.experts\.[1-9]",
    stacked=r"\.experts\.0\.",
    rename={r"\.experts\.0\b": "", r"\.([12])\.mlp\b": r".\1.moe"},
    ignore=("model.layers.{1,2}.share_expert*",),
)

# As Maverick, it has experts in every other layer.
LLAMA4 = Family(
    replace(QWEN, layers=3, dense_layers=1),
    {
        "architectures": None,
        "model_type": "llama4_text",
        "attention_chunk_size": 64,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        "decoder_sparse_step": None,
        "floor_scale": 8192,
        "interleave_moe_layer_step": 2,
        "intermediate_size": I,
        "intermediate_size_mlp": QWEN.dense_intermediate,
        "moe_intermediate_size": None,
        "moe_layers": [1, 3],
        "no_rope_layers": [1] * 4,
        "num_experts": None,
        "num_experts_per_tok": 1,
        "num_local_experts": E,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "use_qk_norm": True,
    },
    top={
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "tie_word_embeddings": False,
        "boi_token_index": 60,
        "eoi_token_index": 61,
        "image_token_index": 62,
        "vision_config": {
            "hidden_act": "gelu",
            "hidden_size": 64,
            "image_size": 28,
            "intermediate_size": 256,
            "model_type": "llama4_vision_model",
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "patch_size": 14,
            "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
        },
    },
    extra=(
        *shared_expert("model.layers.{1,3}.mlp.shared_expert"),
        *gated_mlp(QWEN, "model.layers.2.mlp", QWEN.dense_intermediate, True),
        *linears(
            {
                "vision_model.model.layers.0.mlp.fc1": (256, 64),
                "vision_model.model.layers.0.mlp.fc2": (64, 256),
                "vision_model.model.layers.0.self_attn.{q,k,v,o}_proj": (64, 64),
            }
        ),
        *many("vision_model.model.layers.0.{input,post_attention}_layernorm.{weight,bias}", 64),
        *many("vision_model.{layernorm_pre,layernorm_post}.{weight,bias}", 64),
        *many("vision_model.class_embedding", 64),
        *many("vision_model.patch_embedding.linear.weight", 64, 588),
        *many("vision_model.positional_embedding_vlm", 5, 64),
        *many("vision_model.vision_adapter.mlp.fc1.weight", 64, 256),
        *many("vision_model.vision_adapter.mlp.fc2.weight", 64, 64),
        *many("multi_modal_projector.linear_1.weight", H, 64),
    ),
    without=r"\.experts\.([1-9]|0\.up_proj)|^model\.layers\.2\.mlp\.(experts|gate)\b|\.[qk]_norm\.",
    batched=r"\.experts\.0\.",
    rename={
        r"^(model\.layers\.\d+)\.mlp\.gate\b": r"\1.feed_forward.router",
        r"^(model\.layers\.\d+)\.mlp\b": r"\1.feed_forward",
        r"^(?=model|lm_head)": "language_model.",
    },
    ignore=("vision_model*", "multi_modal_projector*"),
)

STEP_3_7 = replace(
    STEP_3_5,
    top={
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step3p7",
        "projector_bias": False,
        "vision_config": {
            "heads": 4,
            "hidden_act": "gelu",  # vLLM has no quick_gelu on a CPU
            "image_size": 28,
            "layers": 1,
            "ls_init_value": 0.1,
            "mlp_ratio": 2.0,
            "model_type": "perception_encoder",
            "output_dim": None,
            "patch_size": 14,
            "use_abs_posemb": True,
            "use_cls_token": False,
            "use_ln_post": False,
            "use_ln_pre": True,
            "use_rope2d": True,
            "width": 64,
        },
    },
    extra=(
        *STEP_3_5.extra,
        *many("model.vision_model.conv1.weight", 64, 3, 14, 14),
        *many("model.vision_model.positional_embedding", 4, 64),
        *many("model.vision_model.ln_pre.{weight,bias}", 64),
        *many("model.vision_model.transformer.resblocks.0.{ln_1,ln_2}.{weight,bias}", 64),
        *many("model.vision_model.transformer.resblocks.0.{ls_1,ls_2}.gamma", 64),
        *many("model.vision_model.transformer.resblocks.0.attn.in_proj_weight", 192, 64),
        *many("model.vision_model.transformer.resblocks.0.attn.in_proj_bias", 192),
        *linears(
            {
                "model.vision_model.transformer.resblocks.0.attn.out_proj": (64, 64),
                "model.vision_model.transformer.resblocks.0.mlp.c_fc": (128, 64),
                "model.vision_model.transformer.resblocks.0.mlp.c_proj": (64, 128),
            }
        ),
        *many("model.vision_model.vit_downsampler1.weight", 128, 64, 3, 3),
        *many("model.vision_model.vit_downsampler1.bias", 128),
        *many("model.vision_model.vit_downsampler2.weight", 256, 128, 3, 3),
        *many("model.vision_model.vit_downsampler2.bias", 256),
        *many("model.vit_large_projector.weight", H, 256),
    ),
    rename={**STEP_3_5.rename, r"^model\.(?!vi)": "model.language_model."},
)

# Kimi K3: latent experts with the SiTU activation, behind a layer of each kind of attention.
KIMI_K3 = Family(
    replace(QWEN, layers=3, intermediate=1024),
    {
        "architectures": None,
        "model_type": "kimi_linear",
        "activation_situ_beta": 4.0,
        "activation_situ_linear_beta": 25.0,
        "attn_res_block_size": 2,
        "first_k_dense_replace": 1,
        "hidden_act": "situ",
        "kv_lora_rank": 64,
        "latent_moe_use_norm": True,
        "linear_attn_config": {
            "full_attn_layers": [2],
            "gate_lower_bound": -5.0,
            "head_dim": 128,
            "kda_layers": [1, 3],
            "num_heads": 4,
            "short_conv_kernel_size": 4,
            "use_full_rank_gate": True,
        },
        "mla_use_nope": True,
        "mla_use_output_gate": True,
        "moe_layer_freq": 1,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "num_expert_group": 1,
        "num_experts_per_tok": None,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "q_lora_rank": 64,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "routed_expert_hidden_size": 128,
        "routed_scaling_factor": 2.5,
        "topk_group": 1,
        "use_grouped_topk": True,
        "v_head_dim": 128,
    },
    top={
        "architectures": ["KimiK3ForConditionalGeneration"],
        "model_type": "kimi_k3",
        "media_placeholder_token_id": 63,
        "vision_config": {
            "init_pos_emb_height": 4,
            "init_pos_emb_width": 4,
            "model_type": "kimi_k3_vision",
            "qkv_hidden_size": 64,
            "text_hidden_size": H,
            "vt_hidden_size": 64,
            "vt_intermediate_size": 128,
            "vt_num_attention_heads": 4,
            "vt_num_hidden_layers": 1,
        },
    },
    extra=(
        *many("model.layers.{0,2}.self_attn.g_proj.weight", Q, H),
        *many("model.layers.{0,2}.self_attn.{q,k,v}_conv1d.weight", Q, 1, 4),
        *many("model.layers.{0,2}.self_attn.b_proj.weight", 4, H),
        *many("model.layers.{0,2}.self_attn.f_a_proj.weight", 128, H),
        *many("model.layers.{0,2}.self_attn.f_b_proj.weight", Q, 128),
        *many("model.layers.{0,2}.self_attn.o_norm.weight", 128),
        *(f32(f"model.layers.{n}.self_attn.A_log", 4) for n in (0, 2)),
        *(f32(f"model.layers.{n}.self_attn.dt_bias", Q) for n in (0, 2)),
        *many("model.layers.1.self_attn.q_a_proj.weight", 64, H),
        *many("model.layers.1.self_attn.{q,kv}_a_layernorm.weight", 64),
        *many("model.layers.1.self_attn.q_b_proj.weight", 4 * 192, 64),
        *many("model.layers.1.self_attn.kv_a_proj_with_mqa.weight", 128, H),
        *many("model.layers.1.self_attn.kv_b_proj.weight", 4 * 256, 64),
        *many("model.layers.1.self_attn.g_proj.weight", Q, H),
        *many("model.layers.{0,1,2}.{self_attention,mlp}_res_norm.weight", H),
        *many("model.layers.{0,1,2}.{self_attention,mlp}_res_proj.weight", 1, H),
        *many("model.output_attn_res_norm.weight", H),
        *many("model.output_attn_res_proj.weight", 1, H),
        *gated_mlp(QWEN, "model.layers.0.mlp", 8 * 1024, False),
        *(f32(f"model.layers.{n}.mlp.gate.e_score_correction_bias", E) for n in (1, 2)),
        *many("model.layers.{1,2}.mlp.shared_experts.{gate,up}_proj.weight", 1024, H),
        *many("model.layers.{1,2}.mlp.shared_experts.down_proj.weight", H, 1024),
        *many("model.layers.{1,2}.mlp.routed_expert_down_proj.weight", 128, H),
        *many("model.layers.{1,2}.mlp.routed_expert_norm.weight", 128),
        *many("model.layers.{1,2}.mlp.routed_expert_up_proj.weight", H, 128),
        *many("vision_tower.patch_embed.proj.weight", 64, 3, 14, 14),
        *many("vision_tower.patch_embed.pos_emb.weight", 4, 4, 64),
        *many("vision_tower.encoder.blocks.0.{norm0,norm1}.weight", 64),
        *many("vision_tower.encoder.blocks.0.mlp.fc0.weight", 128, 64),
        *many("vision_tower.encoder.blocks.0.mlp.fc1.weight", 64, 128),
        *many("vision_tower.encoder.blocks.0.wqkv.weight", 192, 64),
        *many("vision_tower.encoder.blocks.0.wo.weight", 64, 64),
        *many("vision_tower.encoder.final_layernorm.weight", 64),
        *many("mm_projector.proj.0.weight", 256, 256),
        *many("mm_projector.proj.2.weight", H, 256),
        *many("mm_projector.post_norm.weight", H),
    ),
    without=(
        r"^model\.layers\.0\.mlp\.(experts|gate)\b|\.self_attn\.[qk]_norm"
        r"|^model\.layers\.1\.self_attn\.[qkv]_proj"
    ),
    shapes={
        r"\.experts\.\d+\.(gate|up)_proj\.weight$": (1024, 64),
        r"\.experts\.\d+\.(gate|up)_proj\.weight_scale$": (1024, 8),
        r"\.experts\.\d+\.down_proj\.weight$": (128, 512),
        r"\.experts\.\d+\.down_proj\.weight_scale$": (128, 64),
    },
    rename={
        r"^(model\.layers\.[12])\.mlp\b(?!_)": r"\1.block_sparse_moe",
        **{
            rf"(\.experts\.\d+)\.{old}\b": rf"\1.{new}"
            for old, new in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
        },
        r"^(?=model|lm_head)": "language_model.",
    },
    ignore=(
        "model.layers.{0,1,2}.self_attn*",
        "model.layers.0.mlp*",
        "model.layers.{1,2}.mlp.{shared_experts,routed_expert}*",
        "vision_tower*",
        "mm_projector*",
    ),
    section="mixed by module",
    aliases={"block_sparse_moe": "mlp", r"^language_model\.": ""},
)

# Sparse attention: an indexer chooses what a token looks at.
DEEPSEEK_V32 = Family(
    DEEPSEEK,
    {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "index_head_dim": 128,
        "index_n_heads": 4,
        "index_topk": 512,
    },
    extra=(
        *many("model.layers.{0,1,2}.self_attn.indexer.wq_b.weight", 4 * 128, 64),
        *many("model.layers.{0,1,2}.self_attn.indexer.wk.weight", 128, H),
        *many("model.layers.{0,1,2}.self_attn.indexer.weights_proj.weight", 4, H),
        *many("model.layers.{0,1,2}.self_attn.indexer.k_norm.{weight,bias}", 128),
    ),
)

# With a layer of each kind of attention, the first of those that route by the token alone, and
# one of multi-token prediction, which stays in MXFP4.
DEEPSEEK_V4 = Family(
    replace(QWEN, layers=3, intermediate=512),
    {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "compress_ratios": [0, 4, 128, 0],
        "compress_rope_theta": 160000,
        "decoder_sparse_step": None,
        "expert_dtype": "fp4",
        "hc_eps": 1e-06,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "head_dim": 512,
        "index_head_dim": 128,
        "index_n_heads": 4,
        "index_topk": 512,
        "intermediate_size": None,
        "max_position_embeddings": 4096,
        "mlp_only_layers": None,
        "n_routed_experts": E,
        "n_shared_experts": 1,
        "num_experts": None,
        "num_experts_per_tok": 2,
        "num_hash_layers": 1,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "o_groups": 4,
        "o_lora_rank": 128,
        "q_lora_rank": 128,
        "qk_rope_head_dim": 64,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 256,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 128,
        "swiglu_limit": 10.0,
        "topk_method": "noaux_tc",
    },
    extra=(
        *many("model.layers.{0,1,2}.attn.wq_a.weight", 128, H),
        *many("model.layers.{0,1,2}.attn.wkv.weight", 512, H),
        *many("model.layers.{0,1,2}.attn.wq_b.weight", 4 * 512, 128),
        *many("model.layers.{0,1,2}.attn.wo_a.weight", 4 * 128, 512),
        *many("model.layers.{0,1,2}.attn.wo_b.weight", H, 4 * 128),
        *many("model.layers.{0,1,2}.attn.q_norm.weight", 128),
        *many("model.layers.{0,1,2}.attn.kv_norm.weight", 512),
        *(f32(f"model.layers.{n}.attn.attn_sink", 4) for n in (0, 1, 2)),
        *compressor("model.layers.1.attn.compressor", 4, 2 * 512, 512),
        *compressor("model.layers.2.attn.compressor", 128, 512, 512),
        *compressor("model.layers.1.attn.indexer.compressor", 4, 2 * 128, 128),
        *many("model.layers.1.attn.indexer.wq_b.weight", 4 * 128, 128),
        *many("model.layers.1.attn.indexer.weights_proj.weight", 4, H),
        *(
            f32(f"model.layers.{n}.hc_{part}_{leaf}", *shape)
            for n in (0, 1, 2)
            for part in ("attn", "ffn")
            for leaf, shape in (("fn", (24, 4 * H)), ("base", (24,)), ("scale", (3,)))
        ),
        Tensor("model.layers.0.mlp.gate.tid2eid", "I64", (64, 2), "tid2eid"),
        *(f32(f"model.layers.{n}.mlp.gate.bias", E) for n in (1, 2)),
        *many("model.layers.{0,1,2}.mlp.shared_experts.{gate,up}_proj.weight", 512, H),
        *many("model.layers.{0,1,2}.mlp.shared_experts.down_proj.weight", H, 512),
        f32("hc_head_fn", 4, 4 * H),
        f32("hc_head_base", 4),
        f32("hc_head_scale", 1),
        *(
            Tensor(f"mtp.0.ffn.experts.{n}.{projection}.{leaf}", dtype, (rows, size), projection)
            for n in range(E)
            for projection, rows, cols in (("w1", 512, H), ("w2", H, 512), ("w3", 512, H))
            for leaf, dtype, size in (("weight", "I8", cols // 2), ("scale", "F8_E8M0", cols // 32))
        ),
    ),
    without=r"\.self_attn\b",
    fp8=r"\.(attn|indexer)\.w(q_a|kv|q_b|o_a|o_b)\.|\.shared_experts\.",
    rename={
        r"\.mlp\b": ".ffn",
        r"\.input_layernorm\b": ".attn_norm",
        r"\.post_attention_layernorm\b": ".ffn_norm",
        r"^model\.embed_tokens\b": "embed",
        r"^lm_head\b": "head",
        r"^model\.": "",
        **W1_W3_W2,
    },
    section="amid fp8",
)

FAMILIES: dict[str, Family] = {
    "minimax_m2": MINIMAX_M2,
    "deepseek_v4": DEEPSEEK_V4,
    "minimax_m3_text": MINIMAX_M3,
    "minimax_m3_text-mixed": replace(
        MINIMAX_M3, section="mixed by linear", mxfp8=r"self_attn\b", says_kv_cache=False
    ),
    "minimax_m2-ct": replace(MINIMAX_M2, section="compressed-tensors"),
    "glm4_moe": GLM4_MOE,
    "glm4_moe-mtp-file": replace(GLM4_MOE, beside=("mtp.safetensors", r"^model\.layers\.3\.")),
    "kimi_k25": KIMI_K25,
    "kimi_k25-legacy": replace(
        KIMI_K25, rename={r"^model\.layers": "language_model.layers", **KIMI_K25.rename}
    ),
    "kimi_k25-leftover": replace(
        KIMI_K25, config={**KIMI_K25.config, "quantization_config": INT4}, in_file=True
    ),
    "gemma4": Family(
        QWEN,
        {
            "architectures": None,
            "model_type": "gemma4_text",
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "global_head_dim": 128,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size_per_layer_input": 0,
            "intermediate_size": I,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_global_key_value_heads": 4,
            "num_kv_shared_layers": 0,
            "rope_parameters": {
                "full_attention": {
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 1000000.0,
                    "rope_type": "proportional",
                },
                "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            },
            "rope_scaling": None,
            "rope_theta": None,
            "sliding_window": 1024,
            "tie_word_embeddings": True,
            "top_k_experts": E,
            "use_bidirectional_attention": "vision",
            "use_double_wide_mlp": False,
            "vocab_size_per_layer_input": 64,
        },
        top={
            "architectures": ["Gemma4ForConditionalGeneration"],
            "model_type": "gemma4",
            "audio_config": None,
            "image_token_id": 60,
            "tie_word_embeddings": True,
            "vision_config": {
                "model_type": "gemma4_vision",
                "head_dim": 16,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_attention_heads": 4,
                "num_hidden_layers": 1,
                "num_key_value_heads": 4,
                "patch_size": 16,
                "position_embedding_size": 16,
                "standardize": True,
            },
        },
        extra=(
            *shared_expert("model.layers.{0,1}.mlp"),
            *many("model.layers.{0,1}.{pre,post}_feedforward_layernorm.weight", H),
            *many("model.layers.{0,1}.{pre,post}_feedforward_layernorm_2.weight", H),
            *many("model.layers.{0,1}.post_feedforward_layernorm_1.weight", H),
            *many("model.layers.{0,1}.layer_scalar", 1),
            *many("model.layers.{0,1}.router.scale", H),
            *many("model.layers.{0,1}.router.per_expert_scale", E),
            *many("model.vision_tower.patch_embedder.input_proj.weight", 64, 768),
            *many("model.vision_tower.patch_embedder.position_embedding_table", 2, 16, 64),
            *many(
                "model.vision_tower.encoder.layers.0.self_attn.{q,k,v,o}_proj.linear.weight", 64, 64
            ),
            *many("model.vision_tower.encoder.layers.0.self_attn.{q,k}_norm.weight", 16),
            *many("model.vision_tower.encoder.layers.0.mlp.{gate,up}_proj.linear.weight", 128, 64),
            *many("model.vision_tower.encoder.layers.0.mlp.down_proj.linear.weight", 64, 128),
            *many("model.vision_tower.encoder.layers.0.input_layernorm.weight", 64),
            *many("model.vision_tower.encoder.layers.0.post_attention_layernorm.weight", 64),
            *many(
                "model.vision_tower.encoder.layers.0.{pre,post}_feedforward_layernorm.weight", 64
            ),
            *many("model.vision_tower.{std_bias,std_scale}", 64),
            *many("model.embed_vision.embedding_projection.weight", H, 64),
        ),
        without=r"^model\.layers\.1\.self_attn\.v_proj|^lm_head",
        rename={
            r"\.mlp\.experts\b": ".experts",
            r"\.mlp\.gate\b": ".router.proj",
            r"^model\.(?!vision|embed_vision)": "model.language_model.",
        },
        ignore=("lm_head", "model.vision_tower*", "model.embed_vision*"),
    ),
    "qwen3_5_moe": QWEN3_5,
    "qwen3_5_moe-mixed": replace(
        QWEN3_5, spec=WIDE, section="mixed by module", fp8=r"^model\.layers\.1\.self_attn\b"
    ),
    "qwen3_next": QWEN3_NEXT,
    "qwen3_next-nvfp4-mtp": replace(
        QWEN3_NEXT,
        # SGLang builds its q_proj, k_proj and v_proj unquantized, whatever the section says.
        quantized=r"^mtp\.layers\.0\.(self_attn\.o_proj|mlp\.(experts|shared_expert)\.)",
        ignore=(
            *QWEN3_NEXT.ignore[:-1],
            "mtp.fc",
            "mtp.layers.0.self_attn.{q,k,v}_proj",
            "mtp.layers.0.mlp.{gate,shared_expert_gate}",
        ),
    ),
    "qwen3_vl_moe": Family(
        QWEN,
        {
            "architectures": None,
            "model_type": "qwen3_vl_moe_text",
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
                "rope_type": "default",
            },
        },
        top={
            "architectures": ["Qwen3VLMoeForConditionalGeneration"],
            "model_type": "qwen3_vl_moe",
            "image_token_id": 60,
            "tie_word_embeddings": False,
            "video_token_id": 61,
            "vision_config": QWEN_VISION_CONFIG
            | {"deepstack_visual_indexes": [0], "model_type": "qwen3_vl_moe"},
            "vision_end_token_id": 62,
            "vision_start_token_id": 63,
        },
        extra=(
            *QWEN_VISION,
            *linears(
                {
                    "model.visual.deepstack_merger_list.0.linear_fc1": (256, 256),
                    "model.visual.deepstack_merger_list.0.linear_fc2": (H, 256),
                }
            ),
            *many("model.visual.deepstack_merger_list.0.norm.{weight,bias}", 256),
        ),
        # SGLang does not find its attention in an ignore list: its names have another prefix.
        quantized=r"^model\.layers.*\.self_attn\b",
        rename=QWEN_NESTED,
        ignore=("model.visual*",),
    ),
    "ernie4_5_moe": Family(
        replace(QWEN, dense_layers=1),
        {
            "architectures": ["Ernie4_5_MoeForCausalLM"],
            "model_type": "ernie4_5_moe",
            "moe_capacity": [64, 64, 64],
            "moe_gate": "topk",
            "moe_k": 2,
            "moe_layer_end_index": 2,
            "moe_layer_interval": 1,
            "moe_layer_start_index": 1,
            "moe_num_experts": E,
            "moe_num_shared_experts": 1,
            "moe_use_aux_free": True,
            "num_experts": None,
            "num_experts_per_tok": None,
            "use_bias": False,
        },
        extra=(
            *shared_expert("model.layers.{1,2}.mlp.shared_experts"),
            *(
                f32(f"model.layers.{n}.mlp.moe_statics.e_score_correction_bias", 1, E)
                for n in (1, 2)
            ),
        ),
        without=r"\.[qk]_norm\.weight$",
    ),
    "deepseek_v3": Family(replace(DEEPSEEK, mtp=True, kv_scales=True), {}),
    "deepseek_v32": DEEPSEEK_V32,
    "glm_moe_dsa": replace(
        DEEPSEEK_V32,
        config=DEEPSEEK_V32.config
        | {"architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa"},
    ),
    "kimi_k2": Family(DEEPSEEK, {"model_type": "kimi_k2"}, remote=True),
    "deepseek_v3-ct": Family(DEEPSEEK, {}, section="compressed-tensors"),
    "qwen3_moe": Family(QWEN, {}),
    "qwen3_moe-ct": Family(
        replace(WIDE, differing_scales=True),
        {},
        section="compressed-tensors",
        quantized=r"self_attn",
    ),
    "qwen3_moe-ct-fp8": Family(QWEN, {}, section="compressed-tensors", fp8=r"self_attn"),
    # SGLang's Transformers backend does not find lm_head in an ignore list.
    "qwen3_moe-nvfp4-head": Family(QWEN, {}, quantized=r"self_attn|^lm_head"),
    "qwen2_moe": Family(
        QWEN,
        {
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "head_dim": None,
            "shared_expert_intermediate_size": I,
        },
        extra=(
            *shared_expert("model.layers.{0,1}.mlp.shared_expert"),
            *many("model.layers.{0,1}.mlp.shared_expert_gate.weight", 1, H),
            *many("model.layers.{0,1}.self_attn.{q,k,v}_proj.bias", H),
        ),
        without=r"\.[qk]_norm\.weight$",
        shapes={r"\.self_attn\.._proj\.weight$": (H, H)},
        ignore=("model.layers.{0,1}.mlp.shared_expert_gate",),
    ),
    "mixtral": Family(
        QWEN,
        {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "intermediate_size": I,
            "moe_intermediate_size": None,
            "num_experts": None,
            "num_local_experts": E,
        },
        without=r"\.[qk]_norm\.weight$",
        rename={r"\.mlp\b": ".block_sparse_moe", **W1_W3_W2},
    ),
    "hunyuan_v1_moe": Family(
        QWEN,
        {
            "architectures": ["HunYuanMoEV1ForCausalLM"],
            "model_type": "hunyuan_v1_moe",
            "attention_head_dim": 128,
            "cla_share_factor": 2,
            "intermediate_size": I,
            "moe_intermediate_size": [I, I],
            "moe_topk": [E, E],
            "num_shared_expert": [1, 1],
            "tie_word_embeddings": True,
            "use_cla": False,
            "use_mixed_mlp_moe": True,
            "use_qk_norm": True,
        },
        extra=tuple(shared_expert("model.layers.{0,1}.mlp.shared_mlp")),
        without=r"^lm_head",
        ignore=("lm_head",),
        quantized=r"\.self_attn\b",
        rename={
            r"\.q_norm\b": ".query_layernorm",
            r"\.k_norm\b": ".key_layernorm",
            r"\.mlp\.gate\b": ".mlp.gate.wg",
        },
    ),
    # Hy3 as llm-compressor writes it, with all but its experts in FP8. Each engine reads keys of
    # its own.
    "hy_v3-ct-fp8": Family(
        replace(QWEN, layers=3),
        {
            "architectures": ["HYV3ForCausalLM"],
            "model_type": "hy_v3",
            "expert_hidden_dim": I,
            "first_k_dense_replace": 1,
            "num_shared_experts": 1,
            "qk_norm": True,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "rope_scaling": None,
            "rope_theta": None,
            "route_norm": True,
            "router_scaling_factor": 2.826,
        },
        extra=(
            *gated_mlp(QWEN, "model.layers.0.mlp", QWEN.dense_intermediate, False),
            *shared_expert("model.layers.{1,2}.mlp.shared_mlp", quantized=False),
            *(f32(f"model.layers.{n}.mlp.expert_bias", E) for n in (1, 2)),
        ),
        without=r"^model\.layers\.0\.mlp\.(experts|gate)\b",
        rename={r"\.mlp\.gate\b": ".mlp.router.gate"},
        section="compressed-tensors",
        fp8=r"\.self_attn\b|\.shared_mlp\b|\.layers\.0\.mlp\b",
    ),
    "kimi_k3-mixed": KIMI_K3,
    "kimi_k3-ct": replace(KIMI_K3, section="compressed-tensors"),
    "laguna": Family(
        replace(QWEN, dense_layers=1),
        {
            "architectures": ["LagunaForCausalLM"],
            "model_type": "laguna",
            "gating": "per-head",
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "moe_apply_router_weight_on_input": False,
            "moe_routed_scaling_factor": 2.5,
            "rope_parameters": {
                "full_attention": {"rope_theta": 500000.0, "rope_type": "default"},
                "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            },
            "rope_scaling": None,
            "rope_theta": None,
            "shared_expert_intermediate_size": I,
            "sliding_window": 512,
        },
        extra=(
            *shared_expert("model.layers.{1,2}.mlp.shared_expert"),
            *(f32(f"model.layers.{n}.mlp.experts.e_score_correction_bias", E) for n in (1, 2)),
            *many("model.layers.{0,1,2}.self_attn.g_proj.weight", 4, H),
        ),
        ignore=("model.layers.{0,1,2}.self_attn.g_proj",),
    ),
    "bailing_moe": Family(
        replace(QWEN, dense_layers=1),
        {
            "architectures": ["BailingMoeV2ForCausalLM"],
            "model_type": "bailing_moe",
            "embedding_dropout": 0.0,
            "first_k_dense_replace": 1,
            "moe_router_enable_expert_bias": True,
            "n_group": 4,
            "norm_head": False,
            "num_shared_experts": 1,
            "output_dropout": 0.0,
            "partial_rotary_factor": 0.5,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "rope_scaling": None,
            "rope_theta": None,
            "routed_scaling_factor": 2.5,
            "score_function": "sigmoid",
            "topk_group": 2,
            "use_bias": False,
            "use_qk_norm": True,
            "use_qkv_bias": False,
        },
        remote=True,
        extra=(
            *shared_expert("model.layers.{1,2}.mlp.shared_experts"),
            *(f32(f"model.layers.{n}.mlp.gate.expert_bias", E) for n in (1, 2)),
            *many("model.layers.{0,1,2}.self_attn.query_key_value.weight", 3 * Q, H),
        ),
        without=r"\.[qkv]_proj\.",
        rename={
            r"\.self_attn\b": ".attention",
            r"\.o_proj\b": ".dense",
            r"\.q_norm\b": ".query_layernorm",
            r"\.k_norm\b": ".key_layernorm",
            r"\.embed_tokens\b": ".word_embeddings",
        },
    ),
    "mimo_v2": Family(
        replace(QWEN, dense_layers=1),
        {
            "architectures": ["MiMoV2FlashForCausalLM"],
            "model_type": "mimo_v2_flash",
            "add_full_attention_sink_bias": False,
            "add_swa_attention_sink_bias": True,
            "attention_value_scale": 0.707,
            "hybrid_layer_pattern": [0, 1, 1],
            "layernorm_epsilon": 1e-05,
            "moe_layer_freq": [0, 1, 1],
            "n_group": 1,
            "n_routed_experts": E,
            "n_shared_experts": None,
            "num_experts": None,
            "partial_rotary_factor": 0.334,
            "routed_scaling_factor": None,
            "scoring_func": "sigmoid",
            "sliding_window": 128,
            "sliding_window_size": 128,
            "swa_head_dim": 128,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_rope_theta": 10000,
            "swa_v_head_dim": 128,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "v_head_dim": 128,
        },
        remote=True,
        extra=(
            *(f32(f"model.layers.{n}.mlp.gate.e_score_correction_bias", E) for n in (1, 2)),
            *many("model.layers.{1,2}.self_attn.attention_sink_bias", 4),
        ),
        without=r"\.[qk]_norm\.weight$",
    ),
    "step3p5": STEP_3_5,
    "step3p5-unclamped": replace(
        STEP_3_5,
        config=STEP_3_5.config | {"swiglu_limits": [0.0] * 3, "swiglu_limits_shared": [0.0] * 3},
    ),
    "step3p7": STEP_3_7,
    "llama4": LLAMA4,
    "nemotron_h": NEMOTRON_H,
    # As Nemotron-3 Ultra says it, whose experts are narrower than the model.
    "nemotron_h-latent": replace(
        NEMOTRON_H,
        config=NEMOTRON_H.config
        | {
            "hybrid_override_pattern": None,
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "moe_latent_size": 128,
            "num_hidden_layers": None,
        },
        extra=(
            *NEMOTRON_H.extra,
            *many("model.layers.{1,3}.mlp.fc1_latent_proj.weight", 128, H),
            *many("model.layers.{1,3}.mlp.fc2_latent_proj.weight", H, 128),
        ),
        shapes={
            r"\.experts\.\d+\.up_proj\.weight$": (448, 64),
            r"\.experts\.\d+\.up_proj\.weight_scale$": (448, 8),
            r"\.experts\.\d+\.down_proj\.weight$": (128, 224),
            r"\.experts\.\d+\.down_proj\.weight_scale$": (128, 28),
        },
        ignore=(*NEMOTRON_H.ignore, "model.layers.{1,3}.mlp.fc{1,2}_latent_proj"),
        in_file=False,
    ),
}
# Nemotron-3 Super and Ultra. All that is said of the quantization is in hf_quant_config.json here.
FAMILIES["nemotron_h-latent-mixed"] = replace(
    FAMILIES["nemotron_h-latent"],
    section="mixed by linear",
    fp8=r"^model\.layers\.2\.self_attn\b",
    in_file=True,
)

BATCHED = tuple(name for name in FAMILIES if name.startswith("llama4"))
"""Families that have a tensor for all experts of a layer, transposed."""
STACKED = (*(name for name in FAMILIES if name.startswith("step")), *BATCHED)
"""Families that have one at all."""
UNGATED = tuple(name for name in FAMILIES if name.startswith("nemotron_h"))
"""Families whose experts have no gate."""
OTHER_SECTIONS = tuple(name for name, family in FAMILIES.items() if family.section != "modelopt")
"""Families that are described otherwise than by ModelOpt's plain NVFP4."""


def make(folder: Path, name: str) -> None:
    """Write an original into ``folder``, which is created.

    Raises:
        KeyError: no such family.
        FileExistsError: ``folder`` exists.
    """
    write_family(folder, FAMILIES[name])


def write_family(folder: Path, family: Family) -> None:
    """As `make`, for a family of any sizes."""
    folder.mkdir(parents=True)
    path, pattern = family.beside or ("", r"$^")
    beside: list[Tensor] = []
    indexed: list[Tensor] = []
    for tensor in tensors_of_family(family):
        (beside if re.search(pattern, tensor.name) else indexed).append(tensor)
    if beside:
        write_shard(folder / path, beside, family.spec.seed, sparse=False)
    shards = cut_into_shards(indexed, 2)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        path = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / path, shard, family.spec.seed, sparse=False)
        weight_map |= {tensor.name: path for tensor in shard}
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in indexed)},
        "weight_map": weight_map,
    }
    files = other_files(QWEN) | {
        "config.json": to_json(config_of(family)),
        "model.safetensors.index.json": to_json(index),
    }
    if family.in_file or family.is_mixed:
        files["hf_quant_config.json"] = to_json(hf_quant_config_of(family))
    if family.remote:
        files["configuration.py"] = REMOTE_CONFIGURATION.format_map(family.config)
    for path, text in files.items():
        (folder / path).write_text(text)


def tensors_of_family(family: Family) -> Iterator[Tensor]:
    """Everything that is in the original, under its final name."""
    for tensor in itertools.chain(tensors_of(family.spec), family.extra):
        if re.search(family.without, tensor.name):
            continue
        for pattern, shape in family.shapes.items():
            if re.search(pattern, tensor.name):
                tensor = tensor._replace(shape=shape)
        if re.search(family.stacked, tensor.name):
            tensor = tensor._replace(shape=(family.spec.experts, *tensor.shape))
        elif re.search(family.batched, tensor.name):
            tensor = batched(tensor, family.spec.experts)
        parts: Iterator[Tensor] = iter((tensor,))
        if len(tensor.shape) == 2 and tensor.dtype == "BF16":
            if re.search(family.quantized, tensor.name):
                parts = nvfp4(tensor)
            elif re.search(family.fp8, tensor.name):
                parts = FP8.get(family.section, fp8)(tensor)
            elif re.search(family.mxfp8, tensor.name):
                parts = mxfp8(tensor)
        for part in parts:
            if family.section == "compressed-tensors":
                part = as_compressed_tensors(part)
            yield part._replace(name=renamed(family, part.name))


def batched(tensor: Tensor, experts: int) -> Tensor:
    """What ModelOpt makes of a tensor of gate or down where one product multiplies all experts."""
    module, _, leaf = tensor.name.rpartition(".")
    module = re.sub(r"\.0\.(gate(?=_))?", lambda gate: ".gate_up" if gate[1] else ".", module)
    shape = tensor.shape
    if shape:
        rows, cols = shape
        shape = (experts, cols, rows * (1 + module.endswith(".gate_up_proj")))
    return tensor._replace(name=module if leaf == "weight" else f"{module}_{leaf}", shape=shape)


def fp8(weight: Tensor) -> Iterator[Tensor]:
    """ModelOpt's FP8: a scale for the tensor and one for the activations."""
    yield weight._replace(dtype="F8_E4M3")
    yield f32(f"{weight.name}_scale")
    yield f32(f"{weight.name.removesuffix('weight')}input_scale")


def mxfp8(weight: Tensor) -> Iterator[Tensor]:
    """ModelOpt's MXFP8: an E8M0 scale for 32 values."""
    rows, cols = weight.shape
    yield weight._replace(dtype="F8_E4M3")
    yield Tensor(f"{weight.name}_scale", "U8", (rows, cols // 32), f"{weight.name}_scale")


def fp8_channels(weight: Tensor) -> Iterator[Tensor]:
    """compressed-tensors' FP8: a scale for each row, none for the activations."""
    yield weight._replace(dtype="F8_E4M3")
    yield bf16(f"{weight.name}_scale", weight.shape[0], 1)


def fp8_blocks(weight: Tensor) -> Iterator[Tensor]:
    """DeepSeek-V4's FP8: an E8M0 scale for a block of 128 by 128."""
    scale = f"{weight.name.removesuffix('weight')}scale"
    yield weight._replace(dtype="F8_E4M3")
    yield Tensor(scale, "F8_E8M0", tuple(-(-size // 128) for size in weight.shape), scale)


FP8 = {"compressed-tensors": fp8_channels, "amid fp8": fp8_blocks}
"""By the section; elsewhere it is `fp8`."""


def as_compressed_tensors(tensor: Tensor) -> Tensor:
    """A tensor of a linear layer in NVFP4 under the name that llm-compressor gives it."""
    module, _, leaf = tensor.name.rpartition(".")
    if tensor.dtype == "U8":
        return tensor._replace(name=f"{module}.weight_packed")
    if leaf in ("weight_scale_2", "input_scale"):
        kind = leaf.partition("_")[0]
        return tensor._replace(name=f"{module}.{kind}_global_scale", shape=(1,))
    return tensor


def quantized_layers(family: Family) -> Json:
    """The algorithm of each module, as mixed precision has it; amid FP8, that of the experts."""
    tensors = {tensor.name: tensor for tensor in tensors_of_family(family)}
    dtypes = ("U8",) if family.section == "amid fp8" else ("U8", "F8_E4M3")
    layers: Json = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or tensor.dtype not in dtypes:
            continue
        if family.section != "mixed by linear":
            module = re.sub(r"\.experts\..*", ".experts", module)
        if tensor.dtype == "U8":
            layers[module] = {"quant_algo": "NVFP4", "group_size": BLOCK}
        elif tensors[f"{name}_scale"].dtype == "U8":
            layers[module] = {"quant_algo": "MXFP8", "group_size": 32}
        else:
            layers[module] = {"quant_algo": "FP8"}
    for pattern, replacement in family.aliases.items():
        layers |= {re.sub(pattern, replacement, name): layer for name, layer in layers.items()}
    return layers


def compressed_section(family: Family, ignore: list[str]) -> Json:
    groups = compressed_groups(family)
    formats = {group["format"] for group in groups}
    return {
        "config_groups": {f"group_{n}": group for n, group in enumerate(groups)},
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "ignore": [f"re:{name[:-1]}.*" if name.endswith("*") else name for name in ignore],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def compressed_groups(family: Family) -> list[Json]:
    """What llm-compressor says of NVFP4 modules, and of FP8 ones where there are any."""
    float_ = {"symmetric": True, "type": "float"}
    blocks = {"num_bits": 4, "strategy": "tensor_group", "group_size": BLOCK, **float_}
    nvfp4_group: Json = {
        "format": "nvfp4-pack-quantized",
        "weights": {"dynamic": False, **blocks},
        "input_activations": {"dynamic": "local", **blocks},
        "targets": ["Linear"],
    }
    if family.fp8 == Family.fp8:
        return [nvfp4_group]
    fp8_group = {
        "format": "float-quantized",
        "weights": {"dynamic": False, "num_bits": 8, "strategy": "channel", **float_},
        "input_activations": {"dynamic": True, "num_bits": 8, "strategy": "token", **float_},
        "targets": [f"re:.*({family.fp8})"],
    }
    return [nvfp4_group | {"targets": [r"re:.*\.experts\..*"]}, fp8_group]


def renamed(family: Family, name: str) -> str:
    for pattern, replacement in family.rename.items():
        name = re.sub(pattern, replacement, name)
    return name


def config_of(family: Family) -> Json:
    text = model_config(family.spec) | {"pad_token_id": 0}
    del text["quantization_config"]
    text |= family.config
    text.pop("auto_map", None)
    if family.remote:
        text["auto_map"] = {"AutoConfig": "configuration.Config"}
    text = {key: value for key, value in text.items() if value is not None}
    config = text if family.top is None else {**family.top, "text_config": text}
    return config if family.in_file else config | {"quantization_config": section_of(family)}


def section_of(family: Family) -> Json:
    section = quantization_section(family.spec)
    section["ignore"] = ignored_modules(family, section["ignore"])
    if family.section == "compressed-tensors":
        return compressed_section(family, section["ignore"])
    if family.section == "amid fp8":
        return fp8_section(family)
    if family.is_mixed:
        section.pop("config_groups")
        section.update(quant_algo="MIXED_PRECISION", quantized_layers=quantized_layers(family))
    return section


def fp8_section(family: Family) -> Json:
    """DeepSeek-V4's own section, with what ModelOpt adds to it."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "group_size": BLOCK,
        "ignore": ["mtp.*"],
        "moe_quant_algo": "NVFP4",
        "producer": {"name": "modelopt", "version": "0.44.0"},
        "quant_algo": "MIXED_PRECISION",
        "quant_method": "fp8",
        "quantized_layers": quantized_layers(family),
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }


def hf_quant_config_of(family: Family) -> Json:
    file = hf_quant_config(family.spec)
    settings = file["quantization"]
    settings["exclude_modules"] = ignored_modules(family, settings["exclude_modules"])
    if family.is_mixed:  # published ones say of the KV cache only here
        settings.update(quant_algo="MIXED_PRECISION", kv_cache_quant_algo="FP8")
        settings["quantized_layers"] = quantized_layers(family)
        if not family.says_kv_cache:
            del settings["kv_cache_quant_algo"]
    return file


def ignored_modules(family: Family, usual: list[str]) -> list[str]:
    """Under their final names, given those of the checkpoint that the family starts from."""
    no_longer = f"{family.quantized}|{family.fp8}|{family.mxfp8}|{family.without}"
    ignore = [module for module in usual if not re.search(no_longer, module)]
    ignore += [tensor.name for module in family.ignore for tensor in many(module)]
    return sorted(renamed(family, module) for module in ignore)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("name", choices=FAMILIES)
    arguments = parser.parse_args()
    make(arguments.out, arguments.name)


if __name__ == "__main__":
    main()
