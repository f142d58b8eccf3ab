"""Weights from every layout people keep them in: Hugging Face folders, Meta folders, GGUF files.

The loader speaks Hugging Face's names; the table of the other names lives here, with the order of query and key rows.
Meta and llama.cpp rotate neighbours (2i, 2i+1), Hugging Face and `model.py` halves (i, i + N/2): rows of heads move.
Each parameter is allocated once, in its final dtype on its device, and filled in blocks of rows, so that loading takes
little more memory than the model. Every shape is compared with the config first, every number found finite.
Suffixes: Q rows of whole heads (heads * head dim), D d_model.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from llama_3 import gguf_file, huggingface, meta
from llama_3.config import Layout, ModelConfig, described, find_layout, read_config
from llama_3.errors import config_error
from llama_3.model import Transformer

BLOCK_NUMBERS = 1 << 20
"""Weights moved at a time, 4 MiB in float32: larger temporaries, once freed, leave holes between the parameters."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""What a model may compute in."""

NAMES = {
    "model.embed_tokens": ("tok_embeddings", "token_embd"),
    "model.norm": ("norm", "output_norm"),
    "lm_head": ("output", "output"),
    "input_layernorm": ("attention_norm", "attn_norm"),
    "self_attn.q_proj": ("attention.wq", "attn_q"),
    "self_attn.k_proj": ("attention.wk", "attn_k"),
    "self_attn.v_proj": ("attention.wv", "attn_v"),
    "self_attn.o_proj": ("attention.wo", "attn_output"),
    "post_attention_layernorm": ("ffn_norm", "ffn_norm"),
    "mlp.gate_proj": ("feed_forward.w1", "ffn_gate"),
    "mlp.up_proj": ("feed_forward.w3", "ffn_up"),
    "mlp.down_proj": ("feed_forward.w2", "ffn_down"),
}
"""What Meta and llama.cpp call the tensors of Hugging Face, without `model.layers.N.` and `.weight`."""

IGNORED = ("rotary_emb.inv_freq", "rope.freqs", "rope_freqs.weight")
"""RoPE frequencies that some files carry: they follow from the config."""


def name_in(layout: Layout, name: str) -> str:
    """The name that `layout` gives to a tensor of Hugging Face."""
    if layout in ("safetensors", "bin"):
        return name
    column, prefix = (0, "layers") if layout == "meta" else (1, "blk")
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem][column]}.weight"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"{prefix}.{layer}.{NAMES[part][column]}.weight"


def pairs_to_halves(w_QD: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads, stored for rotating pairs, in the order for rotating halves."""
    heads = w_QD.view(-1, head_dim // 2, 2, w_QD.shape[-1])
    return heads.transpose(1, 2).reshape(w_QD.shape)


def all_finite(x: Tensor) -> bool:
    """Whether no number is NaN or infinite: without its sign, such a number's bits are those of infinity or above.

    Integers are compared many times faster than halves are summed.
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
    endless = torch.tensor(torch.inf, dtype=x.dtype).view(integers)
    return bool((x.view(integers) & torch.iinfo(integers).max).amax() < endless.item())


class Weights(Protocol):
    """The tensors of a checkpoint under its layout's names, rows first."""

    shapes: dict[str, tuple[int, ...]]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype a tensor is stored in; for quantised ones, the dtype to compute in."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) in the stored dtype or float32, good until the next call."""
        ...


class Checkpoint:
    """An open checkpoint: its weights by Hugging Face name, in Hugging Face order."""

    def __init__(self, layout: Layout, where: Path, config: ModelConfig, weights: Weights) -> None:
        self.layout, self.where, self.config, self.weights = layout, where, config, weights

    @property
    def dtype(self) -> torch.dtype:
        """What `dtype="auto"` means: the dtype of the embedding, float32 for float64."""
        name = name_in(self.layout, "model.embed_tokens.weight")
        if name not in self.weights.shapes:
            raise config_error(f"the weights in {self.where} lack {name}")
        stored = self.weights.dtype(name)
        return torch.float32 if stored == torch.float64 else stored

    def check(self) -> None:
        """ValueError unless the file holds the config's tensors in the config's shapes, and no others."""
        shapes, config = self.weights.shapes, self.config
        expected = {name_in(self.layout, name): shape for name, shape in tensor_shapes(config).items()}
        if missing := sorted(expected.keys() - shapes.keys()):
            raise config_error(f"the weights in {self.where} lack {_named(missing)}")
        extra = (name for name in shapes.keys() - expected.keys() if not name.endswith(IGNORED))
        head = name_in(self.layout, "lm_head.weight")
        if surplus := sorted(name for name in extra if not (config.tied and name == head)):
            raise config_error(f"the weights in {self.where} hold {_named(surplus)}, which this Llama has no place for")
        for name, shape in expected.items():
            if shapes[name] != shape:
                source = {"meta": "params.json", "gguf": "its metadata"}.get(self.layout, "config.json")
                raise config_error(f"{name} in {self.where} has shape {shapes[name]} where {source} asks for {shape}")

    def read(self, name: str, into: Tensor, first: int = 0, columns: slice = slice(None)) -> None:
        """Fill `into`, on any device, of any dtype, with a tensor of Hugging Face; ValueError for NaN or infinity.

        A part of the tensor begins at row `first` (of queries and keys, whole heads) and has those `columns` of it.
        """
        own, head_dim = name_in(self.layout, name), self.config.head_dim
        paired = self.layout in ("meta", "gguf") and name.endswith(("q_proj.weight", "k_proj.weight"))
        step = max(1, BLOCK_NUMBERS // max(1, prod(self.weights.shapes[own][1:])))
        if paired:
            step = max(step // head_dim, 1) * head_dim
        for start in range(0, len(into), step):
            part = into[start : start + step]
            rows = self.weights.rows(own, first + start, first + start + len(part))
            part.copy_((pairs_to_halves(rows, head_dim) if paired else rows)[..., columns])
            if not all_finite(part):
                raise config_error(
                    f"{own} in {self.where} holds numbers that are NaN or infinite in {part.dtype}",
                    "use bfloat16 or float32" if part.dtype == torch.float16 else "download the file again",
                )


@contextmanager
def open_checkpoint(path: Path | str) -> Iterator[Checkpoint]:
    """The checkpoint at `path`, open for reading; ValueError or OSError when it is none, or damaged."""
    header = gguf_file.hold_header(path)
    config, (layout, where) = read_config(path), find_layout(path)
    with ExitStack() as stack:
        weights: Weights
        if layout == "gguf":
            weights = gguf_file.GGUFWeights(where, stack, header)
        elif layout == "meta":
            weights = meta.MetaWeights(weight_files(path), config.d_model, stack)
        else:
            weights = huggingface.HuggingFaceWeights(weight_files(path), stack)
        yield Checkpoint(layout, where, config, weights)


def load_model(
    path: Path | str,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    *,
    finish: Callable[[nn.Module, int], None] | None = None,
) -> Transformer:
    """The model at `path` (a folder, or a `.gguf` file), weights frozen; `dtype="auto"` keeps the file's.

    `finish(block, layer)` is called as soon as a block's weights are in place, before the next block is read.
    OSError or ValueError, one sentence each: a dtype that is none of `DTYPES`, no folder, no weights, not a Llama,
    a file cut short, a tensor missing, left over, of the wrong shape or not finite.
    """
    wanted = weights_dtype(dtype)
    with open_checkpoint(path) as checkpoint:
        checkpoint.check()
        chosen = wanted or checkpoint.dtype
        shapes = tensor_shapes(checkpoint.config)
        with torch.device("meta"):
            model = Transformer(checkpoint.config)
        sources = parameter_sources(checkpoint.config)
        for part, names in groupby(sources, lambda name: ".".join(name.split(".")[:2])):
            for name in names:
                heights = [shapes[source][0] for source in sources[name]]
                weight = torch.empty((sum(heights), *shapes[sources[name][0]][1:]), dtype=chosen, device=device)
                for source, rows in zip(sources[name], torch.split(weight, heights), strict=True):
                    checkpoint.read(source, rows)
                _assign(model, name, weight)
            if finish is not None and part.startswith("blocks."):
                finish(model.get_submodule(part), int(part.removeprefix("blocks.")))
    return model.eval()


def weights_dtype(asked: torch.dtype | str) -> torch.dtype | None:
    """The dtype that is asked for, by name or itself, None for "auto"; ValueError unless it is one of `DTYPES`."""
    name = str(asked).removeprefix("torch.")
    if name != "auto" and name not in DTYPES:
        raise config_error(f"weights are not loaded in '{described(name)}'", f"use auto, {', '.join(DTYPES)}")
    return DTYPES.get(name)


def stored_dtype(path: Path | str) -> torch.dtype:
    """The dtype that `dtype="auto"` loads: the file's, bfloat16 for quantised files. Reads headers only."""
    with open_checkpoint(path) as checkpoint:
        return checkpoint.dtype


def parameter_count(config: ModelConfig) -> int:
    """Weights of a model, a tied head counted once."""
    return sum(prod(shape) for shape in tensor_shapes(config).values())


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


def weight_files(path: Path | str) -> list[Path]:
    """The files that hold the weights at `path`, in order; FileNotFoundError names one that is missing."""
    layout, where = find_layout(path)
    if layout == "gguf":
        return [where]
    if layout == "meta":
        return meta.weight_files(where)
    return huggingface.weight_files(where, "model.safetensors" if layout == "safetensors" else "pytorch_model.bin")


def _named(names: list[str]) -> str:
    return described(names[0]) + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")


def _assign(model: nn.Module, name: str, weight: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
