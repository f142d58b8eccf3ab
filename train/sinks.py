"""Where metrics go besides `metrics.jsonl`: Weights & Biases (online or offline) and TensorBoard, both optional."""

import json
import secrets
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from train.config import TrainConfig
from train.errors import TrainError


class Sinks:
    """What entries of a run's metrics are also written to. Use as a context manager; `write` takes an entry."""

    def __init__(
        self,
        out: Path,
        config: TrainConfig | None,
        *,
        wandb: str | None = None,
        tensorboard: bool = False,
        first: int = 0,
    ):
        """`wandb` is a project's name, `first` the step of the first entry that will come. A run that goes on is gone
        on with there too, by its id in `RUN/wandb/id.json`.

        Raises `TrainError` where the package of a sink is not installed.
        """
        self._wandb = _open_wandb(out, wandb, config) if wandb else None
        self._board = _open_tensorboard(out, first) if tensorboard else None

    def write(self, entry: dict[str, Any]) -> None:
        """Numbers under their names, parts of the loss as `losses/NAME`; histograms stay in metrics.jsonl."""
        step = int(entry["step"])
        flat = dict(_numbers(entry))
        if self._wandb is not None:
            self._wandb.log(flat, step=step)
        if self._board is not None:
            for name, value in flat.items():
                self._board.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)
        if self._board is not None:
            self._board.close()


def _numbers(entry: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in entry.items():
        if isinstance(value, dict) and name != "density":
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name not in ("step", "steps"):
            yield prefix + name, value


def _open_wandb(out: Path, project: str, config: TrainConfig | None) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise TrainError(
            "--wandb needs Weights & Biases, which is not installed", "pip install 'steer[train]'"
        ) from error
    file = out / "wandb" / "id.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else secrets.token_hex(4)
    file.write_text(json.dumps(stored), encoding="utf-8")
    settings = wandb.Settings(console="off", silent=True)
    try:
        return wandb.init(
            project=project,
            id=stored,
            resume="allow",
            name=out.name,
            dir=str(out),
            config=asdict(config) if config else None,
            settings=settings,
        )
    except wandb.errors.Error as error:
        raise TrainError(
            f"Weights & Biases does not take the run ({error})", "WANDB_MODE=offline keeps it in RUN/wandb"
        ) from error


def _open_tensorboard(out: Path, first: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainError(
            "--tensorboard needs TensorBoard, which is not installed", "pip install 'steer[train]'"
        ) from error
    return SummaryWriter(str(out / "tensorboard"), purge_step=first)  # what a killed process wrote of later steps goes
