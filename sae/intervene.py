"""`Steerer`: the callable that stands at a hook point, reads latents and applies compiled edits.

It happens to have the shape of a hook, `(resid_BTD, span) -> resid_BTD`, and knows nothing else of a model. Edits
arrive compiled: raw strengths, plain places. With no live edit and nothing to record it returns its argument itself,
so logits stay bit-identical to those without an SAE. All arithmetic is float32; the sum is rounded once to the stream's
dtype.

    f = encode(x),  a = f_i,  d = W_dec[i]          every edit of a set reads this same f; their deltas are summed
                                                    d is scaled as the SAE's output at x is, by the unedited x
    add v       v * d
    clamp v     (v - a) * d          `if on`: only where a > 0
    scale s     (s - 1) * a * d
    ablate      -a * d
    bias v      decode(f') - decode(f),  f' = act(pre + v * e_i)

Letters: B rows, T tokens, D d_model, F latents, K kept latents, R the rows of a batch that share one set.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from sae.model import SAE, Latents


class SpanLike(Protocol):
    """What a steerer asks of the model's span: which tokens of which rows these are, and which are generated."""

    @property
    def positions_BT(self) -> Tensor: ...
    @property
    def tokens_BT(self) -> Tensor: ...
    @property
    def rows(self) -> Sequence[int]: ...
    @property
    def generated_BT(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class CompiledEdit:
    """An edit with its strength resolved to a raw number."""

    kind: Literal["add", "clamp", "scale", "ablate", "bias"]
    latent: int
    value: float = 0.0
    if_on: bool = False
    place: Literal["all", "prompt", "generated"] = "all"


@dataclass(frozen=True, slots=True)
class CompiledSet:
    """The live edits of one row, and what becomes of the reconstruction error."""

    edits: tuple[CompiledEdit, ...] = ()
    drop_error: bool = False
    special_tokens: bool = False

    def __bool__(self) -> bool:
        return bool(self.edits) or self.drop_error

    def at(self, generated: bool) -> CompiledSet:
        """What of the set can act at a position of the prompt, or from its last position on (`generated`)."""
        places = ("all", "generated") if generated else ("all", "prompt")
        kept = tuple(edit for edit in self.edits if edit.place in places)
        return CompiledSet(kept, self.drop_error, self.special_tokens) if kept or self.drop_error else NO_EDITS


Trace = Tensor
"""What one edit did to one row, (5, T), float32, on the device: the position; 1 where it acted, else 0; the latent's
activation there before; what the encoder reads of the latent in the edited stream, for topk before the race for k
places; 1 where a `bias` did not bring its latent into the active set. The last three are 0 where it did not act."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What one edit did to one row, summed."""

    positions: int
    """Positions where it acted."""
    before: float | None
    """Mean activation of the latent there, None where it never acted."""
    after: float | None
    """Mean of what the encoder reads of it in the edited stream."""
    lost: int
    """Positions where a `bias` left its latent off."""
    first: int | None
    """First and last position where it acted."""
    last: int | None

    @classmethod
    def of(cls, traces: Sequence[Trace]) -> Tally:
        """The sums of traces, copied from the device at once."""
        trace_5P = torch.cat(list(traces), 1).cpu().double()
        positions_P = trace_5P[0, trace_5P[1] > 0]
        if not len(positions_P):
            return cls(0, None, None, 0, None, None)
        acted, before, after, lost = trace_5P[1:].sum(1).tolist()
        first, last = int(positions_P.min()), int(positions_P.max())
        return cls(int(acted), before / acted, after / acted, int(lost), first, last)


@dataclass(slots=True)
class Record:
    """The latents of one call, before any edit; `readable_BT` is False where the SAE is not read."""

    rows: Sequence[int]
    positions_BT: Tensor
    latents: Latents
    readable_BT: Tensor


NO_EDITS = CompiledSet()


@dataclass(slots=True)
class Steerer:
    """Edits and reads the residual stream at one hook point with one SAE.

    `sets` maps logical rows to what runs there and may be changed between forward passes; rows left out run unedited.
    `special` holds the token ids that, like the first token, are neither read nor (by default) edited.
    """

    sae: SAE
    special: Collection[int] = ()
    recording: bool = False
    sets: Mapping[int, CompiledSet] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    """One per call while `recording`, oldest first; whoever reads them takes them out."""
    traces: dict[tuple[int, CompiledEdit], list[Trace]] = field(default_factory=dict)
    """By row and edit, one per call in which the edit was in the row's set."""
    applied: dict[int, int] = field(default_factory=dict)
    """Forward passes in which a row's set had at least one live edit."""
    _special: Tensor | None = None

    def __call__(self, resid_BTD: Tensor, span: SpanLike) -> Tensor:
        groups: dict[CompiledSet, list[int]] = {}
        for place, row in enumerate(span.rows):
            compiled = self.sets.get(row, NO_EDITS)
            if compiled:
                groups.setdefault(compiled, []).append(place)
                self.applied[row] = self.applied.get(row, 0) + 1
        if not groups and not self.recording:
            return resid_BTD
        x_BTD = resid_BTD.float()
        positions_BT = span.positions_BT
        real_BT = positions_BT >= 0
        readable_BT = (positions_BT > 0) & ~self._is_special(span.tokens_BT)
        needs_pre = any(edit.kind == "bias" for compiled in groups for edit in compiled.edits)
        pre_BTF = self.sae.pre_activations(x_BTD) if needs_pre else None
        latents = self.sae.encode(x_BTD) if pre_BTF is None else self.sae.activate(pre_BTF)
        if self.recording:
            self.records.append(Record(tuple(span.rows), positions_BT, latents, readable_BT))
        if not groups:
            return resid_BTD
        edited_BTD = resid_BTD.clone()
        for compiled, places in groups.items():
            whole = len(places) == len(span.rows)
            pick = slice(None) if whole else torch.tensor(places, device=x_BTD.device)
            f = Latents(latents.indices[pick], latents.values[pick])
            allowed_RT = (real_BT if compiled.special_tokens else readable_BT)[pick]
            generated_RT = span.generated_BT[pick]
            x_RTD = x_BTD[pick]
            pre_RTF = pre_BTF[pick] if pre_BTF is not None else None
            delta_RTD, acting_ERT, lost_ERT = self._deltas(compiled, x_RTD, f, pre_RTF, allowed_RT, generated_RT)
            y_RTD = x_RTD + delta_RTD
            if compiled.drop_error:
                y_RTD = torch.where(allowed_RT[..., None], self.sae.decode(f, x_RTD) + delta_RTD, y_RTD)
            touched_RT = allowed_RT if compiled.drop_error else acting_ERT.any(0)
            # Untouched positions keep their very bits, whatever the round trip through float32 would do.
            edited_BTD[pick] = torch.where(touched_RT[..., None], y_RTD.to(resid_BTD.dtype), resid_BTD[pick])
            self._trace(compiled, [span.rows[p] for p in places], f, y_RTD, acting_ERT, lost_ERT, positions_BT[pick])
        return edited_BTD

    def _deltas(
        self,
        compiled: CompiledSet,
        x_RTD: Tensor,
        f: Latents,
        pre_RTF: Tensor | None,
        allowed_RT: Tensor,
        generated_RT: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The summed deltas (R, T, D); where each edit acted and where a bias lost the race, both (E, R, T)."""
        scale_RT1 = self.sae.scale(x_RTD)
        delta_RTD = torch.zeros_like(x_RTD)
        acting_ERT = torch.zeros(len(compiled.edits), *allowed_RT.shape, dtype=torch.bool, device=x_RTD.device)
        lost_ERT = torch.zeros_like(acting_ERT)
        for number, edit in enumerate(compiled.edits):
            a_RT = activation_of(f, edit.latent)
            where_RT = allowed_RT
            if edit.place != "all":
                where_RT = where_RT & (generated_RT if edit.place == "generated" else ~generated_RT)
            if edit.if_on:
                where_RT = where_RT & (a_RT > 0)
            acting_ERT[number] = where_RT
            match edit.kind:
                case "bias":
                    assert pre_RTF is not None
                    pushed_RTF = pre_RTF.clone()
                    pushed_RTF[..., edit.latent] += edit.value
                    pushed = self.sae.activate(pushed_RTF)
                    lost_ERT[number] = where_RT & (activation_of(pushed, edit.latent) <= 0)
                    change_RTD = self.sae.decode(pushed, x_RTD) - self.sae.decode(f, x_RTD)
                    delta_RTD += torch.where(where_RT[..., None], change_RTD, 0.0)
                    continue
                case "add":
                    amount_RT = torch.full_like(a_RT, edit.value)
                case "clamp":
                    amount_RT = edit.value - a_RT
                case "scale":
                    amount_RT = (edit.value - 1.0) * a_RT
                case "ablate":
                    amount_RT = -a_RT
            amount_RT = torch.where(where_RT, amount_RT, 0.0)
            delta_RTD += amount_RT[..., None] * scale_RT1 * self.sae.decoder_direction(edit.latent)
        return delta_RTD, acting_ERT, lost_ERT

    def _trace(
        self,
        compiled: CompiledSet,
        rows: Sequence[int],
        f: Latents,
        y_RTD: Tensor,
        acting_ERT: Tensor,
        lost_ERT: Tensor,
        positions_RT: Tensor,
    ) -> None:
        """Note what every edit did in this call, on the device."""
        for edit in dict.fromkeys(compiled.edits):  # an edit that stands twice in a set acts at each position once more
            number = compiled.edits.index(edit)
            where_RT = acting_ERT[number].float()
            before_RT, after_RT = activation_of(f, edit.latent), self.sae.read(y_RTD, edit.latent)
            columns = positions_RT, where_RT, where_RT * before_RT, where_RT * after_RT, lost_ERT[number]
            trace_R5T = torch.stack([column.float() for column in columns], 1)
            for trace_5T, row in zip(trace_R5T, rows, strict=True):
                self.traces.setdefault((row, edit), []).append(trace_5T)

    def _is_special(self, tokens_BT: Tensor) -> Tensor:
        if not self.special:
            return torch.zeros_like(tokens_BT, dtype=torch.bool)
        if self._special is None or self._special.device != tokens_BT.device:
            self._special = torch.tensor(sorted(self.special), device=tokens_BT.device)
        return torch.isin(tokens_BT, self._special)


def activation_of(latents: Latents, latent: int) -> Tensor:
    """The activation (...) of one latent in sparse latents (..., K): 0 where it is not among the kept ones."""
    return torch.where(latents.indices == latent, latents.values, 0.0).sum(-1)
