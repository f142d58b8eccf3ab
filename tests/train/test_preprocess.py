"""Moments and scales against plain float64, the geometric median against geometry, and plans that fit their data."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.model import SAE, SAEConfig
from steer.cli import main
from tests.train.test_reader import write_capture
from train import preprocess
from train.errors import TrainError
from train.preprocess import InputScale, Moments, geometric_median, make_plan, plan_of, read_plan, write_plan
from train.reader import ShardReader, open_source

NONE = InputScale("none")


def drawn(rows: int, d: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def folder_of(path: Path, rows_ND: Tensor, files: int = 3) -> Path:
    path.mkdir()
    for number, part in enumerate(rows_ND.chunk(files)):
        np.save(path / f"{number}.npy", part.numpy())
    return path


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), offset=st.sampled_from([0.0, 1e6]))
def test_moments_of_parts_merge_into_those_of_the_whole(sizes: list[int], offset: float) -> None:
    x_ND = torch.randn(sum(sizes), 4, generator=torch.Generator().manual_seed(sum(sizes)), dtype=torch.float64) + offset
    total = Moments(0, torch.zeros(4, dtype=torch.float64), 0.0, 0.0)
    for part in x_ND.split(sizes):  # type: ignore[no-untyped-call]  # torch has no types for it
        total = total.merged(Moments.of(part, NONE))
    assert total.count == len(x_ND)
    torch.testing.assert_close(total.mean_D, x_ND.mean(0), rtol=1e-12, atol=1e-12)
    assert total.variance == pytest.approx(float(x_ND.var(0, correction=0).sum()), rel=1e-8, abs=1e-12)
    assert total.norm == pytest.approx(float(x_ND.norm(dim=1).mean()), rel=1e-12)


def test_a_far_mean_costs_no_digits() -> None:
    x_ND = drawn(30_000, 3).double() + 1e7
    assert Moments.of(x_ND, NONE).variance == pytest.approx(float(x_ND.var(0, correction=0).sum()), rel=1e-9)


def test_the_geometric_median_is_the_fermat_point() -> None:
    even = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])
    torch.testing.assert_close(geometric_median(even), even.double().mean(0), rtol=0, atol=1e-5)
    obtuse = torch.tensor([[0.0, 0.0], [10.0, 0.3], [-10.0, 0.3]])  # the corner of over 120 degrees is the point
    torch.testing.assert_close(geometric_median(obtuse), obtuse[0].double(), rtol=0, atol=1e-4)
    assert geometric_median(torch.ones(5, 3)).tolist() == [1, 1, 1]


def test_at_the_geometric_median_the_unit_vectors_to_the_rows_cancel() -> None:
    x_ND = drawn(500)
    x_ND[:20] += 1e4  # outliers, which move the mean by 400
    point_D = geometric_median(x_ND, tolerance=1e-9)
    apart_ND = x_ND.double() - point_D
    assert float((apart_ND / apart_ND.norm(dim=1, keepdim=True)).mean(0).norm()) < 1e-5
    assert float((point_D - x_ND[20:].double().mean(0)).norm()) < 1 < float((x_ND.mean(0) - x_ND[20:].mean(0)).norm())


def test_scales_of_all_rows_do_what_they_say() -> None:
    x_ND = drawn(4000, 6) * torch.tensor([1.0, 2, 3, 4, 5, 6])
    before = x_ND.clone()
    scaled = {mode: InputScale.measure(mode, x_ND).apply(x_ND) for mode in preprocess.MODES}
    assert torch.equal(x_ND, before), "out of place"
    assert float(scaled["variance"].var(0, correction=0).sum()) == pytest.approx(6, rel=1e-5)
    assert float(scaled["norm"].norm(dim=1).mean()) == pytest.approx(math.sqrt(6), rel=1e-5)
    assert torch.equal(scaled["none"], x_ND)
    assert {InputScale.measure(mode, x_ND).factor for mode in ("none", "layer_norm", "unit_norm")} == {1.0}


@pytest.mark.parametrize("mode", ["layer_norm", "unit_norm"])
def test_scales_of_each_token_are_those_of_an_sae_that_normalises(mode: str) -> None:
    x_BD = drawn(20, 8)
    inputs_BD = InputScale(mode).apply(x_BD)
    centred_BD = x_BD - x_BD.mean(1, keepdim=True)
    size_B1 = centred_BD.pow(2).sum(1, keepdim=True).sqrt()
    expected = centred_BD / size_B1 if mode == "unit_norm" else centred_BD / (size_B1 / math.sqrt(7) + 1e-5)
    torch.testing.assert_close(inputs_BD, expected)
    sae = SAE(SAEConfig(d_in=8, d_sae=8, activation="relu", k=0, normalise=mode))
    sae.W_enc_FD.copy_(torch.eye(8))
    torch.testing.assert_close(sae.pre_activations(x_BD), inputs_BD)
    assert bool(InputScale(mode).apply(torch.ones(1, 8)).isfinite().all()), "a constant token has no direction"


def test_rows_without_spread_cannot_be_scaled_by_it() -> None:
    with pytest.raises(TrainError, match=r"the 5 rows have a spread of 0\.0"):
        InputScale.measure("variance", torch.ones(5, 3))
    with pytest.raises(TrainError, match=r"mean norm of 0\.0"):
        InputScale.measure("norm", torch.zeros(5, 3))
    with pytest.raises(TrainError, match="no scaling 'l1'"):
        InputScale.measure("l1", torch.ones(5, 3))


@pytest.mark.parametrize("scale", preprocess.MODES)
def test_a_plan_measures_what_is_trained_on_whatever_the_threads(tmp_path: Path, scale: str) -> None:
    folder = folder_of(tmp_path / "a", drawn(3000, 6))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    plans = [
        make_plan(ShardReader(folder, 0, held_out=0.2, use_plan=False), scale=scale, center="median", threads=threads)
        for threads in (1, 3)
    ]
    plan = plans[0]
    assert plans[1] == plan and plan.rows + plan.held_out_rows == 3000 and plan.held_out_rows > 0
    write_plan(folder, plan)
    source = open_source(folder, 7)
    assert plan_of(source) == plan == read_plan(folder)
    assert {name: (folder / name).read_bytes() for name in before} == before, "no row is rewritten"
    inputs_ND = plan.scale.apply(source.batch(0, source.rows).double())
    unscaled_ND = inputs_ND * plan.scale.factor
    torch.testing.assert_close(torch.tensor(plan.mean, dtype=torch.float64), unscaled_ND.mean(0), rtol=1e-9, atol=1e-9)
    assert plan.variance == pytest.approx(float(unscaled_ND.var(0, correction=0).sum()), rel=1e-9)
    expected_D = geometric_median(inputs_ND)
    torch.testing.assert_close(plan.center_D().double(), expected_D, rtol=0, atol=1e-4)
    if scale == "variance":
        assert float(inputs_ND.var(0, correction=0).sum()) == pytest.approx(6, rel=1e-9)


def test_a_plan_of_other_files_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", drawn(300))
    write_plan(folder, make_plan(ShardReader(folder, 0, use_plan=False)))
    np.save(folder / "1.npy", drawn(101).numpy())
    with pytest.raises(TrainError, match=r"was made from another 1\.npy") as error:
        open_source(folder, 0)
    assert error.value.hint == "run steer preprocess again"
    np.save(folder / "1.npy", drawn(100).numpy() + 1)
    with pytest.raises(TrainError, match=r"was made from another 1\.npy"):
        open_source(folder, 0)
    (folder / "1.npy").unlink()
    with pytest.raises(TrainError, match=r"was made with 1\.npy, which is gone"):
        open_source(folder, 0)
    make_plan(ShardReader(folder, 0, use_plan=False))


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"format": "x"}', '{"format": "steer-plan", "version": 1}', "NaN", "[" * 100_000]
)
def test_a_damaged_plan_is_named(tmp_path: Path, text: str) -> None:
    folder = folder_of(tmp_path / "a", drawn(30))
    (folder / "plan.json").write_text(text)
    with pytest.raises(TrainError, match=r"plan\.json is not a plan"):
        open_source(folder, 0)


def test_values_of_a_plan_that_cannot_be_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", drawn(300))
    write_plan(folder, make_plan(ShardReader(folder, 0, use_plan=False)))
    whole = json.loads((folder / "plan.json").read_text())
    changes = {"scale": {"mode": "variance", "factor": 0}, "center": "mode", "held_out": 2, "mean": [1.0], "rows": "x"}
    for name, value in changes.items():
        (folder / "plan.json").write_text(json.dumps(whole | {name: value}))
        with pytest.raises(TrainError, match=r"plan\.json is not a plan"):
            read_plan(folder)


def test_the_command_writes_a_plan_again_and_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    folder = write_capture(tmp_path / "a")
    for share in ("0.2", "0.3"):
        code = main(["preprocess", str(folder), "--held-out", share, "--seed", "3", "--scale", "norm", "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        told, plan = json.loads(out), read_plan(folder)
        assert plan is not None and plan.held_out == float(share) and plan.seed == 3 and plan.scale.mode == "norm"
        assert told["rows"] == plan.rows == open_source(folder, 0).rows
        assert told["held_out_rows"] == plan.held_out_rows > 0 and told["factor"] == plan.scale.factor
        assert [entry["sha256"] for entry in plan.made_from] == [
            shard["sha256"] for shard in json.loads((folder / "manifest.json").read_text())["shards"]
        ]
    assert main(["preprocess", str(folder), "--held-out", "1e-9"]) == 0
    assert "no row is held out" in capsys.readouterr().err
    for arguments, why in (
        ((str(tmp_path / "none"),), "there is no folder"),
        ((str(folder), "--held-out", "1"), "share is 1"),
        ((str(tmp_path / "home"),), "there is no folder" if not (tmp_path / "home").exists() else "no activations"),
    ):
        assert main(["preprocess", *arguments]) == 1
        assert why in capsys.readouterr().err
