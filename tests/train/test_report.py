"""The floor of a loss against curves whose floor is known, and reports of whole, broken and unfinished runs."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from train.activity import ActivityLog
from train.errors import TrainError
from train.floor import fit_floor
from train.pictures import draw_density, negative_share, series
from train.report import read_b_enc, report

TOKENS = np.arange(1, 2001) * 8192.0


def power_law(floor: float, a: float, b: float, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    return floor + a * TOKENS**-b + noise * np.random.default_rng(seed).normal(size=len(TOKENS))


@pytest.mark.parametrize(("floor", "a", "b"), [(0.1, 50, 0.5), (0.3, 1e4, 1.0), (0.05, 5, 0.3), (0.0, 3, 0.2)])
def test_a_power_law_is_found_again(floor: float, a: float, b: float) -> None:
    found = fit_floor(TOKENS, power_law(floor, a, b))
    assert not found.why and found.points == 1001 and found.first == TOKENS[999]
    np.testing.assert_allclose([found.loss, found.a, found.b], [floor, a, b], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.at(TOKENS), power_law(floor, a, b), rtol=1e-6)


def test_the_fit_is_the_least_squares_of_a_plain_solver() -> None:
    losses = power_law(0.1, 50, 0.5, noise=1e-4)
    found = fit_floor(TOKENS, losses)
    t, y = TOKENS[999:], losses[999:]
    best = float("inf")
    for b in np.linspace(0.3, 0.8, 2001):
        columns = np.stack([np.ones_like(t), t**-b], axis=1)
        answer = np.linalg.lstsq(columns, y, rcond=None)[0]
        best = min(best, float(((columns @ answer - y) ** 2).sum()))
    assert float(((found.at(t) - y) ** 2).sum()) <= best * (1 + 1e-9)


def test_the_interval_holds_the_floor_about_as_often_as_it_says() -> None:
    found = [fit_floor(TOKENS, power_law(0.1, 50, 0.5, noise=1e-4, seed=seed)) for seed in range(30)]
    held = sum(fit.low <= 0.1 <= fit.high for fit in found)
    assert held >= 24
    assert np.mean([fit.high - fit.low for fit in found]) < 0.01


def test_more_noise_widens_the_interval_until_it_says_nothing() -> None:
    widths = []
    for noise in (1e-5, 1e-4, 1e-3):
        found = fit_floor(TOKENS, power_law(0.1, 50, 0.5, noise=noise))
        widths.append(found.high - found.low)
    assert widths == sorted(widths)
    assert "do not settle" in found.why


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        (np.linspace(1, 2, 2000), "does not fall"),
        (np.ones(2000), "does not fall"),
        (2 - (TOKENS / TOKENS[-1]) ** 2, "does not level off"),
        (np.log(1e9 / TOKENS), "does not level off"),
        (np.where(TOKENS / TOKENS[-1] < 0.55, 2.0, 1.0), "faster at the end|do not follow"),
        (1 + np.cos(TOKENS / TOKENS[-1] * 30) * 0.01 + 100 * TOKENS**-0.5, "do not follow|does not|do not settle"),
        (np.ones(50), "26 losses, too few"),
        (np.full(2000, np.nan), "0 losses"),
        (np.empty(0), "0 losses"),
    ],
)
def test_what_is_no_power_law_is_said_to_be_none(losses: np.ndarray, why: str) -> None:
    assert re.search(why, fit_floor(TOKENS[: len(losses)], losses).why)


def entries(steps: int = 200) -> list[dict[str, Any]]:
    """The metrics of a run whose loss is an exact power law."""
    found = []
    for number in range(1, steps + 1):
        tokens = number * 10_240
        loss = 0.1 + 50 * tokens**-0.5
        entry: dict[str, Any] = {"step": number * 10, "steps": steps * 10, "tokens": tokens, "loss": loss}
        entry |= {"losses": {"reconstruction": 0.9 * loss, "aux": 0.1 * loss, "sparsity": 0.0}, "fvu": loss, "l0": 32.0}
        entry |= {"dead": 0.1, "grad_norm": 0.5, "lr": 1e-3, "tokens_per_second": 9000.0, "loader_wait": 0.01}
        if number % 50 == 0:
            entry |= {"held_out_fvu": loss, "density": {"edges": [-4, -3, -2], "counts": [3, 5], "never": 7}}
        found.append(entry)
    return found


def make_run(run: Path, metrics: list[dict[str, Any]] | None = None, config: str = "dead_after = 100000\n") -> Path:
    """A run's folder with metrics, activity and a checkpoint."""
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.toml").write_text(config)
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in metrics or entries()))
    log = ActivityLog(run / "activity")
    for step in (500, 1000, 1500, 2000):
        silent_F = torch.tensor([0, 1024, 90_000 + step, 99_000 + step, 10**9])
        log.add(step, step * 1024, silent_F, torch.ones(5, dtype=torch.int64))
    save_file({"b_enc": torch.tensor([-1.0, -2.0, 0.0, 3.0])}, run / "checkpoints" / "000002000.safetensors")
    return run


PICTURES = {"loss", "loss_parts", "dead", "activity", "density", "biases", "speed"}


class Reading(HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_whole_run_gives_every_picture_and_a_page_that_stands_alone(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run"))
    assert page == tmp_path / "run" / "report" / "report.html"
    assert {file.name for file in page.parent.iterdir()} == {f"{name}.png" for name in PICTURES} | {"report.html"}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in page.parent.glob("*.png"))
    read = Reading(page.read_text())
    assert len(read.links) == len(PICTURES) and all(link.startswith("data:image/png;base64,") for link in read.links)
    assert "script" not in read.tags
    for fact in (
        "not finished",
        "2,000 of 2,000",
        "loss floor0.1 (0.1 to 0.1",
        "births0",
        "deaths2",
        "50.00%",
        "7 never were",
    ):
        assert fact in read.text.replace("\n", "")


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    pages = [report(run, tmp_path / name) for name in ("a", "b")]
    for file in pages[0].parent.iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_nothing_of_the_program_around_it_is_changed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    import matplotlib

    before, loaded = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    report(run)
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_text_of_a_run_is_escaped(tmp_path: Path) -> None:
    wild = "<script>alert(1)</script>"
    metrics = [entry | {"losses": {"$x_{": 1.0, wild: 2.0, "_": 3.0}} for entry in entries(3)]
    page = report(make_run(tmp_path / wild.replace("/", ""), metrics, f"dead_after = 5\nnotes = '{wild}'\n"))
    read = Reading(page.read_text())
    assert "script" not in read.tags and wild in read.text


@pytest.mark.parametrize("gone", ["losses", "loss", "tokens", "density"])
def test_a_missing_key_costs_no_more_than_its_curve(tmp_path: Path, gone: str) -> None:
    metrics = [{key: value for key, value in entry.items() if key != gone} for entry in entries(50)]
    page = report(make_run(tmp_path / "run", metrics))
    assert (page.parent / "biases.png").exists()
    assert (page.parent / "density.png").exists() == (gone != "density")
    assert ("No picture of density" in page.read_text()) == (gone == "density")


def test_a_run_of_one_step_without_anything_else_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("latents = 5\n")
    line = json.dumps(
        {"step": 10, "tokens": 100, "fvu": 0.5, "l0": float("nan"), "losses": None, "density": {"edges": 3}}
    )
    (tmp_path / "metrics.jsonl").write_text(line + '\n{"step": 20, "tok')
    page = report(tmp_path)
    assert {file.stem for file in page.parent.glob("*.png")} == {"loss"}
    text = page.read_text()
    assert "density of step 10 is not a histogram" in text and "No picture of activity" in text


@pytest.mark.parametrize("metrics", [None, "", '{"step": 1', "[1, 2]\n"])
def test_a_run_without_a_step_is_one_sentence(tmp_path: Path, metrics: str | None) -> None:
    (tmp_path / "config.toml").write_text("")
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    with pytest.raises(TrainError, match="has no step in its metrics") as caught:
        report(tmp_path)
    assert caught.value.hint and not (tmp_path / "report").exists()


def test_a_folder_without_a_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="there is no run in"):
        report(tmp_path / "none")
    (tmp_path / "config.toml").write_text("latents = = 5")
    with pytest.raises(TrainError, match="is not the config of a run"):
        report(tmp_path)


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TrainError, match="needs matplotlib") as caught:
        report(run)
    assert caught.value.hint == "pip install 'steer[train]'"


def test_a_damaged_snapshot_ends_the_activity_and_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "activity" / "000001500.safetensors").write_bytes(b"no")
    page = report(run)
    assert "The activity ends early: activity snapshot" in page.read_text()
    assert (page.parent / "activity.png").exists()


def test_b_enc_comes_from_the_sae_else_from_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "checkpoints" / "000003000.safetensors").write_bytes(b"cut short")
    b_enc_F, where = read_b_enc(run)
    assert b_enc_F.tolist() == [-1, -2, 0, 3] and where == "at step 2,000" and negative_share(b_enc_F) == 0.5
    (run / "sae").mkdir()
    save_file({"b_enc": torch.tensor([1.0])}, run / "sae" / "sae.safetensors")
    assert read_b_enc(run)[0].tolist() == [1] and "finished" in read_b_enc(run)[1]
    assert len(read_b_enc(tmp_path / "none")[0]) == 0


def test_the_slices_of_a_dictionary_are_put_together(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for rank, name in enumerate(("000003000.safetensors", "000003000.1.safetensors")):
        save_file({"b_enc": torch.full((2,), float(rank))}, run / "checkpoints" / name, {"shards": "2"})
    assert read_b_enc(run)[0].tolist() == [0, 0, 1, 1]
    (run / "checkpoints" / "000003000.1.safetensors").unlink()
    assert read_b_enc(run)[1] == "at step 2,000"


def test_a_series_holds_what_is_a_number() -> None:
    given = [{"tokens": 1, "a": {"b": 2}}, {"tokens": 2, "a": 3}, {"tokens": 3, "a": {"b": True}}, {"a": {"b": 1}}]
    assert [points.tolist() for points in series(given, "a", "b")] == [[1], [2]]


@pytest.mark.parametrize(("edges", "drawn"), [([-4, -2, 0], True), ([0, 1e-3, 1], True), ([0, 1], False), ([], False)])
def test_a_histogram_of_density_is_drawn_if_it_is_one(edges: list[float], drawn: bool) -> None:
    assert (draw_density(edges, [1, 2]) is not None) == drawn


def test_the_page_of_a_sweep_compares_its_runs_best_first(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, fvu in (("k-2", 0.4), ("k-4", 0.2), ("k-<8>", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text("k = 2\n")
        if fvu is not None:
            entry = {"step": 1500, "tokens": 96_000, "loss": 1.0, "fvu": 0.1, "held_out_fvu": fvu}
            (tmp_path / name / "metrics.jsonl").write_text(json.dumps(entry) + "\n")
    page = report(tmp_path, tmp_path / "out").read_text()
    found = re.findall(r'<td><a href="([^"]+)">([^<]+)</a></td><td>([^<]*)</td><td>([^<]*)</td>', page)
    assert found == [
        ("k-4/report.html", "k-4", "1,500", "0.2000"),
        ("k-2/report.html", "k-2", "1,500", "0.4000"),
    ]
    assert all((tmp_path / "out" / link).is_file() for link, *_ in found)
    assert "k-&lt;8&gt;: the run in" in page and "k-<8>" not in page
    for name in ("k-2", "k-4"):
        (tmp_path / name / "metrics.jsonl").unlink()
    with pytest.raises(TrainError, match="has no step in its metrics"):
        report(tmp_path, tmp_path / "out")
