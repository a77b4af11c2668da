"""Write a DeepSeek-V3 or Qwen3-MoE shaped ModelOpt NVFP4 checkpoint filled with random values.

    python tests/support/make_checkpoint.py OUT --layers 1    # 7.4 GB, true DeepSeek-V3 width
    python tests/support/make_checkpoint.py OUT --experts 4 --hidden 256 --intermediate 128

Names, dtypes, shapes, shard cuts and configuration are those of a real export; only the values are
made up. The script needs numpy alone and shares no code with the converter, so that tests can hold
the one against the other. It streams: memory does not grow with the checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, get_args, get_type_hints

import numpy as np

Quantization = Literal["config", "hf", "both"]
Layout = Literal["index", "no-index", "single"]
ScaleShape = Literal["scalar", "vector"]
Style = Literal["deepseek_v3", "qwen3_moe"]
Json = dict[str, Any]

BLOCK = 16  # values that share one NVFP4 block scale
SHARD_NBYTES = 5_000_000_000  # the usual upper bound of Hugging Face exports
# random_raw allocates its result; at 1 MiB malloc hands the same block out again and it stays in
# cache (3.5 GB/s a core measured, 2.5 GB/s at 4 MiB and at 128 KiB).
CHUNK_WORDS = 1 << 17

# bytes of one value; the order is the one in which safetensors 0.8 sorts a file (the sort key is
# the dtype, widest first, then the name).
ITEM_NBYTES = {"I64": 8, "F32": 4, "BF16": 2, "F8_E8M0": 1, "F8_E4M3": 1, "I8": 1, "U8": 1}
DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(ITEM_NBYTES)}

ATTENTION_HEAD_DIMS = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}

# Stand-ins: valid files of their kind, no more.
TOKENIZER: Json = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"},
}
CONFIGURATION_DEEPSEEK = """\
from transformers import PretrainedConfig


class DeepseekV3Config(PretrainedConfig):
    model_type = "deepseek_v3"
"""


@dataclass(frozen=True, slots=True)
class Spec:
    """What to write. The defaults are two MoE layers of DeepSeek-V3."""

    layers: int = 2  # MoE layers, without the MTP layer
    dense_layers: int = 1  # layers before them with a plain MLP
    experts: int = 256
    hidden: int = 7168
    intermediate: int = 2048  # of one expert
    shards: int | None = None  # None: one for every 5 GB, at least 2
    vocab_size: int = 1024
    mtp: bool = False  # append a bf16 multi-token-prediction layer
    kv_scales: bool = False  # FP8 KV cache scales in every attention layer
    differing_scales: bool = False  # gate and up each with their own per-tensor scales
    quantization: Quantization = "config"  # file that describes it: config.json or hf_quant_config
    layout: Layout = "index"
    scale_shape: ScaleShape = "scalar"  # per-tensor scales as [] or as [1]
    style: Style = "deepseek_v3"
    ungated: bool = False  # routed experts have no gate projection, as in Nemotron-H
    seed: int = 0
    sparse: bool = False  # true headers, holes for data: whole models that take no disk

    def __post_init__(self) -> None:
        for name, least in (("layers", 0), ("dense_layers", 0), ("experts", 1), ("vocab_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        for name in ("hidden", "intermediate"):
            size = getattr(self, name)
            if size < BLOCK or size % BLOCK:
                raise ValueError(f"{name} is {size}, expected a multiple of {BLOCK}")
        if self.shards is not None and self.shards < 1:
            raise ValueError(f"shards is {self.shards}, expected at least 1")
        if self.mtp and self.style != "deepseek_v3":
            raise ValueError(f"{self.style} has no MTP layer")

    @property
    def hidden_layers(self) -> int:
        return self.dense_layers + self.layers

    @property
    def dense_intermediate(self) -> int:
        """Width of the dense MLP: 18432 for 2048 in DeepSeek-V3, 6144 for 768 in Qwen3-30B-A3B."""
        return (9 if self.style == "deepseek_v3" else 8) * self.intermediate

    @property
    def heads(self) -> int:
        """Attention heads: 128 for H = 7168 in DeepSeek-V3, 32 for H = 2048 in Qwen3-30B-A3B."""
        return max(4, self.hidden // (56 if self.style == "deepseek_v3" else 64) // 4 * 4)

    def lora_rank(self, full: int) -> int:
        """An attention rank of DeepSeek-V3, scaled from H = 7168 in steps of 64."""
        return max(64, round(full * self.hidden / 7168 / 64) * 64)


class Tensor(NamedTuple):
    """One checkpoint tensor; its values follow from the seed and ``origin`` alone."""

    name: str
    dtype: str  # safetensors spelling
    shape: tuple[int, ...]
    origin: str  # usually the name; tensors of one origin hold equal values

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_NBYTES[self.dtype]


# --- what the checkpoint holds, in state-dict order -----------------------------------------------


def tensors_of(spec: Spec) -> Iterator[Tensor]:
    hidden, vocab = spec.hidden, spec.vocab_size
    yield bf16("model.embed_tokens.weight", vocab, hidden)
    for layer in range(spec.hidden_layers):
        yield from decoder_layer(spec, f"model.layers.{layer}", dense=layer < spec.dense_layers)
    if spec.mtp:
        prefix = f"model.layers.{spec.hidden_layers}"
        yield bf16(f"{prefix}.embed_tokens.weight", vocab, hidden)
        yield bf16(f"{prefix}.enorm.weight", hidden)
        yield bf16(f"{prefix}.hnorm.weight", hidden)
        yield bf16(f"{prefix}.eh_proj.weight", hidden, 2 * hidden)
        yield from decoder_layer(spec, prefix, dense=False, quantized=False)
        yield bf16(f"{prefix}.shared_head.norm.weight", hidden)
        yield bf16(f"{prefix}.shared_head.head.weight", vocab, hidden)
    yield bf16("model.norm.weight", hidden)
    yield bf16("lm_head.weight", vocab, hidden)


def decoder_layer(
    spec: Spec, prefix: str, *, dense: bool, quantized: bool = True
) -> Iterator[Tensor]:
    yield from attention(spec, f"{prefix}.self_attn", kv_scales=spec.kv_scales and quantized)
    mlp = f"{prefix}.mlp"
    if dense:
        yield from gated_mlp(spec, mlp, spec.dense_intermediate, quantized)
    else:
        gate = bf16(f"{mlp}.gate.weight", spec.experts, spec.hidden)
        if spec.style == "qwen3_moe":
            yield gate
        for expert in range(spec.experts):
            own = f"{mlp}.experts.{expert}"
            for tensor in gated_mlp(spec, own, spec.intermediate, quantized):
                if not (spec.ungated and ".gate_proj." in tensor.name):
                    yield tensor
        if spec.style == "deepseek_v3":
            yield gate
            yield f32(f"{mlp}.gate.e_score_correction_bias", spec.experts)
            yield from gated_mlp(spec, f"{mlp}.shared_experts", spec.intermediate, quantized)
    yield bf16(f"{prefix}.input_layernorm.weight", spec.hidden)
    yield bf16(f"{prefix}.post_attention_layernorm.weight", spec.hidden)


def attention(spec: Spec, prefix: str, *, kv_scales: bool) -> Iterator[Tensor]:
    hidden, heads = spec.hidden, spec.heads
    if spec.style == "deepseek_v3":
        q_rank, kv_rank = spec.lora_rank(1536), spec.lora_rank(512)
        nope, rope, value = ATTENTION_HEAD_DIMS.values()
        yield bf16(f"{prefix}.q_a_proj.weight", q_rank, hidden)
        yield bf16(f"{prefix}.q_a_layernorm.weight", q_rank)
        yield bf16(f"{prefix}.q_b_proj.weight", heads * (nope + rope), q_rank)
        yield bf16(f"{prefix}.kv_a_proj_with_mqa.weight", kv_rank + rope, hidden)
        yield bf16(f"{prefix}.kv_a_layernorm.weight", kv_rank)
        yield bf16(f"{prefix}.kv_b_proj.weight", heads * (nope + value), kv_rank)
        yield bf16(f"{prefix}.o_proj.weight", hidden, heads * value)
    else:
        yield bf16(f"{prefix}.q_proj.weight", heads * 128, hidden)
        yield bf16(f"{prefix}.k_proj.weight", 4 * 128, hidden)
        yield bf16(f"{prefix}.v_proj.weight", 4 * 128, hidden)
        yield bf16(f"{prefix}.o_proj.weight", hidden, heads * 128)
        yield bf16(f"{prefix}.q_norm.weight", 128)
        yield bf16(f"{prefix}.k_norm.weight", 128)
    if kv_scales:
        yield f32(f"{prefix}.k_proj.k_scale")
        yield f32(f"{prefix}.v_proj.v_scale")


def gated_mlp(spec: Spec, prefix: str, intermediate: int, quantized: bool) -> Iterator[Tensor]:
    for projection, rows, cols in (
        ("gate_proj", intermediate, spec.hidden),
        ("up_proj", intermediate, spec.hidden),
        ("down_proj", spec.hidden, intermediate),
    ):
        name = f"{prefix}.{projection}"
        if not quantized:
            yield bf16(f"{name}.weight", rows, cols)
            continue
        yield Tensor(f"{name}.weight", "U8", (rows, cols // 2), f"{name}.weight")
        scale = f"{name}.weight_scale"
        yield Tensor(scale, "F8_E4M3", (rows, cols // BLOCK), scale)
        # ModelOpt ties the two halves of a fused gate_up projection; engines merge what differs.
        tied = not spec.differing_scales and projection == "up_proj"
        origin = f"{prefix}.gate_proj" if tied else name
        shape = () if spec.scale_shape == "scalar" else (1,)
        for leaf in ("weight_scale_2", "input_scale"):
            yield Tensor(f"{name}.{leaf}", "F32", shape, f"{origin}.{leaf}")


def bf16(name: str, *shape: int) -> Tensor:
    return Tensor(name, "BF16", shape, name)


def f32(name: str, *shape: int) -> Tensor:
    return Tensor(name, "F32", shape, name)


# --- values ---------------------------------------------------------------------------------------


def content(tensor: Tensor, seed: int) -> Iterator[memoryview]:
    """The bytes of ``tensor``, in pieces.

    NumPy promises that the raw stream of a bit generator never changes, which it does not for the
    distributions of ``Generator``.
    """
    digest = hashlib.blake2b(f"{seed}/{tensor.origin}".encode(), digest_size=16).digest()
    stream = np.random.SFC64(int.from_bytes(digest, "little"))
    left = tensor.nbytes
    while left:
        words = stream.random_raw(min(CHUNK_WORDS, -(-left // 8))).astype("<u8", copy=False)
        make_valid(words, tensor.dtype)
        piece = words.data.cast("B")[:left]
        left -= len(piece)
        yield piece


def make_valid(words: np.ndarray[Any, np.dtype[np.uint64]], dtype: str) -> None:
    """Turn random bits into sensible values of ``dtype``, in place."""
    if dtype == "F8_E4M3":  # 0x00 .. 0x7E: not negative, and 0x7F is NaN
        codes = words.view(np.uint8)
        codes &= 0x7F
        np.minimum(codes, 0x7E, out=codes)
    elif dtype == "F8_E8M0":  # 2^-9 .. 2^-2
        codes = words.view(np.uint8)
        codes &= 0x07
        codes += 118
    elif dtype == "I64":  # 0 .. 7: numbers of experts
        words &= 7
    elif dtype == "BF16":  # sign, lowest exponent bit and mantissa are free: +-[2^-7, 2^-5)
        values = words.view("<u2")
        values &= 0x80FF
        values |= 0x3C00
    elif dtype == "F32":  # the mantissa is free: [2^-13, 2^-12), the size of a weight_scale_2
        scales = words.view("<u4")
        scales &= 0x007FFFFF
        scales |= 0x39000000


# --- shards ---------------------------------------------------------------------------------------


def cut_into_shards(tensors: list[Tensor], shards: int) -> list[list[Tensor]]:
    """Cut at tensor boundaries into parts of about equal size, in order.

    One of the cuts is moved, by as little as possible, to lie between the gate and the up
    projection of a routed expert, which is the hardest case for a converter.
    """
    if not 1 <= shards <= len(tensors):
        raise ValueError(f"cannot cut {len(tensors)} tensors into {shards} shards")
    if shards == 1:
        return [tensors]
    starts = np.concatenate(([0], np.cumsum([tensor.nbytes for tensor in tensors])))
    goals = starts[-1] * np.arange(1, shards) // shards
    cuts = np.searchsorted(starts[: len(tensors)], goals)
    # A tensor larger than a shard can draw several cuts to one place: spread them.
    for i in range(len(cuts)):
        lowest = cuts[i - 1] + 1 if i else 1
        cuts[i] = min(max(cuts[i], lowest), len(tensors) - (len(cuts) - i))
    pairs = np.array([i for i, tensor in enumerate(tensors) if is_routed_up(tensor)], dtype=int)
    if pairs.size:
        distances = np.abs(starts[pairs][:, None] - starts[cuts][None, :])
        pair, cut = np.unravel_index(np.argmin(distances), distances.shape)
        cuts[cut] = pairs[pair]
    bounds = [0, *(int(cut) for cut in cuts), len(tensors)]
    return [tensors[start:stop] for start, stop in pairwise(bounds)]


def is_routed_up(tensor: Tensor) -> bool:
    return (
        tensor.dtype == "U8"
        and ".mlp.experts." in tensor.name
        and tensor.name.endswith(".up_proj.weight")
    )


def shard_names(spec: Spec, shards: int) -> list[str]:
    if spec.layout == "single":
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]


def write_shard(path: Path, tensors: list[Tensor], seed: int, sparse: bool) -> None:
    """Write ``tensors`` as the safetensors library would, byte for byte in the header."""
    ordered = sorted(tensors, key=lambda tensor: (DTYPE_RANK[tensor.dtype], tensor.name))
    with path.open("wb", buffering=1 << 16) as file:
        write_header(file, ordered)
        if sparse:
            file.truncate(file.tell() + sum(tensor.nbytes for tensor in ordered))
            return
        for tensor in ordered:
            for piece in content(tensor, seed):
                file.write(piece)


def write_header(file: BinaryIO, ordered: list[Tensor]) -> None:
    header: Json = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        end = offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


# --- configuration --------------------------------------------------------------------------------


def model_config(spec: Spec) -> Json:
    config = deepseek_v3_config(spec) if spec.style == "deepseek_v3" else qwen3_moe_config(spec)
    config |= {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "initializer_range": 0.02,
        "intermediate_size": spec.dense_intermediate,
        "moe_intermediate_size": spec.intermediate,
        "norm_topk_prob": True,
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.hidden_layers,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }
    if spec.ungated:
        config["mlp_hidden_act"] = "relu2"
    if spec.quantization != "hf":
        config["quantization_config"] = quantization_section(spec)
    return config


def deepseek_v3_config(spec: Spec) -> Json:
    # Two experts of a group are scored together, so a group needs at least two.
    experts = spec.experts
    groups = next((n for n in (8, 4, 2) if experts % n == 0 and experts >= 2 * n), 1)
    chosen = max(1, groups // 2)
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "model_type": "deepseek_v3",
        "ep_size": 1,
        "first_k_dense_replace": spec.dense_layers,
        "kv_lora_rank": spec.lora_rank(512),
        "max_position_embeddings": 163840,
        "moe_layer_freq": 1,
        "n_group": groups,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": min(8, chosen * experts // groups),
        "num_key_value_heads": spec.heads,
        "num_nextn_predict_layers": int(spec.mtp),
        "q_lora_rank": spec.lora_rank(1536),
        **ATTENTION_HEAD_DIMS,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": chosen,
        "topk_method": "noaux_tc",
    }


def qwen3_moe_config(spec: Spec) -> Json:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "mlp_only_layers": list(range(spec.dense_layers)),
        "num_experts": spec.experts,
        "num_experts_per_tok": min(8, spec.experts),
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "use_sliding_window": False,
    }


def excluded_modules(spec: Spec) -> list[str]:
    modules = ["lm_head"]
    modules += [f"model.layers.{layer}.self_attn*" for layer in range(spec.hidden_layers)]
    moe_layers = range(spec.dense_layers, spec.hidden_layers)
    modules += [f"model.layers.{layer}.mlp.gate" for layer in moe_layers]
    if spec.mtp:
        modules.append(f"model.layers.{spec.hidden_layers}*")
    return sorted(modules)


def hf_quant_config(spec: Spec) -> Json:
    """``hf_quant_config.json``, the only description that older exports have."""
    return {
        "producer": {"name": "modelopt", "version": "0.33.0"},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8" if spec.kv_scales else None,
            "group_size": BLOCK,
            "exclude_modules": excluded_modules(spec),
        },
    }


def quantization_section(spec: Spec) -> Json:
    """``quantization_config`` of config.json, as ModelOpt's convert_hf_config.py derives it."""
    four_bits = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    section: Json = {
        "config_groups": {
            "group_0": {
                "input_activations": dict(four_bits),
                "weights": dict(four_bits),
                "targets": ["Linear"],
            }
        },
        "ignore": excluded_modules(spec),
        "quant_algo": "NVFP4",
        "producer": {"name": "modelopt", "version": "0.33.0"},
        "quant_method": "modelopt",
    }
    if spec.kv_scales:
        section["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return section


def other_files(spec: Spec) -> dict[str, str]:
    """What lies beside the shards and travels along in a conversion, name to text."""
    files = {
        "config.json": to_json(model_config(spec)),
        "generation_config.json": to_json({"bos_token_id": 0, "eos_token_id": 1}),
        "tokenizer.json": to_json(TOKENIZER),
        "tokenizer_config.json": to_json({"tokenizer_class": "PreTrainedTokenizerFast"}),
    }
    if spec.quantization != "config":
        files["hf_quant_config.json"] = to_json(hf_quant_config(spec))
    if spec.style == "deepseek_v3":
        files["configuration_deepseek.py"] = CONFIGURATION_DEEPSEEK
    return files


def to_json(value: Json) -> str:
    return json.dumps(value, indent=2) + "\n"


# --- putting it together --------------------------------------------------------------------------


def make_checkpoint(out: Path, spec: Spec) -> None:
    """Write the checkpoint into ``out``, which is created and must be empty.

    Raises:
        FileExistsError: ``out`` holds something already.
        ValueError: more shards than tensors.
    """
    tensors = list(tensors_of(spec))
    total = sum(tensor.nbytes for tensor in tensors)
    count = spec.shards if spec.shards is not None else max(2, -(-total // SHARD_NBYTES))
    shards = cut_into_shards(tensors, 1 if spec.layout == "single" else count)
    names = shard_names(spec, len(shards))

    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty")
    # Random bits are made and written outside the interpreter lock.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        paths = [out / name for name in names]
        list(pool.map(write_shard, paths, shards, repeat(spec.seed), repeat(spec.sparse)))
    if spec.layout == "index":
        weight_map = {
            tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        index = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (out / "model.safetensors.index.json").write_text(to_json(index))
    for name, text in other_files(spec).items():
        (out / name).write_text(text)


def parse_arguments() -> tuple[Path, Spec]:
    """The command line has one option for every field of `Spec`, with its name and default."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    types = get_type_hints(Spec)
    for field in fields(Spec):
        option = "--" + field.name.replace("_", "-")
        kind = types[field.name]
        if kind is bool:
            parser.add_argument(option, action="store_true")
        elif choices := [value for value in get_args(kind) if isinstance(value, str)]:
            parser.add_argument(option, choices=choices, default=field.default)
        else:
            parser.add_argument(option, type=int, default=field.default, metavar="N")
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    try:
        return out, Spec(**arguments)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    make_checkpoint(*parse_arguments())
