"""What a training run will cost: some real steps on the real rows, in a folder that is gone afterwards."""

import tempfile
from dataclasses import replace
from pathlib import Path

from train.config import TrainConfig
from train.cost import TRIAL_SECONDS, Cost, estimate, trial
from train.reader import Source
from train.trainer import Trainer

ACTIVITY_BYTES = 5
"""Of a snapshot, for each latent."""


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
        state = sum(tensor.numel() * tensor.element_size() for tensor in trainer.state.state().values())
        weights = 4 * sum(weight.numel() for weight in trainer.state.final_weights().values())
    kept = full.keep + 1 + (full.steps // full.keep_every if full.keep_every else 0)
    checkpoints = state * min(kept, -(-full.steps // full.checkpoint_every) + 1)
    snapshots = ACTIVITY_BYTES * full.latents * (full.steps // full.evaluate_every + 1)
    return estimate(
        full.tokens,
        rate,
        disk_bytes=checkpoints + snapshots + weights + 3 * 4 * full.latents,
        memory_bytes=memory,
        price_per_hour=price_per_hour,
    )
