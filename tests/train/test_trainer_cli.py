"""`steer train` as it is typed: settings from everywhere, sweeps, a search, streams, and words to a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sae.checkpoint import load_sae
from steer.cli import main
from tests.tiny import write_tiny_checkpoint
from tests.train.known_rows import write_rows
from train.config import TrainConfig, read_run
from train.cost import Cost
from train.lock import only_process
from train.metrics import read_metrics

SMALL = ("--latents", "64", "--k", "3", "--tokens", "2560", "--batch", "128", "--threads", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `rows`, `model`, `text.txt`, and what the tests make of them."""
    folder = tmp_path_factory.mktemp("train")
    write_rows(folder / "rows", rows=1500)
    write_tiny_checkpoint(folder / "model")
    (folder / "text.txt").write_text("<|endoftext|>\n".join(f"The {n} cats sat on the mat.\n" * 4 for n in range(40)))
    return folder


@pytest.fixture
def steer(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    torch.set_num_threads(1)
    monkeypatch.setenv("STEER_HOME", str(folder / "home"))
    monkeypatch.chdir(folder)

    def run(*arguments: str, code: int = 0) -> Any:
        found = main(["train", *arguments])
        out, err = capsys.readouterr()
        assert found == code, err
        return out if code == 0 else err

    return run


def test_settings_come_from_a_preset_a_file_and_the_line_each_beating_the_one_before(steer: Any, folder: Path) -> None:
    (folder / "my.toml").write_text('preset = "openai"\nk = 5\nbatch = 256\naccumulate = 2\nclip = 2.0\n')
    told = json.loads(steer("rows", "--out", "a", "--config", "my.toml", *SMALL, "--set", "clip=3", "--json"))
    assert set(told) == {"steps", "tokens", "fvu", "l0", "dead", "measured_on"} and told["steps"] == 20
    config, _ = read_run(folder / "a")
    assert (config.k, config.batch, config.clip, config.ema, config.preset) == (3, 128, 3.0, 0.999, "openai")
    assert config.accumulate == 2 and load_sae(folder / "a" / "sae").config.normalise == "unit_norm"
    again = json.loads(steer("rows", "--out", "b", "--config", "a/config.toml", "--threads", "1", "--json"))
    assert again == told, "the config of a run makes that run again"
    assert steer("rows", "--out", "a", "--resume", "--json") == json.dumps(told) + "\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "0"], "tokens is 0"),
        (["--latents", "0"], "latents is 0"),
        (["--lr", "0"], "lr is 0"),
        (["--set", "aux_coeficient=1"], "no setting 'aux_coeficient'\n\nhint: perhaps aux_coefficient"),
        (["--preset", "closedai"], "no preset 'closedai'"),
        (["--preset", "openai", "--quick"], "--quick is the preset quick"),
        (["--sweep", "k=2,4", "--lr-sweep", "auto"], "two things"),
        (["--sweep", "seed=1,2"], "seed cannot be swept"),
        (["--lr-sweep", "1e-3,fast"], "lr is 'fast'"),
        (["--config", "none.toml"], "there is no file none.toml"),
        (["--k", "65", "--latents", "64"], "k is 65"),
        (["--device", "mps"], "training runs on cpu or cuda"),
        (["--stream"], "rows"),
        (["--set", "l0_target=8"], "l0_target does nothing where arch is topk"),
        (["--arch", "jumprelu", "--k", "8"], "k does nothing where arch is jumprelu"),
        (["--sweep", "arch=relu,gated", "--set", "bandwidth=1"], "bandwidth does nothing where arch is relu"),
        (["--set", "revival=none", "--set", "k_aux=8"], "k_aux does nothing where revival is none"),
        (["--arch", "relu", "--sweep", "k=2,4"], "k does nothing where arch is relu"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_begun(
    steer: Any, folder: Path, arguments: list[str], words: str
) -> None:
    err = steer("rows", "--out", "never", *arguments, code=1)
    assert words in err and "Traceback" not in err and not (folder / "never").exists()


def test_a_sweep_is_a_table_and_goes_on_by_itself(steer: Any, folder: Path) -> None:
    table = steer("rows", "--out", "swept", *SMALL, "--sweep", "k=2,4")
    lines = table.splitlines()
    assert lines[0].split() == ["FVU", "L0", "dead"] and [line.split()[0] for line in lines[1:]] == ["k-2", "k-4"]
    rows = [
        json.loads(line)
        for line in steer("rows", "--out", "swept", *SMALL, "--sweep", "k=2,4", "--resume", "--json").splitlines()
    ]
    assert [row["run"] for row in rows] == ["k-2", "k-4"] and rows[0]["fvu"] > rows[1]["fvu"]
    assert "swept holds a sweep" in steer("rows", "--out", "swept", code=1)
    alone = steer("rows", "--out", "swept", "--resume", "--json", "--threads", "1", "--device", "cpu")
    assert [json.loads(line) for line in alone.splitlines()] == rows
    asked = (folder / "swept" / "sweep.json").read_text()
    assert "already holds a run" in steer("rows", "--out", "swept", *SMALL, "--sweep", "k=2,8", code=1)
    assert "has tokens = 2560" in steer("rows", "--out", "swept", "--resume", "--tokens", "128", code=1)
    assert (folder / "swept" / "sweep.json").read_text() == asked, "a call that was refused leaves no trace"
    assert "no process trains in swept" in steer("stop", "swept", code=1)
    (folder / "swept" / "sweep.json").write_text("{}")
    assert "sweep.json is not readable" in steer("rows", "--out", "swept", "--resume", code=1)
    assert (
        steer("rows", "--out", "swept/k-2", "--resume", "--json")
        == json.dumps({k: rows[0][k] for k in ("steps", "tokens", "fvu", "l0", "dead", "measured_on")}) + "\n"
    )


def test_a_length_that_is_not_that_of_the_run_is_refused(steer: Any) -> None:
    small = ("--latents", "64", "--k", "3", "--batch", "500", "--threads", "1", "--device", "cpu")
    told = steer("rows", "--out", "passes", *small, "--set", "epochs=2")
    assert steer("rows", "--out", "passes", "--resume", "--tokens", "3000") == told
    assert "has tokens = 3000, not 500" in steer("rows", "--out", "passes", "--resume", "--tokens", "500", code=1)


def test_a_search_finds_a_rate_and_a_resumed_run_keeps_it(steer: Any, folder: Path) -> None:
    found = ("--lr-sweep", "1e-5,3e-3", "--set", "held_out=0.2", "--json")
    told = steer("rows", "--out", "searched", *SMALL, *found)
    assert read_run(folder / "searched")[0].lr == 3e-3
    assert steer("rows", "--out", "searched", *SMALL, *found, "--resume") == told


def test_a_trial_says_what_it_takes_and_writes_nothing(
    steer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.trial.TRIAL_SECONDS", 0.2)
    lines = steer("rows", "--out", "never", *SMALL, "--dry-run", "--price-per-hour", "2").splitlines()
    assert [line.split()[0] for line in lines] == ["tokens", "disk", "memory", "time", "money", "rows"]
    assert not (folder / "never").exists()


def test_a_trial_of_a_sweep_and_a_search_adds_up_their_runs(
    steer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def cost(source: Any, config: TrainConfig, **options: Any) -> Cost:
        asked.append(config.k)
        return Cost(1000, 100.0, 10 * config.k, 7, 2.0, 4.0)

    monkeypatch.setattr("train.trial.training_cost", cost)
    ask = ("rows", "--out", "never", *SMALL, "--dry-run", "--price-per-hour", "2", "--json")
    told = json.loads(steer(*ask, "--sweep", "k=2,4"))
    assert asked == [2, 4] and (told["hours"], told["money"], told["disk_bytes"], told["memory_bytes"]) == (
        4,
        8,
        60,
        14,
    )
    monkeypatch.setattr("train.sweep.SHORT_STEPS", 5)
    told = json.loads(steer(*ask, "--lr-sweep", "1e-3,2e-3"))
    assert told["hours"] == pytest.approx(2 * (1 + 2 * 640 / 1000)) and told["money"] == pytest.approx(
        2 * told["hours"]
    )


def test_a_trial_of_a_text_is_that_of_capture_and_training(
    steer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.trial.TRIAL_SECONDS", 0.2)
    monkeypatch.setattr("train.trial.TRIAL_ROWS", 300)
    small = ("--latents", "64", "--batch", "128", "--threads", "1", "--device", "cpu", "--set", "epochs=3")
    ask = ("text.txt", "--out", "never", *small, "--model", "model", "--dry-run", "--price-per-hour", "2")
    lines = steer(*ask).splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["capture:", "train:", "both:"] and len(lines) == 18
    told = json.loads(steer(*ask, "--json"))
    capture, training = told["capture"], told["train"]
    assert training["tokens"] == 3 * capture["tokens"] == told["tokens"] > 300
    for name in ("hours", "money", "disk_bytes"):
        assert told[name] == pytest.approx(capture[name] + training[name]) and capture[name] > 0
    assert not (folder / "never").exists()


def test_a_text_is_streamed_with_no_activations_on_disk(steer: Any, folder: Path) -> None:
    sizes = ("--latents", "64", "--k", "3", "--tokens", "512", "--batch", "64", "--threads", "1", "--device", "cpu")
    more = ("--set", "stats_rows=200", "--set", "held_out=0.2", "--model", "model", "--json")
    told = json.loads(steer("text.txt", "--out", "streamed", *sizes, *more, "--stream"))
    sae = load_sae(folder / "streamed" / "sae")
    assert told["steps"] == 8 and sae.config.hook.startswith("blocks.") and sae.manifest["data"]["streamed"]
    assert sae.manifest["measured_on"] == "held-out rows" and not (folder / "streamed" / "activations").exists()
    whole = (folder / "streamed" / "sae" / "sae.safetensors").read_bytes()
    (folder / "streamed" / "sae" / "cfg.json").unlink()
    assert json.loads(steer("text.txt", "--out", "streamed", *sizes, *more, "--stream", "--resume")) == told
    assert (folder / "streamed" / "sae" / "sae.safetensors").read_bytes() == whole
    err = steer("text.txt", "--out", "x", "--stream", "--set", "epochs=2", "--model", "model", code=1)
    assert "nobody knows how long an epoch of a stream is" in err


def test_words_to_a_run_and_a_page_about_it(steer: Any, folder: Path) -> None:
    pytest.importorskip("matplotlib")
    steer("rows", "--out", "told", *SMALL)
    assert "no process trains in told" in steer("stop", "told", code=1)
    with only_process(folder / "told"):
        steer("stop", "told")
        steer("checkpoint", "told")
    assert (folder / "told" / "control").read_text().split() == ["stop", "checkpoint"]
    assert "holds no run" in steer("stop", "nowhere", code=1)
    page = Path(steer("report", "told", "--out", "page").strip())
    assert page.suffix == ".html" and "fvu" in page.read_text().lower()
    assert len(list(read_metrics(folder / "told" / "metrics.jsonl"))) == 2


def test_help_shows_training_with_its_presets_and_the_words(steer: Any) -> None:
    text = " ".join(steer("--help").split())
    assert "Usage: steer train [OPTIONS]" in text
    for word in ("steer train report RUN", "openai:", "llama3-interpretability-sae:", "--sweep", "--lr-sweep"):
        assert word in text, word
    assert "Usage: steer train report [OPTIONS]" in steer("report", "--help")


def test_metrics_go_to_the_boards_that_were_asked_for(
    steer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    logged: list[dict[str, Any]] = []

    class Run:
        def log(self, entry: dict[str, Any], step: int) -> None:
            logged.append(entry | {"step": step})

        def finish(self, exit_code: int) -> None:
            logged.append({"exit": exit_code})

    wandb = pytest.importorskip("wandb")
    asked: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", lambda **given: (asked.update(given), Run())[1])
    steer("rows", "--out", "members", *SMALL, "--wandb", "project", "--sweep", "k=2,4")
    assert asked["config"]["k"] == 4 and asked["name"] == "k-4", "each member with what is its own"
    assert asked["config"]["lr"] == read_run(folder / "members" / "k-4")[0].lr > 0
    logged.clear()
    steer("rows", "--out", "boards", *SMALL, "--wandb", "project", "--tensorboard")
    assert asked["project"] == "project" and asked["resume"] == "allow" and asked["config"]["k"] == 3
    assert [entry.get("step") for entry in logged] == [10, 20, None] and logged[-1] == {"exit": 0}
    assert logged[0]["losses/reconstruction"] == logged[0]["fvu"]
    assert list((folder / "boards" / "tensorboard").iterdir())
