"""The example in the package's docstring is run as it stands, on a tiny model."""

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

import llama_3
from llama_3.generate import ReplyText, stream_steps
from llama_3.hooks import HookPoint
from tests.tiny import write_tiny_checkpoint


def test_the_example_streams_a_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_checkpoint(tmp_path)
    code = textwrap.dedent("\n".join(re.findall(r"^(?: {4}.*)?$", llama_3.__doc__ or "", re.MULTILINE)))
    assert code.count('"meta-llama/Llama-3.2-1B-Instruct"') == 1
    names: dict[str, Any] = {}
    exec(code.replace('"meta-llama/Llama-3.2-1B-Instruct"', repr(str(tmp_path))), names)
    said = capsys.readouterr().out
    options = dict(sampling=names["Sampling"](), seeds=[0], **names["options"])
    again = list(stream_steps(names["model"], [names["prompt"]], texts=[ReplyText(names["tokenizer"])], **options))
    assert said and said == "".join(step.text for steps in again for step in steps)
    assert names["hooks"].points() == (HookPoint(8, "resid_post"),)
