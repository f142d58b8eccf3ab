"""A whole training step on the Triton kernels against the plain one: under Triton's interpreter, without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

import sae.kernels
from tests.train.test_step import BASE, started
from train.recipe import Recipe

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
triton_kernels = None
if INTERPRETED:
    triton_kernels = pytest.importorskip("sae.triton_kernels", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")

RECIPES = {
    "topk": BASE,
    "batchtopk": Recipe(arch="batchtopk", k=4, k_aux=6, dead_after=1000),
    "jumprelu": Recipe(arch="jumprelu", initial_l0=10, bandwidth=0.1, dead_after=1000),
    "gated": Recipe(arch="gated", initial_l0=10, dead_after=1000),
    "prefixes": Recipe(k=4, k_aux=6, prefixes=(8, 96), dead_after=1000),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_on_triton_is_the_plain_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(**(vars(RECIPES[name]) | {"dtype": "float32", "screen": "float32"}))
    plain, x_BD = started(recipe, dead=5)
    with plain:
        wanted = plain.gradient(x_BD)
        norm = plain.update(wanted, lr=1e-3)
    fast, _ = started(recipe, dead=5)
    fast.threads = 1  # the interpreter keeps its place in a global
    # The encoder screens with a copy in bfloat16, which the interpreter cannot multiply: here the copy is in float32.
    fast.encoder._fast, fast.encoder._screens = triton_kernels, True
    fast.encoder._copy = fast.weights["W_enc"].clone()
    monkeypatch.setattr(sae.kernels, "triton_kernels", lambda weight: triton_kernels)
    with fast:
        found = fast.gradient(x_BD)
        assert fast.update(found, lr=1e-3) == pytest.approx(norm, rel=1e-4)
    assert found.losses == pytest.approx(wanted.losses, rel=1e-4) and found.active == wanted.active
    for weight, first in plain.first_moments.items():
        torch.testing.assert_close(fast.first_moments[weight], first, rtol=1e-3, atol=1e-6)
