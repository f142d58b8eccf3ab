"""`steer why`, `steer patch` and `steer inspect --ablate` on a tiny model and SAE in folders."""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae.checkpoint import save_sae
from sae.model import SAE
from tests.steer.commands import Ran, Steer, ran
from tests.steer.test_sae_kinds import sae_of
from tests.tiny import write_tiny_checkpoint

torch.set_num_threads(1)
TEXT = "Once upon"
LENGTH = len(TEXT) + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(folder / "model")
    save_sae(folder / "sae", sae_of("topk"))
    below: SAE = sae_of("jumprelu")
    below.config = replace(below.config, hook="blocks.0.hook_resid_pre")
    save_sae(folder / "below", below)
    return folder


@pytest.fixture
def steer(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Steer:
    monkeypatch.setenv("STEER_HOME", str(folder / "home"))
    monkeypatch.chdir(folder)

    def run(*arguments: str, sae: bool = True) -> Ran:
        return ran(capsys, *arguments, "--model", "model", *(("--sae", "sae") if sae else ()))

    return run


def test_one_object_a_latent(steer: Steer) -> None:
    ran = steer("why", TEXT, "--token", "5", "--json")
    assert ran.code == 0, ran.err
    keys = {"latent", "attribution", "gradient", "ablation", "normalised", "label", "places", "about"}
    assert all(set(line) == keys for line in ran.lines) and len(ran.lines) > 8
    about = ran.lines[0]["about"]
    assert (about["index"], about["target"]["text"], about["against"]) == (5, TEXT[4], None)
    assert {"error", "error_ablation", "total", "together"} < set(about)
    assert ran.lines[0]["ablation"] is not None
    few = steer("why", TEXT, "--token", "5", "--json", "--top", "3").lines
    assert [line["latent"] for line in few] == [line["latent"] for line in ran.lines[:3]]


def test_a_token_at_the_end_is_the_models_own(steer: Steer) -> None:
    own, same = (steer("why", TEXT, "--json", *more).lines for more in ((), ("--token", str(LENGTH))))
    assert own == same and own[0]["about"]["index"] == LENGTH
    against = steer("why", TEXT, "--json", "--against", "x").lines[0]["about"]
    assert against["against"]["token"] == ord("x")
    assert steer("why", TEXT, "--json", "--against", "120").lines[0]["about"] == against


def test_a_prompt_on_stdin_is_read_without_its_last_newline(steer: Steer, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = steer("why", TEXT, "--json", "--top", "2").lines
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT + "\n"))
    assert steer("why", "--json", "--top", "2").lines == typed


def test_a_table_for_a_person(steer: Steer) -> None:
    ran = steer("why", TEXT, "--token", "5", "--top", "4")
    lines = ran.out.splitlines()
    assert lines[0].startswith("token 5 ") and lines[1].startswith("  likeliest: ")
    assert lines[2].split() == ["latent", "ablated", "estimate", "norm.", "most", "at"]
    assert len(lines) == 3 + 4 + 1 and lines[-1].split()[0] == "error"
    assert "all removed at once" in ran.err
    assert "against" in steer("why", TEXT, "--token", "5", "--against", "x", "--by", "normalised").out.splitlines()[0]


def test_what_made_a_latent_fire(steer: Steer) -> None:
    hit = steer("inspect", TEXT, "--json").lines[5]["hits"][0]
    latent, call = str(hit["latent"]), ("why", TEXT, "--token", "5", "--latent")
    tokens = steer(*call, latent, "--json").lines
    assert {line["index"] for line in tokens} == {1, 2, 3, 4, 5}
    assert set(tokens[0]) == {"index", "token", "text", "attribution", "ablation", "about"}
    assert tokens[0]["about"] == {"index": 5, "of": hit["latent"], "activation": pytest.approx(hit["activation"])}
    latents = steer(*call, latent, "--through", "below", "--json").lines
    assert latents and all(line["about"]["of"] == hit["latent"] and line["label"] == "" for line in latents)
    shown = steer(*call, latent)
    assert shown.out.startswith(f"latent {latent} is at ") and len(shown.out.splitlines()) == 7
    assert "blocks.0.hook_resid_pre" in steer(*call, latent, "--through", "below").err
    assert steer("why", TEXT, "--latent", latent).code == 0


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--top", "0"), "--top is 0"),
        (("--token", "40"), "there is no token 40"),
        (("--token", "0"), "nothing comes before token 0"),
        (("--against", "two"), "is 3 tokens: 't' 'w' 'o'"),
        (("--against", "999999"), "--against is 999999"),
        (("--against", " 4"), "is 2 tokens: ' ' '4'"),
        (("--against", "4 "), "is 2 tokens: '4' ' '"),
        (("--latent", "3", "--by", "normalised"), "--latent alone ranks tokens"),
        (("--through", "below"), "--through goes with --latent"),
        (("--latent", "3", "--against", "x"), "--against explains a token"),
        (("--latent", "64"), "there is no latent 64"),
        (("--latent", "-1"), "there is no latent -1"),
        (("--latent", "3", "--through", "nowhere"), "nowhere"),
    ],
)
def test_a_bad_request_is_one_sentence(steer: Steer, arguments: tuple[str, ...], why: str) -> None:
    ran = steer("why", TEXT, *arguments)
    assert ran.code == 1 and ran.out == ""
    assert ran.err.startswith("error: ") and why in ran.err


def test_an_sae_above_explains_nothing(steer: Steer) -> None:
    latent = str(steer("inspect", TEXT, "--json").lines[5]["hits"][0]["latent"])
    ran = steer("why", TEXT, "--token", "5", "--latent", latent, "--through", "sae")
    assert ran.code == 1 and "does not stand below" in ran.err


@pytest.mark.parametrize(
    "call", [("why", TEXT), ("inspect", TEXT, "--ablate", "3"), ("patch", "ab", "cb", "--latents", "3")]
)
def test_without_an_sae_there_is_nothing_to_tell(steer: Steer, call: tuple[str, ...]) -> None:
    ran = steer(*call, sae=False)
    assert ran.code == 1 and "there is no SAE" in ran.err and "--sae FOLDER" in ran.err


def test_inspect_says_what_goes_without_a_latent(steer: Steer) -> None:
    plain = steer("inspect", TEXT, "--json").lines
    latent = plain[5]["hits"][0]["latent"]
    found = steer("inspect", TEXT, "--ablate", str(latent), "--json").lines
    for line, before in zip(found, plain, strict=True):
        assert {key: line[key] for key in before} == before
        on = next((hit["activation"] for hit in before["hits"] if hit["latent"] == latent), 0.0)
        assert line["activation"] == pytest.approx(on, rel=1e-4) and line["ablated"] == latent
    assert found[0]["change"] is None and found[1]["logprob"] < 0 and found[6]["change"] != 0
    shown = steer("inspect", TEXT, "--ablate", str(latent))
    assert len(shown.out.splitlines()) == 1 + LENGTH and f"latent {latent} is on at" in shown.err
    for bad, why in ((("--by", "text"), "token by token"), (("--html", "x.html"), "token by token")):
        assert why in steer("inspect", TEXT, "--ablate", "3", *bad).err
    assert "there is no latent 64" in steer("inspect", TEXT, "--ablate", "64").err


def test_patch_prints_layers_by_positions(steer: Steer) -> None:
    ran = steer("patch", "the sea is", "the zoo is")
    lines = ran.out.splitlines()
    assert ran.code == 0 and lines[0].startswith("logit of ")
    assert lines[2].split() == ["5", "6", "7", "8", "9", "10"]
    assert [line.split()[0] for line in lines[3:]] == ["clean", "corrupt", "0", "1"]
    cells = steer("patch", "the sea is", "the zoo is", "--json", sae=False).lines
    assert len(cells) == 12 and cells[0]["hook"] == "blocks.0.hook_resid_post" and cells[0]["index"] == 5
    assert cells[-1]["recovered"] == pytest.approx(1.0, abs=1e-4)
    assert cells[0]["clean"] == "s" and cells[0]["corrupt"] == "z" and cells[0]["answer"] != cells[0]["wrong"]
    some = steer("patch", "the sea is", "the zoo is", "--json", "--tokens", "6..7", "--at", "blocks.1.hook_attn_out",
                 "--at", "blocks.0.hook_mlp_out", "--answer", "a", "--wrong", "98").lines  # fmt: skip
    assert [(cell["hook"], cell["index"]) for cell in some] == [
        ("blocks.1.hook_attn_out", 6), ("blocks.1.hook_attn_out", 7),
        ("blocks.0.hook_mlp_out", 6), ("blocks.0.hook_mlp_out", 7),
    ]  # fmt: skip
    assert (some[0]["answer"]["text"], some[0]["wrong"]["text"]) == ("a", "b")
    latents = steer("patch", "the sea is", "the zoo is", "--latents", "3, 5", "--json").lines
    assert {cell["hook"] for cell in latents} == {"blocks.0.hook_resid_post"}


def test_a_wide_table_is_broken_into_blocks(steer: Steer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = steer("patch", "the sea is", "the zoo is").out.splitlines()
    assert max(map(len, lines[1:])) <= 40
    assert [line.split() for line in lines if not line.strip("0123456789 ")][1::2] == [
        ["5", "6", "7"],
        ["8", "9", "10"],
    ]


@pytest.mark.parametrize("name", ["p.html", "p.png", "p.svg"])
def test_patch_draws_a_picture(steer: Steer, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    ran = steer("patch", "The <b>a is", "the <b>a is", "--picture", str(file), "--answer", "a", "--wrong", "b")
    assert ran.code == 0 and f"wrote {file}" in ran.err
    assert [one.name for one in tmp_path.iterdir()] == [name]
    head = file.read_bytes()
    if name == "p.html":
        page = head.decode()
        assert page.count("<td") == 2 * 11 and "&lt;" in page
        assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    elif name == "p.png":
        assert head.startswith(b"\x89PNG")
    else:
        assert b"<svg" in head


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("ab", "abc"), "the clean prompt has 3 tokens and the corrupt one 4"),
        (("ab", "ab"), "the same"),
        (("ab", "cb", "--tokens", "2..1"), "--tokens is '2..1'"),
        (("ab", "cb", "--tokens", "x"), "--tokens is 'x'"),
        (("ab", "cb", "--tokens", "9"), "there is no token 9"),
        (("ab", "cb", "--at", "resid_past"), "'resid_past' is not a hook point"),
        (("ab", "cb", "--at", "blocks.7.hook_resid_post"), "the model has 2 blocks"),
        (("ab", "cb", "--latents", "x"), "--latents is 'x'"),
        (("ab", "cb", "--latents", "64"), "there is no latent 64"),
        (("ab", "cb", "--latents", "3", "--at", "blocks.1.hook_resid_post"), "the latents stand at"),
        (("ab", "cb", "--picture", "p.gif"), "`p.gif` is no picture"),
        (("ab", "cb", "--picture", "nowhere/p.html"), "there is no folder `nowhere`"),
        (("ab", "cb", "--answer", " 4", "--wrong", "5"), "--answer ' 4' is 2 tokens"),
        (("ab", "cb", "--answer", "a", "--wrong", "a"), "the answer and the wrong one are both 'a'"),
    ],
)
def test_a_bad_patch_is_one_sentence(steer: Steer, arguments: tuple[str, ...], why: str) -> None:
    ran = steer("patch", *arguments)
    assert ran.code == 1 and ran.out == ""
    assert ran.err.startswith("error: ") and why in ran.err


def test_the_help_of_the_commands_needs_no_torch() -> None:
    code = "import sys, steer.cli; print('torch' in sys.modules, 'numpy' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]
