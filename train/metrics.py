"""What a run tells and is told while it goes on. No torch here.

`metrics.jsonl` holds one JSON object a line, appended as training goes, read by whoever watches. `control` is written
by whoever wants something of the run, one word a line, and taken away by the run when it obeys.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.errors import TrainError
from train.lock import is_taken

WORDS = ("stop", "checkpoint")
"""What a run can be told: save and end; save and go on."""


def append_metrics(file: Path, entry: dict[str, Any]) -> None:
    """Adds one line in one write, so that a reader sees all of it or a tail that `read_metrics` skips."""
    with file.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(entry) + "\n")


def read_metrics(file: Path) -> Iterator[dict[str, Any]]:
    """The entries of a metrics file; empty if there is none, without a last line that a kill cut short."""
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry


def cut_metrics(file: Path, last_step: int) -> None:
    """Drops the entries after `last_step`, which a resumed run is about to write again."""
    kept = [entry for entry in read_metrics(file) if entry.get("step", 0) <= last_step]
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
    temporary.replace(file)


def tell(run: Path, word: str) -> None:
    """Asks the run in `run` to do something once its step is finished. Raises `TrainError` if nobody trains there."""
    assert word in WORDS, word
    if not (run / "config.toml").is_file():
        raise TrainError(f"{run} holds no run (no config.toml)", "give the folder that `steer train --out` was given")
    if not is_taken(run):
        raise TrainError(f"no process trains in {run} at present", "`steer train --resume` goes on with a stopped run")
    with (run / "control").open("a", encoding="utf-8") as handle:
        handle.write(word + "\n")


def obey(run: Path) -> set[str]:
    """The words the run was told since it last asked; it asks at every step, so no word costs one look at a file."""
    file = run / "control"
    try:
        if not file.stat().st_size:
            return set()
        taken = file.with_name(file.name + ".taken")
        file.replace(taken)  # a word that comes now goes into a new file
        told = set(taken.read_text(encoding="utf-8", errors="replace").split())
        taken.unlink()
    except FileNotFoundError:
        return set()
    return told.intersection(WORDS)
