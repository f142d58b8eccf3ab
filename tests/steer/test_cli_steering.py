"""`steer controls`, `complete --compare` and `--spliced`, and `--trust-sae` as they are typed, on a tiny model."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sae.checkpoint import save_sae
from steer.analysis.controls import CONDITIONS
from steer.analysis.likelihood import Text
from steer.events import Event, TokenEvent
from steer.session import Readout
from tests.steer.commands import Ran, Steer, ran
from tests.steer.fake import NAMES, FakeEngine
from tests.steer.test_engine import tiny_sae
from tests.tiny import write_tiny_checkpoint

QUICK = ("--max-tokens", "4", "--seed", "3", "--temperature", "0.9")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("steering")
    write_tiny_checkpoint(folder / "model")
    save_sae(folder / "sae", tiny_sae(), tiny_sae().stats)
    return folder


@pytest.fixture
def steer(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Steer:
    monkeypatch.setenv("STEER_HOME", str(folder / "home"))
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> Ran:
        return ran(capsys, *arguments, "--model", "model", "--sae", "sae")

    return run


# -- beside the unsteered reply ----------------------------------------------------------------------------------------


def test_compare_writes_the_replies_that_are_written_alone(steer: Steer) -> None:
    edit = ("--edit", "5 +6 on generated")
    plain, steered = (steer("complete", "Once", *more, *QUICK, "--json").lines[0] for more in ((), edit))
    ran = steer("complete", "Once", "--compare", *edit, *QUICK, "--json")
    assert ran.code == 0
    baseline, pushed = ran.lines
    assert (baseline["row"], baseline["tokens"], baseline["edits"]) == ("baseline", plain["tokens"], [])
    assert (pushed["row"], pushed["tokens"], pushed["edits"]) == ("steered", steered["tokens"], ["5 +6 on generated"])
    assert "kl" not in baseline and len(pushed["kl"]) == len(pushed["surprisal"]) == len(pushed["tokens"])
    found = pushed["comparison"]
    first = next(n for n, pair in enumerate(zip(plain["tokens"], steered["tokens"], strict=False)) if len({*pair}) > 1)
    assert found["first_difference"] == first and found["kl"] > 0 and found["changed"]
    page = steer("complete", "Once", "--compare", *edit, *QUICK)
    assert page.out.startswith("baseline:\n") and "\nsteered:\n" in page.out
    assert f"first token that differs: {first} (from 0); {found['same']} of 4 are the same" in page.out
    assert "KL(steered | unsteered)" in page.out and "5 +6 on generated: at 4 positions" in page.out
    assert page.err.endswith("\nseed 3; baseline 4 tokens, length; steered 4 tokens, length\n")
    assert max(map(len, page.out.split("features that changed")[0].splitlines())) <= 80


def test_spliced_is_the_sae_alone(steer: Steer) -> None:
    [alone] = steer("complete", "Once", "--error", "drop", *QUICK, "--json").lines
    ran = steer("complete", "Once", "--spliced", "--edit", "5 +6", *QUICK, "--json")
    assert ran.code == 0 and [entry["row"] for entry in ran.lines] == ["baseline", "steered", "spliced"]
    assert ran.lines[2]["tokens"] == alone["tokens"] != ran.lines[0]["tokens"]
    assert ran.lines[2]["edits"] == [] and len(ran.lines[2]["kl"]) == len(alone["tokens"])
    page = steer("complete", "Once", "--spliced", "--edit", "5 +6", *QUICK).out
    assert "\n\nspliced:\n" in page and "KL(spliced | unsteered)" in page and "\nerror dropped: the set ran" in page


def test_a_comparison_says_whose_it_is_and_where_nothing_acts(steer: Steer) -> None:
    ran = steer("complete", "Once", "Twice", "--compare", "--max-tokens", "2")
    assert "no edit is given: the steered reply is the baseline" in ran.err and ran.err.count("seed ") == 2
    assert ran.out.startswith("prompt: Once\n\nbaseline:") and "\n\nprompt: Twice\n\nbaseline:" in ran.out
    ran = steer("complete", "Once", "--edit", "5 +6 on 90..99", *QUICK)
    assert "not steered: no edit met its place or condition in 4 steps" in ran.err and "at 0 positions" in ran.err


class Interrupted(FakeEngine):
    """Ctrl-C comes with the second token of the first prompt."""

    def stream(self, *given: Any, **options: Any) -> Iterator[Event]:
        for event in super().stream(*given, **options):
            if isinstance(event, TokenEvent) and event.token == 21:
                options["stop"].set()
            yield event


def test_an_interrupted_comparison_shows_what_it_has_and_no_more(steer: Steer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.cli.engines.load_engine", lambda settings, **_: Interrupted())
    ran = steer("complete", "first", "second", "third", "--compare", "--json")
    assert ran.code == 130
    assert [(entry["prompt"], entry["row"]) for entry in ran.lines] == [("first", "baseline"), ("first", "steered")]
    assert {entry["finish"] for entry in ran.lines} == {"cancelled"}


def test_a_label_cannot_add_a_row_to_a_comparison(steer: Steer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Apart(FakeEngine):
        """The second row says more than the first, so features differ."""

        def stream(self, *given: Any, **options: Any) -> Iterator[Event]:
            yield from (
                event
                for event in super().stream(*given, **options)
                if not (isinstance(event, TokenEvent) and event.row == 0 and event.token > 21)
            )

    monkeypatch.setattr("steer.cli.engines.load_engine", lambda settings, **_: Apart())
    for latent in range(10):
        monkeypatch.setitem(NAMES, latent, "one\nseed 9, 0 tokens, stop")
    out = steer("complete", "a", "--compare").out
    assert "-> " in out and "one" in out
    assert not [line for line in out.splitlines() if line.startswith("seed 9")]


# -- controls ----------------------------------------------------------------------------------------------------------

CONTROLS = ("controls", "5 +4", "--topic", "e", "--prompt", "Once", "--seeds", "2", "--max-tokens", "4")


def test_controls_have_a_line_for_each_condition(steer: Steer) -> None:
    ran = steer(*CONTROLS, "--json")
    assert ran.code == 0 and [entry["condition"] for entry in ran.lines] == list(CONDITIONS)
    assert {(entry["replies"], entry["edit"], entry["asked"]) for entry in ran.lines} == {
        (2, "5 +4", "A story about e. Once")
    }
    assert all(entry["rate"]["low"] <= entry["rate"]["value"] <= entry["rate"]["high"] for entry in ran.lines)
    page = steer(*CONTROLS)
    assert [line.split()[0] for line in page.out.splitlines()] == ["condition", *CONDITIONS]
    assert "12 of 12 replies" in page.err and "asked: A story about e. Once" in page.err
    for wrong, why in (
        (("controls", "ablate 5", "--topic", "e"), "does not add to a latent"),
        (("controls", "5 +4", "--topic", ","), "the topic has no words"),
        ((*CONTROLS, "--seeds", "1"), "--seeds is 1"),
        ((*CONTROLS, "--seed", str(2**31 - 1)), "the seed is 2147483648"),
    ):
        ran = steer(*wrong)
        assert ran.code == 1 and why in ran.err and ran.out == ""


def test_controls_take_the_seeds_and_the_system_message_that_are_given(
    steer: Steer, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    heard: set[tuple[str, str]] = set()

    def write(engine: object, prompts: Any, sets: Any, seeds: list[int], *rest: object) -> list[tuple[Text, str]]:
        drawn.extend(seeds)
        heard.update(prompt.messages[0] for prompt in prompts)
        return [(Text((256, 5), (6,)), "e")] * len(prompts)

    monkeypatch.setattr("steer.analysis.controls.write", write)
    Path("steer.toml").write_text('system = "Be brief."\n')
    try:
        assert steer(*CONTROLS, "--seed", "7", "--chat").code == 0
    finally:
        Path("steer.toml").unlink()
    assert set(drawn) == {7, 8} and heard == {("system", "Be brief.")}


# -- an SAE that fits nothing ------------------------------------------------------------------------------------------


def test_a_wrong_sae_steers_only_when_it_is_trusted(steer: Steer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "steer.analysis.checkup.glance", lambda model, sae, tokenizer: "the SAE does not fit this model"
    )
    call = ("complete", "Once", "--edit", "5 +6", *QUICK, "--json")
    refused = steer(*call)
    assert refused.code == 1 and refused.out == "" and "--trust-sae" in refused.err
    trusted = steer(*call, "--trust-sae")
    assert trusted.code == 0 and trusted.lines[0]["report"]["steered"] and "does not fit this model" in trusted.err
    assert steer("complete", "Once", *QUICK).code == 0  # it may be looked at


def test_a_strength_at_which_text_falls_apart_is_said(steer: Steer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngine, "readout", lambda self, edit: Readout(1.0, None, edit.strength and -31.0))
    monkeypatch.setattr("steer.cli.engines.load_engine", lambda settings, many=False: FakeEngine())
    monkeypatch.setattr("sys.stdin", io.StringIO("hi"))
    two = ("--edit", "3 -1", "--edit", "4 +1", "--edit", "ablate 5")
    for call in (("complete", "Once"), ("chat", "--plain")):
        assert "the strengths come to 62% of |x|, the residual norm: over 60%" in steer(*call, *two).err
    assert "fall apart" not in steer("complete", "Once", "--edit", "3 -1").err
