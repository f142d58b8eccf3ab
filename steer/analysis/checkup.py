"""Is this the right SAE for this model: what it costs on text, and which reading of it fits better, if any.

`examine` measures the SAE as its folder says it is to be read (FVU, L0, rise in cross-entropy, by `train.evaluate`) and
tries the readings of `readings.py` on the first few hundred tokens of the same text. The verdict is relative: a
reading is the right one where its FVU is clearly below that of the folder's (`BETTER`) and near what was recorded
(`most`). Where nothing fits, the SAE is another model's. `suspicion` is the quick word on the same question, for
whoever is about to steer; `glance` asks it of one paragraph.

Nothing that is returned holds a tensor. Shapes: B rows, T tokens, N tokens that count, D width of the residual stream.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from llama_3.chat_format import ChatFormat
from llama_3.hooks import HookPoint
from llama_3.model import Transformer
from llama_3.tokenizer import Tokenizer
from sae.losses import fvu
from sae.model import SAE
from steer.analysis.probing import first_tokens, in_float32, residuals, write_text
from steer.analysis.readings import (
    Fit,
    Reading,
    agreement,
    fit,
    hook_readings,
    k_readings,
    normalise_readings,
    places,
    weight_readings,
)
from steer.errors import SteerError
from train.evaluate import assess, hook_point
from train.intervals import Metric
from train.text import Row, TextPlan, read_rows

TOKENS = 2048
"""Of the text that is measured."""
PROBED, ROWS = 256, 8
"""Tokens on which other readings are tried, and the rows they are taken from."""
BETTER = {"hook": 0.92, "normalise": 0.85, "weights": 0.85, "k": 0.7, "bos": 0.85, "dtype": 0.85}
"""Another reading is better where its FVU is below so many times that of the folder's. Of 27 SAEs of six kinds beside
the demo, no other hook came below 1.06 times, no other normalisation below 1.14, text without BOS below 1.00; more
latents than in training always help a little."""
UNRECORDED = 0.8
"""The largest FVU that is believed of an SAE without recorded figures."""
TORN = 0.1
"""The mean cosine of encoder and decoder rows below which they do not belong together."""
LEAST = 24
"""Tokens below which `suspicion` says nothing: FVU of fewer is noise."""


@dataclass(frozen=True)
class Finding:
    """What one check found; `message` and `hint` are sentences for a person."""

    check: str
    ok: bool
    value: float | str | None
    message: str
    hint: str | None = None


@dataclass(frozen=True)
class Recorded:
    """What an SAE's folder says of how it did when it was made; None where it is silent."""

    fvu: float | None
    l0: float | None
    activation: float | None
    """Sum of a token's activations, mean over tokens."""
    delta_ce: float | None

    @classmethod
    def of(cls, sae: SAE) -> Recorded:
        stats, metrics = sae.stats, sae.manifest.get("metrics")
        metrics = metrics if isinstance(metrics, dict) else {}
        fvu, l0, rise = (_number(metrics.get(name)) for name in ("fvu", "l0", "delta_ce"))
        if stats is None:
            return cls(fvu, l0, None, rise)
        density_F, on_F = stats.density_F.double(), stats.mean_on_F.double()
        return cls(fvu, float(density_F.sum()) or l0, float((density_F * on_F).sum()) or None, rise)


def most(recorded: float | None) -> float:
    """The largest FVU that is believed of a right pairing, whatever the text: three times the recorded one and at least
    0.2 more, but no more than 0.9 (or than was recorded)."""
    if recorded is None:
        return UNRECORDED
    return max(recorded, min(0.9, max(3 * recorded, recorded + 0.2)))


HOPELESS = 0.9
"""FVU above which a first look says that an SAE is a wrong one: the mean would do about as well. Below it a text unlike
the SAE's own may be all that is wrong."""


def suspicion(x_ND: Tensor, y_ND: Tensor, recorded: Recorded) -> str | None:
    """Why the SAE that made `y` out of residuals `x` looks like a wrong one, in one sentence, or None.

    First and special tokens must be left out of both. Of fewer than `LEAST` tokens nothing is said but that they are no
    numbers.
    """
    if not bool(x_ND.isfinite().all()):
        return "the residual stream is not a number at the SAE's hook: its dtype overflows"
    if len(x_ND) < LEAST:
        return None
    found = float(fvu(x_ND.double(), y_ND.double()))
    if found <= max(HOPELESS, recorded.fvu or 0.0):
        return None
    beside = "" if recorded.fvu is None else f", where {recorded.fvu:.2g} is recorded"
    return f"the SAE does not fit this model: it leaves {_share(found)} of the variance unexplained{beside}"


def glance(model: Transformer, sae: SAE, tokenizer: Tokenizer) -> str | None:
    """`suspicion` of an SAE on the first tokens of one paragraph: one pass up to its hook."""
    point = hook_point(model.config, sae.config)
    x_ND = residuals(model, [first_tokens(model, tokenizer)], [point], tokenizer, 1)[point].to(sae.W_enc_FD.device)
    with torch.inference_mode():
        y_ND = sae.decode(sae.encode(x_ND), x_ND) if bool(x_ND.isfinite().all()) else x_ND
    return suspicion(x_ND, y_ND, Recorded.of(sae))


def examine(
    model: Transformer,
    sae: SAE,
    tokenizer: Tokenizer,
    text: Path | str | None = None,
    *,
    chat: ChatFormat | None = None,
    tokens: int = TOKENS,
    seed: int = 0,
    narrate: Callable[[str], None] = lambda line: None,
) -> tuple[Finding, ...]:
    """What the checks find of an SAE beside a model, in the order of a report.

    `text` is a file that `train.text` reads; without one, the model writes (`seed`). Raises `SteerError` or
    `ValueError` for a text that is not usable and an SAE that cannot stand in this model at all.
    """
    with tempfile.TemporaryDirectory() as folder:
        if text is None:
            narrate(f"the model writes {tokens:,} tokens to be measured on (`--text FILE` gives others)")
            text, source = write_text(model, tokenizer, Path(folder), tokens, seed)
        else:
            source = f"of {Path(text).name}"
        plan = TextPlan(context=min(512, model.config.max_context))
        rows = _beginnings(read_rows([text], tokenizer, chat, plan), text)
        checkup = _Checkup(model, sae, tokenizer, rows, narrate)
        if not math.isfinite(checkup.named.fvu):
            return (checkup.overflow(),)
        narrate(f"measures {tokens:,} tokens with and without the SAE")
        found = assess(model, sae, tokenizer, [text], tokens, plan=plan, chat=chat)
    said = Finding("text", True, found.tokens, f"{found.tokens:,} tokens {source}")
    return (said, *checkup.findings({each.metric: each for each in found.metrics}))


@dataclass(frozen=True)
class _Tried:
    """A reading, its FVU, and that of the folder's reading on the same tokens."""

    reading: Reading
    fvu: float
    own: float


class _Checkup:
    """One examination: all readings are tried when it is made, and `findings` says what came of it."""

    def __init__(
        self,
        model: Transformer,
        sae: SAE,
        tokenizer: Tokenizer,
        rows: Sequence[list[int]],
        narrate: Callable[[str], None],
    ) -> None:
        self.model, self.sae, self.tokenizer, self.rows = model, sae, tokenizer, rows
        self.recorded, self.at = Recorded.of(sae), hook_point(model.config, sae.config)
        self.bound, self.dtype = most(self.recorded.fvu), str(model.dtype).removeprefix("torch.")
        points = places(model.config, self.at, sae.config.d_in)
        narrate(f"reads {sum(map(len, rows)):,} tokens at {len(points)} places")
        there = self._read(model, rows, points)
        self.x_ND, self.precise_ND = there[self.at], self._precise()
        self.named = self._fit(self.x_ND)
        if math.isfinite(self.named.fvu):
            self.tried = [*self._try(there), *self._try_fronts()]
            self.culprit = self._find_culprit()

    # -- what is tried ----------------------------------------------------------------------------------------------

    def _read(
        self, model: Transformer, rows: Sequence[list[int]], points: Sequence[HookPoint], skip: int = 1
    ) -> dict[HookPoint, Tensor]:
        device = self.sae.W_enc_FD.device
        return {at: x_ND.to(device) for at, x_ND in residuals(model, rows, points, self.tokenizer, skip).items()}

    def _precise(self) -> Tensor | None:
        """The residuals at the hook when the layers up to it run in float32; None where they do, or are quantised."""
        if self.model.dtype == torch.float32 or (model := in_float32(self.model, self.at.layer + 1)) is None:
            return None
        return self._read(model, self.rows, [self.at])[self.at]

    def _fit(self, x_ND: Tensor) -> Fit:
        """How well the SAE does as its folder says."""
        return fit(Reading("", str(self.at), "", x_ND, self.sae))

    def _try(self, there: dict[HookPoint, Tensor]) -> Iterator[_Tried]:
        readings = [
            *hook_readings(self.sae, there, self.at),
            *normalise_readings(self.sae, self.x_ND),
            *weight_readings(self.sae, self.x_ND),
            *(k_readings(self.sae, self.x_ND) if self.recorded.l0 is None else ()),
        ]
        if self.precise_ND is not None:
            readings.append(Reading("dtype", "in float32", "run with `--dtype float32`", self.precise_ND, self.sae))
        return (_Tried(reading, fit(reading).fvu, self.named.fvu) for reading in readings)

    def _try_fronts(self) -> Iterator[_Tried]:
        """Text without BOS, and with the model's own where the tokenizer has another. The first token of all does not
        count, so that the same tokens are compared."""
        own = self._fit(self._read(self.model, self.rows, [self.at], 2)[self.at]).fvu
        hint = "steer puts BOS in front of every text: train the SAE on text with BOS"
        fronts = [("text without BOS", hint, [row[1:] for row in self.rows], 1)]
        if (bos := self.model.config.bos_id) not in (None, self.tokenizer.bos_id):
            hint = f"make token {bos} the tokenizer's BOS, which is {self.tokenizer.bos_id}"
            fronts.append((f"text with the model's BOS {bos}", hint, [[bos, *row[1:]] for row in self.rows], 2))
        for name, hint, rows, skip in fronts:
            x_ND = self._read(self.model, rows, [self.at], skip)[self.at]
            yield _Tried(Reading("bos", name, hint, x_ND, self.sae), self._fit(x_ND).fvu, own)

    def _find_culprit(self) -> _Tried | None:
        """The reading that is the right one in place of the folder's: near what is recorded and clearly better."""
        better = [each for each in self.tried if each.fvu <= min(self.bound, BETTER[each.reading.family] * each.own)]
        if not better:
            return None
        best = min(better, key=lambda each: each.fvu)
        near = 1.15 if best.reading.family == "k" else 1.05  # the simplest of those that do as well
        alike = (each for each in better if each.reading.family == best.reading.family)
        return next(each for each in alike if each.fvu <= near * best.fvu)

    def _wrong_k(self) -> bool | None:
        """Whether k is another than what was recorded; None where nothing is."""
        config, recorded = self.sae.config, self.recorded.l0
        if not config.function.takes_k or recorded is None:
            return None
        return abs(config.k - recorded) > 1 + recorded / 4

    # -- what is said -----------------------------------------------------------------------------------------------

    def findings(self, measured: dict[str, Metric]) -> Iterator[Finding]:
        """All checks but that of the text, given the figures of the text."""
        yield from self._figures(measured)
        names = self.sae.config.normalise
        yield self._of("hook", f"the {self.at} it names") or self._next("hook", str(self.at))
        written = "inputs as they are" if names == "none" else f"inputs normalised by {names}"
        yield self._of("normalise", written) or self._scaled() or self._next("normalise", written)
        written = "as its file has it"
        yield self._of("weights", written) or self._torn() or self._next("weights", written)
        yield self._k()
        yield self._of("bos", f"text with BOS {self.tokenizer.bos_id} in front") or self._first_counted() or self._bos()
        yield self._of("dtype", f"in {self.dtype}") or self._dtype(measured["ce_clean"].value)
        yield self._pair(measured["fvu"].value)

    def _figures(self, measured: dict[str, Metric]) -> Iterator[Finding]:
        """FVU, L0 and the rise in cross-entropy beside what was recorded."""
        found, noted = measured["fvu"], self.recorded.fvu
        ok = found.value <= self.bound
        message = f"{_span(found)}; {_noted(noted)}" + ("" if ok else f", and at most {self.bound:.2g} is believed")
        yield Finding("fvu", ok, found.value, message)
        active, noted = measured["l0"], self.recorded.l0
        ok = noted is None or noted / 2 <= active.value <= 2 * noted
        yield Finding("l0", ok, active.value, f"{_span(active, 1)} latents a token; {_noted(noted, 1)}")
        rise, kept = measured["delta_ce"], measured["loss_recovered_mean"].value
        if not math.isfinite(rise.value):
            yield Finding("cost", False, None, "the cross-entropy is no number")
            return
        message = f"cross-entropy {rise.value:+.3f} nats a token"
        if math.isfinite(rise.low):
            message += f" ({rise.low:+.3f} to {rise.high:+.3f})"
        message += " with the reconstruction in the residual's place"
        matters = measured["ce_mean"].value - measured["ce_clean"].value > 0.1
        if matters:
            message += f"; loss recovered {kept:.2f} (1: all, 0: as with the mean)"
        if (noted := self.recorded.delta_ce) is not None:
            message += f"; {_noted(noted)}"
        ok = not (matters and kept < 0.5) and (noted is None or rise.value <= max(3 * noted, noted + 0.2))
        yield Finding("cost", ok, rise.value, message)

    def _of(self, family: str, written: str) -> Finding | None:
        """That a reading of the family is the right one, if so; `written` is what the folder says instead."""
        if self.culprit is None or self.culprit.reading.family != family:
            return None
        reading, figures = self.culprit.reading, f"FVU {self.culprit.fvu:.3g} against {self.culprit.own:.3g}"
        message = f"this SAE fits {reading.name} better than {written}: {figures}"
        return Finding(family, False, self.culprit.own, message, reading.hint)

    def _next(self, family: str, written: str) -> Finding:
        """That the folder's reading stands, and the best of the others."""
        best = min(
            (each for each in self.tried if each.reading.family == family), key=lambda each: each.fvu, default=None
        )
        beside = "there is no other" if best is None else f"next {best.reading.name}, {best.fvu:.3g}"
        return Finding(family, True, self.named.fvu, f"{written}: FVU {self.named.fvu:.3g}; {beside}")

    def _scaled(self) -> Finding | None:
        """Some SAEs do not mind the scale of their inputs, but what is recorded of their latents does."""
        noted = self.recorded.activation
        if self.culprit or self._wrong_k() or noted is None or self.named.fvu > self.bound:
            return None
        times = self.named.activation / noted
        if 1 / 3 < times < 3:
            return None
        message = f"its activations are {times:.3g} times those recorded: its inputs or latents were scaled otherwise"
        hint = "convert the SAE again; strengths in units of a latent's max would be off by that factor"
        return Finding("normalise", False, times, message, hint)

    def _torn(self) -> Finding | None:
        """That encoder and decoder do not belong together, where nothing fits."""
        cosine = agreement(self.sae)
        if self.culprit or self._wrong_k() or self.named.fvu <= self.bound or abs(cosine) >= TORN:
            return None
        message = "its encoder and decoder do not belong together: the cosine of a latent's rows in them"
        message += f" is {cosine:.2f} on average"
        return Finding("weights", False, cosine, message, "copy or convert the SAE again")

    def _k(self) -> Finding:
        config, recorded = self.sae.config, self.recorded.l0
        if not config.function.takes_k:
            return Finding("k", True, None, f"{config.activation} takes no k")
        if self._wrong_k() and recorded is not None:
            message = f"its k is {config.k}, and {recorded:.1f} latents a token were on when it was made"
            return Finding("k", False, config.k, message, f'write `"k": {round(recorded)}` in its cfg.json')
        noted = "none is recorded" if recorded is None else f"{recorded:.1f} were on when it was made"
        right = Finding("k", True, config.k, f"{config.k} latents a token; {noted}")
        return self._of("k", f"with the k {config.k} it names") or right

    def _first_counted(self) -> Finding | None:
        """That what is recorded is of all tokens, the first among them, whose residual may dwarf all others."""
        if self.culprit or self._wrong_k() or self.recorded.fvu is None or self.named.fvu <= self.bound:
            return None
        with_first = self._fit(self._read(self.model, self.rows, [self.at], 0)[self.at]).fvu
        if with_first > self.bound:
            return None
        message = f"with the first token counted FVU is {with_first:.3g}, without {self.named.fvu:.3g}:"
        message += " it was trained with the first token in, and does badly on the others"
        return Finding("bos", False, with_first, message, "train it without first tokens; steer leaves them out")

    def _bos(self) -> Finding:
        fronts = [each for each in self.tried if each.reading.family == "bos"]
        others = ", ".join(f"{each.reading.name} {each.fvu:.3g}" for each in fronts)
        message = f"text with BOS in front: FVU {fronts[0].own:.3g}; {others}"
        data = self.sae.manifest.get("data")
        plan = data.get("text") if isinstance(data, dict) else None
        if isinstance(plan, dict) and plan.get("bos") is False:
            message += "; it was trained on text without"
        return Finding("bos", True, self.named.fvu, message)

    def _dtype(self, loss: float) -> Finding:
        if not math.isfinite(loss):
            message = f"in {self.dtype} the model's logits are no numbers: it overflows above {self.at}"
            return Finding("dtype", False, self.dtype, message, "run with `--dtype bfloat16` or float32")
        limit = torch.finfo(self.model.dtype).max
        message = f"{self.dtype}: the largest number at the hook is {float(self.x_ND.abs().max()):.4g} of {limit:.4g}"
        precise = [f"in float32 FVU {each.fvu:.3g}" for each in self.tried if each.reading.family == "dtype"]
        return Finding("dtype", True, self.dtype, "; ".join([message, *precise]))

    def overflow(self) -> Finding:
        """The one finding where residuals are no numbers: nothing else can be measured."""
        bad = int((~self.x_ND.isfinite()).any(1).sum())
        message = f"in {self.dtype} the residual at {self.at} is no number on {bad} of {len(self.x_ND)} tokens"
        if self.precise_ND is not None and bool(self.precise_ND.isfinite().all()):
            largest, limit = float(self.precise_ND.abs().max()), torch.finfo(self.model.dtype).max
            message += f": it overflows at {limit:,.0f}" + (
                f" and goes up to {largest:,.0f}" if largest > limit else ""
            )
            message += f"; in float32 the FVU is {self._fit(self.precise_ND).fvu:.3g}"
        return Finding("dtype", False, self.dtype, message, "run with `--dtype bfloat16` or float32")

    def _pair(self, value: float) -> Finding:
        if self.culprit is not None:
            return Finding("pair", True, value, f"this model's SAE, once its {self.culprit.reading.family} is right")
        if self.named.fvu <= self.bound or self._wrong_k() or self._torn() or self._first_counted():
            return Finding("pair", True, value, "nothing says that it is another model's SAE")
        best = min(self.tried, key=lambda each: each.fvu)
        message = f"it fits this model at no hook and in no reading (at best {best.reading.name}, FVU {best.fvu:.3g})"
        return Finding(
            "pair", False, value, f"{message}: it is another model's of the same width", "pass its own model"
        )


def _beginnings(rows: Iterator[Row], text: Path | str) -> list[list[int]]:
    """The beginnings of the first rows, on which other readings are tried."""
    taken = [row.tokens for row in islice(rows, ROWS) if len(row.tokens) > 2]
    each = max(PROBED // max(len(taken), 1), 2)
    if sum(min(len(row) - 2, each) for row in taken) < 2:
        raise SteerError(f"`{text}` holds no text to measure on")
    return [row[: each + 1] for row in taken]


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _share(value: float) -> str:
    return f"{value:.0%}" if abs(value) < 10 else f"{value:.3g} times all"


def _span(metric: Metric, digits: int = 3) -> str:
    shown = f"{metric.value:.{digits}f}"
    if math.isfinite(metric.low) and f"{metric.low:.{digits}f}" != f"{metric.high:.{digits}f}":
        shown += f" ({metric.low:.{digits}f} to {metric.high:.{digits}f})"
    return shown


def _noted(value: float | None, digits: int = 3) -> str:
    return "none is recorded" if value is None else f"{value:.{digits}f} is recorded"
