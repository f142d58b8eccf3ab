"""`metrics.jsonl`: one JSON object a line, appended as training goes, read by whoever watches. No torch here."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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
