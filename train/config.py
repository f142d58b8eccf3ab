"""What a training run does: every choice as a field of `TrainConfig`, the schedules that follow, and how choices are
typed, read from TOML and written into a run. No torch: a command line can be checked before anything heavy is loaded.

A field whose 0 stands for "chosen when the run begins" is in `AUTO`. Such a 0 is never typed: people write `auto`.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from train.errors import TrainError
from train.presets import PRESETS
from train.recipe import COUNTED, Arch, Recipe

FORMAT, VERSION = "steer-run", 2

AUTO = ("latents", "tokens", "lr", "k_aux", "dead_after", "resample_every", "initial_l0")
"""Fields whose 0 stands for a value chosen from the data and the other fields."""

_STEERED = tuple(arch for arch in get_args(Arch) if arch not in COUNTED)
ONLY: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(("k", "k_anneal", "k_anneal_share"), ("arch", COUNTED)),
    **dict.fromkeys(("sparsity", "l0_target", "initial_l0", "sparsity_warmup"), ("arch", _STEERED)),
    "bandwidth": ("arch", ("jumprelu",)),
    **dict.fromkeys(("prolu_gradient", "prolu_plain"), ("arch", ("prolu",))),
    "screen": ("arch", ("topk",)),
    **dict.fromkeys(("k_aux", "aux_coefficient"), ("revival", ("auxk",))),
    "aux_min_dead": ("revival", ("auxk", "ghost")),
    "resample_every": ("revival", ("resample",)),
}
"""Fields that do something only where another field has one of some values."""

MOST_DEAD_AFTER = 1_000_000


@dataclass(frozen=True)
class TrainConfig(Recipe):
    """What a run does; the fields of `Recipe` come first. 0 in a field of `AUTO` stands for a choice of the program."""

    dead_after: int = 0
    """tokens of silence after which a latent is revived; by default 1 M, or a tenth of the run if that is less"""
    initial_l0: float = 0.0
    """latents that are on at a token when a kind without k starts; by default twice `l0_target`, or 64 without one"""
    latents: int = 0
    """width of the SAE; by default `expansion` times that of the data"""
    expansion: int = 16
    """width of the SAE over that of the data, where `latents` is left open"""
    tokens: int = 0
    """training tokens; may exceed the rows there are, which are then read again in another order; by default 4 M"""
    epochs: int = 0
    """above 0: so many passes over the rows, each in another order, instead of `tokens`"""
    batch: int = 1024
    """tokens in one step"""
    accumulate: int = 1
    """parts in which a step's gradient is computed; it is the same, and its parts are kept until the weights move, so
    that only what it takes to make a part is less (batchtopk chooses within each part)"""
    lr: float = 0.0
    """peak learning rate; by default `default_rate`"""
    lr_boost: float = 10.0
    """the most by which the default rate is raised in a short run; 1 is the published law alone"""
    warmup: float = 0.02
    """share of the steps in which the rate rises from 0"""
    decay: Literal["linear", "cosine"] = "linear"
    """how the rate falls at the end"""
    decay_share: float = 0.2
    """share of the steps, the last, in which the rate falls"""
    final_lr: float = 0.0
    """share of the peak rate to which it falls"""
    k_anneal: int = 0
    """k of the first step, from which it falls to `k` in equal strides; 0 is off"""
    k_anneal_share: float = 0.1
    """share of the steps in which it does"""
    sparsity_warmup: float = 0.05
    """share of the steps in which the coefficient of the sparsity term rises from 0"""
    scale: Literal["auto", "none", "variance", "norm", "layer_norm", "unit_norm"] = "auto"
    """what is done to the inputs (`train.preprocess.InputScale`); auto: as `steer preprocess` planned, else variance"""
    center: Literal["auto", "mean", "median", "none"] = "auto"
    """where the decoder's bias starts: mean or geometric median of the inputs, or 0; auto: as planned, else the mean"""
    held_out: float = 0.0
    """share of the rows that are not trained on, for evaluations; 0 leaves it to what the data say themselves"""
    resample_every: int = 0
    """tokens between two resamplings of dead latents (revival "resample"); by default as many as `dead_after`"""
    evaluate_every: int = 500
    """steps between evaluations on held-out rows, density histograms and activity snapshots"""
    early_stop: int = 0
    """evaluations without a better held-out FVU after which the run ends; 0 is off"""
    checkpoint_every: int = 500
    """steps between checkpoints, at most: one is also due when the last is ten minutes old"""
    keep: int = 2
    """newest checkpoints that are kept"""
    keep_every: int = 0
    """steps; checkpoints at multiples of it are kept for good; 0 is off"""
    log_every: int = 10
    """steps between entries of metrics.jsonl"""
    seed: int = 0
    """of the first weights and of the order of rows"""
    stats_rows: int = 1_000_000
    """rows on which the finished SAE is measured, at most"""
    preset: str = "default"
    """where the values that were not typed come from"""

    @classmethod
    def of(cls, preset: str = "default", **values: Any) -> TrainConfig:
        """A preset with some values changed; `tokens` takes the place of its `epochs`.

        Raises `TrainError` for an unknown preset, and where both lengths are among the values.
        """
        if preset not in PRESETS:
            raise TrainError(f"there is no preset {preset!r}", f"known: {', '.join(PRESETS)}")
        if values.get("tokens") and values.get("epochs"):
            raise TrainError(f"tokens is {values['tokens']} and epochs is {values['epochs']}", "give one of the two")
        length = {"epochs": 0} if values.get("tokens") else {}
        return cls(**({"preset": preset} | PRESETS[preset] | length | values))

    @classmethod
    def quick(cls) -> TrainConfig:
        """A small SAE from a few minutes of training, every default chosen."""
        return cls.of("quick")

    def planned(self, scale: Any, center: Any) -> TrainConfig:
        """This config with scale and centre, where they are left open, as a plan of the data has them."""
        return replace(
            self,
            scale=scale if self.scale == "auto" else self.scale,
            center=center if self.center == "auto" else self.center,
        )

    def resolve(self, d_in: int, rows: int) -> TrainConfig:
        """This config with nothing left open, for `rows` rows of width `d_in`. Raises `TrainError` as `check` does."""
        latents = self.latents or self.expansion * d_in
        tokens = self.epochs * rows if self.epochs > 0 else self.tokens or 4_000_000
        dead_after = self.dead_after or max(1, min(MOST_DEAD_AFTER, tokens // 10))
        full = replace(
            self,
            latents=latents,
            tokens=tokens,
            lr=self.lr or default_rate(latents, tokens, self.lr_boost),
            k_aux=self.k_aux or max(1, d_in // 2),
            dead_after=dead_after,
            resample_every=self.resample_every or dead_after,
            initial_l0=self.initial_l0 or 2 * self.l0_target or 64.0,
            scale="variance" if self.scale == "auto" else self.scale,
            center="mean" if self.center == "auto" else self.center,
            screen=_fast_screen() if self.screen == "auto" else self.screen,
        )
        full.check(latents)
        return full

    def check(self, latents: int) -> None:
        """Raises `TrainError` naming the first value that cannot be; nothing may be left open."""
        for name, kind in kinds().items():
            if get_origin(kind) is Literal and (value := getattr(self, name)) not in get_args(kind):
                raise TrainError(f"{name} is {value!r}", f"it must be one of {', '.join(get_args(kind))}")
        above_0 = ("latents", "tokens", "batch", "accumulate", "k_aux", "dead_after", "resample_every", "stats_rows")
        for name in (*above_0, "evaluate_every", "checkpoint_every", "log_every", "keep"):
            if (count := getattr(self, name)) < 1:
                raise TrainError(f"{name} is {count}, but must be at least 1")
        for name in ("k_anneal", "early_stop", "keep_every", "epochs", "seed"):
            if (count := getattr(self, name)) < 0:
                raise TrainError(f"{name} is {count}, but must not be negative")
        if self.batch % self.accumulate:
            raise TrainError(f"a batch of {self.batch} does not fall into {self.accumulate} equal parts")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise TrainError(f"the learning rate is {self.lr}, but must be a positive number")
        if not (math.isfinite(self.lr_boost) and self.lr_boost >= 1):
            raise TrainError(f"lr_boost is {self.lr_boost}, but must be at least 1")
        for name in ("warmup", "decay_share", "final_lr", "k_anneal_share", "sparsity_warmup", "held_out"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise TrainError(f"{name} is {share}, but must be a share between 0 and 1")
        if self.held_out > 0.5:
            raise TrainError(f"held_out is {self.held_out}, but more than half of the rows must be left to train on")
        if self.warmup + self.decay_share > 1:
            raise TrainError(f"warm-up {self.warmup} and decay {self.decay_share} are more than the whole run together")
        if self.k_anneal and not self.k <= self.k_anneal <= latents:
            raise TrainError(f"k_anneal is {self.k_anneal}, but k can only fall from there to {self.k}")
        super().check(latents)

    def recipe(self) -> Recipe:
        """The part of it that a training step needs."""
        return Recipe(**{field.name: getattr(self, field.name) for field in fields(Recipe)})

    def effective(self, name: str) -> bool:
        """Whether a field does anything in this run."""
        decides, values = ONLY.get(name, ("arch", get_args(Arch)))
        return getattr(self, decides) in values

    @property
    def steps(self) -> int:
        return -(-self.tokens // self.batch)

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0: it rises in a line, stays, and falls to its `final_lr`."""
        warm, fall = max(1, round(self.warmup * self.steps)), round(self.decay_share * self.steps)
        left = min(1.0, (self.steps - step) / fall) if fall else 1.0
        if self.decay == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return self.lr * min(1.0, (step + 1) / warm) * (self.final_lr + (1 - self.final_lr) * left)

    def k_at(self, step: int) -> int:
        """Latents kept at step `step`: k, or more while it is annealed."""
        whole = round(self.k_anneal_share * self.steps)
        if not self.k_anneal or step >= whole:
            return self.k
        return self.k + round((self.k_anneal - self.k) * (1 - step / whole))

    def sparsity_share(self, step: int) -> float:
        """Share of the full coefficient of the sparsity term at step `step`."""
        warm = round(self.sparsity_warmup * self.steps)
        return min(1.0, (step + 1) / warm) if warm else 1.0


def default_rate(latents: int, tokens: int, boost: float = 10.0) -> float:
    """2e-4 / sqrt(latents / 2^14), the law of Gao et al. 2024, times sqrt(10^8 / tokens) within 1 and `boost`.

    The law is for runs of billions of tokens; in a short one the weights would not get anywhere. On the demo model,
    4,096 latents after 0.3 M tokens: FVU 0.29, 0.24 and 0.21 at rates of 1e-3, 2e-3 and 4e-3.
    """
    return 2e-4 / math.sqrt(latents / 2**14) * min(boost, max(1.0, math.sqrt(1e8 / tokens)))


def _fast_screen() -> Literal["bfloat16", "float32"]:
    import torch

    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def kinds() -> dict[str, Any]:
    """The type of each field, by name, in order."""
    hints = get_type_hints(TrainConfig)
    return {field.name: hints[field.name] for field in fields(TrainConfig)}


def read_settings(file: Path | str) -> dict[str, Any]:
    """The values in a flat TOML file, each checked by its field. It may name a `preset`, and be a run's config.toml.

    Raises `TrainError` in one sentence.
    """
    try:
        read = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TrainError(f"there is no file {file}") from error
    except (OSError, ValueError) as error:
        raise TrainError(f"{file} is not readable TOML ({error})") from error
    if read.get("format") == FORMAT:
        read = {name: read[name] for name in kinds() if name in read and (name != "tokens" or not read.get("epochs"))}
    try:
        return {name: value if name == "preset" else typed(name, value) for name, value in read.items()}
    except TrainError as error:
        raise TrainError(f"{file}: {error}", error.hint) from error


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """The values in texts such as `k=64`, each checked by its field. Raises `TrainError` in one sentence."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise TrainError(f"{text!r} is not of the form key=value", "as in `--set k=64`")
        found[name] = typed(name, value)
    return found


def typed(name: str, value: Any) -> Any:
    """`value`, a text or of TOML's kinds, as field `name` holds it; `auto` becomes the 0 that stands for it.

    Raises `TrainError` for a field that does not exist, with the names nearest to it, and for a value of another kind.
    """
    known = kinds()
    if name not in known or name == "preset":
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        raise TrainError(
            f"there is no setting {name!r}", f"perhaps {' or '.join(near)}" if near else f"known: {', '.join(known)}"
        )
    kind = known[name]
    if name in AUTO:
        if value == "auto":
            return 0
        if _is_zero(value):
            raise TrainError(f"{name} is 0", "write `auto`, or leave it out, to have it chosen")
    fault = TrainError(f"{name} is {value!r}, but must be {_kind_in_words(kind)}")
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise fault
        return value
    try:
        if get_origin(kind) is tuple:
            parts = value.split(",") if isinstance(value, str) else value
            return tuple(_whole(part) for part in parts if part != "")
        if kind is bool:
            return {"true": True, "false": False, "on": True, "off": False}[str(value).lower()]
        if kind is int:
            return _whole(value)
        if isinstance(value, bool) or not math.isfinite(number := float(value)):
            raise fault
        return number
    except (ValueError, TypeError, KeyError) as error:
        raise fault from error


def check_effect(configs: Sequence[TrainConfig], names: Iterable[str]) -> None:
    """Raises `TrainError` for the first field that was typed and does nothing in any of these runs."""
    for name in names:
        if not any(config.effective(name) for config in configs):
            decides, values = ONLY[name]
            raise TrainError(
                f"{name} does nothing where {decides} is {getattr(configs[0], decides)}",
                f"leave it out; it is for {decides} {', '.join(values)}",
            )


def _is_zero(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and float(value) == 0
    except (ValueError, TypeError):
        return False


def _whole(value: Any) -> int:
    """A whole number from a number or a text; `4e6` and `4_000_000` are such too."""
    if isinstance(value, bool):
        raise ValueError
    number = float(value)
    if not math.isfinite(number) or number != int(number):
        raise ValueError
    return int(value) if isinstance(value, str) and value.strip().lstrip("+-").isdecimal() else int(number)


def _kind_in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return "whole numbers with commas between"
    return {bool: "true or false", int: "a whole number", float: "a number"}[kind]


def read_run(out: Path | str) -> tuple[TrainConfig, dict[str, Any]]:
    """The config of the run in `out`, and what else its config.toml says: `activations`, `activations_sha256`."""
    file = Path(out) / "config.toml"
    try:
        stored = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainError(f"{file} is not the config of a run ({error})", "choose another folder") from error
    if stored.get("format") != FORMAT or stored.get("version") != VERSION:
        old = "format" not in stored and "activations_sha256" in stored
        why = "was begun by an earlier version of steer" if old else "is not the config of a run of this version"
        raise TrainError(f"{file} {why}", "train again in another folder; a finished SAE in it stays usable")
    try:
        values = {name: stored[name] if name == "preset" else typed(name, stored[name]) for name in kinds()}
        config = TrainConfig(**values)
        config.check(config.latents)
    except (KeyError, ValueError) as error:
        raise TrainError(f"{file} is not the config of a run ({error})", "choose another folder") from error
    return config, {name: value for name, value in stored.items() if name not in values}


def write_run(out: Path, config: TrainConfig, more: Mapping[str, str]) -> None:
    """Writes config.toml, flat: a JSON string, number, truth value or list is one of TOML as well."""
    values = {"format": FORMAT, "version": VERSION} | asdict(config) | dict(more)
    file = out / "config.toml"
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()), encoding="utf-8")
    os.replace(temporary, file)


def check_same(out: Path, stored: TrainConfig, asked: TrainConfig) -> None:
    """Raises `TrainError` naming the first field in which a run that is to go on differs from what was asked."""
    chosen_first = sorted(asdict(stored).items(), key=lambda field: field[0] in AUTO[2:])  # the others follow from them
    for name, value in chosen_first:
        if name != "preset" and value != getattr(asked, name):
            raise TrainError(
                f"the run in {out} has {name} = {value}, not {getattr(asked, name)}",
                "leave the option out to go on with it, or choose another folder",
            )
