"""An SAE as a folder: `cfg.json`, `sae.safetensors`, and where known `stats.safetensors` and `manifest.json`.

`cfg.json` begins `"format": "steer-sae", "version": 1`, which tells it from other tools' files of the same names. It is
written last, so a folder that has one is whole. Every file is written under a temporary name and then moved into place.
Reading trusts nothing: only safetensors and JSON, every shape checked against `cfg.json`, no NaN let through.
"""

import json
import os
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sae.model import SAE, SAEConfig

FORMAT, VERSION = "steer-sae", 1


class SAEFileError(ValueError):
    """A file of an SAE folder is missing, damaged or not ours: one sentence, with a `hint` where there is one."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Stats:
    """How the latents of an SAE behaved on its reference text."""

    max_F: Tensor
    """largest activation; 0 for a latent that was never active"""
    mean_on_F: Tensor
    """mean activation over the tokens on which the latent was active; 0 if there were none"""
    density_F: Tensor
    """share of tokens on which the latent was active"""
    resid_norm: float
    """median norm of the residual at the hook, first and special tokens left out"""
    tokens: int
    """tokens measured"""

    def save(self, file: Path | str) -> None:
        tensors = {"max": self.max_F, "mean_on": self.mean_on_F, "density": self.density_F}
        scalars = {"resid_norm": torch.tensor(self.resid_norm), "tokens": torch.tensor(self.tokens)}
        _write_tensors(Path(file), {name: tensor.float() for name, tensor in tensors.items()} | scalars)

    @classmethod
    def load(cls, file: Path | str, d_sae: int) -> "Stats":
        """The statistics in `file`, which must be of `d_sae` latents."""
        shapes = {"max": (d_sae,), "mean_on": (d_sae,), "density": (d_sae,), "resid_norm": (), "tokens": ()}
        read = _read_tensors(Path(file), shapes)
        norm, tokens = float(read["resid_norm"]), int(read["tokens"])
        return cls(read["max"].float(), read["mean_on"].float(), read["density"].float(), norm, tokens)


def save_sae(
    folder: Path | str,
    sae: SAE,
    stats: Stats | None = None,
    manifest: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the SAE's folder, weights in `dtype` (default: as they are). Without `stats` or `manifest` the SAE's own
    are written; an SAE without gets no such file, and one left there by another SAE is removed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").unlink(missing_ok=True)
    weights = {name: weight.detach().to(dtype or weight.dtype) for name, weight in sae.weights.items()}
    _write_tensors(folder / "sae.safetensors", weights)
    if stats := stats or sae.stats:
        stats.save(folder / "stats.safetensors")
    else:
        (folder / "stats.safetensors").unlink(missing_ok=True)
    if manifest := manifest or sae.manifest:
        _write_json(folder / "manifest.json", manifest)
    else:
        (folder / "manifest.json").unlink(missing_ok=True)
    _write_json(folder / "cfg.json", {"format": FORMAT, "version": VERSION} | asdict(sae.config))


def write_stats(folder: Path | str, stats: Stats) -> None:
    """Replaces the statistics of the SAE in `folder`."""
    stats.save(Path(folder) / "stats.safetensors")


def load_sae(folder: Path | str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> SAE:
    """The SAE in `folder` with its `stats` (None if there are none) and `manifest` (empty if there is none).

    Raises `SAEFileError` if a file is missing, damaged, of another format or does not fit `cfg.json`.
    """
    folder = Path(folder)
    config = read_config(folder)
    d, n = config.d_in, config.d_sae
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (n, d), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,)}
    shapes |= {name: (n,) for name in config.function.extra}
    read = _read_tensors(folder / "sae.safetensors", shapes, f", which an SAE of kind {config.activation} has")
    sae = SAE(config, dtype=dtype, device=device)
    for name, weight in sae.weights.items():
        weight.data.copy_(read[name])
    if (folder / "stats.safetensors").exists():
        sae.stats = Stats.load(folder / "stats.safetensors", n)
    if (folder / "manifest.json").exists():
        sae.manifest = _read_json(folder / "manifest.json")
    return sae


def read_config(folder: Path | str) -> SAEConfig:
    """The config of the SAE in `folder`, without its weights."""
    file = Path(folder) / "cfg.json"
    if not Path(folder).is_dir():
        raise SAEFileError(f"there is no SAE folder {folder}")
    cfg = _read_json(file)
    if cfg.get("format") != FORMAT:
        raise SAEFileError(
            f"{file} is not the cfg.json of a {FORMAT} folder",
            'ours begins with "format": "steer-sae"; foreign formats must be converted first',
        )
    if cfg.get("version") != VERSION:
        raise SAEFileError(f"{file} has format version {cfg.get('version')!r}; this program reads version {VERSION}")
    values = {field.name: _setting(file, cfg, field) for field in fields(SAEConfig)}
    try:
        return SAEConfig(**values)
    except ValueError as error:
        raise SAEFileError(f"{file} is not usable: {error}") from error


_FIRST = ("d_in", "d_sae", "activation", "k", "hook")
"""What every folder says; other settings came later and have their default where a folder is silent."""
_WORDS = {str: "text", int: "a whole number", bool: "true or false", list: "a list of whole numbers"}


def _setting(file: Path, cfg: dict[str, Any], field: Field[Any]) -> Any:
    """The value of one field of `SAEConfig`."""
    if field.name not in cfg and field.name not in _FIRST:
        return field.default
    value = cfg.get(field.name)
    kind = int if field.name in ("d_in", "d_sae") else list if field.name == "prefixes" else type(field.default)
    if type(value) is not kind or (isinstance(value, list) and any(type(each) is not int for each in value)):
        raise SAEFileError(f"{file} has {field.name} = {value!r}, which is not {_WORDS[kind]}")
    return tuple(value) if isinstance(value, list) else value


def _read_tensors(file: Path, shapes: dict[str, tuple[int, ...]], why: str = "") -> dict[str, Tensor]:
    if not file.is_file():
        raise SAEFileError(f"{file} is missing", "the folder of an SAE holds cfg.json and sae.safetensors")
    try:
        read = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise SAEFileError(f"{file} is damaged or not a safetensors file ({error})", "copy or make it again") from error
    for name, shape in shapes.items():
        if name not in read:
            raise SAEFileError(f"{file} has no tensor {name}{why}")
        if tuple(read[name].shape) != shape:
            raise SAEFileError(f"{file} has {name} of shape {tuple(read[name].shape)}, expected {shape}")
        if read[name].is_floating_point() and not bool(read[name].isfinite().all()):
            raise SAEFileError(f"{file} has NaN or infinite values in {name}", "copy or train it again")
    return read


def _read_json(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SAEFileError(f"{file} is missing", "the folder of an SAE holds cfg.json and sae.safetensors") from error
    except (OSError, ValueError, RecursionError) as error:
        raise SAEFileError(f"{file} is not readable JSON ({error})", "copy or make it again") from error
    if not isinstance(read, dict):
        raise SAEFileError(f"{file} does not hold a JSON object")
    return read


def _write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_bytes(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
    os.replace(temporary, file)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, file)
