"""GGUF files, as llama.cpp keeps models: metadata, then tensors, most of them quantised in blocks along their rows.

The header is read here and not by the `gguf` package's reader, which keeps two arrays per word of the vocabulary and
believes every length it meets; the package does the arithmetic of the quantised kinds, a block of rows at a time.
Llama 3's RoPE scaling stands in a tensor, `rope_freqs.weight`: what each frequency is divided by. Where that is the
well-known stretching it becomes a `RopeScaling`, so that the frequencies equal the Hugging Face checkpoint's exactly.
Format: ggml-org/ggml, docs/gguf.md.
"""

import math
import mmap
import struct
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from llama_3.config import ModelConfig, RopeScaling, described, describing_a_llama, find_layout
from llama_3.errors import config_error
from llama_3.meta import special_ids
from llama_3.tensor_files import RawFile, damaged

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's letter for each kind of metadata value; 8 is a string, 9 an array."""
STRING, ARRAY = 8, 9
LENGTH = struct.Struct("<Q")
MOST_ENTRIES = 1 << 24
"""More words, keys or tensors than any file has: a damaged header must not keep us busy."""
STOP_WORDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
"""Words that end a reply, also in files too old to say so."""


@dataclass(frozen=True)
class Stored:
    """One tensor of the file."""

    shape: tuple[int, ...]
    """As everywhere here, rows first; the file says it the other way round."""
    kind: int
    """ggml's number of the quantisation."""
    offset: int
    """Where its first byte lies, from the start of the file."""


@dataclass(frozen=True)
class Header:
    """What stands before the weights."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def find_gguf(path: Path | str) -> Path | None:
    """The `.gguf` file that a model path means, None where it means another layout or holds no weights.

    ValueError when the folder holds several.
    """
    try:
        layout, where = find_layout(path)
    except FileNotFoundError:
        return None
    return where if layout == "gguf" else None


def read_metadata(path: Path | str) -> dict[str, Any]:
    """The metadata of a GGUF file: numbers, booleans, strings and lists of them by key; ValueError when damaged."""
    return dict(read_header(Path(path)).metadata)


_HELD: WeakValueDictionary[tuple[Path, int, int], Header] = WeakValueDictionary()
"""Headers that somebody holds, by file, size and time of change."""


def hold_header(path: Path | str) -> Header | None:
    """The header of the GGUF file that a model path means, None where it means another layout; ValueError when damaged.

    Config, weights, tokenizer and chat format each ask for it, and hundreds of thousands of words take a while to read:
    whoever loads a model keeps this until all have asked. Then it goes with its words.
    """
    file = find_gguf(path)
    return None if file is None else read_header(file)


def read_header(path: Path) -> Header:
    """Metadata and table of tensors; ValueError in one sentence when the file is no whole GGUF file."""
    found = path.stat()
    key = path, found.st_size, found.st_mtime_ns
    header = _HELD.get(key)
    if header is None:
        header = _HELD[key] = _read_header(path, found.st_size)
    return header


def _read_header(path: Path, size: int) -> Header:
    if size < 24:
        raise damaged(path, "it is shorter than a GGUF header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Parser(path, data, size).header()
        except (struct.error, LookupError, UnicodeDecodeError, ArithmeticError) as error:
            raise damaged(path, described(error)) from error


class _Parser:
    """A place in the header, moving forward."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 0

    def header(self) -> Header:
        if self.data[:4] != b"GGUF":
            raise config_error(f"{self.path} is no GGUF file", "pass a file that llama.cpp can read")
        self.at = 4
        if (version := self.number("I")) not in (2, 3):
            raise config_error(f"{self.path} has GGUF version {version}, and versions 2 and 3 are read")
        n_tensors, n_keys = self.count(), self.count()
        metadata = {self.string(): self.value(self.number("I")) for _ in range(n_keys)}
        stored = {}
        for _ in range(n_tensors):
            name, dims = self.string(), self.number("I")
            if dims > 4:
                raise damaged(self.path, f"{described(name)} has {dims} dimensions")
            shape = tuple(reversed([self.number("Q") for _ in range(dims)]))
            stored[name] = Stored(shape, self.number("I"), self.number("Q"))
        align = metadata.get("general.alignment", 32)
        if type(align) is not int or not 0 < align <= 1 << 20:
            raise damaged(self.path, f"its alignment is {described(align)}")
        start = -(-self.at // align) * align
        return Header(metadata, {name: replace(each, offset=start + each.offset) for name, each in stored.items()})

    def number(self, letter: str) -> Any:
        (number,) = struct.unpack_from("<" + letter, self.data, self.at)
        self.at += struct.calcsize("<" + letter)
        return number

    def count(self) -> int:
        count: int = self.number("Q")
        if count > MOST_ENTRIES:
            raise damaged(self.path, f"its header claims {count:,} entries")
        return count

    def string(self) -> str:
        length = self.number("Q")
        if length > self.size - self.at:
            raise damaged(self.path, f"its header claims a string of {length:,} bytes")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def strings(self, count: int) -> list[str]:
        """`string`, so many times: most of a header are the words of the vocabulary."""
        data, at, size, words = self.data, self.at, self.size, []
        for _ in range(count):
            (length,) = LENGTH.unpack_from(data, at)
            at += 8 + length
            if at > size:
                raise damaged(self.path, f"its header claims a string of {length:,} bytes")
            words.append(data[at - length : at].decode())
        self.at = at
        return words

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(NUMBERS[kind])
        inner, count = self.number("I"), self.count()
        if depth > 3:
            raise damaged(self.path, "its metadata nests too deep")
        if inner == STRING:
            return self.strings(count)
        if inner == ARRAY:
            return [self.value(inner, depth + 1) for _ in range(count)]
        numbers = struct.unpack_from(f"<{count}{NUMBERS[inner]}", self.data, self.at)
        self.at += struct.calcsize(f"<{count}{NUMBERS[inner]}")
        return list(numbers)


def read_config(path: Path) -> ModelConfig:
    """What the metadata says; ValueError for anything but a plain Llama."""
    header = read_header(path)
    _refuse_other_models(header.metadata, path)
    with describing_a_llama(path):
        config = _model_config(header)
        return _with_rope(config, _rope_factors(path, header))


def _refuse_other_models(raw: dict[str, Any], path: Path) -> None:
    kind = raw.get("general.architecture")
    if kind != "llama":
        raise config_error(f"{path} describes {described(kind)}, and only Llama models are supported")
    if raw.get("llama.expert_count"):
        raise config_error(f"{path} describes a mixture of experts, and only plain Llama models are supported")
    scaling = raw.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise config_error(f"{path} asks for RoPE scaling '{described(scaling)}', and only Llama 3's is supported")


def _model_config(header: Header) -> ModelConfig:
    raw = header.metadata
    d_model, n_heads = int(raw["llama.embedding_length"]), int(raw["llama.attention.head_count"])
    head_dim = int(raw.get("llama.attention.key_length") or d_model // n_heads)
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if raw.get(key, head_dim) != head_dim:
            raise config_error(
                f"{key} is {described(raw[key])} in heads of {head_dim}, and only whole heads are supported"
            )
    vocab_size = header.tensors["token_embd.weight"].shape[0]
    bos_id, stop_ids = special_ids(vocab_size)
    if "tokenizer.ggml.eos_token_id" in raw:
        words = raw.get("tokenizer.ggml.tokens")
        words = words if isinstance(words, list) else []
        marked = [raw.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        ids = [*marked, *(words.index(word) for word in STOP_WORDS if word in words)]
        stop_ids = tuple(dict.fromkeys(int(each) for each in ids if each is not None))
    return ModelConfig(
        vocab_size=int(raw.get("llama.vocab_size") or vocab_size),
        d_model=d_model,
        n_layers=int(raw["llama.block_count"]),
        n_heads=n_heads,
        n_kv_heads=int(raw.get("llama.attention.head_count_kv") or n_heads),
        head_dim=head_dim,
        d_ff=int(raw["llama.feed_forward_length"]),
        norm_eps=float(str(np.float32(raw["llama.attention.layer_norm_rms_epsilon"]))),  # 1e-05, not 9.99999974e-06
        rope_theta=float(raw.get("llama.rope.freq_base") or 10000.0),
        rope_scaling=None,
        max_context=int(raw["llama.context_length"]),
        tied="output.weight" not in header.tensors,
        bos_id=int(raw.get("tokenizer.ggml.bos_token_id", bos_id)),
        stop_ids=stop_ids,
    )


def _rope_factors(path: Path, header: Header) -> Tensor | None:
    name = "rope_freqs.weight"
    if name not in header.tensors:
        return None
    with ExitStack() as stack:
        weights = GGUFWeights(path, stack, header)
        return weights.rows(name, 0, weights.shapes[name][0]).float().clone()


def _with_rope(config: ModelConfig, factors: Tensor | None) -> ModelConfig:
    if factors is None or bool((factors == 1).all()):
        return config
    from llama_3.model import Rope  # here, since reading metadata needs no model

    explicit = replace(config, rope_factors=tuple(factors.tolist()))
    known = replace(config, rope_scaling=RopeScaling(float(factors.max()), 1.0, 4.0, 8192))
    expected = Rope(config).frequencies() / Rope(known).frequencies()
    return known if torch.allclose(expected, factors, rtol=1e-5) else explicit


class GGUFWeights:
    """Tensors under llama.cpp's names; quantised ones come back in float32, a block of rows at a time."""

    def __init__(self, path: Path, stack: ExitStack, header: Header | None = None) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants  # a quarter second, and only needed for weights

        self._file = stack.enter_context(RawFile(path))
        self._dequantize, self._kinds = quants.dequantize, GGMLQuantizationType
        self._plain = {int(GGMLQuantizationType[name]): dtype for name, dtype in PLAIN.items()}
        self._stored = (header or read_header(path)).tensors
        self.shapes = {name: each.shape for name, each in self._stored.items()}
        self._row_bytes: dict[str, int] = {}
        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        for name, each in self._stored.items():
            block, in_bytes = sizes.get(each.kind, (1, 0))
            if not in_bytes or not self._can_read(each.kind, in_bytes):
                kind = self._kinds(each.kind).name if in_bytes else each.kind
                raise config_error(
                    f"{path} holds {described(name)} in {kind}, which cannot be read", "use a Q8_0 or F16 file"
                )
            row = math.prod(each.shape[1:])
            if not each.shape or row % block:
                raise damaged(path, f"rows of {described(name)} are not whole blocks of {block} numbers")
            self._row_bytes[name] = row // block * in_bytes
            if each.offset + each.shape[0] * self._row_bytes[name] > self._file.size:
                raise damaged(path, f"{described(name)} reaches beyond its end")

    def _can_read(self, kind: int, in_bytes: int) -> bool:
        if kind in self._plain:
            return True
        try:
            self._dequantize(np.zeros((1, in_bytes), np.uint8), self._kinds(kind))
        except NotImplementedError:
            return False
        return True

    def dtype(self, name: str) -> torch.dtype:
        """The dtype a tensor is stored in, bfloat16 where anything in the file is quantised."""
        if all(each.kind in self._plain for each in self._stored.values()):
            return self._plain[self._stored[name].kind]
        return torch.bfloat16

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, good until the next call."""
        stored, width = self._stored[name], self._row_bytes[name]
        data = self._file.read(stored.offset + start * width, (stop - start) * width)
        shape = (stop - start, *stored.shape[1:])
        if stored.kind in self._plain:
            return data.view(self._plain[stored.kind]).view(shape)
        with np.errstate(all="ignore"):  # numbers that are not finite are found where the block arrives
            blocks = self._dequantize(data.numpy().reshape(stop - start, width), self._kinds(stored.kind))
        return torch.from_numpy(blocks).view(shape)


PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
