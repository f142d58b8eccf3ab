"""What a Llama is made of, read from a Hugging Face folder.

`read_config` turns `config.json` into numbers the model needs and refuses, in one sentence, every variant whose
arithmetic differs from Llama 3's (other architectures, other RoPE scalings, biases). Absent keys take the values
transformers gives them. Token ids that end a reply are the union of `config.json` and `generation_config.json`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of slow RoPE frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


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
    """What each RoPE frequency (head_dim / 2 of them) is divided by, where a file lists them; replaces the scaling."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_context"):
            if getattr(self, name) < 1:
                raise config_error(f"{name} is {getattr(self, name)} and must be at least 1")
        if self.n_heads % self.n_kv_heads:
            raise config_error(f"{self.n_heads} attention heads cannot share {self.n_kv_heads} key-value heads evenly")
        if self.head_dim % 2:
            raise config_error(f"head_dim is {self.head_dim} and RoPE needs an even number")


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling the makers of a model recommend."""

    temperature: float = 0.7
    top_p: float = 0.95


def config_error(sentence: str, hint: str | None = None) -> ValueError:
    """The error for a model folder that cannot be used; `hint` names the next step."""
    error = ValueError(sentence)
    error.hint = hint  # type: ignore[attr-defined]  # exceptions carry our hint as a plain attribute
    return error


def read_config(folder: Path | str) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face model folder; ValueError or OSError names what is missing or unsupported."""
    folder = Path(folder)
    path = folder / "config.json"
    raw = read_json(path)
    if raw is None:
        if not folder.is_dir():
            error = FileNotFoundError(f"there is no model folder {folder}")
        else:
            error = FileNotFoundError(f"there is no config.json in {folder}")
        error.hint = "pass a folder in Hugging Face layout: config.json, model.safetensors, tokenizer.model"  # type: ignore[attr-defined]
        raise error
    _refuse_other_models(raw, path)
    try:
        return _model_config(raw, path, folder)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        if hasattr(error, "hint"):  # already a sentence of ours
            raise
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else f"a value has the wrong type ({error})"
        raise config_error(f"{path} does not describe a Llama: {what}") from error


def _model_config(raw: dict[str, Any], path: Path, folder: Path) -> ModelConfig:
    n_heads = int(raw["num_attention_heads"])
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    stop_ids = [*_ids(raw.get("eos_token_id")), *_ids((_generation_config(folder)).get("eos_token_id"))]
    return ModelConfig(
        vocab_size=int(raw["vocab_size"]),
        d_model=int(raw["hidden_size"]),
        n_layers=int(raw["num_hidden_layers"]),
        n_heads=n_heads,
        n_kv_heads=int(raw.get("num_key_value_heads") or n_heads),
        head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // n_heads),
        d_ff=int(raw["intermediate_size"]),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(rope, path),
        max_context=int(raw.get("max_position_embeddings", 2048)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        bos_id=next(iter(_ids(raw.get("bos_token_id"))), 1),
        stop_ids=tuple(dict.fromkeys(stop_ids)),
    )


def _refuse_other_models(raw: dict[str, Any], path: Path) -> None:
    kinds = raw.get("architectures")
    kind = kinds[0] if isinstance(kinds, list) and kinds else raw.get("model_type")
    if kind not in ("LlamaForCausalLM", "llama"):
        raise config_error(f"{path} describes {kind}, and only Llama models (LlamaForCausalLM) are supported")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise config_error(f"{path} sets {key}, and Llama models with biases are not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise config_error(f"{path} has hidden_act {raw['hidden_act']!r}, and only 'silu' is supported")
    if "quantization_config" in raw:
        raise config_error(f"{path} describes quantised weights", "use the folder with the original bf16 weights")


def _rope_scaling(rope: dict[str, Any], path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise config_error(f"{path} asks for RoPE scaling {kind!r}, and only 'llama3' is supported")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_context=int(rope["original_max_position_embeddings"]),
    )


def read_generation_defaults(folder: Path | str) -> GenerationDefaults:
    """Temperature and top-p of `generation_config.json`, else 0.7 and 0.95; greedy where it says `do_sample: false`."""
    raw = _generation_config(Path(folder))
    plain = GenerationDefaults()
    temperature, top_p = raw.get("temperature"), raw.get("top_p")
    if raw.get("do_sample") is False:
        temperature = 0.0
    try:
        return GenerationDefaults(
            plain.temperature if temperature is None else float(temperature),
            plain.top_p if top_p is None else float(top_p),
        )
    except (TypeError, ValueError) as error:
        path = Path(folder) / "generation_config.json"
        raise config_error(f"{path} has a temperature or top_p that is no number: {error}") from error


def _generation_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "generation_config.json") or {}


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, None where there is no such file; ValueError where it is not a JSON object."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise config_error(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise config_error(f"{path} holds a {type(raw).__name__} where a JSON object was expected")
    return raw
