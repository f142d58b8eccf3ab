"""Every Triton kernel against the plain PyTorch function of the same name, and whether NVIDIA's assembler takes it.

The plain functions run on the CPU, the kernels on a CUDA device where there is one, else on CPU tensors in Triton's
interpreter: `TRITON_INTERPRET=1 pytest tests/sae/test_triton.py`. The interpreter (Triton 3.9) multiplies the bits of
bfloat16 operands as whole numbers, so there the screen holds bfloat16 numbers in float32. The compiler needs no device.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sae import kernels
from sae.losses import normalise_rows_, project_gradient_

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None
installed = pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
on_a_gpu = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device, or TRITON_INTERPRET"
)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not 1")
DEVICES = [
    pytest.param("cpu", marks=[installed, interpreted]),
    pytest.param("cuda", marks=[installed, on_a_gpu, pytest.mark.gpu]),
]


@pytest.fixture
def ours() -> ModuleType:
    return importlib.import_module("sae.triton_kernels")


class Draw:
    """Random tensors of a case, on the CPU; B tokens, F latents, D width, K kept."""

    def __init__(self, B: int, F: int, D: int, K: int):
        self.generator = torch.Generator().manual_seed(B + F + D + K)
        self.B, self.F, self.D, self.K = B, F, D, K

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def whole(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """(latent, token) of pairs sorted by token; tokens at both ends and in between, and half of the latents, have
        none, and one latent has a fifth of all pairs."""
        token_P = torch.arange(1, self.B - 1).repeat_interleave(torch.arange(1, self.B - 1) % 4 * self.K)
        latent_P = self.whole((self.F + 1) // 2, len(token_P)) * 2
        latent_P[::5] = 0
        return latent_P, token_P


def decode(draw: Draw) -> list[Tensor]:
    return [draw.whole(draw.F, draw.B, draw.K), draw.normal(draw.B, draw.K), draw.normal(draw.F, draw.D)]


def decode_ragged(draw: Draw) -> list[Tensor]:
    latent_P, token_P = draw.pairs()
    starts_B = torch.searchsorted(token_P, torch.arange(draw.B))
    return [latent_P, draw.normal(len(token_P)), starts_B, draw.normal(draw.F, draw.D)]


def decode_nothing(draw: Draw) -> list[Tensor]:
    none = torch.zeros(0, dtype=torch.int64)
    return [none, none.float(), torch.zeros(draw.B, dtype=torch.int64), draw.normal(draw.F, draw.D)]


def dots(draw: Draw) -> list[Tensor]:
    return [draw.normal(draw.B, draw.D), draw.normal(draw.F, draw.D), draw.whole(draw.F, draw.B, draw.K)]


def dots_ragged(draw: Draw) -> list[Tensor]:
    return [draw.normal(draw.B, draw.D), draw.normal(draw.F, draw.D), *draw.pairs()]


CASES = [
    ("decode_sparse", decode),
    ("decode_pairs", decode_ragged),
    ("decode_pairs", decode_nothing),
    ("gather_dot", dots),
    ("dot_pairs", dots_ragged),
]
SIZES = [(3, 16, 16, 1), (20, 45, 70, 3), (131, 300, 33, 5), (6, 37, 520, 17)]
"""B, F, D, K: one block, parts of a block, more than one block of each"""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_product_equals_the_plain_one(
    ours: ModuleType, name: str, case: Callable[[Draw], list[Tensor]], sizes: tuple[int, ...], device: str
) -> None:
    args = case(Draw(*sizes))
    found, expected = getattr(ours, name)(*(arg.to(device) for arg in args)), getattr(kernels, name)(*args)
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", SIZES)
def test_weight_gradients_equal_the_plain_ones(ours: ModuleType, sizes: tuple[int, ...], device: str) -> None:
    """Range by range, on top of what is there, as the optimiser asks for it."""
    draw = Draw(*sizes)
    latent_P, token_P = draw.pairs()
    pairs, size = kernels.TokensByLatent(latent_P, token_P, draw.F), draw.F // 3
    values_P, dense_BD, expected_FD = (
        draw.normal(len(token_P)),
        draw.normal(draw.B, draw.D),
        draw.normal(draw.F, draw.D),
    )
    starts_F1 = torch.searchsorted(pairs.latent_P, torch.arange(draw.F + 1).int()).int().to(device)
    found_FD, edges = expected_FD.clone().to(device), pairs.edges(size)
    for number, first in enumerate(range(0, draw.F, size)):
        out, (low, high) = slice(first, first + size), edges[number : number + 2]
        pairs.add_product(values_P, dense_BD, first, expected_FD[out], low, high, pairs.token_P)
        there = values_P.to(device), dense_BD.to(device), first, found_FD[out], pairs.token_P.to(device)
        ours.add_product(starts_F1, *there)
    torch.testing.assert_close(found_FD.cpu(), expected_FD, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", SIZES)
def test_group_maxima_are_those_of_the_whole_product(ours: ModuleType, sizes: tuple[int, ...], device: str) -> None:
    draw = Draw(*sizes)
    x_BD, W_FD, b_F = draw.normal(draw.B, draw.D), draw.normal(draw.F, draw.D), draw.normal(draw.F)
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    x_BD, W_FD = x_BD.bfloat16().to(dtype), W_FD.bfloat16().to(dtype)
    found_BG = ours.group_maxima(x_BD.to(device), W_FD.to(device), b_F.to(device))
    pre_BF = (x_BD.double() @ W_FD.double().t() + b_F).float()
    padded = torch.nn.functional.pad(pre_BF, (0, -draw.F % ours.GROUP), value=-torch.inf)
    expected_BG = padded.unflatten(1, (-1, ours.GROUP)).amax(2)
    torch.testing.assert_close(found_BG.cpu(), expected_BG, rtol=2e-5, atol=2e-5)


def loud(W_FD: Tensor, b_F: Tensor) -> None:
    """Latents so loud that all tokens choose their groups: more pairs of a group than a tile holds."""
    b_F[:: max(16, len(b_F) // 3)] = 100


def tied(W_FD: Tensor, b_F: Tensor) -> None:
    """Few different pre-activations, spread over all groups."""
    W_FD.copy_(W_FD[:3].repeat(len(W_FD) // 3 + 1, 1)[: len(W_FD)])
    b_F.zero_()


def silent(W_FD: Tensor, b_F: Tensor) -> None:
    """Nothing but zeros and what lies below."""
    W_FD.zero_()
    b_F.clamp_(max=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("change", [None, loud, tied, silent])
@pytest.mark.parametrize(
    ("sizes", "margin"),
    [((3, 16, 16, 1), 8), ((20, 45, 70, 45), 0), ((131, 700, 33, 5), 8), ((5, 515, 129, 20), 9), ((4, 400, 64, 3), 6)],
)
def test_encoder_keeps_the_largest_of_float32(
    ours: ModuleType, sizes: tuple[int, ...], margin: int, change: Callable[[Tensor, Tensor], None] | None, device: str
) -> None:
    draw = Draw(*sizes)
    x_BD, W_FD, b_F = draw.normal(draw.B, draw.D), draw.normal(draw.F, draw.D), draw.normal(draw.F)
    if change:
        change(W_FD, b_F)
    there = x_BD.to(device), W_FD.to(device), b_F.to(device)
    screen_FD = there[1].bfloat16().float() if INTERPRETED else None
    indices_BK, values_BK = ours.encode_topk(*there, draw.K, screen_FD=screen_FD, margin=margin)
    indices_BK, values_BK = indices_BK.cpu(), values_BK.cpu()
    pre_BF = (x_BD.double() @ W_FD.double().t() + b_F).float()
    assert indices_BK.dtype == torch.int64 and indices_BK.shape == values_BK.shape == (draw.B, draw.K)
    assert all(len(set(row)) == draw.K for row in indices_BK.tolist())
    torch.testing.assert_close(values_BK, pre_BF.gather(1, indices_BK), rtol=2e-5, atol=2e-5)
    best_BK = pre_BF.topk(draw.K).values
    torch.testing.assert_close(values_BK.sort(1, descending=True).values, best_BK, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("project", "unit_norm"), [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize(("width", "weight_decay"), [(16, 0.0), (70, 0.1)])
def test_adam_equals_projection_fused_adam_and_renormalisation(
    ours: ModuleType, width: int, weight_decay: float, project: bool, unit_norm: bool, device: str
) -> None:
    draw = Draw(9, 9, width, 1)
    start_RD = normalise_rows_(draw.normal(9, width))
    settings = {"lr": 3e-3, "beta1": 0.85, "beta2": 0.9999, "eps": 6.25e-10, "weight_decay": weight_decay}
    expected, updates = [start_RD.clone(), torch.zeros_like(start_RD), torch.zeros_like(start_RD)], torch.zeros(())
    found = [tensor.clone().to(device) for tensor in expected]
    screen_RD = torch.zeros_like(found[0], dtype=torch.bfloat16) if project else None
    switches = {"project": project, "unit_norm": unit_norm, "screen_RD": screen_RD}
    for step in range(1, 4):
        gradient_RD = draw.normal(9, width) * 1e-4
        gradient_RD[2] = 0
        there = gradient_RD.to(device, copy=True)
        ours.adam_rows_(found[0], there, *found[1:], step=step, **settings, **switches)
        assert torch.equal(there.cpu(), gradient_RD)
        if project:
            project_gradient_(gradient_RD, expected[0])
        weights, first, second = ([tensor] for tensor in expected)
        torch._fused_adamw_(
            weights, [gradient_RD], first, second, [], [updates.add_(1)], amsgrad=False, maximize=False, **settings
        )
        if unit_norm:
            normalise_rows_(expected[0])
    torch.testing.assert_close(found[0].cpu(), expected[0], rtol=0, atol=1e-6)
    assert not torch.allclose(expected[0], start_RD, atol=1e-4)
    for own, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(own.cpu(), other, rtol=1e-5, atol=float(other.abs().max()) * 1e-6)
    if screen_RD is not None:
        # The interpreter cuts the digits off; the card rounds to the nearest.
        torch.testing.assert_close(screen_RD.float(), found[0], rtol=2**-7 if INTERPRETED else 2**-8, atol=0)


COMPILE = """
import torch, triton, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sae import triton_kernels as ours

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}
TYPES |= {int: "i32", float: "fp32"}

class Recorder:  # stands for a kernel: what it is launched with is compiled, for cards that need not be there
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        return self.compile
    def compile(self, *args, **named):
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        types = {name: TYPES[getattr(arg, "dtype", type(arg))] for name, arg in zip(self.kernel.arg_names, args)}
        signature = {name: types.get(name, "constexpr") for name in self.kernel.arg_names}
        whole = lambda arg: isinstance(arg, int) and arg % 16 == 0
        full = [i for i, arg in enumerate(args) if torch.is_tensor(arg) or whole(arg)]
        source = ASTSource(self.kernel, signature, named, {(i,): [["tt.divisibility", 16]] for i in full})
        # 80 stands for 86 and 89 too, whose blocks have 99 KB: their code is the same.
        for arch, most in {80: 99, 90: 227}.items():
            made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            assert made.metadata.shared <= most * 1024, (made.metadata.name, arch, made.metadata.shared)
            tensor_cores = {80: "mma.sync", 90: "wgmma.mma_async"}[arch]
            assert made.metadata.name != "_maxima_kernel" or tensor_cores in made.asm["ptx"], arch
            print(made.metadata.name, arch, len(made.asm["cubin"]) > 0)

for name in [name for name in vars(ours) if name.endswith("_kernel")]:
    setattr(ours, name, Recorder(getattr(ours, name)))
x, W, b, latents = torch.zeros(8, 4096), torch.zeros(512, 4096), torch.zeros(512), torch.zeros(8, 4, dtype=torch.int64)
ours.encode_topk(x, W, b, 4)
ours.decode_sparse(latents, torch.zeros(8, 4), W)
ours.gather_dot(x, W, latents)
ours.add_product(torch.zeros(513).int(), torch.zeros(32), x, 0, W, torch.zeros(32).int())
options = dict(step=1, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-9, project=True, unit_norm=True)
ours.adam_rows_(W, W, W, W, screen_RD=W.bfloat16(), **options)
"""


@installed
def test_every_kernel_compiles_for_ampere_and_hopper(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=Path(__file__).parents[2],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    lines = set(ran.stdout.splitlines())
    assert len(lines) == 2 * 5 and all(line.endswith("True") for line in lines), ran.stdout
