"""How much one edit moves the demo model towards a topic: the steering table of the demo's model card.

    python benchmarks/steering.py                 # the table, from the choices in steering_choices.json
    python benchmarks/steering.py --choose        # make those choices again, on other seeds than the table's

For each topic of `steering_topics.toml` a latent is found by label search (the first hits for the topic's name) and a
strength is chosen by trying hits and strengths, mildest first, on the seeds from 1,000. The table then uses the seeds 0
to 49 and nothing is chosen on them: how often the topic's words come in 100 tokens after "Once upon a time", plus one,
with the edit and without it, and the perplexity of either text under the unsteered model.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import torch

from steer.edits import Edit, SteeringSet
from steer.engine import Engine
from steer.events import PromptRead, TokenEvent
from steer.session import Prompt

HERE = Path(__file__).parent
PROMPT = "Once upon a time"
TOKENS = 100
SEEDS = range(50)
TRIAL_SEEDS = range(1000, 1010)
TRIAL_TOKENS = 60
HITS = 2
STRENGTHS = (0.4, 0.7, 1.0, 1.5)
TARGET = 8.0
"""Of the trials that make the words so many times as frequent, the one with the lowest perplexity is taken."""


def write(engine: Engine, edit: str | None, seeds: Sequence[int], tokens: int = TOKENS) -> tuple[list[str], float]:
    """The texts of one batch, a row a seed, and their perplexity under the unsteered model."""
    steering = SteeringSet((Edit.parse(edit),) if edit else ())
    rows = [steering] * len(seeds)
    prompts, replies = [[] for _ in seeds], [[] for _ in seeds]
    texts = [""] * len(seeds)
    ask = [Prompt(text=PROMPT)] * len(seeds)
    stream = engine.stream(ask, rows, seeds=list(seeds), max_tokens=tokens, hits=False, alternatives=0)
    for event in stream:
        if isinstance(event, PromptRead):
            prompts[event.row] = [token.token for token in event.tokens]
        elif isinstance(event, TokenEvent):
            replies[event.row].append(event.token)
            texts[event.row] += event.text
    return texts, perplexity(engine, prompts, replies)


def perplexity(engine: Engine, prompts: Sequence[list[int]], replies: Sequence[list[int]]) -> float:
    """exp of the mean negative log-likelihood of all reply tokens, given their prompts, without any edit."""
    rows = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
    longest = max(map(len, rows))
    tokens_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    with torch.inference_mode():
        logprobs_BTV = engine.model.forward(tokens_BT, lengths_B=list(map(len, rows))).float().log_softmax(-1)
    total, count = 0.0, 0
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        for place in range(len(prompt), len(row)):
            total -= float(logprobs_BTV[number, place - 1, row[place]])
            count += 1
    return math.exp(total / count)


def mentions(texts: Sequence[str], words: Sequence[str]) -> int:
    """How often any of the words stands in the texts: whole words, any case."""
    wanted = set(words)
    return sum(word in wanted for text in texts for word in re.findall(r"[a-z]+", text.lower()))


def choose(engine: Engine, topics: dict[str, list[str]]) -> dict[str, str]:
    """An edit for each topic whose name finds a feature, tried on `TRIAL_SEEDS`."""
    base, _ = write(engine, None, TRIAL_SEEDS, TRIAL_TOKENS)
    chosen = {}
    for topic, words in topics.items():
        trials = []
        for card in engine.search(topic, HITS):
            for strength in STRENGTHS:
                edit = f"{card.latent} +{strength:g}x"
                texts, steered_perplexity = write(engine, edit, TRIAL_SEEDS, TRIAL_TOKENS)
                gain = (mentions(texts, words) + 1) / (mentions(base, words) + 1)
                reached = gain >= TARGET
                trials.append((reached, -steered_perplexity if reached else gain, gain, steered_perplexity, edit))
                if reached:
                    break  # a stronger one would only cost more
        if trials:
            _, _, gain, steered_perplexity, chosen[topic] = max(trials)
            print(f"{topic}: {chosen[topic]}  x{gain:.1f}  perplexity {steered_perplexity:.1f}", file=sys.stderr)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true", help="choose latents and strengths again")
    parser.add_argument("--json", action="store_true", help="one object a topic instead of a table")
    asked = parser.parse_args()
    engine = Engine.load(dtype="float32", device="cpu")
    topics: dict[str, list[str]] = tomllib.loads((HERE / "steering_topics.toml").read_text())["topics"]
    choices = HERE / "steering_choices.json"
    if asked.choose:
        choices.write_text(json.dumps(choose(engine, topics), indent=1) + "\n")
    edits: dict[str, str] = json.loads(choices.read_text())
    base, base_perplexity = write(engine, None, SEEDS)
    rows = []
    for topic, edit in edits.items():
        texts, steered_perplexity = write(engine, edit, SEEDS)
        before, after = mentions(base, topics[topic]) + 1, mentions(texts, topics[topic]) + 1
        label = engine.card(Edit.parse(edit).latent).label
        rows.append((after / before, topic, edit, label, before, after, steered_perplexity))
        print(f"{topic}: {before} -> {after}", file=sys.stderr)
    rows.sort(reverse=True)
    if asked.json:
        names = ("times", "topic", "edit", "label", "baseline", "steered", "perplexity")
        for row in rows:
            print(json.dumps(dict(zip(names, row, strict=True))))
        return
    print("| topic | edit | label of the latent | baseline | steered | times | perplexity |")
    print("|---|---|---|---:|---:|---:|---:|")
    for times, topic, edit, label, before, after, steered_perplexity in rows:
        shown = label.replace("|", "\\|")
        print(f"| {topic} | `{edit}` | {shown} | {before} | {after} | {times:.1f} | {steered_perplexity:.1f} |")
    enough = sum(row[0] >= 5 for row in rows)
    print(
        f"\n{enough} of {len(rows)} topics at least five times as frequent; baseline perplexity {base_perplexity:.1f}."
    )


if __name__ == "__main__":
    main()
