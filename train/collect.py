"""From text to an index of features: what each latent fires on, how often, how strongly, and what it promotes.

Rows of token ids go through the model up to the SAE's hook point, through the SAE, and into a `labels.examples`
store; the first and all special tokens are left out. The index is written under a temporary name and moved into place,
so an interrupted run leaves what was there before; labels in an index that is replaced are carried over.

Shapes: B rows, T tokens, D model width, K kept latents, F latents, V vocabulary, N positions that count.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from labels.examples import ExampleStore
from labels.index import LabelIndex
from llama_3.chat_format import ChatFormat
from llama_3.hooks import HookPoint
from llama_3.model import Transformer
from llama_3.tokenizer import Tokenizer
from sae.checkpoint import Stats, write_stats
from sae.model import SAE
from train.errors import TrainError
from train.evaluate import hook_point
from train.text import default_chat, read_rows

Progress = Callable[[int, int | None], None]
"""Called with the tokens read so far and the most that will be read, if known."""
EFFECTS: Final = 8
"""Tokens kept on each side of a latent's effects."""
_NORMS: Final = 1 << 18
"""Positions whose residual norms are kept for the median: a mixture of the files, 1 MB."""


@dataclass(frozen=True)
class Collected:
    """Examples of every latent, and the statistics measured on the way."""

    store: ExampleStore
    stats: Stats


def collect(
    model: Transformer,
    sae: SAE,
    tokenizer: Tokenizer,
    files: Sequence[Path | str],
    out_index: Path | str,
    *,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    context: int = 256,
    chat: ChatFormat | None = None,
    meta: Mapping[str, str] | None = None,
    stats_folder: Path | str | None = None,
) -> dict[str, int]:
    """Reads text files into a new index at `out_index`; counts of tokens, contexts, live and dead latents, examples.

    The index shows the SAE's own statistics where it has them, else the measured ones, which then also go to
    `stats.safetensors` in `stats_folder` if that is given. `meta` is written into the index (hashes of model and SAE).
    Dialogs are written in `chat`, by default as in Llama 3.
    ValueError or OSError in one sentence for what cannot be read.
    """
    _labels_of_same_sae(Path(out_index), _identity(sae) | dict(meta or {}))  # refuses before the text is read
    context = min(context, model.config.max_context)
    contexts = (row.tokens for row in read_rows(files, tokenizer, chat or default_chat(tokenizer), context))
    found = collect_contexts(model, sae, tokenizer, contexts, max_tokens=max_tokens, seed=seed, progress=progress)
    if sae.stats is None and stats_folder is not None:
        write_stats(stats_folder, found.stats)
    return write_index(model, sae, tokenizer, found, out_index, meta={"seed": str(seed), **(meta or {})})


def collect_contexts(
    model: Transformer,
    sae: SAE,
    tokenizer: Tokenizer,
    contexts: Iterable[list[int]],
    *,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    batch_tokens: int = 4096,
) -> Collected:
    """What the latents do on rows of token ids, each with its first token in front. `max_tokens` counts every token."""
    point = hook_point(model.config, sae.config)
    store = ExampleStore(sae.config.d_sae, seed=seed)
    specials = torch.tensor(sorted(tokenizer.special_ids), dtype=torch.int64)
    norms: list[Tensor] = []
    read = 0
    for rows in _batches(_limited(contexts, max_tokens), batch_tokens):
        lengths_B = torch.tensor([len(row) for row in rows])
        tokens_BT = torch.zeros(len(rows), int(lengths_B.max()), dtype=torch.int64)
        for row, tokens in enumerate(rows):
            tokens_BT[row, : len(tokens)] = torch.tensor(tokens)
        keep_BT = (torch.arange(tokens_BT.shape[1]) < lengths_B[:, None]) & ~torch.isin(tokens_BT, specials)
        keep_BT[:, 0] = False
        with torch.inference_mode():
            resid_BTD = model.forward(tokens_BT.to(model.device), lengths_B=lengths_B, stop_after=point)
            resid_ND = resid_BTD[keep_BT.to(model.device)].to(sae.W_enc_FD.device)
            indices_NK, values_NK = _encode(sae, resid_ND)
        if sum(map(len, norms)) < _NORMS:
            norms.append(resid_ND.float().norm(dim=1).cpu())
        indices_BTK = np.zeros((*tokens_BT.shape, indices_NK.shape[1]), dtype=np.int64)
        values_BTK = np.zeros(indices_BTK.shape, dtype=np.float32)
        keep = keep_BT.numpy()
        indices_BTK[keep], values_BTK[keep] = indices_NK, values_NK
        store.update(tokens_BT.numpy(), lengths_B.numpy(), indices_BTK, values_BTK, keep)
        read += int(lengths_B.sum())
        if progress is not None:
            progress(read, max_tokens)
    if not store.tokens:
        raise TrainError("the text holds no token to look at", "the first and special tokens of a text do not count")
    norm = float(torch.cat(norms)[:_NORMS].median())
    max_F, mean_on_F, density_F = map(torch.from_numpy, (store.max_F.copy(), store.mean_on_F, store.density_F))
    return Collected(store, Stats(max_F, mean_on_F, density_F, resid_norm=norm, tokens=store.tokens))


def write_index(
    model: Transformer,
    sae: SAE,
    tokenizer: Tokenizer,
    found: Collected,
    out_index: Path | str,
    *,
    meta: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Makes the index at `out_index`, with the labels of the one it replaces; the counts `collect` gives."""
    out, store, stats = Path(out_index), found.store, sae.stats or found.stats
    meta = _identity(sae) | {"tokens": str(store.tokens), **(meta or {})}
    latents = range(sae.config.d_sae)
    examples = {latent: each for latent in latents if (each := store.examples(latent))}
    effects = list(logit_effects(model, sae, tokenizer))
    used = {token for each in examples.values() for example in each for token in example.tokens}
    used.update(token for _, *sides in effects for side in sides for token, _ in side)
    kept = _labels_of_same_sae(out, meta)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with LabelIndex.create(temporary, meta) as index:
            max_F, mean_on_F, density_F = (each.tolist() for each in (stats.max_F, stats.mean_on_F, stats.density_F))
            histograms = [store.histogram(latent) for latent in latents]
            index.write_features(latents, max_F, mean_on_F, density_F, histograms)
            index.write_tokens({token: tokenizer.token_bytes(token) for token in sorted(used)})
            index.write_examples(examples.items())
            index.write_effects(effects)
            index.add_labels(kept)
            index.compact()
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return {
        "tokens": store.tokens,
        "contexts": store.contexts,
        "latents": len(examples),
        "dead": len(latents) - len(examples),
        "examples": sum(map(len, examples.values())),
    }


def logit_effects(
    model: Transformer, sae: SAE, tokenizer: Tokenizer, count: int = EFFECTS
) -> Iterator[tuple[int, list[tuple[int, float]], list[tuple[int, float]]]]:
    """(latent, promoted, suppressed) for every latent: token ids and logits per unit of activation, strongest first.

    The logit lens: the decoder direction, times the weight of the final norm, through the unembedding, less its mean
    over the vocabulary; the norm's division is left out, as is the size of the token where the SAE
    normalises by it. From `attn_z` the way to the residual stream leads through the block's output projection. Special
    tokens take no part.
    """
    ordinary = [token for token in range(model.config.vocab_size) if token not in tokenizer.special_ids]
    ordinary = [token for token in ordinary if token < tokenizer.vocab_size]
    ids_V = torch.tensor(ordinary)
    with torch.inference_mode():
        head_VD = model.unembedding_VD[ids_V.to(model.device)].float() * model.norm.weight.float()
        head_VD = head_VD - head_VD.mean(dim=0)
        point = HookPoint.parse(sae.config.hook)
        if point.site == "attn_z":
            head_VD = head_VD @ attrgetter("attention.out.weight")(model.blocks[point.layer]).float()
    for start in range(0, sae.config.d_sae, 256):
        with torch.inference_mode():  # never around a `yield`: the mode would hold for whoever asked
            logits_FV = sae.W_dec_FD[start : start + 256].to(head_VD.device).float() @ head_VD.T
            up, down = (logits_FV.topk(min(count, len(ids_V)), largest=largest) for largest in (True, False))
            sides = [(ids_V[side.indices.cpu()].tolist(), side.values.tolist()) for side in (up, down)]
        for row in range(len(logits_FV)):
            promoted, suppressed = (list(zip(ids[row], values[row], strict=True)) for ids, values in sides)
            yield start + row, promoted, suppressed


def _encode(sae: SAE, resid_ND: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Indices and values (N, K) as arrays, a slice at a time: all pre-activations at once may not fit."""
    step = max(1, (1 << 25) // sae.config.d_sae)
    parts = [sae.encode(part) for part in torch.split(resid_ND, step)]
    most = max((part.indices.shape[1] for part in parts), default=1)
    indices_NK = np.zeros((len(resid_ND), most), dtype=np.int64)
    values_NK = np.zeros((len(resid_ND), most), dtype=np.float32)
    for number, part in enumerate(parts):
        rows, columns = slice(number * step, number * step + len(part.indices)), slice(part.indices.shape[1])
        indices_NK[rows, columns], values_NK[rows, columns] = part.indices.cpu().numpy(), part.values.cpu().numpy()
    return indices_NK, values_NK


def _limited(contexts: Iterable[list[int]], max_tokens: int | None) -> Iterator[list[int]]:
    left = max_tokens
    for context in contexts:
        row = context if left is None else context[:left]
        if not row:
            return
        yield row
        left = None if left is None else left - len(row)


def _batches(contexts: Iterator[list[int]], batch_tokens: int) -> Iterator[list[list[int]]]:
    """Rows of like length together, so that little is padded: 256 rows are read ahead and sorted."""
    while ahead := sorted(islice(contexts, 256), key=len, reverse=True):
        while ahead:
            rows = max(1, batch_tokens // len(ahead[0]))
            yield ahead[:rows]
            ahead = ahead[rows:]


def _identity(sae: SAE) -> dict[str, str]:
    return {"hook": sae.config.hook, "d_sae": str(sae.config.d_sae)}


def _labels_of_same_sae(path: Path, meta: Mapping[str, str]) -> list[Any]:
    if not path.exists():
        return []
    with LabelIndex(path, read_only=True) as old:
        was = old.meta()
        for key in ("d_sae", "hook", "sae/sae.safetensors"):
            if key in was and key in meta and was[key] != meta[key]:
                why = f"`{path}` is an index of another SAE ({key} is {was[key]}, not {meta[key]})"
                raise TrainError(why, "choose another name for the new index")
        return old.all_labels()
