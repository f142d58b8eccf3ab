"""What an SAE keeps of a model's residual stream and what it costs the model, on text neither was trained on.

Splicing puts `decode(encode(x))` in place of x at every position that is neither the first of its context nor a special
token, which is also where the reconstruction is measured; the two ablations put zeros there, or the mean of x over the
measured text. Losses are means over all tokens of a context but the first, special ones included, and so is the KL
divergence of the spliced model's next token from the clean model's.

Shapes: B rows, T tokens, D width of the residual stream, F latents, V vocabulary, N positions that count.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llama_3.chat_format import ChatFormat
from llama_3.config import ModelConfig
from llama_3.hooks import Hook, HookPoint, Hooks, Span
from llama_3.model import Transformer
from llama_3.tokenizer import Tokenizer
from sae.model import SAE, SAEConfig
from train.capture import Batch, batches, take_tokens
from train.errors import TrainError
from train.intervals import DocumentSums, Metric, share
from train.text import TextPlan, default_chat, read_rows

METRICS = {
    "reconstruction": {
        "mse": "squared distance of x and its reconstruction y, summed over the width, mean over tokens",
        "normalised_mse": "the same over the squared norm of x, mean over tokens (Gao et al. 2024's code)",
        "fvu": "sum of squared distances of x and y over that of x and its mean",
        "cosine": "cosine of x and y, mean over tokens",
        "l0": "active latents a token",
        "dead": "share of the latents that were never active",
    },
    "downstream": {
        "ce_clean": "cross-entropy of the model as it is, nats a token",
        "ce_spliced": "cross-entropy with y in place of x",
        "ce_zero": "cross-entropy with zeros in place of x",
        "ce_mean": "cross-entropy with the mean of x in place of x",
        "delta_ce": "ce_spliced - ce_clean",
        "loss_recovered_zero": "(ce_zero - ce_spliced) / (ce_zero - ce_clean)",
        "loss_recovered_mean": "(ce_mean - ce_spliced) / (ce_mean - ce_clean)",
        "kl": "KL divergence of the spliced model's next token from the clean model's, nats a token",
    },
}
"""What each section measures, in the order of a report."""
LOGITS = 1 << 28
"""Logits of a batch at most."""
PRE_ACTIVATIONS = 1 << 25
"""Pre-activations computed at once."""


@dataclass(frozen=True)
class Evaluation:
    metrics: list[Metric]
    """of the sections asked for, in the order of `METRICS`"""
    tokens: int
    """positions measured"""
    documents: int


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
    """The values alone of `assess`, of both sections and by name, and `tokens`, the positions measured."""
    plan = TextPlan(context=context)
    found = assess(model, sae, tokenizer, files, max_tokens, plan=plan, batch_tokens=batch_tokens, chat=chat)
    return {each.metric: each.value for each in found.metrics} | {"tokens": found.tokens}


def assess(
    model: Transformer,
    sae: SAE,
    tokenizer: Tokenizer,
    files: Sequence[Path | str],
    max_tokens: int,
    *,
    sections: Sequence[str] = tuple(METRICS),
    plan: TextPlan | None = None,
    batch_tokens: int = 4096,
    chat: ChatFormat | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """The measures of `sections`, each with a 95% interval by a bootstrap over documents, drawn with `seed`. (That of
    `dead` is over latents: fewer documents can only have more dead latents.)

    The text is read from its beginning as `plan` says, whole rows until they hold `max_tokens` tokens or it ends, and
    dialogs are written in `chat`, by default as in Llama 3. `on_progress(tokens, all tokens)` is called after each
    batch.

    Raises `TrainError` for a section that there is not, an SAE that does not fit the model, a text with nothing to
    measure.
    """
    for section in sections:
        if section not in METRICS:
            raise TrainError(f"there is no section {section!r}", f"one of {', '.join(METRICS)}")
    if not sections:
        raise TrainError("an evaluation needs at least one section", f"one of {', '.join(METRICS)}")
    point = hook_point(model.config, sae.config)
    plan = plan or TextPlan()
    rows = read_rows(files, tokenizer, chat or default_chat(tokenizer), fit_context(plan, model.config.max_context))
    batch_tokens = min(batch_tokens, max(1, LOGITS // model.config.vocab_size))
    # The text from its beginning: batches are sorted by length, so that some of them alone would not be like it.
    taken = take_tokens(rows, max_tokens)
    chosen = list(batches(taken, sorted(tokenizer.special_ids), batch_tokens))
    tokens = sum(int(batch.kept_BT.sum()) for batch in chosen)
    if not tokens:
        raise TrainError(f"{files[0] if files else 'no file'} holds no token to measure")
    downstream = "downstream" in sections
    mean_D = _mean(model, point, chosen) if downstream else None
    reading, done = _Reading(sae), 0
    with torch.inference_mode():
        for batch in chosen:
            reading.batch = batch
            if mean_D is None:
                _run(model, batch, point, reading, stop=True)
            else:
                _losses(model, batch, point, reading, mean_D)
            done += int(batch.kept_BT.sum())
            if on_progress:
                on_progress(done, tokens)
    formulas = {name: FORMULAS[name] for section in sections for name in METRICS[section] if name in FORMULAS}
    found = {each.metric: each for each in reading.sums.metrics(formulas, seed)}
    found["dead"] = share("dead", int((~reading.seen_F).sum()), sae.config.d_sae)
    names = [name for section in METRICS if section in sections for name in METRICS[section]]
    return Evaluation([found[name] for name in names], tokens, len(reading.sums.documents))


Sums = Mapping[str, Tensor]


def _per(name: str, of: str) -> Callable[[Sums], Tensor]:
    return lambda sums: sums[name] / sums[of]


def _recovered(ablated: str) -> Callable[[Sums], Tensor]:
    return lambda sums: (sums[ablated] - sums["spliced"]) / (sums[ablated] - sums["clean"])


def _fvu(sums: Sums) -> Tensor:
    sum_RD = sums["x"].view(len(sums["tokens"]), -1)
    return sums["error"] / (sums["squares"] - sum_RD.pow(2).sum(1) / sums["tokens"])


FORMULAS: dict[str, Callable[[Sums], Tensor]] = {
    "mse": _per("error", "tokens"),
    "normalised_mse": _per("relative", "tokens"),
    "fvu": _fvu,
    "cosine": _per("cosine", "tokens"),
    "l0": _per("active", "tokens"),
    "ce_clean": _per("clean", "predicted"),
    "ce_spliced": _per("spliced", "predicted"),
    "ce_zero": _per("zero", "predicted"),
    "ce_mean": _per("mean", "predicted"),
    "delta_ce": lambda sums: (sums["spliced"] - sums["clean"]) / sums["predicted"],
    "loss_recovered_zero": _recovered("zero"),
    "loss_recovered_mean": _recovered("mean"),
    "kl": _per("kl", "predicted"),
}
"""Each metric from sums over documents."""


class _Reading:
    """A hook that changes nothing, measures the reconstruction, and keeps it to be spliced in."""

    batch: Batch
    y_ND: Tensor

    def __init__(self, sae: SAE):
        self.sae, self.sums = sae, DocumentSums()
        self.seen_F = torch.zeros(sae.config.d_sae, dtype=torch.bool)

    def __call__(self, resid_BTD: Tensor, span: Span) -> Tensor:
        kept_BT = self.batch.kept_BT
        x_ND = resid_BTD[kept_BT.to(resid_BTD.device)].float().to(self.sae.W_enc_FD.device)
        documents_N = self.batch.documents_at(kept_BT.nonzero())
        step = max(1, PRE_ACTIVATIONS // self.sae.config.d_sae)
        parts = [
            self._measure(x_ND[start : start + step], documents_N[start : start + step])
            for start in range(0, len(x_ND), step)
        ]
        self.y_ND = torch.cat(parts) if parts else x_ND
        return resid_BTD

    def _measure(self, x_ND: Tensor, documents_N: Tensor) -> Tensor:
        latents = self.sae.encode(x_ND)
        y_ND = self.sae.decode(latents, x_ND)
        on = latents.values > 0
        self.seen_F[latents.indices[on].cpu()] = True
        error_N = (x_ND.double() - y_ND.double()).pow(2).sum(1)
        squares_N = x_ND.double().pow(2).sum(1)
        self.sums.add(
            documents_N,
            tokens=torch.ones(len(x_ND)),
            error=error_N,
            relative=error_N / squares_N.clamp(min=1e-30),
            squares=squares_N,
            cosine=torch.cosine_similarity(x_ND.double(), y_ND.double(), dim=1),
            active=on.sum(1),
            x=x_ND,
        )
        return y_ND


def _put(batch: Batch, value: Tensor) -> Hook:
    """A hook that puts `value` (broadcast to (N, D)) where the batch's tokens count."""

    def put(resid_BTD: Tensor, span: Span) -> Tensor:
        changed_BTD = resid_BTD.clone()
        changed_BTD[batch.kept_BT.to(resid_BTD.device)] = value.to(resid_BTD.device, resid_BTD.dtype)
        return changed_BTD

    return put


def _run(model: Transformer, batch: Batch, point: HookPoint, hook: Hook | None, *, stop: bool = False) -> Tensor:
    """Logits (B, T, V) with a hook at `point`, or with `stop` the tensor there."""
    hooks = Hooks()
    if hook is not None:
        hooks.add(point, hook)
    stop_after = point if stop else None
    return model(batch.tokens_BT.to(model.device), lengths_B=batch.lengths, hooks=hooks, stop_after=stop_after)  # type: ignore[no-any-return]  # nn.Module's call


def _mean(model: Transformer, point: HookPoint, chosen: Sequence[Batch]) -> Tensor:
    """The mean of x over the positions that count, (D,)."""
    total_D, count = torch.zeros(point.width(model.config), dtype=torch.float64), 0
    with torch.inference_mode():
        for batch in chosen:
            x_ND = _run(model, batch, point, None, stop=True)[batch.kept_BT.to(model.device)]
            total_D += x_ND.float().cpu().double().sum(0)
            count += len(x_ND)
    return (total_D / count).float()


def _losses(model: Transformer, batch: Batch, point: HookPoint, reading: _Reading, mean_D: Tensor) -> None:
    """Adds the losses of the batch as it is, spliced and ablated, to the sums of `reading`."""
    clean_BTV = _run(model, batch, point, reading)
    found: dict[str, list[Tensor]] = {"clean": _each_row(batch, clean_BTV)}
    for name, value in (("spliced", reading.y_ND), ("zero", torch.zeros(1)), ("mean", mean_D)):
        logits_BTV = _run(model, batch, point, _put(batch, value))
        found[name] = _each_row(batch, logits_BTV)
        if name == "spliced":
            found["kl"] = [
                _kl(clean_BTV[row, : length - 1], logits_BTV[row, : length - 1])
                for row, length in enumerate(batch.lengths)
            ]
        del logits_BTV
    columns = {name: torch.stack(values) for name, values in found.items()}
    reading.sums.add(batch.documents_B, predicted=torch.tensor(batch.lengths) - 1, **columns)


def _each_row(batch: Batch, logits_BTV: Tensor) -> list[Tensor]:
    """Cross-entropy of every next token in nats, summed over each row; one row at a time is float32."""
    tokens_BT = batch.tokens_BT.to(logits_BTV.device)
    return [
        torch.nn.functional.cross_entropy(
            logits_BTV[row, : length - 1].float(), tokens_BT[row, 1:length], reduction="sum"
        )
        for row, length in enumerate(batch.lengths)
    ]


def _kl(clean_TV: Tensor, other_TV: Tensor) -> Tensor:
    """KL divergence of the distributions of `other` from those of `clean`, summed over positions."""
    log_clean_TV, log_other_TV = (logits.float().log_softmax(-1) for logits in (clean_TV, other_TV))
    return torch.nn.functional.kl_div(log_other_TV, log_clean_TV, reduction="sum", log_target=True)


def fit_context(plan: TextPlan, most: int) -> TextPlan:
    """The plan with rows no longer than the model reads."""
    return replace(plan, context=min(plan.context, most))
