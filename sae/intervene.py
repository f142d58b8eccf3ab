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
    floor v     (max(a, v) - a) * d
    cap v       (min(a, v) - a) * d
    bias v      decode(f') - decode(f),  f' = act(pre + v * e_i)
    project     -(x . u) * u,  u = d / |d|
    vector v    v * d,  d from a file; needs no SAE

Where and when an edit acts, and with what share of its delta, is told by `sae/gate.py`.
Letters: B rows, T tokens, D d_model, F latents, K kept latents, E edits, R the rows of a batch that share one set.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sae.compiled import NO_EDITS, CompiledEdit, CompiledSet
from sae.gate import Gate, Where
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
    @property
    def prompt_lengths_B(self) -> Tensor: ...
    def head(self, rows: int) -> SpanLike: ...


Trace = Tensor
"""What one edit did to one row, (5, T), float32, on the device: the position; 1 where it acted, else 0; the latent's
activation there before; what the encoder reads of the latent in the edited stream, for topk before the race for k
places; 1 where a `bias` did not bring its latent into the active set. The last three are 0 where it did not act. Of a
vector, which has no latent, before and after are the stream's parts along it."""


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


@dataclass(slots=True)
class Steerer:
    """Edits and reads the residual stream at one hook point, with one SAE or, for vectors alone, with none.

    `sets` maps logical rows to what runs there and may be changed between forward passes; rows left out run unedited.
    `special` holds the token ids that, like the first token, are neither read nor (by default) edited.
    """

    sae: SAE | None
    special: Collection[int] = ()
    recording: bool = False
    sets: Mapping[int, CompiledSet] = field(default_factory=dict)
    gate: Gate = field(default_factory=Gate)
    records: list[Record] = field(default_factory=list)
    """One per call while `recording`, oldest first; whoever reads them takes them out."""
    traces: dict[tuple[int, CompiledEdit | None], list[Trace]] = field(default_factory=dict)
    """By row and edit, one per call in which the edit was in the row's set; under None where the error was dropped."""
    applied: dict[int, int] = field(default_factory=dict)
    """Forward passes in which a row's set had at least one live edit."""
    passing: Collection[int] = ()
    """Rows that are neither read nor edited; they stand behind all others in a batch."""
    _special: Tensor | None = None

    def __call__(self, resid_BTD: Tensor, span: SpanLike) -> Tensor:
        rows = sum(row not in self.passing for row in span.rows)
        if rows == len(span.rows):
            return self._run(resid_BTD, span)
        ours_RTD = resid_BTD[:rows]
        edited_RTD = self._run(ours_RTD, span.head(rows)) if rows else ours_RTD
        return resid_BTD if edited_RTD is ours_RTD else torch.cat([edited_RTD, resid_BTD[rows:]])

    def _run(self, resid_BTD: Tensor, span: SpanLike) -> Tensor:
        groups: dict[CompiledSet, list[int]] = {}
        for place, row in enumerate(span.rows):
            compiled = self.sets.get(row, NO_EDITS)
            if compiled:
                groups.setdefault(compiled, []).append(place)
                self.applied[row] = self.applied.get(row, 0) + 1
        self.gate.keep({row: compiled.edits for row, compiled in self.sets.items()})
        if not groups and not self.recording:
            return resid_BTD
        x_BTD = resid_BTD.float()
        positions_BT = span.positions_BT
        real_BT = positions_BT >= 0
        readable_BT = (positions_BT > 0) & ~self._is_special(span.tokens_BT)
        pre_BTF, latents = self._encode(x_BTD, groups)
        if self.recording and latents is not None:
            self.records.append(Record(tuple(span.rows), positions_BT, latents, readable_BT))
        if not groups:
            return resid_BTD
        last_BT = positions_BT == span.prompt_lengths_B[:, None].to(positions_BT.device) - 1
        edited_BTD = resid_BTD.clone()
        for compiled, places in groups.items():
            begin, end = places[0], places[-1] + 1
            together = len(places) == end - begin  # rows beside each other are looked at where they lie
            pick = slice(begin, end) if together else torch.tensor(places, device=x_BTD.device)
            rows, masks = [span.rows[place] for place in places], (real_BT, readable_BT, span.generated_BT, last_BT)
            where = Where(rows, positions_BT[pick], *(mask[pick] for mask in masks))
            f = Latents(latents.indices[pick], latents.values[pick]) if latents is not None else None
            x_RTD = x_BTD[pick]
            delta_RTD, acting_ERT, lost_ERT = self._deltas(
                compiled, x_RTD, f, pre_BTF[pick] if pre_BTF is not None else None, where
            )
            y_RTD, touched_RT = x_RTD + delta_RTD, acting_ERT.any(0)
            if compiled.drop_error and self.sae is not None and f is not None:
                dropped_RT = where.real_RT if compiled.special_tokens else where.readable_RT
                y_RTD = torch.where(dropped_RT[..., None], self.sae.decode(f, x_RTD) + delta_RTD, y_RTD)
                touched_RT = dropped_RT | touched_RT
                self._note(None, where, dropped_RT)
            # Untouched positions keep their very bits, whatever the round trip through float32 would do.
            edited_BTD[pick] = torch.where(touched_RT[..., None], y_RTD.to(resid_BTD.dtype), resid_BTD[pick])
            self._trace(compiled, where, f, x_RTD, y_RTD, acting_ERT, lost_ERT)
        return edited_BTD

    def _encode(self, x_BTD: Tensor, groups: Collection[CompiledSet]) -> tuple[Tensor | None, Latents | None]:
        """Pre-activations where a bias asks for them, and latents."""
        if self.sae is None:
            return None, None
        if any(edit.kind == "bias" for compiled in groups for edit in compiled.edits):
            pre_BTF = self.sae.pre_activations(x_BTD)
            return pre_BTF, self.sae.activate(pre_BTF)
        return None, self.sae.encode(x_BTD)

    def _deltas(
        self, compiled: CompiledSet, x_RTD: Tensor, f: Latents | None, pre_RTF: Tensor | None, where: Where
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The summed deltas (R, T, D); where each edit acted and where a bias lost the race, both (E, R, T)."""
        scale_RT1 = self.sae.scale(x_RTD) if self.sae is not None else 1.0
        delta_RTD = torch.zeros_like(x_RTD)
        acting_ERT = torch.zeros(len(compiled.edits), *x_RTD.shape[:2], dtype=torch.bool, device=x_RTD.device)
        lost_ERT = torch.zeros_like(acting_ERT)
        for number, edit in enumerate(compiled.edits):
            other_RT = activation_of(f, edit.other) if f is not None and edit.other is not None else None
            acts_RT, share_RT = self.gate.share(edit, where, other_RT, compiled.special_tokens)
            if edit.kind == "vector":
                assert edit.direction_D is not None
                acting_ERT[number] = acts_RT
                delta_RTD += (edit.value * share_RT)[..., None] * edit.direction_D
                continue
            assert self.sae is not None and f is not None, f"{edit.kind} needs an SAE"
            a_RT, d_D = activation_of(f, edit.latent), self.sae.decoder_direction(edit.latent)
            if edit.if_on:
                acts_RT = acts_RT & (a_RT > 0)
            acting_ERT[number] = acts_RT
            match edit.kind:
                case "bias":
                    assert pre_RTF is not None
                    pushed_RTF = pre_RTF.clone()
                    pushed_RTF[..., edit.latent] += edit.value
                    pushed = self.sae.activate(pushed_RTF)
                    lost_ERT[number] = acts_RT & (activation_of(pushed, edit.latent) <= 0)
                    change_RTD = self.sae.decode(pushed, x_RTD) - self.sae.decode(f, x_RTD)
                    delta_RTD += torch.where(acts_RT[..., None], share_RT[..., None] * change_RTD, 0.0)
                    continue
                case "project":
                    u_D = torch.nn.functional.normalize(d_D, dim=0)
                    along_RT = torch.where(acts_RT, share_RT * (x_RTD @ u_D), 0.0)
                    delta_RTD -= along_RT[..., None] * u_D
                    continue
                case "add":
                    amount_RT = torch.full_like(a_RT, edit.value)
                case "clamp":
                    amount_RT = edit.value - a_RT
                case "scale":
                    amount_RT = (edit.value - 1.0) * a_RT
                case "ablate":
                    amount_RT = -a_RT
                case "floor":
                    amount_RT = (edit.value - a_RT).clamp(min=0.0)
                case "cap":
                    amount_RT = (edit.value - a_RT).clamp(max=0.0)
            amount_RT = torch.where(acts_RT, share_RT * amount_RT, 0.0)
            delta_RTD += amount_RT[..., None] * scale_RT1 * d_D
        return delta_RTD * compiled.factor if compiled.factor != 1.0 else delta_RTD, acting_ERT, lost_ERT

    def _trace(
        self,
        compiled: CompiledSet,
        where: Where,
        f: Latents | None,
        x_RTD: Tensor,
        y_RTD: Tensor,
        acting_ERT: Tensor,
        lost_ERT: Tensor,
    ) -> None:
        """Note what every edit did in this call, on the device."""
        for edit in dict.fromkeys(compiled.edits):  # an edit that stands twice in a set acts at each position once more
            number = compiled.edits.index(edit)
            acted_RT = acting_ERT[number].float()
            if edit.direction_D is not None:
                u_D = torch.nn.functional.normalize(edit.direction_D, dim=0)
                before_RT, after_RT = x_RTD @ u_D, y_RTD @ u_D
            else:
                assert self.sae is not None and f is not None
                before_RT, after_RT = activation_of(f, edit.latent), self.sae.read(y_RTD, edit.latent)
            self._note(edit, where, acted_RT, acted_RT * before_RT, acted_RT * after_RT, lost_ERT[number])

    def _note(self, edit: CompiledEdit | None, where: Where, *columns: Tensor) -> None:
        """Keep the columns of a trace behind its positions; those left out are 0."""
        trace_R5T = torch.zeros(len(where.rows), 5, where.positions_RT.shape[1], device=where.positions_RT.device)
        for place, column_RT in enumerate((where.positions_RT, *columns)):
            trace_R5T[:, place] = column_RT
        for trace_5T, row in zip(trace_R5T, where.rows, strict=True):
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
