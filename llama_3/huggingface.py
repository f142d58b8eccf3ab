"""Hugging Face folders: `config.json` beside safetensors or old `pytorch_model.bin` files, whole or in shards.

Absent keys of `config.json` take the values transformers gives them. Token ids that end a reply are the union of
`config.json` and `generation_config.json`. Names and orientation of the tensors here are the ones the loader speaks.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_3.config import ModelConfig, RopeScaling, described, describing_a_llama, read_json, token_ids
from llama_3.errors import config_error, explained
from llama_3.tensor_files import PickleFile, SafetensorsFile


def read_config(folder: Path) -> ModelConfig:
    """What `config.json` says; FileNotFoundError without one, ValueError for anything but a plain Llama."""
    path = folder / "config.json"
    raw = read_json(path)
    if raw is None:
        raise explained(
            FileNotFoundError, f"there is no config.json in {folder}", "download the model's config.json as well"
        )
    _refuse_other_models(raw, path)
    with describing_a_llama(path):
        return _model_config(raw, path)


def _model_config(raw: dict[str, Any], path: Path) -> ModelConfig:
    n_heads = int(raw["num_attention_heads"])
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    generation = read_json(path.parent / "generation_config.json") or {}
    stop_ids = [*token_ids(raw.get("eos_token_id")), *token_ids(generation.get("eos_token_id"))]
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
        bos_id=next(iter(token_ids(raw.get("bos_token_id"))), 1),
        stop_ids=tuple(dict.fromkeys(stop_ids)),
    )


def _refuse_other_models(raw: dict[str, Any], path: Path) -> None:
    kinds = raw.get("architectures")
    kind = kinds[0] if isinstance(kinds, list) and kinds else raw.get("model_type")
    if kind not in ("LlamaForCausalLM", "llama"):
        raise config_error(
            f"{path} describes {described(kind)}, and only Llama models (LlamaForCausalLM) are supported"
        )
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise config_error(f"{path} sets {key}, and Llama models with biases are not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise config_error(f"{path} has hidden_act '{described(raw['hidden_act'])}', and only 'silu' is supported")
    if raw.get("quantization_config") is not None:
        raise config_error(f"{path} describes quantised weights", "use the folder with the original bf16 weights")


def _rope_scaling(rope: dict[str, Any], path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise config_error(f"{path} asks for RoPE scaling '{described(kind)}', and only 'llama3' is supported")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_context=int(rope["original_max_position_embeddings"]),
    )


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files that `stem`.index.json lists, in order, else `stem` itself; FileNotFoundError names a missing one."""
    index = read_json(folder / f"{stem}.index.json")
    files = [folder / stem]
    if index is not None:
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise config_error(f"{folder / stem}.index.json has no weight_map")
        # An index is somebody else's file: it may only name files that lie beside it.
        files = [folder / Path(name).name for name in sorted(set(map(str, shards.values())))]
    for path in files:
        if not path.is_file():
            raise explained(
                FileNotFoundError,
                f"there is no {described(path.name)} in {folder}",
                "download the model's weights completely",
            )
    return files


class HuggingFaceWeights:
    """Tensors of a folder by name, whichever of its files they lie in; close with the stack they were opened on."""

    def __init__(self, files: list[Path], stack: ExitStack) -> None:
        self._where: dict[str, SafetensorsFile | PickleFile] = {}
        for path in files:
            file: SafetensorsFile | PickleFile
            file = SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)
            stack.enter_context(file)
            self._where.update(dict.fromkeys(file.shapes, file))
        self.shapes = {name: file.shapes[name] for name, file in self._where.items()}

    def dtype(self, name: str) -> torch.dtype:
        """The dtype a tensor is stored in."""
        return self._where[name].dtypes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, good until the next call."""
        return self._where[name].rows(name, start, stop)
