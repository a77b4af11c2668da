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

from .make_checkpoint import (
    Json,
    Spec,
    Tensor,
    bf16,
    cut_into_shards,
    f32,
    gated_mlp,
    model_config,
    other_files,
    tensors_of,
    to_json,
    write_shard,
)

H, I, E = 256, 128, 8  # noqa: E741 - the project's names of the three sizes


def many(name: str, *shape: int) -> Iterator[Tensor]:
    """A bf16 tensor for each name: ``a.{x,y}`` are two, and several braces multiply."""
    parts = [part.split(",") for part in re.split(r"[{}]", name)]
    # What lies outside of braces comes at even places, and may not be split.
    choices = [[",".join(part)] if i % 2 == 0 else part for i, part in enumerate(parts)]
    return (bf16("".join(chosen), *shape) for chosen in itertools.product(*choices))


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    spec: Spec
    """Where the tensors and the configuration come from."""
    config: Json
    """What config.json says besides; for a nested model, what the text model's part says."""
    top: Json | None = None
    """The outer config.json of a nested model, without ``text_config``."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """Patterns and replacements, in order, for names of tensors and of ignored modules."""
    without: str = r"$^"
    """Pattern of the tensors, renamed, that the family does not have."""
    extra: tuple[Tensor, ...] = ()
    """Tensors besides, under their final names."""
    ignore: tuple[str, ...] = ()
    """Modules besides that are not quantized."""
    beside: tuple[str, str] | None = None
    """A file that the index does not name, and the pattern of the tensors in it."""


DEEPSEEK = Spec(experts=E, hidden=H, intermediate=I, vocab_size=64)
QWEN = replace(DEEPSEEK, style="qwen3_moe", dense_layers=0)
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
    rename={r"^": "language_model."},
    extra=(
        *many("vision_tower.patch_embed.proj.weight", 64, 3, 14, 14),
        *many("vision_tower.patch_embed.proj.bias", 64),
        *many("vision_tower.patch_embed.pos_emb.weight", 4, 4, 64),
        *many("vision_tower.encoder.blocks.0.{norm0,norm1}.{weight,bias}", 64),
        *many("vision_tower.encoder.blocks.0.mlp.fc0.weight", 128, 64),
        *many("vision_tower.encoder.blocks.0.mlp.fc0.bias", 128),
        *many("vision_tower.encoder.blocks.0.mlp.fc1.weight", 64, 128),
        *many("vision_tower.encoder.blocks.0.mlp.fc1.bias", 64),
        *many("vision_tower.encoder.blocks.0.wqkv.weight", 192, 64),
        *many("vision_tower.encoder.blocks.0.wqkv.bias", 192),
        *many("vision_tower.encoder.blocks.0.wo.weight", 64, 64),
        *many("vision_tower.encoder.blocks.0.wo.bias", 64),
        *many("vision_tower.encoder.final_layernorm.{weight,bias}", 64),
        *many("mm_projector.pre_norm.{weight,bias}", 64),
        *many("mm_projector.proj.0.weight", 256, 256),
        *many("mm_projector.proj.0.bias", 256),
        *many("mm_projector.proj.2.weight", H, 256),
        *many("mm_projector.proj.2.bias", H),
    ),
    ignore=("vision_tower*", "mm_projector*"),
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
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.5,
        "routed_scaling_factor": 2.5,
        "topk_group": 1,
        "use_qk_norm": True,
    },
    extra=(
        *many("model.layers.{0,1,2,3}.self_attn.{q,k,v}_proj.bias", 512),
        *(f32(f"model.layers.{n}.mlp.gate.e_score_correction_bias", E) for n in (1, 2, 3)),
        *gated_mlp(QWEN, "model.layers.1.mlp.shared_experts", I, quantized=True),
        *gated_mlp(QWEN, "model.layers.2.mlp.shared_experts", I, quantized=True),
        # The MTP layer, which ModelOpt leaves in bf16.
        *many("model.layers.3.{enorm,hnorm,shared_head.norm}.weight", H),
        *many("model.layers.3.{input,post_attention}_layernorm.weight", H),
        *many("model.layers.3.eh_proj.weight", H, 2 * H),
        *many("model.layers.3.self_attn.{q,k,v}_proj.weight", 512, H),
        *many("model.layers.3.self_attn.o_proj.weight", H, 512),
        *many("model.layers.3.self_attn.{q,k}_norm.weight", 128),
        *many("model.layers.3.mlp.gate.weight", E, H),
        *(
            tensor
            for module in (*(f"experts.{expert}" for expert in range(E)), "shared_experts")
            for tensor in gated_mlp(QWEN, f"model.layers.3.mlp.{module}", I, quantized=False)
        ),
        *many("model.layers.3.{embed_tokens,shared_head.head}.weight", 64, H),
    ),
    ignore=("model.layers.3*",),
)

FAMILIES: dict[str, Family] = {
    "minimax_m2": Family(
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
        rename={
            r"\.mlp\.": ".block_sparse_moe.",
            r"\.gate_proj\b": ".w1",
            r"\.up_proj\b": ".w3",
            r"\.down_proj\b": ".w2",
        },
        without=r"_norm\.weight$",
        extra=(
            *many("model.layers.{0,1}.self_attn.{q,k}_norm.weight", 512),
            *(f32(f"model.layers.{n}.block_sparse_moe.e_score_correction_bias", E) for n in (0, 1)),
        ),
    ),
    "glm4_moe": GLM4_MOE,
    "glm4_moe-mtp-file": replace(GLM4_MOE, beside=("mtp.safetensors", r"^model\.layers\.3\.")),
    "kimi_k25": KIMI_K25,
    "kimi_k25-legacy": replace(
        KIMI_K25,
        rename={
            r"^model\.layers": "language_model.layers",
            r"^(?=model|lm_head)": "language_model.",
        },
    ),
    "deepseek_v3": Family(replace(DEEPSEEK, mtp=True, kv_scales=True), {}),
}


def make(folder: Path, name: str) -> None:
    """Write the original checkpoint of a family into ``folder``, which is created.

    Raises:
        KeyError: no such family.
    """
    family = FAMILIES[name]
    folder.mkdir(parents=True)
    tensors = [*original_tensors(family), *family.extra]
    files: dict[str, list[Tensor]] = {}
    if family.beside is not None:
        path, pattern = family.beside
        files[path] = [tensor for tensor in tensors if re.search(pattern, tensor.name)]
        tensors = [tensor for tensor in tensors if not re.search(pattern, tensor.name)]
    shards = cut_into_shards(tensors, 2)
    names = [f"model-{n}-of-00002.safetensors" for n in ("00001", "00002")]
    for path, shard in itertools.chain(files.items(), zip(names, shards, strict=True)):
        write_shard(folder / path, shard, family.spec.seed, sparse=False)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": {
            tensor.name: path for path, shard in zip(names, shards, strict=True) for tensor in shard
        },
    }
    (folder / "model.safetensors.index.json").write_text(to_json(index))
    for path, text in other_files(replace(family.spec, style="qwen3_moe", mtp=False)).items():
        (folder / path).write_text(text)
    (folder / "config.json").write_text(to_json(config_of(family)))


def renamed(family: Family, name: str) -> str:
    for pattern, replacement in family.rename.items():
        name = re.sub(pattern, replacement, name)
    return name


def original_tensors(family: Family) -> Iterator[Tensor]:
    for tensor in tensors_of(family.spec):
        name = renamed(family, tensor.name)
        if not re.search(family.without, name):
            yield tensor._replace(name=name)


def config_of(family: Family) -> Json:
    """The family's config.json; a key whose value is None in the table is left out."""
    text = model_config(family.spec)
    section = text.pop("quantization_config")
    section["ignore"] = [renamed(family, module) for module in section["ignore"]]
    section["ignore"] += family.ignore
    text.pop("auto_map", None)
    text |= {"pad_token_id": 0, **family.config}
    text = {key: value for key, value in text.items() if value is not None}
    config = text if family.top is None else {**family.top, "text_config": text}
    return config | {"quantization_config": section}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("name", choices=FAMILIES)
    arguments = parser.parse_args()
    make(arguments.out, arguments.name)


if __name__ == "__main__":
    main()
