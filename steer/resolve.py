"""Where a written strength meets its SAE: `1.1x` and `30%` become raw numbers, and what cannot run is refused.

So is an SAE that cannot belong to the model, and an index that cannot belong to the SAE.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from labels.index import LabelIndex
from llama_3.config import ModelConfig
from llama_3.hooks import HookPoint
from sae.compiled import CompiledEdit, CompiledSet, Place
from sae.model import SAE
from steer.edits import Edit, SteeringSet, Strength, check_latent, span_of
from steer.errors import EXPLAINED, SteerError
from steer.session import Readout
from steer.vectors import load_vector

Compiled = Mapping[HookPoint, CompiledSet]
"""What acts at each hook point; a point where nothing does is not in it."""
EditAt = tuple[HookPoint, CompiledEdit]
_PLACE_OF: dict[str, Place] = {
    "all": "all",
    "all+special": "all",
    "prompt": "prompt",
    "generated": "generated",
    "assistant": "assistant",
    "last": "last",
}

LARGEST = 3.4e38
"""The largest raw strength: about that of float32, in which edits are computed."""


class Resolver:
    """Resolves edits against the SAEs of one model by their hook points, the first being the one meant by default."""

    def __init__(
        self, config: ModelConfig, saes: Mapping[HookPoint, SAE], doubts: Mapping[HookPoint, str] | None = None
    ) -> None:
        """`doubts` says of SAEs why they cannot be the right ones; nothing is steered with those."""
        self._config, self._saes, self._doubts = config, dict(saes), dict(doubts or {})
        self._first = next(iter(self._saes), None)

    def compile(self, steering: SteeringSet, known: dict[Edit, EditAt] | None = None) -> Compiled:
        """By hook point, the live edits with raw strengths; every SAE's point where the error is dropped.

        `known` holds what edits came to before and is added to: their files are not read again. A `SteerError` for an
        edit that cannot run here, and for an error that is dropped where there is no SAE or a wrong one.
        """
        known = {} if known is None else known
        by_hook: dict[HookPoint, list[CompiledEdit]] = {}
        for edit in steering.live:
            if edit not in known:
                self.check(edit)
                known[edit] = self.edit(edit)
            hook, compiled = known[edit]
            by_hook.setdefault(hook, []).append(compiled)
        drop = steering.error == "drop" and not steering.bypass
        if drop and not self._saes:
            raise SteerError("there is no SAE whose error could be dropped", f"keep it, or {self._loaded()}")
        for hook in self._saes if drop else ():
            self._check_trusted(hook)
            by_hook.setdefault(hook, [])
        return {
            hook: CompiledSet(tuple(edits), drop and hook in self._saes, steering.special_tokens, steering.factor)
            for hook, edits in by_hook.items()
        }

    def edit(self, edit: Edit) -> EditAt:
        """One edit, already checked, as the steerer at its hook point takes it."""
        hook, span = self._hook(edit), span_of(edit.place) or (0, 0)
        direction_D, source = None, ""
        if edit.kind == "vector":
            direction_D, source = load_vector(edit.file, hook, self._config)
        return hook, CompiledEdit(
            edit.kind,
            -1 if edit.latent is None else edit.latent,
            self._raw(edit),
            edit.if_on,
            _PLACE_OF.get(edit.place, "range"),
            edit.place == "all+special",
            *span,
            other=edit.when.latent if edit.when else None,
            above=self._in_units(edit.when.above, edit.when.latent, hook) if edit.when else 0.0,
            lasts=edit.lasts,
            ramp=edit.ramp,
            decay=edit.decay,
            source=source,
            direction_D=direction_D,
        )

    def check(self, edit: Edit) -> None:
        """`SteerError` when the edit cannot run here: no SAE at its hook point, a latent out of range, a unit without
        its reference, a file that is no vector of the model's width."""
        hook = self._hook(edit)
        if edit.kind != "vector" or edit.when is not None:
            if hook not in self._saes:
                raise SteerError(f"`{edit}` needs an SAE at {hook}, and none is loaded there", self._loaded())
            self._check_trusted(hook)
        for latent in (edit.latent, edit.when.latent if edit.when else None):
            if latent is not None:
                self.check_latent(latent, hook)
        if edit.when:
            self._in_units(edit.when.above, edit.when.latent, hook)
        if edit.kind == "vector":
            load_vector(edit.file, hook, self._config)
        self._raw(edit)

    def check_latent(self, latent: int, hook: HookPoint | None = None) -> None:
        """`SteerError` when the SAE at a hook point, by default the first one, has no such latent."""
        if (sae := self._sae(hook)) is not None:
            check_latent(latent, sae.config.d_sae)

    def maximum(self, latent: int, hook: HookPoint | None = None) -> float | None:
        """The latent's recorded max, or None without statistics."""
        sae = self._sae(hook)
        return float(sae.stats.max_F[latent]) if sae is not None and sae.stats else None

    def readout(self, edit: Edit) -> Readout | None:
        """The edit's strength in all units; None for what has none, for `scale`, and where it cannot run."""
        if edit.strength is None or edit.kind == "scale":
            return None
        try:
            self.check(edit)
        except EXPLAINED:
            return None
        hook = self._hook(edit)
        raw, sae = self._raw(edit), self._sae(hook)
        maximum = self.maximum(edit.latent, hook) if edit.latent is not None else None
        resid_norm = sae.stats.resid_norm if sae is not None and sae.stats else 0.0
        of_norm = 100 * raw * self._norm(edit, hook) / resid_norm if resid_norm else None
        return Readout(raw, raw / maximum if maximum else None, of_norm)

    def _check_trusted(self, hook: HookPoint) -> None:
        if hook in self._doubts:
            raise SteerError(
                f"nothing is steered with a wrong SAE: {self._doubts[hook]}",
                "`steer doctor` with the same --model and --sae says what is wrong; `--trust-sae` steers all the same",
            )

    def _sae(self, hook: HookPoint | None) -> SAE | None:
        hook = hook or self._first
        return self._saes.get(hook) if hook is not None else None

    def _hook(self, edit: Edit) -> HookPoint:
        if edit.hook:
            hook = HookPoint.parse(edit.hook)
            if hook.layer >= self._config.n_layers:
                raise SteerError(f"`{edit}` acts in block {hook.layer}: the model has {self._config.n_layers}, from 0")
            return hook
        if self._first is None:
            if edit.kind == "vector":
                raise SteerError(f"`{edit}` does not say where", "add the hook point: `at blocks.5.hook_resid_post`")
            raise SteerError(f"`{edit}` needs an SAE, and none is loaded", self._loaded())
        return self._first

    def _loaded(self) -> str:
        loaded = ", ".join(str(hook) for hook in self._saes)
        return f"loaded: {loaded}; `--sae FOLDER` may be given several times" if loaded else "pass `--sae FOLDER`"

    def _raw(self, edit: Edit) -> float:
        if edit.strength is None:
            return 0.0
        hook, strength = self._hook(edit), edit.strength
        raw = self._of_norm(edit, hook) if strength.unit == "norm" else self._in_units(strength, edit.latent, hook)
        if not abs(raw) <= LARGEST:
            raise SteerError(f"the strength of `{edit}` is more than a 32-bit number holds", "write a smaller one")
        return raw

    def _in_units(self, strength: Strength, latent: int | None, hook: HookPoint) -> float:
        """A raw strength, or one in units of a latent's max."""
        if strength.unit == "raw":
            return strength.number
        maximum = self.maximum(latent, hook) if latent is not None else None
        if not maximum:
            raise SteerError(
                f"latent {latent} has no recorded max, so `{strength}` means nothing",
                "write a raw strength (`13.6`) or a share of the residual norm (`30%`)",
            )
        return strength.number * maximum

    def _of_norm(self, edit: Edit, hook: HookPoint) -> float:
        sae = self._sae(hook)
        assert edit.strength is not None
        if sae is None or sae.stats is None or not sae.stats.resid_norm:
            what = "this SAE has no residual norm" if sae is not None else f"no residual norm is known at {hook}"
            raise SteerError(f"{what}, so `{edit.strength}` means nothing", "write a raw strength (`13.6`)")
        if not (norm := self._norm(edit, hook)):
            of = f"decoder direction of latent {edit.latent}" if edit.latent is not None else f"vector in {edit.file}"
            raise SteerError(
                f"the {of} is zero, so `{edit.strength}` means nothing",
                "choose another: this one adds nothing at any strength",
            )
        return edit.strength.number / 100 * sae.stats.resid_norm / norm

    def _norm(self, edit: Edit, hook: HookPoint) -> float:
        """Norm of what a unit of the edit adds to a residual of the median norm."""
        if edit.kind == "vector":
            return float(load_vector(edit.file, hook, self._config)[0].norm())
        sae = self._sae(hook)
        assert sae is not None and edit.latent is not None
        resid_norm = sae.stats.resid_norm if sae.stats else 1.0
        return float(sae.decoder_direction(edit.latent).norm()) * sae.scale_at(resid_norm)


def hook_of(sae: SAE) -> HookPoint:
    """Where in a model an SAE stands; a `SteerError` for one that was trained on rows from elsewhere."""
    if not sae.config.hook:
        raise SteerError(
            "this SAE stands nowhere in a model: the rows it was trained on were not captured from one",
            "pass one that was trained on what `steer capture` wrote",
        )
    return HookPoint.parse(sae.config.hook)


def by_hook(saes: Sequence[SAE]) -> dict[HookPoint, SAE]:
    """SAEs by where they stand, in their order; a `SteerError` for two at one hook point."""
    found: dict[HookPoint, SAE] = {}
    for sae in saes:
        if (hook := hook_of(sae)) in found:
            raise SteerError(f"two SAEs stand at {hook}", "load one of them")
        found[hook] = sae
    return found


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
