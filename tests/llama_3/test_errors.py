"""Errors that carry a next step."""

import subprocess
import sys

import pytest

from llama_3.config import find_layout
from llama_3.errors import config_error, explained
from llama_3.hooks import HookPoint


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, PermissionError])
def test_an_explained_error_is_of_its_kind_and_has_a_hint(kind: type[Exception]) -> None:
    error = explained(kind, "there is no bread", "bake some")
    assert type(error) is kind and (str(error), vars(error)["hint"]) == ("there is no bread", "bake some")
    assert vars(explained(kind, "there is no bread")) == {"hint": None}
    assert type(config_error("the bread is stale")) is ValueError


def test_files_and_hook_points_are_explained() -> None:
    with pytest.raises(FileNotFoundError, match="there is no model folder nowhere") as missing:
        find_layout("nowhere")
    assert vars(missing.value)["hint"].startswith("pass a folder")
    with pytest.raises(ValueError, match="'here' is not a hook point") as unknown:
        HookPoint.parse("here")
    assert "SITE one of resid_pre, attn_norm" in vars(unknown.value)["hint"]


def test_errors_and_configs_do_without_torch() -> None:
    program = "import sys, llama_3.config, llama_3.errors; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
