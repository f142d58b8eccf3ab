"""What `steer batch` gains: its tokens a second over one request at a time, and over static batches of its size.

    python benchmarks/batch.py                     # a random Llama of 0.25 B parameters
    python benchmarks/batch.py --model demo        # the shipped model

The same requests are answered in three ways, which take turns: one after another; in batches in the order of the file,
each of which ends with its longest reply; and as `steer batch` does it (`steer.batch.write`), where the place of a
reply that is done goes to the next request of a like length. Weights are bfloat16, and packed for several rows where
the command packs them. Prompts have 4 to 64 words, and replies end at lengths
drawn from an exponential distribution, as those of a model that stops do. Prints one JSON line for each way with the
median and best of its tokens a second, and the ratio of the batch's median to it.
"""

import argparse
import copy
import json
import random
import statistics
import threading
import time
from collections.abc import Callable

import torch

from benchmarks.resteer import random_engine
from llama_3.packed import pack_model
from steer.batch import Row, groups, write
from steer.edits import SteeringSet
from steer.engine import Engine
from steer.events import TokenEvent
from steer.requests import Request
from steer.session import Prompt, Sampling

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "run", "to", "big", "red", "house", "by", "sea"]


def both(model: str) -> tuple[Engine, Engine]:
    """The engine for one reply at a time, and that for several."""
    if model == "demo":
        return Engine.load(), Engine.load(many=True)
    plain = random_engine(4096)
    plain.model.to(torch.bfloat16)
    packed = copy.deepcopy(plain.model)
    pack_model(packed)
    return plain, Engine(packed, plain.tokenizer, plain.sae)


def requests(engine: Engine, count: int, mean: float, longest: int) -> list[Row]:
    """Requests without edits, whose replies end by their length alone."""
    draw, rows = random.Random(0), []
    ban = tuple((token, -float("inf")) for token in sorted({*engine.tokenizer.stop_ids, *engine.model.config.stop_ids}))
    for line in range(count):
        prompt = Prompt(text=" ".join(draw.choices(WORDS, k=draw.randint(4, 64))))
        limit = max(1, min(longest, round(draw.expovariate(1 / mean))))
        ask = Request(line, {"id": line}, prompt, SteeringSet(), Sampling(logit_bias=ban), line, limit)
        size = engine.measure(ask.prompt, ask.steering, ask.sampling, limit)
        rows.append(Row(ask, ask.steering, size + limit))
    return rows


def static(engine: Engine, rows: list[Row], size: int) -> int:
    """Tokens written in batches of `size`, each begun when the last one has ended."""
    tokens = 0
    for batch in groups(rows, size):
        asks = [row.request for row in batch]
        events = engine.stream(
            [ask.prompt for ask in asks],
            [row.steering for row in batch],
            sampling=[ask.sampling for ask in asks],
            seeds=[ask.seed for ask in asks],
            max_tokens=[ask.max_tokens for ask in asks],
            hits=False,
            alternatives=0,
        )
        tokens += sum(isinstance(event, TokenEvent) for event in events)
    return tokens


def continuous(engine: Engine, rows: list[Row], size: int) -> int:
    """Tokens written as `steer batch` does it."""
    return sum(len(reply.events) for _, reply in write(engine, rows, size, threading.Event()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("random", "demo"), default="random")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--mean", type=float, default=48.0, help="mean length of a reply")
    parser.add_argument("--longest", type=int, default=192, help="length of the longest one")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    alone, engine = both(arguments.model)
    rows = requests(engine, arguments.requests, arguments.mean, arguments.longest)
    ways: dict[str, Callable[[], int]] = {
        "one at a time": lambda: static(alone, rows, 1),
        "static batches": lambda: static(engine, rows, arguments.batch_size),
        "steer batch": lambda: continuous(engine, rows, arguments.batch_size),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    static(engine, rows[: arguments.batch_size], arguments.batch_size)  # warm
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            tokens = way()
            speeds[name].append(tokens / (time.perf_counter() - start))
    ours = statistics.median(speeds["steer batch"])
    for name, values in speeds.items():
        median = statistics.median(values)
        print(
            json.dumps({
                "what": name, "model": arguments.model, "batch_size": arguments.batch_size, "requests": len(rows),
                "tokens": tokens, "threads": torch.get_num_threads(), "median_tokens_per_s": round(median, 1),
                "best_tokens_per_s": round(max(values), 1), "gain": round(ours / median, 2),
            })
        )  # fmt: skip


if __name__ == "__main__":
    main()
