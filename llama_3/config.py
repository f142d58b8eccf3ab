"""What a Llama is made of, and which of the layouts people keep checkpoints in a path holds.

`find_layout` looks at file names only: Hugging Face safetensors, then `pytorch_model.bin`, then Meta's `params.json`
and `consolidated.NN.pth` (also inside `original/`), then one `.gguf` file. `read_config` turns the numbers that lie
beside the weights into a `ModelConfig` and refuses, in one sentence, every variant whose arithmetic differs from Llama
3's. How each layout is read stands in `huggingface.py`, `meta.py` and `gguf_file.py`; they are imported on use, so that
this file stays free of torch.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama_3.errors import config_error, explained

Layout = Literal["safetensors", "bin", "meta", "gguf"]

MOST_LAYERS = 10_000
"""A config that asks for more is damaged; Llama 3.1 405B has 126."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of slow RoPE frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        if not (0 < self.factor < math.inf and 0 < self.low_freq_factor < self.high_freq_factor < math.inf):
            raise config_error(
                f"RoPE scaling by {self.factor} from {self.low_freq_factor} to {self.high_freq_factor} is not possible"
            )
        if self.original_context < 1:
            raise config_error(f"the original context of the RoPE scaling is {self.original_context} tokens")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one Llama."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_context: int
    """Longest sequence in tokens, prompt and reply together."""
    tied: bool
    """The unembedding is the embedding."""
    bos_id: int
    stop_ids: tuple[int, ...]
    rope_factors: tuple[float, ...] | None = None
    """(head_dim/2,): what each RoPE frequency is divided by, where no `rope_scaling` expresses what a file says."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_context"):
            if getattr(self, name) < 1:
                raise config_error(f"{name} is {getattr(self, name)} and must be at least 1")
        if self.n_layers > MOST_LAYERS:
            raise config_error(f"n_layers is {self.n_layers} and must be at most {MOST_LAYERS}")
        if self.n_heads % self.n_kv_heads:
            raise config_error(f"{self.n_heads} attention heads cannot share {self.n_kv_heads} key-value heads evenly")
        if self.head_dim % 2:
            raise config_error(f"head_dim is {self.head_dim} and RoPE needs an even number")
        if not (0 < self.rope_theta < math.inf and 0 <= self.norm_eps < math.inf):
            raise config_error(f"rope_theta {self.rope_theta} and norm_eps {self.norm_eps} must be finite and positive")
        factors = self.rope_factors
        if factors is not None and (len(factors) != self.head_dim // 2 or not all(0 < f < math.inf for f in factors)):
            raise config_error(
                f"{len(factors)} RoPE factors do not fit head_dim {self.head_dim}, or one is not positive"
            )


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling the makers of a model recommend."""

    temperature: float = 0.7
    top_p: float = 0.95


def find_layout(path: Path | str) -> tuple[Layout, Path]:
    """Which layout the weights at `path` have, and the folder (GGUF: the file) they lie in.

    FileNotFoundError when there are none, ValueError for several `.gguf` files.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise config_error(f"{path} is a file and no .gguf", "pass the folder that holds it")
        return "gguf", path
    if not path.is_dir():
        raise explained(
            FileNotFoundError, f"there is no model folder {path}", "pass a folder with weights in it, or a .gguf file"
        )
    for layout, name in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        if any((path / file).exists() for file in (f"{name}.index.json", name)):
            return layout, path  # type: ignore[return-value]  # mypy widens the literals of the tuple
    for folder in (path, path / "original"):
        if (folder / "params.json").exists() or next(folder.glob("consolidated.*.pth"), None):
            return "meta", folder
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        parts = (
            "merge the parts with `llama-gguf-split --merge`" if "-of-" in files[0].name else "pass one of the files"
        )
        raise config_error(f"{path} holds {len(files)} .gguf files, {files[0].name} and others", parts)
    if files:
        return "gguf", files[0]
    raise explained(
        FileNotFoundError,
        f"there is no model.safetensors in {path}, nor pytorch_model.bin, consolidated.00.pth or a .gguf file",
        "download the model's weights completely",
    )


def read_config(folder: Path | str) -> ModelConfig:
    """The `ModelConfig` of a model folder or `.gguf` file; no weights are read beyond file headers.

    ValueError or OSError names, in one sentence, what is missing or unsupported.
    """
    layout, where = find_layout(folder)
    if layout == "meta":
        from llama_3 import meta

        return meta.read_config(where)
    if layout == "gguf":
        from llama_3 import gguf_file

        return gguf_file.read_config(where)
    from llama_3 import huggingface

    return huggingface.read_config(where)


def read_generation_defaults(folder: Path | str) -> GenerationDefaults:
    """Temperature and top-p of `generation_config.json`, else 0.7 and 0.95; greedy where it says `do_sample: false`."""
    path = Path(folder) / "generation_config.json"
    raw = read_json(path) or {}
    plain = GenerationDefaults()
    temperature, top_p = raw.get("temperature"), raw.get("top_p")
    if raw.get("do_sample") is False:
        temperature = 0.0
    try:
        return GenerationDefaults(
            plain.temperature if temperature is None else float(temperature),
            plain.top_p if top_p is None else float(top_p),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise config_error(f"{path} has a temperature or top_p that is no number: {error}") from error


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, None where there is no such file; ValueError where it is not a JSON object."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or a number of 5,000 digits
        raise config_error(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise config_error(f"{path} holds a {type(raw).__name__} where a JSON object was expected")
    return raw


def token_ids(value: Any) -> list[int]:
    """Token ids as JSON holds them: a number, a list of numbers, or nothing; TypeError for anything else."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(each) is not int for each in ids):
        raise TypeError(f"{value!r:.60} is no token id")
    return ids


def described(value: object) -> str:
    """`value` from somebody's file as part of a sentence: on one line, printable, short."""
    return ascii(str(value)[:80])[1:-1]


@contextmanager
def describing_a_llama(path: Path) -> Iterator[None]:
    """Turn what goes wrong while numbers are taken out of `path` into one sentence; our own sentences pass through."""
    try:
        yield
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        if hasattr(error, "hint"):
            raise
        missing = isinstance(error, KeyError)
        what = f"{error.args[0]} is missing" if missing else f"a value has the wrong type ({described(error)})"
        raise config_error(f"{path} does not describe a Llama: {what}") from error
