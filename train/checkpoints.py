"""Checkpoints of a run: everything a later step depends on, in `RUN/checkpoints/STEP.safetensors`.

A file is written under a temporary name and moved into place, so that a name without `.tmp` is a whole file. Where the
dictionary is spread over processes each writes the file of its slice (`STEP.RANK.safetensors`, the first one last): a
step counts once all can read their part of it. Plain numbers ride in the header as JSON, which keeps every bit.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from train.distributed import Team
from train.errors import TrainError

Saved = tuple[int, dict[str, Tensor], dict[str, Any]]
"""step, tensors, plain numbers"""


class Checkpoints:
    """The checkpoints of one process of a run; `config_sha256` ties them to what the run does."""

    def __init__(self, folder: Path, config_sha256: str, team: Team):
        self.folder, self.team = folder, team
        self._identity = {"config": config_sha256, "shards": team.shards}
        self._suffix = f".{team.rank}.safetensors" if team.shards > 1 and team.rank else ".safetensors"

    def save(self, step: int, tensors: dict[str, Tensor], numbers: dict[str, Any], keep: int, keep_every: int) -> None:
        """Writes the checkpoint of `step`, then forgets those of the same kind that the policy does not keep.

        Raises `TrainError` if the disk does not take it; the checkpoints before it stay as they are.
        """
        if self.team.rank and self.team.shards == 1:
            return
        if self.team.shards > 1 and not self.team.rank:
            self.team.wait()  # the first file stands for all, so it is the last to come
        file = self.folder / f"{step:09d}{self._suffix}"
        temporary = file.with_name(file.name + ".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # One entry, since the order in which several are written is not always the same.
            metadata = {"run": json.dumps(self._identity | {"numbers": numbers})}
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
            os.replace(temporary, file)
        except (SafetensorError, OSError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise TrainError(
                f"the checkpoint of step {step:,} could not be written to {file} ({_why(error)})",
                "make room and go on with --resume: earlier checkpoints are whole",
            ) from error
        if self.team.shards > 1:
            if self.team.rank:
                self.team.wait()
            self.team.wait()  # no process forgets an older slice before all have the new one
        for number in self._steps()[:-keep]:
            if keep_every and number % keep_every == 0:
                continue
            (self.folder / f"{number:09d}{self._suffix}").unlink(missing_ok=True)

    def newest(self) -> Saved | None:
        """The newest checkpoint that is whole, or None if there is none at all.

        Raises `TrainError` if there are some and none can be read, and for one of another config or of other processes.
        """
        fault: TrainError | None = None
        steps = torch.tensor(self._steps(".safetensors") if self.team.rank == 0 else [], dtype=torch.int64)
        for step in reversed(self.team.gather(steps).tolist()):  # as the first process sees the folder
            saved: Saved | None = None
            try:
                saved = self._load(step)
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                if isinstance(error, TrainError):
                    raise
                file = self.folder / f"{step:09d}{self._suffix}"
                fault = TrainError(f"checkpoint {file} is damaged ({_why(error)})", "train again in another folder")
            if self.team.agree(saved is not None):
                return saved
            fault = fault or TrainError(f"step {step:,} is damaged in another process", "train again in another folder")
        if fault:
            raise fault
        return None

    def _load(self, step: int) -> Saved:
        file = self.folder / f"{step:09d}{self._suffix}"
        with safe_open(file, framework="pt") as stored:
            metadata = json.loads((stored.metadata() or {}).get("run", "{}"))
            if metadata.get("config") != self._identity["config"]:
                raise TrainError(
                    f"checkpoint {file} is of a run with another config",
                    "put the config.toml it was made with back, or train in another folder",
                )
            if metadata["shards"] != self._identity["shards"]:
                raise TrainError(
                    f"checkpoint {file} is of a dictionary spread over {metadata['shards']} processes, "
                    f"not {self._identity['shards']}",
                    "go on with as many processes as before",
                )
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        return step, tensors, metadata["numbers"]

    def _steps(self, suffix: str | None = None) -> list[int]:
        """The steps of which this process (or one with another suffix) has a file, in order."""
        suffix = suffix or self._suffix
        found = (file.name.removesuffix(suffix) for file in self.folder.glob(f"*{suffix}"))
        return sorted(int(name) for name in found if name.isdecimal())


def _why(error: BaseException) -> str:
    """What the system said, without the file it said it of."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
