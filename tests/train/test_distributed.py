"""Two processes that share rows or latents train what one process trains."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import json, sys
import torch
from dataclasses import replace
from sae.losses import total_variance
from tests.train.test_step import known_dictionary
from train.distributed import join_team
from train.recipe import Recipe
from train.step import SparseStep

recipes = json.loads(sys.argv[1])
_, x_BD = known_dictionary(64, 16, 3, 4096)
team = join_team(sys.argv[2], minutes=1)
curves = {}
for name, fields in recipes.items():
    fields["prefixes"] = tuple(fields.get("prefixes", ()))
    kill = fields.pop("kill", None)  # at that step the first latents are called dead, all of them of the first process
    x, batch = x_BD.to(getattr(torch, fields["dtype"])), 256
    step = SparseStep.begin(
        128, x.mean(0), Recipe(**fields), 4, variance=float(total_variance(x_BD)), team=team, sample_ND=x
    )
    curve = []
    with step:
        for number in range(200):
            start = number * batch % (len(x) - batch)
            rows = x[start : start + batch][team.rows(batch)]
            if fields["revival"] == "resample" and number == 100:
                curve.append(step.resample(rows, seed=1))
            if number == kill and team.part(128).start == 0:
                step.silent_F[:10] = 4096
            gradient = step.gradient(rows)
            norm = step.update(gradient, 3e-3)
            curve += [gradient.losses["reconstruction"], gradient.losses.get("aux", 0.0), norm, gradient.active]
    curves[name] = curve
if team.rank == 0:
    print(json.dumps(curves))
team.leave()
"""
BASE = {"k": 3, "k_aux": 8, "dead_after": 2048, "revival": "auxk", "initial_l0": 8.0, "bandwidth": 0.1}
RECIPES = {
    "topk": BASE,
    "topk dead on one side": BASE | {"kill": 100},
    "topk clipped": BASE | {"clip": 0.05, "ema": 0.9},
    "ghost": BASE | {"revival": "ghost"},
    "resample": BASE | {"revival": "resample", "dead_after": 512},
    "batchtopk": BASE | {"arch": "batchtopk"},
    "prefixes": BASE | {"prefixes": (24, 128)},
    "relu": BASE | {"arch": "relu", "l0_target": 4.0},
    "jumprelu": BASE | {"arch": "jumprelu", "sparsity": 0.01},
    "gated": BASE | {"arch": "gated"},
    "prolu": BASE | {"arch": "prolu", "prolu_gradient": "ste"},
}


def run(kind: str, processes: int, dtype: str) -> dict[str, list[float]]:
    """The loss curves of all recipes, trained by so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    recipes = json.dumps({name: recipe | {"dtype": dtype} for name, recipe in RECIPES.items()})
    root = Path(__file__).parent.parent.parent
    world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, recipes, kind],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=root,
            env=os.environ | world | {"RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        )
        for rank in range(processes)
    ]
    said = [worker.communicate(timeout=300) for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), [err[-3000:] for _, err in said]
    curves: dict[str, list[float]] = json.loads(said[0][0])
    return curves


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, list[float]]]:
    return {dtype: run("data", 1, dtype) for dtype in ("float64", "float32")}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
@pytest.mark.parametrize("kind", ["data", "latents"])
def test_the_loss_curve_of_two_processes_is_that_of_one(
    alone: dict[str, dict[str, list[float]]], kind: str, dtype: str, tolerance: float
) -> None:
    found = run(kind, 2, dtype)
    for name, wanted in alone[dtype].items():
        assert len(wanted) >= 800
        # A gated latent comes on at once with all its magnitude: in float32 one rounding at a gate shows in all that
        # follows, so only the steps before the first such one can be asked for.
        most = 120 if name == "gated" and dtype == "float32" else len(wanted)
        assert found[name][:most] == pytest.approx(wanted[:most], rel=tolerance, abs=tolerance * 1e-2), name
