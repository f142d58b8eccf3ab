"""Several SAEs from one stream of activations: the same rows, each batch read once, each SAE a run of its own.

A member of a sweep lies in `RUN/KEY-VALUE/` and is a whole run: it can be resumed, reported on and told to stop as any.
What decides which rows come when cannot be swept. The search for a learning rate is a sweep of short runs.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from train.config import AUTO, TrainConfig, default_rate, kinds, typed
from train.distributed import ALONE, Team
from train.errors import TrainError
from train.reader import Source
from train.trainer import Progress, Trainer, TrainSummary, check_folder, run_together

STREAM = ("batch", "tokens", "epochs", "seed", "held_out")
"""Fields that decide which rows come when."""
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the default learning rate, tried by a search that is given no rates."""
SHORT_SHARE, SHORT_STEPS = 0.1, 200
"""Length of a run of the search: a share of the real one, and steps that it has at least."""
SHORT_STATS = 100_000


def parse_sweep(texts: Iterable[str]) -> list[dict[str, Any]]:
    """The members of a sweep from texts such as `k=16,32`: every combination, as values by field; none without texts.

    Raises `TrainError` for a field that cannot be swept, and for a value that it cannot have.
    """
    axes: dict[str, list[Any]] = {}
    for text in texts:
        name, _, values = (part.strip() for part in text.partition("="))
        tried = [value.strip() for value in values.split(",") if value.strip()]
        if not tried or name in axes:
            raise TrainError(f"{text!r} is not of the form key=value,value with a key of its own", "as in k=16,32,64")
        axes[name] = list(dict.fromkeys(typed(name, value) for value in tried))
        if name in STREAM or str(kinds()[name]).startswith("tuple"):
            why = "all members read the same rows" if name in STREAM else "its values have commas in them"
            raise TrainError(f"{name} cannot be swept: {why}", "train once for each value, into folders of their own")
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())] if axes else []


def write_sweep(out: Path, texts: Sequence[str], preset: str | None, values: dict[str, Any]) -> None:
    """Keeps in `out/sweep.json` what a sweep was asked for, so that it can be gone on with without saying it again."""
    said = {name: "auto" if name in AUTO and value == 0 else value for name, value in values.items()}
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / "sweep.json.tmp"
    temporary.write_text(json.dumps({"sweep": list(texts), "preset": preset, "values": said}), encoding="utf-8")
    os.replace(temporary, out / "sweep.json")


def read_sweep(out: Path) -> tuple[list[str], str | None, dict[str, Any]] | None:
    """(texts, preset, values) of the sweep in `out`; None if there is none. `TrainError` for a damaged file."""
    file = out / "sweep.json"
    if not file.is_file():
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        values = {name: typed(name, value) for name, value in kept["values"].items()}
        return [str(text) for text in kept["sweep"]], kept["preset"] and str(kept["preset"]), values
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainError(f"{file} is not readable ({error})", "give the same --sweep and options again") from error


def member_name(values: dict[str, Any]) -> str:
    """Name of a member's folder: `k-16`, `k-16_latents-4096`."""
    return "_".join(
        f"{name}-{value:g}" if isinstance(value, float) else f"{name}-{value}" for name, value in values.items()
    )


def sweep(
    source: Source,
    out: Path,
    config: TrainConfig,
    members: Sequence[dict[str, Any]],
    on_progress: Callable[[str], Progress | None] = lambda name: None,
    *,
    begun: Callable[[], None] = lambda: None,
    resume: bool = False,
    threads: int = 1,
    team: Team = ALONE,
    device: str = "cpu",
) -> dict[str, TrainSummary | TrainError]:
    """Trains a member for each dict of values that differ from `config`; by its folder's name, what came of it: an
    error where its loss was no longer a number. `on_progress` gives each member what to call with its metrics;
    `begun` is called once nothing was found that stands against the sweep."""
    names = [member_name(values) for values in members]
    for name in names if team.rank == 0 else []:
        check_folder(out / name, resume)
    trainers = [
        Trainer(
            source,
            out / name,
            replace(config, **values),
            threads=threads,
            team=team,
            device=device,
            on_progress=on_progress(name),
        )
        for name, values in zip(names, members, strict=True)
    ]
    if team.rank == 0:
        begun()
    summaries = iter(run_together(trainers))
    return {name: trainer.fault or next(summaries) for name, trainer in zip(names, trainers, strict=True)}


def short_tokens(whole: TrainConfig) -> int:
    """Length of a run of the search for the rate of a run."""
    return min(whole.tokens, max(SHORT_STEPS * whole.batch, round(SHORT_SHARE * whole.tokens)))


def search_rate(
    source: Source,
    out: Path,
    config: TrainConfig,
    rates: Sequence[float],
    on_progress: Callable[[str], Progress | None] = lambda name: None,
    **options: Any,
) -> tuple[float, dict[float, TrainSummary | TrainError]]:
    """(the learning rate to train with, what each rate tried came to) from short runs in `out`.

    The lowest FVU of the finished SAE wins, on held-out rows where there are some. Without `rates` multiples of the
    default rate are tried, and the best multiple of that of the whole run is taken: the default depends on the length.
    Goes on with a search that was stopped.
    """
    whole = config.resolve(source.d_in, source.rows)
    tokens = short_tokens(whole)
    short = replace(config, tokens=tokens, epochs=0, early_stop=0, stats_rows=min(config.stats_rows, SHORT_STATS))
    base = default_rate(whole.latents, tokens, config.lr_boost)
    tried = list(rates) or [factor * base for factor in FACTORS]
    found = sweep(source, out, short, [{"lr": rate} for rate in tried], on_progress, resume=True, **options)
    table = dict(zip(tried, found.values(), strict=True))
    best = min((result.fvu, rate) for rate, result in table.items() if isinstance(result, TrainSummary))[1]
    return (best if rates else best / base * default_rate(whole.latents, whole.tokens, config.lr_boost)), table
