"""Weights from a Hugging Face folder: one `model.safetensors`, or shards with an index.

The table of names lives here. Files are memory-mapped; every tensor is checked against the config before it is used,
and only those that lie fused in the model (query, key, value; gate, up) are copied.
"""

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llama_3.config import ModelConfig, config_error, read_config, read_json
from llama_3.model import Transformer


def load_model(
    folder: Path | str, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> Transformer:
    """The model in a Hugging Face folder, weights frozen; `dtype="auto"` keeps the file's.

    OSError or ValueError, one sentence each: no folder, no weights, not a Llama, a file cut short, a tensor missing,
    left over or of the wrong shape.
    """
    folder = Path(folder)
    config = read_config(folder)
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise config_error(f"there is no dtype {dtype!r}", "use auto, bfloat16, float16 or float32")
    with ExitStack() as stack:
        where = _open_weights(folder, stack)
        _check_tensors(where, config, folder)
        first = where["model.embed_tokens.weight"].get_slice("model.embed_tokens.weight").get_dtype()
        if dtype == "auto":
            dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}.get(first, torch.float32)
        elif isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        with torch.device("meta"):
            model = Transformer(config)
        for name, sources in parameter_sources(config).items():
            parts = [where[source].get_tensor(source).to(device, dtype) for source in sources]
            _assign(model, name, parts[0] if len(parts) == 1 else torch.cat(parts))
    return model.eval()


def parameter_sources(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Which Hugging Face tensors, stacked by rows, make up each parameter of `Transformer`."""
    sources: dict[str, tuple[str, ...]] = {"embedding_VD": ("model.embed_tokens.weight",)}
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        sources[f"{ours}.attention_norm.weight"] = (f"{theirs}.input_layernorm.weight",)
        sources[f"{ours}.attention.qkv.weight"] = tuple(f"{theirs}.self_attn.{part}_proj.weight" for part in "qkv")
        sources[f"{ours}.attention.out.weight"] = (f"{theirs}.self_attn.o_proj.weight",)
        sources[f"{ours}.feed_forward_norm.weight"] = (f"{theirs}.post_attention_layernorm.weight",)
        sources[f"{ours}.feed_forward.gate_up.weight"] = (
            f"{theirs}.mlp.gate_proj.weight",
            f"{theirs}.mlp.up_proj.weight",
        )
        sources[f"{ours}.feed_forward.down.weight"] = (f"{theirs}.mlp.down_proj.weight",)
    sources["norm.weight"] = ("model.norm.weight",)
    if not config.tied:
        sources["head.weight"] = ("lm_head.weight",)
    return sources


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a Hugging Face checkpoint of this config holds."""
    d, ff = config.d_model, config.d_ff
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    by_end: dict[str, tuple[int, ...]] = {
        "embed_tokens": (config.vocab_size, d), "lm_head": (config.vocab_size, d), "norm": (d,),
        "input_layernorm": (d,), "post_attention_layernorm": (d,),
        "q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q),
        "gate_proj": (ff, d), "up_proj": (ff, d), "down_proj": (d, ff),
    }  # fmt: skip
    names = (name for sources in parameter_sources(config).values() for name in sources)
    return {name: by_end[name.split(".")[-2]] for name in names}


def state_tensors(model: Transformer) -> dict[str, Tensor]:
    """The model's weights under Hugging Face names, unfused, as `save_file` wants them."""
    shapes, tensors = tensor_shapes(model.config), {}
    for name, sources in parameter_sources(model.config).items():
        parts = torch.split(model.get_parameter(name).detach(), [shapes[source][0] for source in sources])
        tensors.update({source: part.contiguous() for source, part in zip(sources, parts, strict=True)})
    return tensors


def weight_files(folder: Path | str) -> list[Path]:
    """The safetensors files of a model folder, in order; FileNotFoundError when there are none."""
    folder = Path(folder)
    index = read_json(folder / "model.safetensors.index.json")
    if index is not None:
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise config_error(f"{folder / 'model.safetensors.index.json'} has no weight_map")
        # An index is somebody else's file: it may only name files that lie beside it.
        files = [folder / Path(name).name for name in sorted(set(map(str, shards.values())))]
    else:
        files = [folder / "model.safetensors"]
    for path in files:
        if not path.is_file():
            error = FileNotFoundError(f"there is no {path.name} in {folder}")
            error.hint = "download the model's .safetensors files completely"  # type: ignore[attr-defined]
            raise error
    return files


def fingerprint(folder: Path | str) -> str:
    """sha256 (hex) over names and contents of the folder's weight files: what a manifest says it was made with."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _open_weights(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """The open file that holds each tensor."""
    where: dict[str, Any] = {}
    for path in weight_files(folder):
        try:
            file = stack.enter_context(safe_open(str(path), "pt"))
        except SafetensorError as error:
            size = path.stat().st_size
            raise config_error(
                f"{path} is damaged or cut short ({size:,} bytes): {error}", "download the file again"
            ) from error
        where.update(dict.fromkeys(file.keys(), file))
    return where


def _check_tensors(where: dict[str, Any], config: ModelConfig, folder: Path) -> None:
    expected = tensor_shapes(config)
    if missing := sorted(expected.keys() - where.keys()):
        raise config_error(f"the weights in {folder} lack {_named(missing)}")
    # A tied model may carry its head a second time, and old files their RoPE frequencies.
    extra = (name for name in where.keys() - expected.keys() if not name.endswith("rotary_emb.inv_freq"))
    if surplus := sorted(name for name in extra if not (config.tied and name == "lm_head.weight")):
        raise config_error(f"the weights in {folder} hold {_named(surplus)}, which this Llama has no place for")
    for name, shape in expected.items():
        found = tuple(where[name].get_slice(name).get_shape())
        if found != shape:
            raise config_error(f"{name} in {folder} has shape {found} where config.json asks for {shape}")


def _named(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"


def _assign(model: nn.Module, name: str, weight: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
