"""What formats ask of the SAE, answered by a loaded engine. Letters: D d_model."""

from __future__ import annotations

from torch import Tensor

from llama_3.hooks import HookPoint
from sae.model import SAE
from steer.edits import Edit, Strength
from steer.engine import Engine
from steer.errors import SteerError
from steer.vectors import load_vector


class EngineDecoder:
    """The `Decoder` of an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def raw(self, edit: Edit) -> float:
        self._engine.check(edit)
        told = self._engine.readout(edit)
        return told.raw if told else 0.0

    def maximum(self, edit: Edit) -> float | None:
        told = self._engine.readout(Edit(edit.latent, "add", Strength(1.0, "max"), hook=edit.hook))
        return told.raw if told else None

    def row(self, edit: Edit) -> list[float]:
        return self._row(edit).double().tolist()

    def along_bias(self, edit: Edit) -> float:
        row_D, sae = self._row(edit).double(), self._sae(edit)
        return float(sae.b_dec_D.double().cpu() @ row_D / row_D.norm()) if bool(row_D.any()) else 0.0

    def scaled(self, edit: Edit) -> bool:
        return edit.kind != "vector" and self._sae(edit).config.normalise != "none"

    def _row(self, edit: Edit) -> Tensor:
        if edit.kind == "vector":
            return load_vector(edit.file, self._hook(edit), self._engine.model.config)[0]
        assert edit.latent is not None
        return self._sae(edit).decoder_direction(edit.latent).cpu()

    def _sae(self, edit: Edit) -> SAE:
        sae = self._engine.saes.get(hook := self._hook(edit))
        if sae is None:
            raise SteerError(f"`{edit}` needs an SAE at {hook}, and none is loaded there", "pass `--sae FOLDER`")
        return sae

    def _hook(self, edit: Edit) -> HookPoint:
        if edit.hook:
            return HookPoint.parse(edit.hook)
        if not self._engine.saes:
            raise SteerError(f"`{edit}` does not say where it acts, and no SAE is loaded", "pass `--sae FOLDER`")
        return next(iter(self._engine.saes))
