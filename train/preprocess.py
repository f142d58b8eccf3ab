"""What is found out about rows before training: where they lie, how far they spread, and by what they are scaled.

`make_plan` reads every row that is not held out once and writes nothing; `write_plan` puts the result beside the rows
as `plan.json`. Rows are never rewritten: a plan says how to read them (which documents are held out), where an SAE's
`b_dec` starts (mean or geometric median) and how its inputs are scaled.

Files are read by several threads, each piece's moments by Welford's updates in float64, and the pieces merged in the
order of the files (Chan, Golub and LeVeque 1979), so that the result does not depend on the threads.

Shapes: B tokens, D width of a row, N rows.
"""

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from train.errors import TrainError
from train.shards import sha256_of, write_json

if TYPE_CHECKING:
    from train.reader import Piece, ShardReader, Source

FORMAT, VERSION = "steer-plan", 1
MODES = ("none", "variance", "norm", "layer_norm", "unit_norm")
PER_TOKEN = ("layer_norm", "unit_norm")
CENTERS = ("mean", "median")
MEDIAN_ROWS = 1 << 14
"""Rows from which the geometric median is taken; its error is that of a mean of so many rows, about."""
CHUNK = 1 << 13
"""Rows that are float64 at a time."""


@dataclass(frozen=True)
class InputScale:
    """How rows become the inputs of an SAE: one factor for all, or each token by itself."""

    mode: str
    factor: float = 1.0
    """what rows are divided by; 1.0 in the modes that take each token by itself, and in "none" """

    @classmethod
    def measure(cls, mode: str, rows_ND: Tensor) -> "InputScale":
        """The scale that these rows ask for."""
        moments = Moments.of(rows_ND, cls("none"))
        return cls.of_moments(mode, moments)

    @classmethod
    def of_moments(cls, mode: str, moments: "Moments") -> "InputScale":
        """ "variance": the total variance becomes D. "norm": the mean norm becomes sqrt(D)."""
        check_mode(mode)
        if mode == "variance":
            return cls(mode, _usable(math.sqrt(moments.variance / len(moments.mean_D)), "spread", moments))
        if mode == "norm":
            return cls(mode, _usable(moments.norm / math.sqrt(len(moments.mean_D)), "mean norm", moments))
        return cls(mode)

    def apply(self, x_BD: Tensor) -> Tensor:
        """The inputs (B, D), out of place.

        "layer_norm" is (x - mean) / (unbiased std + 1e-5) and "unit_norm" (x - mean) / |x - mean|, each over D of one
        token (Gao et al. 2024, appendix A.1).
        """
        if self.mode in PER_TOKEN:
            centred_BD = x_BD - x_BD.mean(-1, keepdim=True)
            if self.mode == "layer_norm":
                return centred_BD / (centred_BD.std(-1, keepdim=True) + 1e-5)
            norm_B1: Tensor = torch.linalg.vector_norm(centred_BD, dim=-1, keepdim=True)
            return centred_BD / norm_B1.clamp(min=1e-30)
        return x_BD / self.factor


def check_mode(mode: str) -> None:
    """`TrainError` for a mode that is none."""
    if mode not in MODES:
        raise TrainError(f"there is no scaling {mode!r}", f"one of {', '.join(MODES)}")


def _usable(factor: float, what: str, moments: "Moments") -> float:
    if not (math.isfinite(factor) and factor > 0):
        raise TrainError(f"the {moments.count:,} rows have a {what} of {factor}, so they cannot be scaled by it")
    return factor


@dataclass(frozen=True)
class Moments:
    """Count, mean, summed squared distances from the mean (over rows and D) and mean norm of some rows."""

    count: int
    mean_D: Tensor
    """float64"""
    squares: float
    norm: float

    @classmethod
    def of(cls, rows_ND: Tensor, scale: InputScale) -> "Moments":
        """Of rows in any float dtype, after `scale`; a chunk at a time."""
        total = cls(0, torch.zeros(rows_ND.shape[1], dtype=torch.float64), 0.0, 0.0)
        for chunk_ND in torch.split(rows_ND, CHUNK):
            x_ND = scale.apply(chunk_ND.double())
            mean_D = x_ND.mean(0)
            norm = float(torch.linalg.vector_norm(x_ND, dim=1).mean())
            total = total.merged(cls(len(x_ND), mean_D, float((x_ND - mean_D).pow(2).sum()), norm))
        return total

    def merged(self, other: "Moments") -> "Moments":
        """Those of both sets of rows together (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        if not count:
            return self
        share = other.count / count
        apart_D = other.mean_D - self.mean_D
        squares = self.squares + other.squares + float(apart_D.pow(2).sum()) * self.count * share
        return Moments(count, self.mean_D + apart_D * share, squares, self.norm + (other.norm - self.norm) * share)

    @property
    def variance(self) -> float:
        """Squared distance from the mean summed over D, mean over rows."""
        return self.squares / self.count


def geometric_median(rows_ND: Tensor, *, tolerance: float = 1e-6, steps: int = 1000) -> Tensor:
    """The point whose distances to the rows have the smallest sum, (D,) float64.

    Weiszfeld's iteration from the mean, with the step of Vardi and Zhang (2000) for a point that hits a row. It ends
    when a step is shorter than `tolerance` times the mean distance of the rows.
    """
    x_ND = rows_ND.double()
    point_D = x_ND.mean(0)
    for _ in range(steps):
        apart_ND = x_ND - point_D
        distance_N = torch.linalg.vector_norm(apart_ND, dim=1)
        away_N = distance_N > 0
        if not bool(away_N.any()):
            return point_D
        weight_N = torch.where(away_N, 1 / distance_N, 0.0)
        pull_D = weight_N @ apart_ND
        held = float((~away_N).sum()) / max(float(pull_D.norm()), 1e-300)
        step_D = pull_D / weight_N.sum() * max(0.0, 1 - held)
        point_D = point_D + step_D
        if float(step_D.norm()) <= tolerance * float(distance_N.mean()):
            break
    return point_D


@dataclass(frozen=True)
class Plan:
    """What `plan.json` holds. Mean, median and factor are of the rows that are not held out."""

    seed: int
    """of the split"""
    held_out: float
    """share of the documents (or blocks of rows) held out"""
    rows: int
    """that are trained on"""
    held_out_rows: int
    scale: InputScale
    center: str
    variance: float
    """of the rows in the units of `mean_D`, summed over D"""
    norm: float
    """mean norm, likewise"""
    mean: list[float] = field(repr=False)
    """as captured; in the modes that scale each token by itself, of the scaled rows"""
    median: list[float] = field(repr=False)
    """geometric median of a sample, likewise"""
    made_from: list[dict[str, Any]] = field(repr=False)
    """`name`, `rows`, `bytes`, `sha256` of every file; of one that is no shard also `sample`, a hash of parts of it"""

    def center_D(self) -> Tensor:
        """Where `b_dec` starts, (D,) float32, in the units of scaled inputs."""
        return (torch.tensor(getattr(self, self.center), dtype=torch.float64) / self.scale.factor).float()

    def check_made_from(self, folder: Path, entries: list[dict[str, Any]], d_in: int) -> None:
        """`TrainError` naming the first file that is not what the plan was made from."""
        if len(self.mean) != d_in:
            raise TrainError(
                f"the plan in {folder} is for rows of width {len(self.mean)}, not {d_in}", "run steer preprocess again"
            )
        planned = {entry["name"]: entry for entry in self.made_from}
        for entry in entries:
            known = planned.pop(entry["name"], None)
            if known is None or any(known.get(name, value) != value for name, value in entry.items()):
                raise TrainError(
                    f"the plan in {folder} was made from another {entry['name']}", "run steer preprocess again"
                )
        for name in planned:
            raise TrainError(f"the plan in {folder} was made with {name}, which is gone", "run steer preprocess again")


def plan_of(source: "Source") -> Plan | None:
    """The plan of a source; None where `steer preprocess` was not run, or nothing is on disk."""
    plan = getattr(source, "plan", None)
    return plan if isinstance(plan, Plan) else None


def make_plan(
    reader: "ShardReader",
    *,
    scale: str = "variance",
    center: str = "mean",
    threads: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Measures the rows of `reader` that are not held out. `on_progress(rows, all rows)` is called after each piece.

    The reader must have been opened with `use_plan=False`: what it holds out is what the plan says.
    """
    check_mode(scale)
    if center not in CENTERS:
        raise TrainError(f"there is no center {center!r}", f"one of {', '.join(CENTERS)}")
    by_token = InputScale(scale) if scale in PER_TOKEN else InputScale("none")

    def measure(piece: "Piece") -> Moments:
        return Moments.of(reader.read(piece), by_token)

    total = Moments(0, torch.zeros(reader.d_in, dtype=torch.float64), 0.0, 0.0)
    with ThreadPoolExecutor(threads) as pool:
        for moments in pool.map(measure, reader.pieces):
            total = total.merged(moments)
            if on_progress:
                on_progress(total.count, reader.rows)
        hashed = pool.map(
            lambda entry: entry.get("sha256") or sha256_of(reader.folder / entry["name"]), reader.made_from
        )
        made_from = [entry | {"sha256": sha256} for entry, sha256 in zip(reader.made_from, hashed, strict=True)]
    sample_ND = by_token.apply(reader.batch(0, min(MEDIAN_ROWS, reader.rows)))
    return Plan(
        seed=reader.split_seed,
        held_out=reader.share,
        rows=reader.rows,
        held_out_rows=reader.held_out_rows,
        scale=InputScale.of_moments(scale, total),
        center=center,
        variance=total.variance,
        norm=total.norm,
        mean=total.mean_D.tolist(),
        median=geometric_median(sample_ND).tolist(),
        made_from=made_from,
    )


def write_plan(folder: Path | str, plan: Plan) -> None:
    """Writes `plan.json` into `folder`, in place of an older one."""
    write_json(Path(folder) / "plan.json", {"format": FORMAT, "version": VERSION} | asdict(plan))


def read_plan(folder: Path | str) -> Plan | None:
    """The plan in a folder; None if it has none. `TrainError` for one that is damaged."""
    file = Path(folder) / "plan.json"
    if not file.exists():
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored.pop("format") != FORMAT or stored.pop("version") != VERSION:
            raise ValueError("it is of another program or version")
        plan = Plan(**stored | {"scale": InputScale(**stored["scale"])})
        usable = (
            plan.scale.mode in MODES and plan.scale.factor > 0 and plan.center in CENTERS and 0 <= plan.held_out < 1
        )
        counts = all(isinstance(value, int) for value in (plan.seed, plan.rows, plan.held_out_rows))
        numbers = counts and all(math.isfinite(value) for value in (*plan.mean, *plan.median, plan.scale.factor))
        if not (
            usable and numbers and len(plan.mean) == len(plan.median) and all("sha256" in e for e in plan.made_from)
        ):
            raise ValueError("a value in it cannot be")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise TrainError(f"{file} is not a plan ({error})", "run steer preprocess again") from error
    return plan
