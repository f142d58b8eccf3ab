"""How well the attributions of `steer why` rank latents: rank correlation with ablating them one by one.

    python benchmarks/attribution.py FILE            # 100 tokens of a text on the shipped model

Tokens are drawn from the documents of FILE at random places with at least 8 tokens before them, the model reading at
most `--context` tokens. For each, the `--top` latents of the largest attributions are ablated one at a time (the
reconstruction error kept), and Spearman's rank correlation is taken between those effects and the estimates: the
attribution, and the plain gradient times activation it begins from. It is printed as the mean over tokens with a 95%
interval (bootstrap over tokens), the median, and once for all pairs of all tokens together.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

from steer.analysis.attribution import why_token
from steer.engine import Engine
from steer.resolve import hook_of
from train.documents import read_texts

LEAST = 8


def ranks(values: list[float]) -> torch.Tensor:
    """Ranks from 0, float64; equal values share the mean of theirs."""
    tensor = torch.tensor(values, dtype=torch.float64)
    below, above = (tensor[None] < tensor[:, None]).sum(1), (tensor[None] <= tensor[:, None]).sum(1)
    return (below + above - 1).double() / 2


def spearman(one: list[float], other: list[float]) -> float:
    """Spearman's rank correlation."""
    return float(torch.corrcoef(torch.stack([ranks(one), ranks(other)]))[0, 1])


def interval(values: list[float], generator: random.Random, draws: int = 2000) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean."""
    means = sorted(statistics.fmean(generator.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def draw(engine: Engine, file: Path, tokens: int, context: int, generator: random.Random) -> list[list[int]]:
    """Rows of token ids, the last of each being the token to explain."""
    rows: list[list[int]] = []
    for text in read_texts(file):
        ids = engine.tokenizer.encode(text, bos=True)
        if len(ids) > LEAST + 1:
            end = generator.randint(LEAST + 1, min(context, len(ids) - 1))
            rows.append(ids[: end + 1])
        if len(rows) == 20 * tokens:
            break
    return generator.sample(rows, min(tokens, len(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--sae")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--top", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    engine, generator = Engine.load(arguments.model, arguments.sae), random.Random(arguments.seed)
    assert engine.sae is not None
    hook = hook_of(engine.sae)
    pairs: dict[str, list[tuple[list[float], list[float]]]] = {"attribution": [], "gradient": []}
    seconds = []
    for row in draw(engine, arguments.file, arguments.tokens, arguments.context, generator):
        start = time.perf_counter()
        found = why_token(engine.model, engine.tokenizer, engine.sae, hook, row, len(row) - 1, check=arguments.top)
        seconds.append(time.perf_counter() - start)
        checked = [effect for effect in found.latents if effect.removed is not None]
        removed = [effect.removed for effect in checked if effect.removed is not None]
        pairs["attribution"].append(([effect.attribution for effect in checked], removed))
        pairs["gradient"].append(([effect.gradient for effect in checked], removed))
    for name, each in pairs.items():
        found_r = [spearman(one, other) for one, other in each]
        low, high = interval(found_r, generator)
        pooled = spearman([x for one, _ in each for x in one], [x for _, other in each for x in other])
        figures = {"mean": statistics.fmean(found_r), "low": low, "high": high, "median": statistics.median(found_r)}
        figures |= {"least": min(found_r), "pooled": pooled}
        rounded = {what: round(value, 4) for what, value in figures.items()}
        print(json.dumps({"estimate": name, "tokens": len(each), "top": arguments.top} | rounded))
    print(json.dumps({"seconds_a_token": round(statistics.median(seconds), 3)}))


if __name__ == "__main__":
    main()
