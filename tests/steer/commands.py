"""Commands as a shell runs them, in this process."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from steer.cli import main


@dataclass
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        """The objects of `--json`, one a line."""
        return [json.loads(line) for line in self.out.splitlines()]


Steer = Callable[..., Ran]


def ran(capsys: pytest.CaptureFixture[str], *arguments: str) -> Ran:
    """Runs one command, which must not end in a traceback."""
    code = main(list(arguments))
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return Ran(code, out, err)
