"""Trains a TopK SAE on captured activations: `RUN/config.toml`, `metrics.jsonl`, `checkpoints/`, and at the end `sae/`.

The run's folder is the whole truth. Its config holds every choice, defaults filled in; a checkpoint holds weights,
moments, counters and the random state, and the number of steps fixes the rows that come next. Killing the process
loses at most the steps since the last checkpoint, and the resumed run ends in the same bits as an unbroken one.

Inputs are divided by one number, so that their total variance is D, and the weights are multiplied back at the end:
the SAE on disk reads the model's own residuals.

Shapes: B tokens, D width of the residual stream, F latents.
"""

import hashlib
import json
import math
import os
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae.checkpoint import load_sae, save_sae
from sae.losses import total_variance
from sae.model import SAE, SAEConfig
from train.errors import TrainError
from train.metrics import append_metrics, cut_metrics
from train.shards import ShardReader, read_manifest
from train.statistics import measure
from train.step import Recipe, SparseStep

SAMPLE_ROWS = 1 << 15
"""Rows from which mean and scale of the data are taken."""

KEPT_CHECKPOINTS = 2
DEAD_WINDOW = 1_000_000
"""A latent is reported dead when it was not active in this many training tokens, or in all if there were fewer."""


@dataclass(frozen=True)
class TrainConfig:
    """What a run does. 0 (or "auto") stands for a value chosen from the data and the machine when the run begins."""

    latents: int = 0
    """width of the SAE; by default 16 times that of the residual stream"""
    k: int = 32
    """latents kept at each token"""
    tokens: int = 0
    """training tokens; may exceed the rows captured, which are then read again in another order; by default 4 M"""
    batch: int = 1024
    """tokens in one step"""
    lr: float = 0.0
    """peak learning rate; by default `default_rate`"""
    warmup: float = 0.02
    """share of the steps in which the rate rises from 0"""
    decay: float = 0.2
    """share of the steps, the last, in which the rate falls to 0"""
    k_aux: int = 0
    """dead latents that explain a token's error together; by default half the width of the residual stream"""
    aux_coefficient: float = 1 / 32
    """weight of that in the loss; 0 switches it off"""
    dead_after: int = 0
    """tokens of silence after which a latent is revived; by default 1 M, or a tenth of the run if that is less"""
    seed: int = 0
    """of the first weights and of the order of rows"""
    checkpoint_every: int = 500
    """steps"""
    log_every: int = 10
    """steps"""
    stats_rows: int = 1_000_000
    """rows on which the finished SAE is measured, at most"""
    screen: str = "auto"
    """precision of the encoder product: bfloat16 where the CPU is fast at it (k is still exact), else float32"""

    @classmethod
    def quick(cls) -> "TrainConfig":
        """A small SAE from a few minutes of training, every default chosen."""
        return cls(k=24, tokens=700_000, stats_rows=100_000, checkpoint_every=200)

    def resolve(self, d_in: int, *, quick: bool = False) -> "TrainConfig":
        """This config with nothing left open, for a residual stream of width `d_in`."""
        latents = self.latents or (8 if quick else 16) * d_in
        tokens = self.tokens or 4_000_000
        screen = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
        full = replace(
            self,
            latents=latents,
            tokens=tokens,
            lr=self.lr or default_rate(latents, tokens),
            k_aux=self.k_aux or max(1, d_in // 2),
            dead_after=self.dead_after or max(1, min(1_000_000, tokens // 10)),
            screen=screen if self.screen == "auto" else self.screen,
        )
        full.check()
        return full

    def check(self) -> None:
        """Raises `TrainError` naming the first value that cannot be."""
        counts = (
            "latents",
            "k",
            "tokens",
            "batch",
            "k_aux",
            "dead_after",
            "checkpoint_every",
            "log_every",
            "stats_rows",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise TrainError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.k > self.latents:
            raise TrainError(f"k is {self.k}, more than the {self.latents} latents there are")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise TrainError(f"the learning rate is {self.lr}, but must be a positive number")
        if not (self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1):
            raise TrainError(
                f"warm-up {self.warmup} and decay {self.decay} must be shares of the run, at most 1 together"
            )
        if not (math.isfinite(self.aux_coefficient) and self.aux_coefficient >= 0):
            raise TrainError(f"the AuxK coefficient is {self.aux_coefficient}, but must not be negative")
        if self.screen not in ("bfloat16", "float32"):
            raise TrainError(f"screen is {self.screen!r}, but must be bfloat16 or float32")

    @property
    def steps(self) -> int:
        return -(-self.tokens // self.batch)

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        warm, fall = max(1, round(self.warmup * self.steps)), round(self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / warm, (self.steps - step) / fall if fall else 1.0)


def default_rate(latents: int, tokens: int) -> float:
    """2e-4 / sqrt(latents / 2^14), the law of Gao et al. 2024, times sqrt(10^8 / tokens) within 1 and 10.

    The law is for runs of billions of tokens; in a short one the weights would not get anywhere. On the demo model,
    4,096 latents after 0.3 M tokens: FVU 0.29, 0.24 and 0.21 at rates of 1e-3, 2e-3 and 4e-3.
    """
    return 2e-4 / math.sqrt(latents / 2**14) * min(10.0, max(1.0, math.sqrt(1e8 / tokens)))


@dataclass(frozen=True)
class TrainSummary:
    steps: int
    tokens: int
    fvu: float
    """of the finished SAE on `stats_rows` of its training rows"""
    l0: float
    dead: float
    """share of latents never active in the last 1 M training tokens"""


def train(
    activations: Path | str,
    out: Path | str,
    config: TrainConfig | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    *,
    resume: bool = False,
    quick: bool = False,
    threads: int | None = None,
) -> TrainSummary:
    """Trains an SAE on an activations folder into `out`; the finished SAE lies in `out/sae`.

    With `resume` it goes on with the run in `out` (whose config counts; another `config` is refused), or starts it if
    there is none. `on_progress` gets each entry of `metrics.jsonl`. Raises `TrainError` for a folder that already holds
    a run, activations that changed, values that cannot be, and a loss that is no longer a number.
    """
    out = Path(out)
    check_folder(out, resume)
    return Trainer(activations, out, config, quick=quick, threads=threads or torch.get_num_threads()).run(on_progress)


def check_folder(out: Path, resume: bool) -> None:
    """Raises `TrainError` if `out` holds a run that is not to be gone on with."""
    if (out / "config.toml").exists() and not resume:
        raise TrainError(f"{out} already holds a run", "go on with it with --resume, or choose another folder")


class Trainer:
    """A run: its config, its data, and the step it has come to."""

    def __init__(
        self, activations: Path | str, out: Path, config: TrainConfig | None, *, quick: bool = False, threads: int = 1
    ):
        manifest = read_manifest(activations)
        data = {"activations": str(Path(activations).resolve()), "activations_sha256": _digest(activations)}
        stored = read_run(out) if (out / "config.toml").exists() else None
        if config is None:
            config = stored[0] if stored else TrainConfig.quick() if quick else TrainConfig()
        self.config = config.resolve(int(manifest["d_in"]), quick=quick)
        if stored:
            _check_same(out, stored[0], self.config)
            if stored[1] != data["activations_sha256"]:
                raise TrainError(f"the activations in {activations} are not those with which the run in {out} began")
        self.reader = ShardReader(activations, self.config.seed)
        self.out, self.checkpoints = out, out / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if not stored:
            _write_toml(out / "config.toml", asdict(self.config) | data)
        sample_ND = self.reader.batch(0, min(SAMPLE_ROWS, self.reader.rows))
        variance = float(total_variance(sample_ND))
        if not (math.isfinite(variance) and variance > 0):
            raise TrainError(f"the activations in {activations} have a variance of {variance}")
        self.scale = math.sqrt(variance / self.reader.d_in)
        recipe = Recipe(
            k=self.config.k,
            k_aux=self.config.k_aux,
            aux_coefficient=self.config.aux_coefficient,
            dead_after=self.config.dead_after,
            variance=float(self.reader.d_in),
            screen=getattr(torch, self.config.screen),
        )
        mean_D = sample_ND.mean(0) / self.scale
        self.state = SparseStep.begin(self.config.latents, mean_D, recipe, self.config.seed, threads)
        self.step = 0
        self._load_checkpoint()

    def run(self, on_progress: Callable[[dict[str, Any]], None] | None = None) -> TrainSummary:
        """Trains to the end, measures the SAE and writes it. A run that is already finished is only read."""
        if self.step == self.config.steps and (self.out / "sae" / "cfg.json").exists():
            return TrainSummary(**load_sae(self.out / "sae").manifest["metrics"])
        cut_metrics(self.out / "metrics.jsonl", self.step)
        with self.state:
            self._train(on_progress)
            return self._finish()

    def _train(self, on_progress: Callable[[dict[str, Any]], None] | None) -> None:
        config, squared_error, active, tokens, began = self.config, 0.0, 0, 0, time.monotonic()
        while self.step < config.steps:
            x_BD = self.reader.batch(self.step * config.batch, config.batch).div_(self.scale)
            gradient = self.state.gradient(x_BD)
            squared_error += float(torch.linalg.vector_norm(gradient.error_BD)) ** 2
            if not math.isfinite(squared_error):
                raise TrainError(
                    f"the loss is {squared_error} at step {self.step}", "lower --lr and go on from the last checkpoint"
                )
            active, tokens = active + int((gradient.acts > 0).sum()), tokens + len(x_BD)
            self.state.update(gradient, config.rate(self.step))
            self.step += 1
            last = self.step == config.steps
            if last or self.step % config.log_every == 0:
                entry = {
                    "step": self.step,
                    "steps": config.steps,
                    "tokens": self.step * config.batch,
                    "fvu": squared_error / (tokens * self.reader.d_in),
                    "l0": active / tokens,
                    "dead": self._dead(),
                    "lr": config.rate(self.step - 1),
                    "tokens_per_second": tokens / max(time.monotonic() - began, 1e-9),
                }
                append_metrics(self.out / "metrics.jsonl", entry)
                if on_progress:
                    on_progress(entry)
                squared_error, active, tokens, began = 0.0, 0, 0, time.monotonic()
            if last or self.step % config.checkpoint_every == 0:
                self._save_checkpoint()

    def _dead(self) -> float:
        """Share of latents silent in the last `DEAD_WINDOW` tokens, or in all if there were fewer."""
        window = min(DEAD_WINDOW, self.step * self.config.batch)
        return float((self.state.silent_F >= window).float().mean())

    def sae(self) -> SAE:
        """The SAE at this step, for the model's own residuals."""
        hook = str(self.reader.manifest["hook"])
        sae = SAE(SAEConfig(d_in=self.reader.d_in, d_sae=self.config.latents, k=self.config.k, hook=hook))
        weights = self.state.weights
        sae.W_enc_FD.copy_(weights["W_enc"])
        sae.W_dec_FD.copy_(weights["W_dec"])
        sae.b_enc_F.copy_(weights["b_enc"] * self.scale)
        sae.b_dec_D.copy_(weights["b_dec"] * self.scale)
        return sae

    def _finish(self) -> TrainSummary:
        stats, fvu, l0 = measure(self.state, self.reader, self.scale, self.config.stats_rows)
        summary = TrainSummary(self.step, self.step * self.config.batch, fvu, l0, self._dead())
        made_from = {name: value for name, value in self.reader.manifest.items() if name not in ("shards", "done")}
        manifest = {
            "hook": self.reader.manifest["hook"],
            "data": made_from | {"activations_sha256": _digest(self.reader.folder)},
            "training": asdict(self.config),
            "versions": {"steer": _version("steer"), "torch": torch.__version__},
            "metrics": asdict(summary),
        }
        save_sae(self.out / "sae", self.sae(), stats, manifest)
        return summary

    def _save_checkpoint(self) -> None:
        file = self.checkpoints / f"{self.step:09d}.safetensors"
        temporary = file.with_suffix(".tmp")
        save_file(self.state.state() | {"random": torch.get_rng_state()}, temporary)
        os.replace(temporary, file)
        for old in sorted(self.checkpoints.glob("*.safetensors"))[:-KEPT_CHECKPOINTS]:
            old.unlink()

    def _load_checkpoint(self) -> None:
        """Goes to the newest checkpoint that is whole; nothing to do if there is none."""
        fault: TrainError | None = None
        for file in sorted(self.checkpoints.glob("*.safetensors"), reverse=True):
            try:
                with safe_open(file, framework="pt") as stored:
                    state: dict[str, Tensor] = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
                self.state.load_state(state)
            except (SafetensorError, OSError, KeyError, RuntimeError) as error:
                fault = TrainError(f"checkpoint {file} is damaged ({error})", "train again in another folder")
                continue
            torch.set_rng_state(state["random"])
            self.step = int(file.stem)
            return
        if fault:
            raise fault


def read_run(out: Path | str) -> tuple[TrainConfig, str]:
    """The config of the run in `out`, and the hash of the manifest of its activations."""
    file = Path(out) / "config.toml"
    try:
        stored = tomllib.loads(file.read_text(encoding="utf-8"))
        config = TrainConfig(**{field.name: stored[field.name] for field in fields(TrainConfig)})
        config.check()
        return config, str(stored["activations_sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainError(f"{file} is not the config of a run ({error})", "choose another folder") from error


def _check_same(out: Path, stored: TrainConfig, asked: TrainConfig) -> None:
    for name, value in asdict(stored).items():
        if value != getattr(asked, name):
            raise TrainError(
                f"the run in {out} has {name} = {value}, not {getattr(asked, name)}",
                "leave the option out to go on with it, or choose another folder",
            )


def _digest(activations: Path | str) -> str:
    """The hash of what the activations are; it does not depend on when they were written."""
    shards = [(shard["rows"], shard["sha256"]) for shard in read_manifest(activations)["shards"]]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _write_toml(file: Path, values: dict[str, str | int | float]) -> None:
    """A flat TOML file: a JSON string or number is a TOML one."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()), encoding="utf-8")
    os.replace(temporary, file)
