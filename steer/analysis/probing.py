"""What a checkup measures on: a text that the model writes itself, and the residuals at many places of a few rows.

Shapes: B rows, T tokens, N tokens that count, D width of the residual stream.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llama_3.generate import stream_steps
from llama_3.hooks import HookPoint, Hooks, Span
from llama_3.model import Transformer
from llama_3.sampling import Sampling
from llama_3.tokenizer import Tokenizer
from steer.analysis.prose import PARAGRAPH

TEXTS, ROUNDS = 16, 8
"""Texts that the model writes side by side, and how often it begins anew at most where they end early."""
GLANCED = 64
"""Tokens of a quick look."""
SHORTEST = 8
"""Tokens of a text that is worth measuring on."""


def write_text(model: Transformer, tokenizer: Tokenizer, folder: Path, tokens: int, seed: int) -> tuple[Path, str]:
    """A file of texts that the model wrote after BOS alone, and what to call them; a paragraph of ours where it writes
    none. Temperature 1, top-p 0.95, no special tokens but those that end a text."""
    each = min(max(tokens // TEXTS, 2 * SHORTEST), model.config.max_context - 1)
    stop = frozenset((*tokenizer.stop_ids, *model.config.stop_ids))
    never = tuple((token, -1e4) for token in sorted(tokenizer.special_ids - stop) if token < model.config.vocab_size)
    sampling, found, count = Sampling(temperature=1.0, top_p=0.95, logit_bias=never), list[str](), 0
    for begun in range(ROUNDS if _speaks(model, tokenizer) else 0):
        written: list[list[int]] = [[] for _ in range(TEXTS)]
        seeds = [seed + begun * TEXTS + number for number in range(TEXTS)]
        prompts = [[tokenizer.bos_id]] * TEXTS
        for steps in stream_steps(model, prompts, sampling=sampling, seeds=seeds, max_tokens=each, stop_ids=stop):
            for step in steps:
                if step.token not in stop:
                    written[step.row].append(step.token)
        texts = [(len(ids), tokenizer.decode(ids).strip()) for ids in written if len(ids) >= SHORTEST]
        found += [text for _, text in texts if text]
        count += sum(length for length, text in texts if text)
        if count >= tokens:
            break
    source = f"that the model wrote itself (seed {seed})"
    if not found:
        found, source = [PARAGRAPH], "of a paragraph of ours, since the model writes nothing"
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in found), encoding="utf-8")
    return file, source


def first_tokens(model: Transformer, tokenizer: Tokenizer) -> list[int]:
    """The first tokens of our paragraph, BOS in front."""
    return tokenizer.encode(PARAGRAPH, bos=True)[: min(GLANCED, model.config.max_context)]


def _speaks(model: Transformer, tokenizer: Tokenizer) -> bool:
    """Whether the model's logits are numbers."""
    tokens_BT = torch.tensor([first_tokens(model, tokenizer)], device=model.device)
    with torch.inference_mode():
        return bool(model(tokens_BT).isfinite().all())


def residuals(
    model: Transformer, rows: Sequence[list[int]], points: Sequence[HookPoint], tokenizer: Tokenizer, skip: int
) -> dict[HookPoint, Tensor]:
    """What is at each point, (N, D) in float32: of every row the tokens from `skip` on that are not special, or with 0
    all of them."""
    special = torch.tensor(sorted(tokenizer.special_ids) if skip else [], dtype=torch.int64)
    found: dict[HookPoint, list[Tensor]] = {point: [] for point in points}
    kept_T = torch.ones(0, dtype=torch.bool)

    def keep(point: HookPoint) -> Callable[[Tensor, Span], Tensor]:
        def hook(x_BTD: Tensor, span: Span) -> Tensor:
            found[point].append(x_BTD[0, kept_T.to(x_BTD.device)].float())
            return x_BTD

        return hook

    hooks = Hooks()
    for point in points:
        hooks.add(point, keep(point))
    for row in rows:
        tokens_T = torch.tensor(row)
        kept_T = ~torch.isin(tokens_T, special)
        kept_T[:skip] = False
        with torch.inference_mode():
            model(tokens_T[None].to(model.device), hooks=hooks, stop_after=hooks.points()[-1])
    return {point: torch.cat(parts) for point, parts in found.items()}


def in_float32(model: Transformer, layers: int) -> Transformer | None:
    """The first layers of a model in float32; None where some of them are quantised."""
    with torch.device("meta"):
        shallow = Transformer(replace(model.config, n_layers=layers, tied=True))
    weights = model.state_dict()
    if not set(shallow.state_dict()) <= set(weights):
        return None
    shallow.load_state_dict({name: weights[name].float() for name in shallow.state_dict()}, assign=True)
    return shallow.eval().requires_grad_(False)
