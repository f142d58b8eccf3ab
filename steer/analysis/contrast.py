"""Latents that tell two sets of texts apart.

A text gets one score for each latent: its largest activation, its mean over the tokens, or that at the last token. The
effect of a latent is Cliff's delta of the scores: the probability that a text of A scores higher than a text of B, less
that of the reverse; 1 or -1 where it tells every text, 0 where it tells nothing. Scores are mostly zeros with a few
large values, so that means and standard deviations (Cohen's d) would say little, and are undefined where no text of a
side fires.

The 95% interval is method 5 of Newcombe (2006, Statistics in Medicine 25:559), which unlike a bootstrap stays wide when
three texts happen to be told apart without a fault. Latents are sorted by the end of it that is nearer to 0, then by
how far the mean scores are apart in units of the latent's recorded max.

Thousands of latents are looked at, and of intervals at 95% one in twenty is off. `certain` are those that Mann and
Whitney's test finds at a false discovery rate of 5% over all active latents (Benjamini and Hochberg 1995).

Shapes: A, B texts of a side, T tokens, N tokens that count, F latents, P pairs of text and latent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from llama_3.chat_format import ChatFormat
from llama_3.model import Transformer
from llama_3.tokenizer import Tokenizer
from sae.model import SAE
from steer.errors import SteerError
from train.capture import Batch, batches
from train.documents import HUB
from train.evaluate import hook_point
from train.text import Row, TextPlan, read_rows

By = Literal["max", "mean", "last"]
Text = tuple[list[int], ...]
"""Rows of token ids, BOS in front of each; one where the text fits the model's context."""

LEVEL = 0.05
"""The chance that an interval leaves out what is there, and the share of chance findings among those that stand."""
BATCH_TOKENS = 4096
PRE_ACTIVATIONS, SCORES = 1 << 25, 1 << 22
"""Pre-activations, and scores of texts, held at once."""
STEPS = 50
"""Of the bisection that finds an interval's end: more than float64 tells apart."""
_FILE = re.compile(r"\.(txt|jsonl|parquet|xz|gz)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Difference:
    """How a latent differs between the texts of A and those of B."""

    latent: int
    effect: float
    """Cliff's delta, from -1 (higher in B) to 1 (higher in A)."""
    low: float
    high: float
    p: float
    """Chance of an effect as large where there is none, by Mann and Whitney's test."""
    certain: bool
    """Whether that is small enough for the number of latents looked at."""
    share_a: float
    """Texts whose score is above 0."""
    share_b: float
    mean_a: float
    """Mean score of a text."""
    mean_b: float


@dataclass(frozen=True, slots=True)
class Contrast:
    """All latents that were active in some text, the most telling first."""

    differences: tuple[Difference, ...]
    texts_a: int
    texts_b: int


def contrast(
    model: Transformer,
    sae: SAE,
    tokenizer: Tokenizer,
    a: Sequence[Text],
    b: Sequence[Text],
    *,
    by: By = "max",
    on_progress: Callable[[int, int], None] | None = None,
) -> Contrast:
    """How the latents differ between texts `a` and `b`; first and special tokens do not count.

    `on_progress(texts, all texts)` is called after each batch. Raises `SteerError` for a `by` that is none, and for a
    side without a text.
    """
    if by not in get_args(By):
        raise SteerError(f"texts are not scored by `{by}`", f"choose {', '.join(get_args(By))}")
    point, special = hook_point(model.config, sae.config), sorted(tokenizer.special_ids)
    texts = [*a, *b]
    rows = [
        Row(number, place, row)
        for number, text in enumerate(texts)
        for place, row in enumerate(text)
        if by != "last" or place == len(text) - 1
    ]
    scores, done = _Scores(sae.config.d_sae, by, len(texts)), 0
    for batch in batches(iter(rows), special, BATCH_TOKENS):
        with torch.inference_mode():
            x_BTD = model(batch.tokens_BT.to(model.device), lengths_B=batch.lengths, stop_after=point)
            scores.read(sae, x_BTD, batch)
        done += len(batch.lengths)
        if on_progress is not None:
            on_progress(done * len(texts) // len(rows), len(texts))
    in_a_T = torch.arange(len(texts)) < len(a)
    counted_T = scores.tokens_T > 0
    for name, side_T in (("A", in_a_T), ("B", ~in_a_T)):
        if not bool((counted_T & side_T).any()):
            raise SteerError(f"{name} holds no text", "the first and the special tokens of a text do not count")
    return _compare(scores, in_a_T, counted_T, sae.stats.max_F if sae.stats else None)


def read_side(
    source: str, tokenizer: Tokenizer, chat: ChatFormat | None, context: int, most: int
) -> tuple[list[Text], bool]:
    """The texts of a file, a folder or an `hf:` dataset (at most so many, and whether there were more), else the words
    given as one text. What is named like a text file and is none raises `TrainError`."""
    if not source.strip():
        raise SteerError("a side of the contrast is empty", "give a text file, or a text in quotes")
    if _is_file(source):
        rows = read_rows([source], tokenizer, chat, TextPlan(context=context))
        documents = (tuple(row.tokens for row in of) for _, of in groupby(rows, lambda row: row.document))
        texts = list(islice(documents, most + 1))
        return texts[:most], len(texts) > most
    ids = tokenizer.encode(source)
    room = context - 1
    return [tuple([tokenizer.bos_id, *ids[start : start + room]] for start in range(0, len(ids), room))], False


def _is_file(source: str) -> bool:
    """Whether texts are to be read: from a file, from a folder written with a slash, or as it is named."""
    try:
        there = Path(source).is_file() or ("/" in source and Path(source).is_dir())
    except OSError:  # a text too long for a name
        return False
    return there or source.startswith(HUB) or bool(_FILE.search(source) and "\n" not in source)


class _Scores:
    """The scores of texts as pairs of text and latent; what is not among them is 0."""

    def __init__(self, latents: int, by: By, texts: int) -> None:
        self.latents, self.by = latents, by
        self.keys_P, self.values_P = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        self._new: list[tuple[Tensor, Tensor]] = []
        self.tokens_T = torch.zeros(texts)

    def read(self, sae: SAE, x_BTD: Tensor, batch: Batch) -> None:
        """Takes in a batch of rows; those of one text may come in several."""
        kept_BT = batch.kept_BT
        if self.by == "last":  # all but the last that counts
            kept_BT = kept_BT & (kept_BT.flip(1).cumsum(1).flip(1) == 1)
        text_N = batch.documents_at(kept_BT.nonzero())
        x_ND = x_BTD[kept_BT.to(x_BTD.device)].to(sae.W_enc_FD.device)
        self.tokens_T.index_add_(0, text_N, torch.ones(len(text_N)))
        step = max(1, PRE_ACTIVATIONS // self.latents)
        for part_ND, part_N in zip(torch.split(x_ND, step), torch.split(text_N, step), strict=True):
            latents = sae.encode(part_ND)
            on_NK = (latents.values > 0).cpu()
            key_NK = part_N[:, None] * self.latents + latents.indices.cpu()
            self._new.append((key_NK[on_NK], latents.values.cpu()[on_NK].float()))
        if sum(len(keys_P) for keys_P, _ in self._new) > len(self.keys_P):  # so that all is sorted only a few times
            self._merge()

    def _merge(self) -> None:
        """One score for each pair of text and latent."""
        keys, values = zip((self.keys_P, self.values_P), *self._new, strict=True)
        self.keys_P, place_P = torch.unique(torch.cat(keys), return_inverse=True)
        reduce = "sum" if self.by == "mean" else "amax"
        self.values_P = torch.zeros(len(self.keys_P)).scatter_reduce(0, place_P, torch.cat(values), reduce)
        self._new.clear()

    def columns(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Numbers (F,) and scores (F, T) of the latents that are on in some text, so many at a time."""
        self._merge()
        text_P, latent_P = self.keys_P // self.latents, self.keys_P % self.latents
        values_P = self.values_P / self.tokens_T[text_P] if self.by == "mean" else self.values_P
        order_P = latent_P.argsort(stable=True)
        text_P, latent_P, values_P = text_P[order_P], latent_P[order_P], values_P[order_P]
        active_F, count_F = torch.unique_consecutive(latent_P, return_counts=True)
        at_once, end_F = max(1, SCORES // len(self.tokens_T)), count_F.cumsum(0)
        for first in range(0, len(active_F), at_once):
            numbers_F = active_F[first : first + at_once]
            part = slice(int(end_F[first] - count_F[first]), int(end_F[first + len(numbers_F) - 1]))
            scores_FT = torch.zeros(len(numbers_F), len(self.tokens_T))
            row_P = torch.searchsorted(numbers_F, latent_P[part])
            scores_FT[row_P, text_P[part]] = values_P[part]
            yield numbers_F, scores_FT


def _compare(scores: _Scores, in_a_T: Tensor, counted_T: Tensor, max_F: Tensor | None) -> Contrast:
    a_T, b_T = in_a_T & counted_T, ~in_a_T & counted_T
    texts_a, texts_b = int(a_T.sum()), int(b_T.sum())
    parts = []
    for numbers_F, scores_FT in scores.columns():
        a_FA, b_FB = scores_FT[:, a_T], scores_FT[:, b_T]
        theta_F = superiority(a_FA, b_FB)
        shares = ((side > 0).double().mean(1) for side in (a_FA, b_FB))
        means = (side.double().mean(1) for side in (a_FA, b_FB))
        parts.append(torch.stack([numbers_F.double(), theta_F, p_values(theta_F, a_FA, b_FB), *shares, *means], 1))
    table = torch.cat(parts) if parts else torch.zeros(0, 7, dtype=torch.float64)
    numbers_F, theta_F, p_F, *_ = table.unbind(1)
    low_F, high_F = interval(theta_F, texts_a, texts_b)
    certain_F = discoveries(p_F)
    nearer_F = torch.where(theta_F >= 0.5, low_F - 0.5, 0.5 - high_F)
    gap_F = (table[:, 5] - table[:, 6]).abs()
    if max_F is not None:
        gap_F /= max_F.cpu().double()[numbers_F.long()].clamp(min=1e-30)
    nearer, gap, certain = nearer_F.tolist(), gap_F.tolist(), certain_F.tolist()
    effects, rows = (2 * torch.stack([theta_F, low_F, high_F], 1) - 1).tolist(), table.tolist()
    found = []
    for row in sorted(range(len(rows)), key=lambda row: (-round(nearer[row], 9), -gap[row])):
        (latent, _, p, share_a, share_b, mean_a, mean_b), (effect, low, high) = rows[row], effects[row]
        found.append(Difference(int(latent), effect, low, high, p, certain[row], share_a, share_b, mean_a, mean_b))
    return Contrast(tuple(found), texts_a, texts_b)


def superiority(a_FA: Tensor, b_FB: Tensor) -> Tensor:
    """Probability that a score of A is above one of B, ties counting half, (F,) in float64: Mann and Whitney's U over
    the number of pairs."""
    sorted_FA = a_FA.sort(1).values.contiguous()
    below_FB = torch.searchsorted(sorted_FA, b_FB.contiguous())
    upto_FB = torch.searchsorted(sorted_FA, b_FB.contiguous(), right=True)
    wins_F = (2 * a_FA.shape[1] - below_FB - upto_FB).double().sum(1) / 2
    return wins_F / (a_FA.shape[1] * b_FB.shape[1])


def p_values(theta_F: Tensor, a_FA: Tensor, b_FB: Tensor) -> Tensor:
    """Two-sided p (F,) of Mann and Whitney's test, by the normal approximation with corrections for ties and
    continuity; never below what the fewest orders of so many texts allow."""
    a, b = a_FA.shape[1], b_FB.shape[1]
    both_FT = torch.cat([a_FA, b_FB], 1).sort(1).values.contiguous()
    count_FT = torch.searchsorted(both_FT, both_FT, right=True) - torch.searchsorted(both_FT, both_FT)
    ties_F = (count_FT.double().square() - 1).sum(1)  # t^3 - t over groups of t equal scores
    texts = a + b
    variance_F = a * b / 12 * (texts + 1 - ties_F / (texts * max(texts - 1, 1)))
    beyond_F = ((theta_F - 0.5).abs() * a * b - 0.5).clamp(min=0)
    z_F = torch.where(variance_F > 0, beyond_F / variance_F.clamp(min=1e-30).sqrt(), 0.0)
    p_F: Tensor = 2 * torch.special.ndtr(-z_F)
    return p_F.clamp(min=fewest(a, b))


def fewest(a: int, b: int) -> float:
    """The smallest p that `a` and `b` texts can come to: that of the two orders that tell them without a fault."""
    return min(1.0, 2 / math.comb(a + b, a))


def discoveries(p_F: Tensor) -> Tensor:
    """Which of many p-values stand at a false discovery rate of 5%, (F,) of bool."""
    sorted_F, order_F = p_F.sort()
    allowed_F = LEVEL * torch.arange(1, len(p_F) + 1, dtype=torch.float64) / max(len(p_F), 1)
    passes_F = sorted_F <= allowed_F
    found_F = torch.zeros(len(p_F), dtype=torch.bool)
    if bool(passes_F.any()):
        found_F[order_F[: int(passes_F.nonzero()[-1]) + 1]] = True
    return found_F


def interval(theta_F: Tensor, a: int, b: int) -> tuple[Tensor, Tensor]:
    """Both ends (F,) of the 95% interval of a probability of superiority between `a` and `b` texts, by method 5 of
    Newcombe (2006): the values from which the one found lies z standard errors away, each with the variance of its own
    exponential model (Hanley and McNeil 1982)."""
    z = float(torch.special.ndtri(torch.tensor(1 - LEVEL / 2, dtype=torch.float64)))
    return _lower(theta_F, a, b, z), 1 - _lower(1 - theta_F, a, b, z)


def _lower(theta_F: Tensor, a: int, b: int, z: float) -> Tensor:
    spread = (a + b) / 2 - 1
    low_F, high_F = torch.zeros_like(theta_F), theta_F.clone()
    for _ in range(STEPS):
        middle_F = (low_F + high_F) / 2
        pairs_F = 1 + spread * ((1 - middle_F) / (2 - middle_F) + middle_F / (1 + middle_F))
        error_F = (middle_F * (1 - middle_F) * pairs_F / (a * b)).sqrt()
        far_F = theta_F - middle_F > z * error_F
        low_F, high_F = torch.where(far_F, middle_F, low_F), torch.where(far_F, high_F, middle_F)
    return low_F
