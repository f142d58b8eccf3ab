"""What an SAE keeps of a model's residual stream and what it costs the model, on text neither was trained on.

Splicing puts `decode(encode(x))` in place of x at every position that is neither the first of its context nor a special
token, which is also where FVU, L0 and dead latents are measured. The losses are means over all tokens of a context but
the first, special ones included.

Shapes: B rows, T tokens, D width of the residual stream, F latents, V vocabulary.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llama_3.chat_format import ChatFormat
from llama_3.config import ModelConfig
from llama_3.hooks import HookPoint, Hooks, Span
from llama_3.model import Transformer
from llama_3.tokenizer import Tokenizer
from sae.model import SAE, SAEConfig
from train.capture import Batch, batches
from train.errors import TrainError
from train.text import default_chat, read_rows


def hook_point(model: ModelConfig, sae: SAEConfig) -> HookPoint:
    """Where in the model the SAE stands; `TrainError` where the model has no such layer or another width there."""
    point = HookPoint.parse(sae.hook)
    if point.layer >= model.n_layers:
        raise TrainError(f"the SAE stands at {point} and the model has {model.n_layers} layers, from 0")
    if sae.d_in != (width := point.width(model)):
        raise TrainError(
            f"the SAE reads a width of {sae.d_in} and the model has {width} at {point}", "it is another model's"
        )
    return point


def evaluate(
    model: Transformer,
    sae: SAE,
    tokenizer: Tokenizer,
    files: Sequence[Path | str],
    max_tokens: int,
    *,
    context: int = 512,
    batch_tokens: int = 4096,
    chat: ChatFormat | None = None,
) -> dict[str, float]:
    """`fvu`, `l0`, `dead` (share of latents never active), `ce_clean` and `ce_spliced` in nats a token, `delta_ce`, and
    `tokens`, the positions measured. Whole batches are read until these are at least `max_tokens` or the text ends.
    Dialogs are written in `chat`, by default as in Llama 3.

    Raises `TrainError` when the SAE does not fit the model or the text holds nothing to measure.
    """
    point = hook_point(model.config, sae.config)
    tally = _Tally(sae)
    loss_clean = loss_spliced = 0.0
    predicted = 0
    rows = read_rows(files, tokenizer, chat or default_chat(tokenizer), min(context, model.config.max_context))
    for batch in batches(rows, sorted(tokenizer.special_ids), batch_tokens):
        tally.batch = batch
        spliced = Hooks()
        spliced.add(point, tally)
        loss_clean += _loss(model, batch, Hooks())
        loss_spliced += _loss(model, batch, spliced)
        predicted += sum(length - 1 for length in batch.lengths)
        if tally.tokens >= max_tokens:
            break
    if not tally.tokens:
        raise TrainError(f"{files[0] if files else 'no file'} holds no token to measure")
    clean, after = loss_clean / predicted, loss_spliced / predicted
    return {
        "fvu": tally.fvu,
        "l0": tally.active / tally.tokens,
        "dead": 1 - float(tally.seen_F.float().mean()),
        "ce_clean": clean,
        "ce_spliced": after,
        "delta_ce": after - clean,
        "tokens": tally.tokens,
    }


class _Tally:
    """The hook that splices, and counts what it sees on its way."""

    batch: Batch

    def __init__(self, sae: SAE):
        self.sae = sae
        self.tokens = self.active = 0
        self.seen_F = torch.zeros(sae.config.d_sae, dtype=torch.bool)
        self._sum_D = torch.zeros(sae.config.d_in, dtype=torch.float64)
        self._squares = self._squared_error = 0.0

    def __call__(self, resid_BTD: Tensor, span: Span) -> Tensor:
        kept_BT = self.batch.kept_BT.to(resid_BTD.device)
        x_ND = resid_BTD[kept_BT].float()
        latents = self.sae.encode(x_ND)
        y_ND = self.sae.decode(latents)
        on = latents.values > 0
        self.tokens += len(x_ND)
        self.active += int(on.sum())
        self.seen_F[latents.indices[on].cpu()] = True
        self._sum_D += x_ND.double().sum(0).cpu()
        self._squares += float(x_ND.double().pow(2).sum())
        self._squared_error += float((x_ND - y_ND).double().pow(2).sum())
        spliced_BTD = resid_BTD.clone()
        spliced_BTD[kept_BT] = y_ND.to(resid_BTD.dtype)
        return spliced_BTD

    @property
    def fvu(self) -> float:
        variance = self._squares - float(self._sum_D.pow(2).sum()) / self.tokens
        return self._squared_error / variance if variance > 0 else math.nan


def _loss(model: Transformer, batch: Batch, hooks: Hooks) -> float:
    """Cross-entropy of every next token, summed over the real tokens of the batch, in nats."""
    tokens_BT = batch.tokens_BT.to(model.device)
    targets_BT = tokens_BT[:, 1:].clone()
    for row, length in enumerate(batch.lengths):
        targets_BT[row, length - 1 :] = -100
    with torch.inference_mode():
        logits_BTV = model(tokens_BT, lengths_B=batch.lengths, hooks=hooks)[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-100, reduction="sum"
        )
    return float(loss)
