"""The commands in the documents are commands: each parses, down to the last option."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from steer.cli import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("llama-3.2.md", "scale.md")
COMMAND = re.compile(r"^(?:steer|.*?torchrun .*?-m steer) (.+)$", re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Arguments of every call of steer in the fenced blocks of a document."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    lines = [re.sub(r" +", " ", line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(match[1], comments=True) for line in lines if (match := COMMAND.match(line))]


CALLS = [(name, call) for name in DOCUMENTS for call in commands((ROOT / "docs" / name).read_text(encoding="utf-8"))]


def test_the_documents_hold_every_step() -> None:
    calls = [" ".join(call[:2]) for name, call in CALLS if name == "llama-3.2.md"]
    for step in ("split", "capture", "preprocess", "train", "evaluate", "label collect", "label local", "chat"):
        assert any(call.startswith(step) for call in calls), step
    assert any(name == "scale.md" for name, _ in CALLS)


@pytest.mark.parametrize(("name", "call"), CALLS, ids=[" ".join(call)[:60] for _, call in CALLS])
def test_a_command_parses(name: str, call: list[str]) -> None:
    command, arguments = typer.main.get_command(app), list(call)
    while arguments and arguments[0] in getattr(command, "commands", {}):
        command = command.commands[arguments.pop(0)]  # type: ignore[attr-defined]  # a group, as was just seen
    assert command.name != "steer", call
    command.make_context(command.name, arguments)
