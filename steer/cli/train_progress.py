"""What a person sees of a training run as it goes: bars on a terminal, else a line now and then; both on stderr.

Metrics also go from here to Weights & Biases and TensorBoard, where these are wanted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from steer.cli.options import narrate
from steer.events import clean

if TYPE_CHECKING:
    from rich.progress import Progress

    from train.sinks import Sinks

LINE_EVERY = 100
"""Steps between two lines where there is no terminal."""


class Bars:
    """A bar for each run; use as a context manager. `of` gives a run what to call with the entries of its metrics."""

    def __init__(self, out: Path, *, wandb: str | None = None, tensorboard: bool = False, shown: bool = True):
        self._out, self._wandb, self._board = out, wandb, tensorboard
        self._shown, self._stack = shown, ExitStack()
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        if self._shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[told]}", markup=False),
            )
            self._progress = self._stack.enter_context(Progress(*columns, console=Console(stderr=True)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)

    def of(self, name: str) -> Callable[[dict[str, Any]], None] | None:
        """What takes the entries of the run in the folder `name`, "" for the only one; None where nobody listens."""
        if not self._shown:
            return None
        sinks: Sinks | None = None
        bars, task, last = self._progress, None, -1
        if bars is not None:
            task = bars.add_task(clean(name or self._out.name), total=None, told="")

        def take(entry: dict[str, Any]) -> None:
            nonlocal last, sinks
            if sinks is None and (self._wandb or self._board):
                sinks = self._sinks(self._out / name, entry["step"])
            if sinks is not None:
                sinks.write(entry)
            step, steps = entry["step"], entry["steps"]
            told = f"fvu {entry['fvu']:.4f}, l0 {entry['l0']:.1f}, dead {entry['dead']:.1%}"
            told += f", {entry['tokens_per_second']:,.0f} tokens/s"
            if bars is not None and task is not None:
                bars.update(task, completed=step, total=steps, told=told)
            elif step // LINE_EVERY > last // LINE_EVERY or step == steps:
                last = step
                narrate(f"{name + ': ' if name else ''}step {step:,} of {steps:,}: {told}")

        return take

    def _sinks(self, run: Path, first: int) -> Sinks:
        """Those of one run, opened at its first entry: its config is written by then, with nothing left open."""
        from train.config import read_run
        from train.sinks import Sinks

        opened = Sinks(run, read_run(run)[0], wandb=self._wandb, tensorboard=self._board, first=first)
        return self._stack.enter_context(opened)
