"""Trains SAEs on rows of activations: `RUN/config.toml`, `metrics.jsonl`, `activity/`, `checkpoints/`, and at the end
`sae/`.

The run's folder is the whole truth. Its config holds every choice, defaults filled in; a checkpoint holds weights,
moments, counters, random state and what the trainer itself counts, and the number of steps fixes the rows that come
next. Killing the process loses at most the steps since the last checkpoint, and the resumed run ends in the same bits
as an unbroken one. A `Trainer` is one run; `run_together` drives one or several of them over the same rows, each batch
read once.

Shapes: B tokens, D width of the rows, F latents, N rows.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.checkpoint import Stats, save_sae
from sae.model import SAE
from train.activity import ActivityLog
from train.assemble import assembled, own_sae
from train.checkpoints import Checkpoints
from train.config import TrainConfig, check_same, read_run, write_run
from train.cost import check_room
from train.distributed import ALONE, Team
from train.errors import LossError, TrainError
from train.inputs import Inputs, open_rows
from train.lock import only_process
from train.log import Log
from train.metrics import append_metrics, cut_metrics, obey
from train.preprocess import plan_of
from train.reader import Source
from train.recipe import COUNTED
from train.signals import StoppedError, stop_on_signals
from train.statistics import Measured, measure
from train.step import SparseStep

Progress = Callable[[dict[str, Any]], None]

EVALUATED_ROWS = 1 << 13
"""Held-out rows, at most, on which FVU is measured while training."""
READ_ROWS = 1 << 14
"""Rows read at a time for the statistics of the finished SAE."""
DEAD_WINDOW = 1_000_000
"""A latent is reported dead when it was not active in this many training tokens, or in all if there were fewer."""
SAVE_SECONDS = 600.0
"""A checkpoint is due when the last one is so old, however few steps that were."""
ACTIVITY_BYTES = 5
"""Of a snapshot, for each latent."""
HELD_BYTES = 1 << 30
"""Held-out rows, in float32, on which the finished SAE is measured, at most."""


@dataclass(frozen=True)
class TrainSummary:
    steps: int
    tokens: int
    fvu: float
    """of the finished SAE on `stats_rows` rows at most"""
    l0: float
    dead: float
    """share of latents never active in the last 1 M training tokens"""
    measured_on: str
    """the rows of which `fvu` and `l0` speak"""


def train(
    source: Source | Path | str,
    out: Path | str,
    config: TrainConfig | None = None,
    on_progress: Progress | None = None,
    *,
    resume: bool = False,
    threads: int | None = None,
    team: Team = ALONE,
    device: str = "cpu",
) -> TrainSummary:
    """Trains an SAE on a source or a folder of rows into `out`; the finished SAE lies in `out/sae`.

    With `resume` it goes on with the run in `out` (whose config counts; another `config` is refused), or starts it if
    there is none. `on_progress` gets each entry of `metrics.jsonl`. Raises `TrainError` for a folder that already holds
    a run, data that changed, values that cannot be, and a loss that is no longer a number; `StoppedError` when a signal
    or the control file stopped it, with everything saved.
    """
    out = Path(out)
    if team.rank == 0:  # who alone begins a run, perhaps before the others look
        check_folder(out, resume)
    trainer = Trainer(
        source,
        out,
        config,
        threads=threads or torch.get_num_threads(),
        team=team,
        device=device,
        on_progress=on_progress,
    )
    return run_together([trainer])[0]


def check_folder(out: Path, resume: bool) -> None:
    """Raises `TrainError` if `out` holds a run that is not to be gone on with."""
    if (out / "config.toml").exists() and not resume:
        raise TrainError(f"{out} already holds a run", "go on with it with --resume, or choose another folder")


class Trainer:
    """A run: its config, its data, and the step it has come to."""

    def __init__(
        self,
        source: Source | Path | str,
        out: Path,
        config: TrainConfig | None = None,
        *,
        threads: int = 1,
        team: Team = ALONE,
        device: str = "cpu",
        on_progress: Progress | None = None,
    ):
        stored = read_run(out) if (out / "config.toml").exists() else None
        asked = config or (stored[0] if stored else TrainConfig())
        self.source = open_rows(source, asked) if isinstance(source, Path | str) else source
        self.out, self.team, self.threads, self.on_progress = out, team, threads, on_progress
        self.fault: TrainError | None = None
        """why this run cannot go on while others beside it do"""
        plan = plan_of(self.source)
        if plan:
            asked = asked.planned(plan.scale.mode, plan.center)
        self.config = asked.resolve(self.source.d_in, self.source.rows)
        if self.config.batch % (self.config.accumulate * team.readers):
            raise TrainError(
                f"a batch of {self.config.batch} does not fall into {self.config.accumulate} equal parts "
                f"for each of {team.readers} processes"
            )
        if stored:
            check_same(out, stored[0], self.config)
            if stored[1].get("activations_sha256") != self.source.digest:
                raise TrainError(f"the activations are not those with which the run in {out} began")
        self.checkpoints = Checkpoints(out / "checkpoints", _identity(self.config), team)
        self.held_out_ND = self.source.held_out(EVALUATED_ROWS)
        if self.config.early_stop and self.held_out_ND is None:
            raise TrainError("early_stop needs held-out rows", "set held_out to a share, such as 0.05")
        self.step, self.stopped, self.best, self.patience = 0, False, math.inf, 0
        self.saved = time.monotonic()
        self.log = Log()
        saved = self.checkpoints.newest()
        try:
            inputs = Inputs.known(saved[2], self.source.d_in) if saved else Inputs.measure(self.source, self.config)
            self.scale = inputs.scale
            self.state = SparseStep.begin(
                self.config.latents,
                inputs.center_D,
                self.config.recipe(),
                self.config.seed,
                variance=inputs.variance,
                threads=threads,
                team=team,
                sample_ND=inputs.sample_ND,
                device=device,
            )
            if saved:
                self._load(*saved)
            else:
                torch.manual_seed(self.config.seed)
        except (KeyError, TypeError, RuntimeError) as error:
            if saved is None:
                raise
            raise TrainError(
                f"the checkpoint of step {saved[0]:,} in {out} does not fit this program ({error})",
                "train again in another folder",
            ) from error
        self.activity = ActivityLog(out / "activity")

    @property
    def finished(self) -> bool:
        return self.stopped or self.step >= self.config.steps

    @property
    def tokens(self) -> int:
        """Training tokens so far, those of all processes."""
        return self.step * self.config.batch

    def begin(self) -> None:
        """Writes the config of a run that is new."""
        if not (self.out / "config.toml").exists():
            folder = getattr(self.source, "folder", None)
            where = {"activations": str(folder.resolve()) if folder else "stream"}
            write_run(self.out, self.config, where | {"activations_sha256": self.source.digest})

    def advance(self, x_BD: Tensor) -> None:
        """One step on this process's rows of the batch, unscaled."""
        config, step = self.config, self.step
        x_BD = self.scale.apply(x_BD)
        k = config.k_at(step) if config.arch in COUNTED else None
        share = config.sparsity_share(step)
        coefficient = share * self.state.strength if share < 1 else None
        try:
            parts = torch.split(x_BD, len(x_BD) // config.accumulate)
            gradients = [self.state.gradient(part, k=k, coefficient=coefficient) for part in parts]
            norm = self.state.update(gradients, config.rate(step))
        except LossError as error:
            raise LossError(f"{error}, at step {step:,} of {self.out}", error.hint) from error
        self.step += 1
        self.log.add([gradient.losses for gradient in gradients], sum(g.active for g in gradients), norm, config.batch)
        every = config.resample_every
        if config.revival == "resample" and self.tokens // every > step * config.batch // every:
            self.state.resample(x_BD, config.seed * 1_000_003 + step)

    def report(self) -> None:
        """What is due after a step: evaluation, an entry of the metrics, a checkpoint."""
        config, last = self.config, self.step >= self.config.steps
        evaluated = self._evaluate() if last or self.step % config.evaluate_every == 0 else {}
        last = self.finished
        if evaluated or last or self.step % config.log_every == 0:
            head = {"step": self.step, "steps": config.steps, "tokens": self.tokens}
            entry = head | self.log.entry() | {"dead": self.dead(), "lr": config.rate(self.step - 1)} | evaluated
            if self.team.rank == 0:
                append_metrics(self.out / "metrics.jsonl", entry)
                if self.on_progress:
                    self.on_progress(entry)
        if last or self.step % config.checkpoint_every == 0:
            self.save()

    def _evaluate(self) -> dict[str, Any]:
        """Density histogram, activity snapshot, and FVU on held-out rows, by which the run may end early."""
        silent_F, fired_F = self._whole(self.state.silent_F), self._whole(self.state.fired_F)
        found: dict[str, Any] = {"density": density(fired_F, self.log.since_density(self.tokens))}
        self.state.fired_F.zero_()
        if self.team.rank == 0:
            self.activity.add(self.step, self.tokens, silent_F, fired_F)
        if self.held_out_ND is not None:
            found["held_out_fvu"] = self.measure([self.held_out_ND]).fvu
            better = found["held_out_fvu"] < self.best
            self.best, self.patience = (found["held_out_fvu"], 0) if better else (self.best, self.patience + 1)
            self.stopped = 0 < self.config.early_stop <= self.patience
        return found

    def dead(self) -> float:
        """Share of latents silent in the last `DEAD_WINDOW` tokens, or in all if there were fewer."""
        silent = (self.state.silent_F >= min(DEAD_WINDOW, self.tokens)).sum().double().cpu()
        return float(self.team.sum_(silent, "shards")) / self.config.latents

    def _whole(self, slice_F: Tensor) -> Tensor:
        """A tensor over all latents, on the CPU, from the slices of all processes."""
        return (self.team.gather(slice_F) if self.team.shards > 1 else slice_F).cpu()

    def sae(self) -> SAE:
        """The SAE at this step (`train.assemble.own_sae`); under `latents` the slice of this process."""
        return own_sae(self.state, self.config, self.scale, self.source.hook)

    def measure(self, parts: Iterable[Tensor]) -> Measured:
        """What the SAE does at this step; all processes ask together, and under `latents` each gets its statistics."""
        return measure(self.sae(), parts, self.threads, self.team, self.config.k)

    def finish(self) -> TrainSummary:
        """Measures the SAE and writes it: on held-out rows if there are some, else on those it was trained on, but of a
        stream, which cannot go back, on those that would have come next."""
        stats_rows, streamed = self.config.stats_rows, bool(self.source.manifest.get("streamed"))
        held_ND = self.source.held_out(min(stats_rows, max(1, HELD_BYTES // (4 * self.source.d_in))))
        rows, first = min(stats_rows, self.source.rows), self.tokens if streamed else 0
        other = (self.source.batch(first + start, min(READ_ROWS, rows - start)) for start in range(0, rows, READ_ROWS))
        found = self.measure(other if held_ND is None else torch.split(held_ND, READ_ROWS))
        own, whole = found.stats, self._whole
        stats = Stats(whole(own.max_F), whole(own.mean_on_F), whole(own.density_F), own.resid_norm, own.tokens)
        sae = assembled(self.sae(), self.config, self.team)
        measured_on = "held-out rows" if held_ND is not None else "new rows" if streamed else "training rows"
        summary = TrainSummary(self.step, self.tokens, found.fvu, found.l0, self.dead(), measured_on)
        if sae is not None:
            manifest = {
                "hook": self.source.hook,
                "data": self.source.manifest | {"activations_sha256": self.source.digest},
                "training": {name: value for name, value in asdict(self.config).items() if self.config.effective(name)},
                "preset": self.config.preset,
                "input_scale": asdict(self.scale),
                "measured_on": measured_on,
                "versions": {"steer": _version("steer"), "torch": torch.__version__},
                "metrics": asdict(summary),
            }
            save_sae(self.out / "sae", sae, stats, manifest)
        self.team.wait()
        return summary

    def written(self) -> TrainSummary | None:
        """What was measured when the SAE of this run was written; None if it is not yet."""
        folder = self.out / "sae"
        if not (folder / "cfg.json").is_file():
            return None
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            return TrainSummary(**{"measured_on": manifest["measured_on"]} | manifest["metrics"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainError(
                f"{folder} does not say what was measured of it ({error})",
                "delete it and go on with --resume: it is written again from the last checkpoint",
            ) from error

    def disk_bytes(self) -> int:
        """What this run's checkpoints, snapshots and SAE will take on disk, about."""
        config, size = self.config, self.team.shards
        state = sum(tensor.numel() * tensor.element_size() for tensor in self.state.state().values()) * size
        weights = 4 * sum(weight.numel() for weight in self.state.weights.values()) * size
        kept = config.keep + 1 + (config.steps // config.keep_every if config.keep_every else 0)
        snapshots = ACTIVITY_BYTES * config.latents * (config.steps // config.evaluate_every + 1)
        return state * kept + snapshots + weights + 3 * 4 * config.latents

    def save(self) -> None:
        """Writes a checkpoint."""
        numbers = {
            "scale": asdict(self.scale),
            "variance": self.state.variance,
            "stopped": self.stopped,
            "best": None if math.isinf(self.best) else self.best,
            "patience": self.patience,
            "log": self.log.state(),
        }
        tensors = self.state.state() | {"random": torch.get_rng_state()}
        self.checkpoints.save(self.step, tensors, numbers, self.config.keep, self.config.keep_every)
        self.saved = time.monotonic()

    def _load(self, step: int, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Takes over what `save` wrote."""
        self.state.load_state(tensors)
        self.step, self.stopped, self.patience = step, numbers["stopped"], numbers["patience"]
        self.best = math.inf if numbers["best"] is None else numbers["best"]
        self.log.load_state(numbers["log"])
        torch.set_rng_state(tensors["random"])


def run_together(trainers: Sequence[Trainer]) -> list[TrainSummary]:
    """Trains all to the end on the same rows, each batch read once, then measures each SAE and writes it.

    Those that are behind, after a kill between their checkpoints, catch up first. A run that is finished is only read.
    One of several whose loss is no longer a number is left out, with its `fault`; all others come back in order. Raises
    `StoppedError` when a signal or a control file asked to stop, after a checkpoint of each, and `TrainError` for a
    folder in which another process trains.
    """
    first = trainers[0]
    with ExitStack() as stack:
        for trainer in trainers if first.team.rank == 0 else []:
            if trainer.written() is None:
                trainer.out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(only_process(trainer.out))
        done = {trainer.out: trainer.written() for trainer in trainers}
        going = [trainer for trainer in trainers if done[trainer.out] is None]
        if going and first.team.rank == 0:
            _check_room(going)
            for trainer in going:
                trainer.begin()
        _to_the_last_step(going, alone=len(trainers) == 1)
        for trainer in going:
            with _left_out(trainer, alone=len(trainers) == 1):
                done[trainer.out] = None if trainer.fault else trainer.finish()
    if all(trainer.fault for trainer in trainers):
        raise TrainError("no run of the sweep came to its end", str(first.fault))
    return [summary for summary in done.values() if summary is not None]


def _check_room(going: Sequence[Trainer]) -> None:
    """Raises `TrainError` where the disk would be full before the runs are finished."""
    needed = 0
    for trainer in going:
        files = (file for part in ("checkpoints", "activity") for file in (trainer.out / part).glob("*.safetensors"))
        needed += max(0, trainer.disk_bytes() - sum(file.stat().st_size for file in files))
    check_room(going[0].out, needed, "make room, or begin on another disk, or with fewer checkpoints: --set keep=1")


def _to_the_last_step(going: Sequence[Trainer], *, alone: bool) -> None:
    """Trains the runs until each is finished or at fault."""
    if not going:
        return
    size, team, source = going[0].config.batch, going[0].team, going[0].source
    assert all(trainer.config.batch == size and trainer.source is source for trainer in going)
    for trainer in going if team.rank == 0 else []:
        obey(trainer.out)  # what an earlier process was told
        cut_metrics(trainer.out / "metrics.jsonl", trainer.step)
    own = team.rows(size)
    with ExitStack() as stack, stop_on_signals() as told:
        for trainer in going:
            stack.enter_context(trainer.state)
        while behind := [trainer for trainer in going if not (trainer.finished or trainer.fault)]:
            step = min(trainer.step for trainer in behind)
            began = time.monotonic()
            x_BD = source.batch(step * size + own.start, own.stop - own.start)
            waited = time.monotonic() - began
            for trainer in (trainer for trainer in behind if trainer.step == step):
                trainer.log.waited += waited
                with _left_out(trainer, alone=alone):
                    trainer.advance(x_BD)
                    trainer.report()
            words = set(told)
            for trainer in going if team.rank == 0 else []:
                words |= obey(trainer.out)
            behind = [trainer for trainer in behind if not (trainer.finished or trainer.fault)]
            if team.rank == 0 and behind and time.monotonic() > max(t.saved for t in behind) + SAVE_SECONDS:
                words.add("checkpoint")
            if team.size > 1:
                words = _agreed(words, team)
            for trainer in behind if words else []:
                trainer.save()
            if "stop" in words and behind:
                raise StoppedError(behind[0].step, behind[0].config.steps)


@contextmanager
def _left_out(trainer: Trainer, *, alone: bool) -> Iterator[None]:
    """Numbers that are none any more end a run that is alone; one of several is left out."""
    try:
        yield
    except LossError as error:
        if alone:
            raise
        trainer.fault = error


def _agreed(words: set[str], team: Team) -> set[str]:
    """The words that any process was told."""
    asked = team.sum_(torch.tensor([float("stop" in words), float("checkpoint" in words)]))
    return {word for word, count in zip(("stop", "checkpoint"), asked.tolist(), strict=True) if count}


def density(fired_F: Tensor, tokens: int) -> dict[str, list[float] | int]:
    """How many latents were active on which share of `tokens` tokens: `counts` between `edges`, the share's log10 in
    steps of half a decade; `never` is the number of those that were not active at all."""
    edges = torch.arange(-7, 0.5, 0.5, dtype=torch.float64)
    share_F = (fired_F[fired_F > 0].double() / max(tokens, 1)).log10_().clamp_(-7, 0)
    counts = torch.histogram(share_F, edges).hist
    return {"edges": edges.tolist(), "counts": counts.tolist(), "never": int((fired_F == 0).sum())}


def _identity(config: TrainConfig) -> str:
    """Hash of what a checkpoint depends on."""
    content = {name: value for name, value in asdict(config).items() if name != "preset"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
