"""The rows a run trains on, and what is found out about them before the first step: scale, centre, variance.

Shapes: D width of the rows, N rows of a sample.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.losses import total_variance
from train.config import TrainConfig
from train.errors import TrainError
from train.preprocess import InputScale, geometric_median, plan_of
from train.reader import ShardReader, Source, open_source

SAMPLE_ROWS = 1 << 15
"""Rows from which mean and scale of the data are taken where no plan says them."""
MEDIAN_ROWS = 1 << 13
"""Rows from which the geometric median is taken, likewise."""


def open_rows(folder: Path | str, config: TrainConfig) -> ShardReader:
    """The rows in a folder in the order of the config's seed. Raises `TrainError` if it holds none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise TrainError(f"there is no folder {folder}", "make one with steer capture")
    for name, what in (("sae.safetensors", "an SAE"), ("config.toml", "a training run")):
        if (folder / name).is_file():
            raise TrainError(f"{folder} holds {what}, not activations", "give a folder that `steer capture` wrote")
    return open_source(folder, config.seed, held_out=config.held_out or None)


@dataclass(frozen=True)
class Inputs:
    """What the first step of a run must know of its rows."""

    scale: InputScale
    center_D: Tensor
    """where `b_dec` starts, in scaled units, as `variance`"""
    variance: float
    """squared distance from the mean summed over D: the constant by which the loss is divided"""
    sample_ND: Tensor | None
    """scaled rows"""

    @classmethod
    def measure(cls, source: Source, config: TrainConfig) -> "Inputs":
        """From the plan of the data where it scales as the config does, else from a sample.

        Raises `TrainError` for numbers that are none, and for rows that do not differ.
        """
        sample_ND = source.batch(0, min(SAMPLE_ROWS, source.rows))
        if not bool(sample_ND.isfinite().all()):
            raise TrainError("the activations hold NaN or infinite values", "capture them again")
        if float(sample_ND.var(0, correction=0).sum()) <= 0:
            raise TrainError("all activations are the same, so there is nothing to learn from them")
        plan = plan_of(source)
        plan = plan if plan and plan.scale.mode == config.scale else None
        scale = plan.scale if plan else InputScale.measure(config.scale, sample_ND)
        sample_ND = scale.apply(sample_ND)
        if config.center == "none":
            center_D = torch.zeros(source.d_in)
        elif plan:
            center_D = replace(plan, center=config.center).center_D()
        elif config.center == "median":
            center_D = geometric_median(sample_ND[:MEDIAN_ROWS]).float()
        else:
            center_D = sample_ND.mean(0)
        variance = float(source.d_in) if scale.mode == "variance" else float(total_variance(sample_ND))
        return cls(scale, center_D, variance, sample_ND)

    @classmethod
    def known(cls, numbers: dict[str, Any], d_in: int) -> "Inputs":
        """Those of a checkpoint, whose weights take the place of everything that starts from a sample."""
        return cls(InputScale(**numbers["scale"]), torch.zeros(d_in), float(numbers["variance"]), None)
