"""What a training run will cost: some real steps on the real rows, in a folder that is gone afterwards.

Of a text that is still to be captured the trial captures as many rows as it needs, and its cost is that of both.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from train.capture import Job, capture_cost
from train.config import TrainConfig
from train.cost import TRIAL_SECONDS, Cost, added, estimate, trial
from train.inputs import open_rows
from train.reader import Source
from train.stream import StreamSource
from train.sweep import short_tokens
from train.trainer import Trainer

TRIAL_ROWS = 1 << 13
"""Rows of a text on which training is tried; they are read again and again."""


def training_cost(
    source: Source,
    config: TrainConfig,
    *,
    threads: int = 1,
    device: str = "cpu",
    price_per_hour: float | None = None,
    seconds: float | None = None,
) -> Cost:
    """Speed and memory from a trial of `seconds` (default `TRIAL_SECONDS`); disk from the sizes of what is written."""
    with tempfile.TemporaryDirectory(prefix="steer-trial-") as folder:
        trainer = Trainer(source, Path(folder), replace(config, early_stop=0), threads=threads, device=device)
        full, step = trainer.config, 0

        def work() -> int:
            nonlocal step
            trainer.advance(source.batch(step * full.batch, full.batch))
            trainer.step, step = 0, step + 1  # a trial that outlasts the run must not leave its schedules
            return full.batch

        with trainer.state:
            rate, memory = trial(work, TRIAL_SECONDS if seconds is None else seconds)
        disk = trainer.disk_bytes()
    return estimate(
        full.tokens,
        rate,
        disk_bytes=disk,
        memory_bytes=memory,
        price_per_hour=price_per_hour,
    )


def runs_cost(
    source: Source, config: TrainConfig, members: Sequence[dict[str, Any]], tried: int = 0, **options: Any
) -> Cost:
    """The cost of a run, or of the `members` of a sweep, which are in memory together; with `tried` learning rates in
    short runs before. Options are those of `training_cost`."""
    costs = [training_cost(source, replace(config, **values), **options) for values in members or [{}]]
    whole = added(costs, costs[0].tokens)
    more = 1 + tried * short_tokens(config.resolve(source.d_in, source.rows)) / whole.tokens
    hours, money = whole.hours * more, None if whole.money is None else whole.money * more
    memory = sum(cost.memory_bytes for cost in costs)
    rate = whole.tokens_per_second / more
    return replace(whole, memory_bytes=memory, hours=hours, money=money, tokens_per_second=rate)


def text_cost(
    job: Job,
    hook: str,
    rows: int,
    config: TrainConfig,
    members: Sequence[dict[str, Any]] = (),
    tried: int = 0,
    **options: Any,
) -> tuple[Cost, Cost]:
    """(the cost of capturing `rows` rows of a job's text at a hook, that of training on them), as `runs_cost`."""
    known = {name: options[name] for name in ("price_per_hour", "seconds") if options.get(name) is not None}
    captured = capture_cost(job, [hook], rows, **known)
    stream = StreamSource(job, hook, config.seed, mix_bytes=4 * TRIAL_ROWS * job.model.config.d_model)
    with tempfile.TemporaryDirectory(prefix="steer-trial-") as folder:
        np.save(Path(folder) / "rows.npy", stream.batch(0, TRIAL_ROWS).numpy())
        stream.close()
        tokens = config.resolve(stream.d_in, captured.tokens).tokens  # an epoch is the text, not the rows of the trial
        config = replace(config, tokens=tokens, epochs=0)
        return captured, runs_cost(open_rows(folder, config), config, members, tried, **options)
