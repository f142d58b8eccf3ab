"""Meta's `original/` folders: `params.json` beside `consolidated.NN.pth`, one file per model-parallel rank.

Each rank's file holds a slice of every matrix; a tensor is put together again while its rows are read. Numbers that
`params.json` leaves out follow from Meta's code: the width of the feed-forward, the RoPE scaling of Llama 3.1 (32 in
the two small 3.2 models, whose own code says 8) and the ids of special tokens. Facts from meta-llama/llama-models.
"""

import math
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_3.config import ModelConfig, RopeScaling, describing_a_llama, read_json
from llama_3.errors import config_error, explained
from llama_3.tensor_files import PickleFile

LLAMA_3_VOCABULARY = 128_256
SCALED_BY_32 = ((2048, 16), (3072, 28))
"""(d_model, layers) of Llama 3.2 1B and 3B."""


def read_config(folder: Path) -> ModelConfig:
    """What `params.json` says, and whether the weights are tied; ValueError or OSError names what is missing."""
    path = folder / "params.json"
    raw = read_json(path)
    if raw is None:
        raise explained(
            FileNotFoundError, f"there is no params.json in {folder}", "download it from where the .pth files came from"
        )
    with describing_a_llama(path), ExitStack() as stack:
        raw = {**raw, **raw.get("model", {})}
        weights = MetaWeights(weight_files(folder), int(raw["dim"]), stack)
        return _model_config(raw, weights)


def _model_config(raw: dict[str, Any], weights: "MetaWeights") -> ModelConfig:
    dim, n_layers, n_heads = int(raw["dim"]), int(raw["n_layers"]), int(raw["n_heads"])
    vocab_size = int(raw.get("vocab_size") or -1)
    if vocab_size < 0:
        vocab_size = weights.shapes["tok_embeddings.weight"][0]
    multiple = int(raw.get("multiple_of") or 256)
    widened = int(float(raw.get("ffn_dim_multiplier") or 1) * int(2 * 4 * dim / 3))
    scaled, theta = bool(raw.get("use_scaled_rope")), float(raw.get("rope_theta") or 10000.0)
    factor = 32.0 if (dim, n_layers) in SCALED_BY_32 else 8.0
    bos_id, stop_ids = special_ids(vocab_size)
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=int(raw.get("n_kv_heads") or n_heads),
        head_dim=dim // n_heads,
        d_ff=multiple * math.ceil(widened / multiple),
        norm_eps=float(raw.get("norm_eps", 1e-5)),
        rope_theta=theta,
        rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192) if scaled else None,
        max_context=131072 if scaled else 4096 if theta == 1e4 else 8192,
        tied=weights.tied,
        bos_id=bos_id,
        stop_ids=stop_ids,
    )


def special_ids(vocab_size: int) -> tuple[int, tuple[int, ...]]:
    """(bos, stop ids) where a checkpoint does not say: Llama 3's in a vocabulary of its size, else sentencepiece's."""
    return (128000, (128001, 128008, 128009)) if vocab_size >= LLAMA_3_VOCABULARY else (1, (2,))


def weight_files(folder: Path) -> list[Path]:
    """`consolidated.00.pth` and its siblings in order; FileNotFoundError names the first that is missing."""
    numbers = {
        int(found[1]): path
        for path in folder.glob("consolidated.*.pth")
        if (found := re.fullmatch(r"consolidated\.(\d{2,4})\.pth", path.name))
    }
    for number in range(max(numbers, default=0) + 1):
        if number not in numbers or not numbers[number].is_file():
            raise _missing_shard(folder, number)
    return [numbers[number] for number in sorted(numbers)]


def _missing_shard(folder: Path, number: int) -> FileNotFoundError:
    return explained(
        FileNotFoundError,
        f"there is no consolidated.{number:02}.pth in {folder}",
        "download the model's .pth files completely",
    )


class MetaWeights:
    """Tensors under Meta's names, put together from every rank's slice; `dim` tells how the embedding was sliced."""

    def __init__(self, files: list[Path], dim: int, stack: ExitStack) -> None:
        self._shards = [stack.enter_context(PickleFile(path, len(files))) for path in files]
        first = self._shards[0].shapes
        query = first.get("layers.0.attention.wq.weight", (dim,))
        if query[0] and dim % query[0] == 0 and dim // query[0] > len(files):
            raise _missing_shard(files[0].parent, len(files))
        for path, shard in zip(files, self._shards, strict=True):
            if shard.shapes != first:
                name = min(name for name, _ in shard.shapes.items() ^ first.items())
                raise config_error(f"{name} has another shape in {path} than in {files[0].name}", "download both again")
        self._axis = {name: self._sliced_along(name, shape, dim) for name, shape in first.items()}
        self.shapes = {name: self._whole(name, shape) for name, shape in first.items()}

    @property
    def tied(self) -> bool:
        """Whether the unembedding is the embedding: absent, or the same weights under a second name."""
        names = "output.weight", "tok_embeddings.weight"
        return names[0] not in self.shapes or all(shard.same(*names) for shard in self._shards)

    def _sliced_along(self, name: str, shape: tuple[int, ...], dim: int) -> int | None:
        if len(self._shards) == 1 or len(shape) != 2:
            return None
        if name == "tok_embeddings.weight":  # Llama 3 slices the vocabulary, Llama 2 the width
            return 0 if shape[1] == dim else 1
        return 1 if name.endswith((".wo.weight", ".w2.weight")) else 0

    def _whole(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        axis = self._axis[name]
        return tuple(size * len(self._shards) if at == axis else size for at, size in enumerate(shape))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype a tensor is stored in."""
        return self._shards[0].dtypes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the whole tensor, to be let go before the next call."""
        axis = self._axis[name]
        if axis is None:
            return self._shards[0].rows(name, start, stop)
        if axis == 1:
            return torch.cat([shard.rows(name, start, stop) for shard in self._shards], 1)
        height = self._shards[0].shapes[name][0]
        spans = ((at * height, shard) for at, shard in enumerate(self._shards))
        return torch.cat([
            shard.rows(name, max(start - low, 0), min(stop - low, height))
            for low, shard in spans
            if start < low + height and low < stop
        ])  # fmt: skip
