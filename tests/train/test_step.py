"""The gradients of every kind of SAE, written out by hand, against autograd of a plain dense float64 loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.losses import total_variance
from train.errors import TrainError
from train.recipe import Arch, Recipe
from train.step import SparseStep

D, F, B = 12, 96, 300
V = 12.0
Weights = dict[str, Tensor]


class Window(torch.autograd.Function):
    """Heaviside(pre - threshold) with the pseudo-derivative of Rajamanoharan et al. 2024 for the threshold."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return (pre > threshold).double()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        inside = ((pre - threshold).abs() < ctx.width / 2).double()
        return None, (-g[0] * inside / ctx.width).sum(0), None


class Jump(torch.autograd.Function):
    """JumpReLU: pre where it is above the threshold, with the pseudo-derivative of the same paper."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        inside = ((pre - threshold).abs() < ctx.width / 2).double()
        return g[0] * (pre > threshold), (-g[0] * inside * threshold / ctx.width).sum(0), None


class StraightThrough(torch.autograd.Function):
    """ProLU with its straight-through gradients (Taggart 2024)."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, b: Tensor) -> Tensor:
        gate = ((m > 0) & (m + b > 0)).double()
        ctx.save_for_backward(m, gate)
        return m * gate

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor, Tensor]:
        m, gate = ctx.saved_tensors
        return g[0] * gate * (1 + m), (g[0] * gate * m).sum(0)


class Both(torch.autograd.Function):
    """ProLU with the gradient of a ReLU for both."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, b: Tensor) -> Tensor:
        gate = ((m > 0) & (m + b > 0)).double()
        ctx.save_for_backward(gate)
        return m * gate

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor, Tensor]:
        (gate,) = ctx.saved_tensors
        return g[0] * gate, (g[0] * gate).sum(0)


def keep(pre: Tensor, k: int) -> Tensor:
    values, indices = pre.topk(k)
    return torch.zeros_like(pre).scatter(1, indices, values.relu())


def activate(recipe: Recipe, w: Weights, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | None]:
    """(f, the sparsity term of all tokens, second activations that must reconstruct with the decoder fixed)."""
    m = (x - w["b_dec"]) @ w["W_enc"].t()
    h = m + w["b_enc"]
    l1 = recipe.sparsity / V**0.5
    match recipe.arch:
        case "topk":
            return keep(h, recipe.k), 0.0, None
        case "batchtopk":
            return keep(h.flatten()[None], recipe.k * len(x)).view_as(h), 0.0, None
        case "relu":
            return h.relu(), l1 * h.relu().sum(), None
        case "jumprelu":
            threshold, width = w["log_threshold"].exp(), recipe.bandwidth * V**0.5
            return Jump.apply(h, threshold, width), recipe.sparsity * Window.apply(h, threshold, width).sum(), None
        case "gated":
            magnitude = (m * w["r_mag"].exp() + w["b_mag"]).relu()
            return magnitude * (h > 0), l1 * h.relu().sum(), h.relu()
        case "prolu":
            own = StraightThrough if recipe.prolu_gradient == "ste" else Both
            f = own.apply(m, w["b_enc"])
            if recipe.prolu_plain:
                f = torch.where(w["b_enc"] >= 0, h.relu(), f)
            return f, l1 * f.sum(), None


def reference(step: SparseStep, x_BD: Tensor) -> tuple[Weights, dict[str, float]]:
    """Gradients and loss parts, by autograd; the decoder's gradient projected if the recipe says so."""
    recipe = step.recipe
    w = {name: weight.detach().double().clone().requires_grad_() for name, weight in step.weights.items()}
    x = x_BD.double()
    f, sparsity, gate = activate(recipe, w, x)
    ends = recipe.prefixes or (F,)
    ys = [f[:, :end] @ w["W_dec"][:end] + w["b_dec"] for end in ends]
    parts = [(x - y).pow(2).sum() / (len(x) * V) for y in ys]
    loss = torch.stack(parts).mean() + sparsity / len(x)
    if gate is not None:
        frozen = gate @ w["W_dec"].detach() + w["b_dec"].detach()
        loss = loss + (x - frozen).pow(2).sum() / (len(x) * V)
    error = (x - ys[-1]).detach()
    dead_F = step.silent_F >= recipe.dead_after
    h = (x - w["b_dec"]) @ w["W_enc"].t() + w["b_enc"]
    if dead_F.any() and recipe.revival == "auxk":
        aux = keep(h[:, dead_F], min(recipe.k_aux, int(dead_F.sum()))) @ w["W_dec"][dead_F]
        loss = loss + recipe.aux_coefficient * (error - aux).pow(2).sum(1).mean() / total_variance(error)
    if dead_F.any() and recipe.revival == "ghost":
        ghost = h[:, dead_F].exp() @ w["W_dec"][dead_F]
        ghost = ghost * (error.norm(dim=1, keepdim=True) / (2 * ghost.norm(dim=1, keepdim=True))).detach()
        missed = (error - ghost).pow(2).sum()
        loss = loss + missed * (error.pow(2).sum() / missed).detach() / (len(x) * V)
    loss.backward()
    found = {name: weight.grad for name, weight in w.items() if weight.grad is not None}
    if recipe.project:
        unit = w["W_dec"].detach()
        found["W_dec"] -= (found["W_dec"] * unit).sum(1, keepdim=True) * unit
    return found, {"reconstruction": float(parts[-1].detach()), "sparsity": float(sparsity) / len(x)}


def started(recipe: Recipe, seed: int = 0, dead: int = 0) -> tuple[SparseStep, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(B, D, generator=generator, dtype=getattr(torch, recipe.dtype))
    step = SparseStep.begin(F, x_BD.mean(0), recipe, seed + 1, variance=V, threads=2, sample_ND=x_BD)
    step.weights["b_enc"] += 0.1 * torch.randn(F, generator=generator)
    step.weights["W_enc"] += 0.1 * torch.randn(F, D, generator=generator)
    for name in ("r_mag", "b_mag"):
        if name in step.weights:
            step.weights[name] += 0.1 * torch.randn(F, generator=generator)
    step.encoder.refresh(0, F)
    step.silent_F[3 : 3 + dead] = recipe.dead_after
    return step, x_BD


BASE = Recipe(k=4, k_aux=6, aux_coefficient=0.5, dead_after=1000, initial_l0=10, bandwidth=0.1, dtype="float64")
KINDS = {
    "topk": BASE,
    "batchtopk": replace(BASE, arch="batchtopk"),
    "relu": replace(BASE, arch="relu"),
    "jumprelu": replace(BASE, arch="jumprelu", sparsity=0.01),
    "gated": replace(BASE, arch="gated"),
    "prolu": replace(BASE, arch="prolu"),
    "prolu straight-through": replace(BASE, arch="prolu", prolu_gradient="ste"),
    "prolu plain": replace(BASE, arch="prolu", prolu_gradient="ste", prolu_plain=True),
    "topk prefixes": replace(BASE, prefixes=(8, 30, F)),
    "batchtopk prefixes": replace(BASE, arch="batchtopk", prefixes=(16, F)),
    "gated prefixes": replace(BASE, arch="gated", prefixes=(16, F)),
    "ghost": replace(BASE, revival="ghost"),
    "free decoder": replace(BASE, project=False, unit_norm=False),
}


def moments_of(step: SparseStep) -> Weights:
    return {name: moment / (1 - step.recipe.beta1) for name, moment in step.first_moments.items()}


@pytest.mark.parametrize("dead", [0, 5, 40])
@pytest.mark.parametrize("name", KINDS)
def test_the_gradients_of_every_kind_are_those_of_autograd(name: str, dead: int) -> None:
    step, x_BD = started(KINDS[name], seed=dead, dead=dead)
    expected, losses = reference(step, x_BD)
    with step:
        gradient = step.gradient(x_BD)
        norm = step.update(gradient, lr=1e-3)
    assert gradient.losses["reconstruction"] == pytest.approx(losses["reconstruction"], rel=1e-9)
    assert gradient.losses.get("sparsity", 0.0) == pytest.approx(losses["sparsity"], rel=1e-9)
    assert ("aux" in gradient.losses) == (dead > 0)
    found = moments_of(step)
    assert set(found) == set(expected) - {"threshold"}
    for weight, wanted in expected.items():
        torch.testing.assert_close(found[weight], wanted, rtol=1e-7, atol=1e-10, msg=lambda m, w=weight: f"{w}: {m}")
        torch.testing.assert_close(1000 * step.second_moments[weight], wanted**2, rtol=1e-6, atol=1e-12)
    assert norm == pytest.approx(float(torch.cat([g.flatten() for g in expected.values()]).norm()), rel=1e-7)
    if step.recipe.unit_norm:
        torch.testing.assert_close(step.weights["W_dec"].norm(dim=1), torch.ones(F, dtype=torch.float64))


@pytest.mark.parametrize("name", KINDS)
def test_float32_follows_float64(name: str) -> None:
    step, x_BD = started(replace(KINDS[name], dtype="float32"), dead=5)
    expected, _ = reference(step, x_BD)
    with step:
        step.update(step.gradient(x_BD), lr=1e-3)
    for weight, wanted in expected.items():
        torch.testing.assert_close(moments_of(step)[weight].double(), wanted, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in KINDS if "batchtopk" not in name])
def test_accumulated_gradients_are_those_of_the_big_batch(name: str) -> None:
    big, x_BD = started(KINDS[name], dead=5)
    small, _ = started(KINDS[name], dead=5)
    with big:
        norm = big.update(big.gradient(x_BD), lr=1e-3)
    with small:
        parts = [small.gradient(part_BD) for part_BD in x_BD.split(77)]
        assert small.update(parts, lr=1e-3) == pytest.approx(norm, rel=1e-9)
    for weight in big.weights:
        torch.testing.assert_close(small.weights[weight], big.weights[weight], rtol=1e-9, atol=1e-12)
    assert torch.equal(small.silent_F, big.silent_F) and torch.equal(small.fired_F, big.fired_F)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    def trained(threads: int) -> Weights:
        step, x_BD = started(replace(BASE, dtype="float32", clip=0.01), dead=9)
        step.threads = threads
        with step:
            for _ in range(3):
                step.update(step.gradient(x_BD), lr=1e-2)
        return step.state()

    one, other = trained(2), trained(threads)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_clipping_shortens_the_gradient_and_nothing_else() -> None:
    free, x_BD = started(BASE)
    held, _ = started(replace(BASE, clip=1e-3))
    with free, held:
        norm = free.update(free.gradient(x_BD), lr=1e-3)
        assert held.update(held.gradient(x_BD), lr=1e-3) == pytest.approx(norm) and norm > 1e-3
    for name, moment in free.first_moments.items():
        torch.testing.assert_close(held.first_moments[name], moment * 1e-3 / norm)


def test_biases_that_are_off_stay_where_they_are() -> None:
    step, x_BD = started(replace(BASE, learn_b_enc=False, learn_b_dec=False))
    before = {name: step.weights[name].clone() for name in ("b_enc", "b_dec")}
    with step:
        step.update(step.gradient(x_BD), lr=1e-2)
    assert all(torch.equal(step.weights[name], held) for name, held in before.items())


def test_the_running_mean_of_the_weights_is_what_is_kept() -> None:
    step, x_BD = started(replace(BASE, ema=0.3))
    wanted = {name: weight.clone() for name, weight in step.mean_weights.items()}
    with step:
        for decay in (1 / 10, 2 / 11, 3 / 12, 0.3, 0.3):  # short at first: the start is not part of the mean for long
            step.update(step.gradient(x_BD), lr=1e-2)
            wanted = {name: decay * mean + (1 - decay) * step.weights[name] for name, mean in wanted.items()}
    wanted["W_dec"] = torch.nn.functional.normalize(wanted["W_dec"], dim=1)
    for name, mean in step.final_weights().items():
        torch.testing.assert_close(mean, wanted[name])


def test_orthogonal_directions_are_and_untied_ones_differ() -> None:
    recipe = replace(BASE, directions="orthogonal", tied_start=False)
    step = SparseStep.begin(F, torch.zeros(D), recipe, 3, variance=V)
    block_DD = step.weights["W_dec"][D : 2 * D]
    torch.testing.assert_close(block_DD @ block_DD.t(), torch.eye(D, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert not torch.equal(step.weights["W_enc"], step.weights["W_dec"])


def known_dictionary(atoms: int, d: int, active: int, rows: int) -> tuple[Tensor, Tensor]:
    """(unit directions, rows): each row a sum of `active` directions with noise, centred, of total variance `d`."""
    generator = torch.Generator().manual_seed(123)
    atoms_FD = torch.nn.functional.normalize(torch.randn(atoms, d, generator=generator), dim=1)
    chosen = torch.rand(rows, atoms, generator=generator).topk(active, 1).indices
    strengths = 1 + torch.rand(rows, active, generator=generator)
    x_BD = torch.nn.functional.embedding_bag(chosen, atoms_FD, per_sample_weights=strengths, mode="sum")
    x_BD += 0.05 * torch.randn(rows, d, generator=generator)
    x_BD -= x_BD.mean(0)
    return atoms_FD, x_BD * (d / total_variance(x_BD)).sqrt()


def trained(recipe: Recipe, latents: int, x_BD: Tensor, steps: int, batch: int, lr: float) -> tuple[SparseStep, Any]:
    """A step after so many of them, and the gradients of the first and the last."""
    step = SparseStep.begin(
        latents, x_BD.mean(0), recipe, 0, variance=float(total_variance(x_BD)), threads=2, sample_ND=x_BD[:4096]
    )
    seen = []
    with step:
        for number in range(steps):
            start = number * batch % (len(x_BD) - batch)
            gradient = step.gradient(x_BD[start : start + batch])
            step.update(gradient, lr * min(1.0, (number + 1) / 20, (steps - number) / (0.3 * steps)))
            seen = [seen[0] if seen else gradient, gradient]
    return step, seen


def test_topk_finds_the_directions_that_the_data_were_made_of() -> None:
    atoms_FD, x_BD = known_dictionary(512, 64, 3, 60_000)
    recipe = Recipe(k=3, k_aux=32, dead_after=20_000)
    step, _ = trained(recipe, 1024, x_BD, steps=600, batch=1024, lr=6e-3)
    best_F = (atoms_FD @ step.weights["W_dec"].t()).max(1).values
    assert float((best_F > 0.95).float().mean()) >= 0.95


@pytest.mark.parametrize("name", [name for name in KINDS if name != "free decoder"])
def test_every_kind_learns(name: str) -> None:
    _, x_BD = known_dictionary(64, D, 2, 8192)
    recipe = replace(KINDS[name], k=2, l0_target=3.0, initial_l0=6.0, dtype="float32", aux_coefficient=1 / 32)
    _, (first, last) = trained(recipe, F, x_BD, steps=300, batch=256, lr=5e-3)
    assert last.losses["reconstruction"] < 0.7 * first.losses["reconstruction"]
    assert 1 < last.active / 256 < F / 6


@pytest.mark.parametrize("arch", ["relu", "gated"])
def test_the_coefficient_is_steered_to_the_l0_asked_for(arch: Arch) -> None:
    _, x_BD = known_dictionary(64, D, 2, 8192)
    recipe = Recipe(arch=arch, l0_target=4.0, initial_l0=8.0, dead_after=20_000)
    step, _ = trained(recipe, F, x_BD, steps=1000, batch=256, lr=3e-3)
    with step:
        assert step.gradient(x_BD).active / len(x_BD) == pytest.approx(4, rel=0.1)


def test_batchtopk_learns_its_threshold_and_finds_the_same_pairs_from_any_guess() -> None:
    step, x_BD = started(KINDS["batchtopk"])

    def pairs(guess: float | None) -> list[int]:
        step.objective.guess = guess  # type: ignore[attr-defined]
        gradient = step.gradient(x_BD)
        assert gradient.active == step.recipe.k * B
        keys: list[int] = sorted((gradient.by_latent.token_P.long() * F + gradient.by_latent.latent_P).tolist())
        return keys

    with step:
        found = pairs(None)
        assert found == pairs(0.0) == pairs(100.0)
        smallest = float(step.gradient(x_BD).f_P.min())
        step.update(step.gradient(x_BD), lr=1e-3)
    assert step.weights["threshold"].tolist() == pytest.approx([smallest] * F)


def test_resampled_latents_start_at_rows_that_are_badly_reconstructed() -> None:
    step, x_BD = started(replace(BASE, revival="resample"), dead=7)
    with step:
        step.update(step.gradient(x_BD), lr=1e-3)
        step.silent_F[3:10] = step.recipe.dead_after
        kept = step.weights["W_dec"][10:].clone()
        assert step.resample(x_BD, seed=5) == 7
    rows_BD = torch.nn.functional.normalize(x_BD - step.weights["b_dec"], dim=1)
    assert (step.weights["W_dec"][3:10] @ rows_BD.t()).max(1).values.min() > 1 - 1e-9
    assert torch.equal(step.weights["W_dec"][10:], kept) and int(step.silent_F.max()) < step.recipe.dead_after
    for name in ("W_enc", "W_dec", "b_enc"):
        assert not step.first_moments[name][3:10].any() and not step.second_moments[name][3:10].any()


def test_a_loss_that_is_no_number_is_one_sentence() -> None:
    step, x_BD = started(BASE)
    x_BD[5, 3] = torch.nan
    with step, pytest.raises(TrainError, match="no longer a number"):
        step.gradient(x_BD)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arch": "sigmoid"}, "arch is 'sigmoid'"),
        ({"k": 97}, "k is 97"),
        ({"prefixes": (8, 4, 96)}, "prefixes are"),
        ({"prefixes": (8, 90)}, "prefixes are"),
        ({"arch": "relu", "unit_norm": False}, "relu needs decoder rows of length 1"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
        ({"bandwidth": 0.0}, "bandwidth is 0.0"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
    ],
)
def test_a_recipe_that_cannot_be_is_one_sentence(change: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainError, match=words):
        replace(BASE, **change).check(F)
