"""What a process reads of torchrun's variables, in one place for the model and for the command line."""

import subprocess
import sys

import pytest

from llama_3 import parallel, ranks


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, (1, True)),
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "3", "RANK": "0"}, (3, True)),
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "3", "RANK": "2"}, (3, False)),
        ({"WORLD_SIZE": "3", "RANK": "2"}, (1, True)),  # another launcher's
    ],
)
def test_only_torchruns_variables_count(
    variables: dict[str, str], found: tuple[int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (ranks.world(), ranks.is_main()) == found


def test_the_model_and_the_commands_ask_the_same_place() -> None:
    code = "import sys, steer.cli.options as o; print('torch' in sys.modules, o.world.__module__, o.is_main.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False llama_3.ranks llama_3.ranks\n"
    assert (parallel.world, parallel.is_main) == (ranks.world, ranks.is_main)
