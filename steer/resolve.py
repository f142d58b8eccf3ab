"""Where a written strength meets its SAE: `1.1x` and `30%` become raw numbers, and what cannot run is refused.

So is an SAE that cannot belong to the model, and an index that cannot belong to the SAE.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from labels.index import LabelIndex
from llama_3.config import ModelConfig
from llama_3.hooks import HookPoint
from sae.intervene import CompiledEdit, CompiledSet
from sae.model import SAE
from steer.edits import Edit, SteeringSet
from steer.errors import SteerError
from steer.session import Readout

LARGEST = 3.4e38
"""The largest raw strength: about that of float32, in which edits are computed."""


class Resolver:
    """Resolves edits against one SAE, or refuses them all where there is none."""

    def __init__(self, sae: SAE | None) -> None:
        self._sae = sae

    def compile(self, steering: SteeringSet) -> CompiledSet:
        """The live edits with raw strengths; a `SteerError` for one that cannot run here."""
        for edit in steering.live:
            self.check(edit)
        drop = steering.error == "drop" and not steering.bypass
        return CompiledSet(tuple(self.edit(edit) for edit in steering.live), drop, steering.special_tokens)

    def edit(self, edit: Edit) -> CompiledEdit:
        """One edit, already checked, as the steerer takes it."""
        return CompiledEdit(edit.kind, edit.latent, self._raw(edit), edit.if_on, edit.place)

    def check(self, edit: Edit) -> None:
        """`SteerError` when the edit cannot run here: no SAE, a latent out of range, a unit without its reference."""
        if self._sae is None:
            raise SteerError(f"`{edit}` needs an SAE, and none is loaded", "pass `--sae FOLDER`")
        self.check_latent(edit.latent)
        self._raw(edit)

    def check_latent(self, latent: int) -> None:
        """`SteerError` when the SAE has no such latent."""
        if self._sae is not None and not 0 <= latent < self._sae.config.d_sae:
            raise SteerError(f"there is no latent {latent}: this SAE has {self._sae.config.d_sae}, from 0")

    def maximum(self, latent: int) -> float | None:
        """The latent's recorded max, or None without statistics."""
        stats = self._sae.stats if self._sae else None
        return float(stats.max_F[latent]) if stats else None

    def readout(self, edit: Edit) -> Readout | None:
        """The edit's strength in all units; None for `ablate`, `scale`, and where it cannot run."""
        if self._sae is None or edit.strength is None or edit.kind == "scale":
            return None
        try:
            self.check(edit)
        except SteerError:
            return None
        raw, maximum, stats = self._raw(edit), self.maximum(edit.latent), self._sae.stats
        of_norm = 100 * raw * self._norm(edit.latent) / stats.resid_norm if stats and stats.resid_norm else None
        return Readout(raw, raw / maximum if maximum else None, of_norm)

    def _raw(self, edit: Edit) -> float:
        raw = self._in_units(edit)
        if not abs(raw) <= LARGEST:
            raise SteerError(f"the strength of `{edit}` is more than a 32-bit number holds", "write a smaller one")
        return raw

    def _in_units(self, edit: Edit) -> float:
        if edit.strength is None or self._sae is None:
            return 0.0
        number, stats = edit.strength.number, self._sae.stats
        if edit.strength.unit == "raw":
            return number
        if edit.strength.unit == "max":
            maximum = self.maximum(edit.latent)
            if not maximum:
                raise SteerError(
                    f"latent {edit.latent} has no recorded max, so `{edit.strength}` means nothing",
                    "write a raw strength (`13.6`) or a share of the residual norm (`30%`)",
                )
            return number * maximum
        if stats is None or not stats.resid_norm:
            raise SteerError(
                f"this SAE has no residual norm, so `{edit.strength}` means nothing", "write a raw strength (`13.6`)"
            )
        if not (norm := self._norm(edit.latent)):
            raise SteerError(
                f"the decoder direction of latent {edit.latent} is zero, so `{edit.strength}` means nothing",
                "choose another latent: this one adds nothing at any strength",
            )
        return number / 100 * stats.resid_norm / norm

    def _norm(self, latent: int) -> float:
        """Norm of what a unit of the latent adds to a residual of the median norm."""
        assert self._sae is not None
        stats = self._sae.stats
        return float(self._sae.decoder_direction(latent).norm()) * self._sae.scale_at(stats.resid_norm if stats else 1)


def hook_of(sae: SAE) -> HookPoint:
    """Where in a model an SAE stands; a `SteerError` for one that was trained on rows from elsewhere."""
    if not sae.config.hook:
        raise SteerError(
            "this SAE stands nowhere in a model: the rows it was trained on were not captured from one",
            "pass one that was trained on what `steer capture` wrote",
        )
    return HookPoint.parse(sae.config.hook)


def check_labels(folder: Path, index: LabelIndex) -> None:
    """Refuse labels that were collected with other weights than those in the SAE's folder."""
    known = index.meta().get("sae/sae.safetensors")
    weights = folder / "sae.safetensors"
    if known is None or not weights.is_file():  # an index or an SAE made by another program
        return
    with weights.open("rb") as handle:
        if hashlib.file_digest(handle, "sha256").hexdigest() != known:
            raise SteerError(
                f"these labels were collected with another SAE than the one in {folder}",
                "pass its own `--labels FILE`, or make them with `steer label collect`",
            )


def check_together(config: ModelConfig, sae: SAE, index: LabelIndex | None) -> None:
    """Refuse an SAE that cannot belong to a model of this config, and labels that speak of another SAE."""
    hook = hook_of(sae)
    if hook.layer >= config.n_layers:
        raise SteerError(f"this SAE stands at {hook}, the model has {config.n_layers} blocks, from 0")
    if sae.config.d_in != (width := hook.width(config)):
        raise SteerError(
            f"this SAE reads vectors of {sae.config.d_in}, those of the model at {hook} have {width}",
            "pass the SAE that was trained on this model",
        )
    meta = index.meta() if index else {}
    for name, own in (("d_sae", str(sae.config.d_sae)), ("hook", sae.config.hook)):
        if meta.get(name, own) != own:
            raise SteerError(
                f"these labels are of an SAE with {name} {meta[name]}, this one has {own}",
                "pass its own `--labels FILE`",
            )
