"""Activation patching: what of one prompt, put into the run of another, brings back its answer.

Two prompts of equal length end differently. The corrupt one is run again and again; each time one position of one hook
point gets what stood there in the clean run: the whole vector, or only what some latents contribute to it. How far the
difference of two logits at the end goes from the corrupt prompt's towards the clean one's says where the model carries
what tells them apart (Meng et al. 2022, arXiv 2202.05262; Wang et al. 2022, arXiv 2211.00593). The whole model runs in
float32 here, from the weights as they are stored.

Suffixes: T tokens, D width at a hook point, B runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_3.hooks import HookPoint
from llama_3.model import Transformer
from llama_3.tokenizer import Tokenizer
from sae.model import SAE
from steer.analysis.attribution import Choice, readable
from steer.analysis.effects import TOKENS_AT_ONCE, LatentParts
from steer.analysis.replay import Replay
from steer.errors import SteerError

_EMBEDDED = HookPoint(0, "resid_pre")


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the corrupt prompt with one position patched."""

    hook: str
    index: int
    difference: float
    """The answer's logit less the wrong one's, after the last token."""
    recovered: float | None
    """0 as in the corrupt run, 1 as in the clean one; None where those two do not differ."""


@dataclass(frozen=True, slots=True)
class Patching:
    """All runs of one comparison, hook by hook and in each position by position."""

    answer: Choice
    """With its log-probability in the clean run."""
    wrong: Choice
    """With its log-probability in the corrupt run."""
    clean: float
    """The difference of the two logits in the clean run."""
    corrupt: float
    tokens: tuple[tuple[str, str], ...]
    """The texts of the clean and the corrupt prompt's tokens."""
    cells: tuple[Cell, ...]


def patch(
    model: Transformer,
    tokenizer: Tokenizer,
    clean: Sequence[int],
    corrupt: Sequence[int],
    points: Sequence[HookPoint],
    positions: Sequence[int] | None = None,
    *,
    answer: int | None = None,
    wrong: int | None = None,
    sae: SAE | None = None,
    latents: Sequence[int] = (),
) -> Patching:
    """The answer's logit less the wrong one's with each position of each point patched from the clean run.

    By default the positions are those from the first that differs on (what stands before is the same), `answer` is
    the clean prompt's own likeliest token and `wrong` the corrupt one's. With `latents` only their contributions are
    patched, as `sae` reads them in either run. Raises `SteerError` for prompts of different length, for two that are
    the same or go on alike, and for a place that there is not.
    """
    if len(clean) != len(corrupt):
        raise SteerError(
            f"the clean prompt has {len(clean)} tokens and the corrupt one {len(corrupt)}",
            "change words for others of as many tokens, so that position stands against position",
        )
    differing = [place for place, pair in enumerate(zip(clean, corrupt, strict=True)) if pair[0] != pair[1]]
    if not differing:
        raise SteerError("the two prompts are the same", "change a word of one of them")
    positions = range(differing[0], len(clean)) if positions is None else positions
    bad = next((place for place in positions if not 0 <= place < len(clean)), None)
    if bad is not None:
        raise SteerError(f"there is no token {bad} in these prompts", f"they go from 0 to {len(clean) - 1}")
    for point in points:
        if point.layer >= model.config.n_layers:
            raise SteerError(f"there is no {point}: the model has {model.config.n_layers} blocks, from 0")
    with torch.no_grad():
        needed = [need for point in points for need in Replay.needs(point)]
        runs = [Replay(model, tokens, _EMBEDDED) for tokens in (clean, corrupt)]
        read = [run.read(run.x_TD[None], needed) for run in runs]
        ends = [run.logits(resid_BTD[0, -1:])[0] for run, (resid_BTD, _) in zip(runs, read, strict=True)]
        answer = int(ends[0].argmax()) if answer is None else answer
        wrong = int(ends[1].argmax()) if wrong is None else wrong
        if answer == wrong:
            both = f"the answer and the wrong one are both {tokenizer.token_text(answer)!r}"
            raise SteerError(both, "say which two tokens: `--answer`, `--wrong`")
        at_clean, at_corrupt = ({point: x_BTD[0] for point, x_BTD in found.items()} for _, found in read)
        high, low = (float(logits_V[answer] - logits_V[wrong]) for logits_V in ends)
        cells = []
        for point in points:
            replay = Replay(model, corrupt, point, captured=at_corrupt)
            change_TD = at_clean[point] - at_corrupt[point]
            if latents:
                assert sae is not None, "latents are an SAE's"
                pair = ((at_clean[point], clean), (at_corrupt[point], corrupt))
                ours_TD, theirs_TD = (_contribution(sae, latents, tokenizer, *one) for one in pair)
                change_TD = ours_TD - theirs_TD
            found = _differences(replay, change_TD, positions, answer, wrong)
            for place, difference in zip(positions, found, strict=True):
                recovered = (difference - low) / (high - low) if high != low else None
                cells.append(Cell(str(point), place, difference, recovered))
    chosen = [
        Choice(token, tokenizer.token_text(token), float(logits_V.log_softmax(-1)[token]))
        for token, logits_V in zip((answer, wrong), ends, strict=True)
    ]
    texts = tuple((tokenizer.token_text(a), tokenizer.token_text(b)) for a, b in zip(clean, corrupt, strict=True))
    return Patching(chosen[0], chosen[1], high, low, texts, tuple(cells))


def _differences(
    replay: Replay, change_TD: Tensor, positions: Sequence[int], answer: int, wrong: int
) -> Iterator[float]:
    """The difference of the logits with the change made at each of the positions alone."""
    size = max(1, TOKENS_AT_ONCE // len(change_TD))
    for start in range(0, len(positions), size):
        position_B = torch.tensor(positions[start : start + size], device=change_TD.device)
        x_BTD = replay.x_TD.repeat(len(position_B), 1, 1)
        x_BTD[torch.arange(len(position_B), device=change_TD.device), position_B] += change_TD[position_B]
        logits_BV = replay.logits(replay(x_BTD)[:, -1])
        yield from (logits_BV[:, answer] - logits_BV[:, wrong]).tolist()


def _contribution(
    sae: SAE, latents: Sequence[int], tokenizer: Tokenizer, x_TD: Tensor, tokens: Sequence[int]
) -> Tensor:
    """What some latents contribute to x, (T, D)."""
    parts = LatentParts(sae, x_TD, readable(tokenizer, tokens, x_TD.device))
    return parts.sum(torch.isin(parts.latent_P, torch.tensor(latents, device=x_TD.device)))
