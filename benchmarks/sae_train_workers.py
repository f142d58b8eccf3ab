"""What the processes of `sae_train.py` do: each holds one implementation and answers a JSON line with another.

A peer's process runs in an environment that has nothing of ours, so nothing of ours is imported before it is needed.
Every implementation starts from the same directions and reads the same batches from a file, outside the clock. FVU is
computed by one function here from the weights as they are, on rows that nobody trains on.

Shapes: B tokens of a batch, N rows held out, D width, F latents, K kept latents.
"""

import argparse
import ctypes
import gc
import importlib
import json
import os
import sys
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

SEED = 5
HELD_OUT = 512
"""Rows at the start of the file of activations, for FVU."""
EPS = 6.25e-10
"""Adam's, of ours and of the dense reference; peers keep theirs."""
AUX = 1 / 32
"""Weight of AuxK wherever a weight can be given."""


@dataclass(frozen=True)
class Setup:
    """One size and what every implementation is told about it."""

    width: int
    latents: int
    k: int
    batch: int
    threads: int
    auxk: bool

    @property
    def lr(self) -> float:
        """The published law for Adam, by the number of latents."""
        return float(2e-4 / (self.latents / 2**14) ** 0.5)

    @property
    def variance(self) -> float:
        """The activations are scaled to this total variance."""
        return float(self.width)

    @property
    def dead_after(self) -> int:
        """Tokens without activity after which AuxK calls a latent dead: two batches, so that a short run has many."""
        return 2 * self.batch


@dataclass(frozen=True)
class Weights:
    """An SAE's weights as views; where `norm_F` is given, activations are those of decoder rows of length 1."""

    enc_FD: Tensor
    dec_FD: Tensor
    b_enc_F: Tensor
    b_dec_D: Tensor
    norm_F: Tensor | None = None

    @torch.no_grad()
    def fvu(self, x_ND: Tensor, k: int) -> float:
        """Fraction of variance unexplained of a TopK SAE, in float32."""
        pre_NF = functional.linear(x_ND - self.b_dec_D, self.enc_FD, self.b_enc_F)
        values_NK, indices_NK = (pre_NF if self.norm_F is None else pre_NF * self.norm_F).topk(k)
        values_NK = values_NK.relu()
        if self.norm_F is not None:
            values_NK /= self.norm_F[indices_NK]
        y_ND = torch.stack([v @ self.dec_FD[i] for v, i in zip(values_NK, indices_NK, strict=True)]) + self.b_dec_D
        return float((x_ND - y_ND).pow(2).sum() / (x_ND - x_ND.mean(0)).pow(2).sum())


class Trainer(Protocol):
    def step(self, x_BD: Tensor) -> None: ...

    def weights(self) -> Weights: ...


# -- implementations --------------------------------------------------------------------------------------------------


def sparse_step(setup: Setup, mean_D: Tensor) -> Any:
    """Our training step, at its start."""
    from train.recipe import Recipe
    from train.step import SparseStep

    recipe = Recipe(k=setup.k, revival="auxk" if setup.auxk else "none", aux_coefficient=AUX,
                    dead_after=setup.dead_after, eps=EPS)  # fmt: skip
    return SparseStep.begin(setup.latents, mean_D, recipe, SEED, variance=setup.variance, threads=setup.threads)


class Ours:
    def __init__(self, setup: Setup, start_FD: Tensor, mean_D: Tensor):
        self.lr, self.state = setup.lr, sparse_step(setup, mean_D)
        assert torch.equal(self.state.weights["W_dec"], start_FD), "the start is another than the peers'"
        self.state.__enter__()

    def step(self, x_BD: Tensor) -> None:
        self.state.update(self.state.gradient(x_BD), self.lr)

    def weights(self) -> Weights:
        return Weights(*(self.state.weights[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")))


class Dense:
    """The same loss and optimiser by autograd through dense products."""

    def __init__(self, setup: Setup, start_FD: Tensor, mean_D: Tensor, bf16: bool = False):
        self.setup, self.bf16 = setup, bf16
        starts = (start_FD.clone(), start_FD.clone(), torch.zeros(setup.latents), mean_D.clone())
        self.parameters = [torch.nn.Parameter(start) for start in starts]
        self.adam = torch.optim.Adam(self.parameters, lr=setup.lr, eps=EPS)
        self.silent_F = torch.zeros(setup.latents, dtype=torch.int64)

    def step(self, x_BD: Tensor) -> None:
        enc_FD, dec_FD, b_enc_F, b_dec_D = self.parameters
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            pre_BF = functional.linear(x_BD - b_dec_D, enc_FD, b_enc_F)
            values_BK, kept_BK = pre_BF.topk(self.setup.k, sorted=False)
            y_BD = torch.zeros_like(pre_BF).scatter(1, kept_BK, values_BK.relu()) @ dec_FD + b_dec_D
        error_BD = x_BD - y_BD.float()
        loss = error_BD.pow(2).sum(1).mean() / self.setup.variance
        if self.setup.auxk:
            loss = loss + AUX * self._auxk(pre_BF, error_BD.detach())
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        with torch.no_grad():
            assert dec_FD.grad is not None
            dec_FD.grad.sub_((dec_FD.grad * dec_FD).sum(1, keepdim=True) * dec_FD)
            self.adam.step()
            self.adam.zero_grad()
            dec_FD.div_(dec_FD.norm(dim=1, keepdim=True))
            self.silent_F += len(x_BD)
            self.silent_F[kept_BK[values_BK > 0]] = 0

    def _auxk(self, pre_BF: Tensor, error_BD: Tensor) -> Tensor:
        """The dead latents' reconstruction of what the live ones missed, as a share of its variance."""
        dead_F = self.silent_F >= self.setup.dead_after
        k_aux = min(self.setup.width // 2, int(dead_F.sum()))
        if not k_aux:
            return torch.zeros(())
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            values_BK, kept_BK = pre_BF.masked_fill(~dead_F, -torch.inf).topk(k_aux, sorted=False)
            y_BD = torch.zeros_like(pre_BF).scatter(1, kept_BK, values_BK.relu()) @ self.parameters[1]
        return (error_BD - y_BD.float()).pow(2).sum(1).mean() / (error_BD - error_BD.mean(0)).pow(2).sum(1).mean()

    def weights(self) -> Weights:
        return Weights(*self.parameters)


class Sparsify:
    """What `sparsify.Trainer.fit` does with one batch, with Adam; it cannot be given activations."""

    def __init__(self, setup: Setup, start_FD: Tensor, mean_D: Tensor):
        config = importlib.import_module("sparsify.config").SparseCoderConfig(num_latents=setup.latents, k=setup.k)
        self.sae = importlib.import_module("sparsify.sparse_coder").SparseCoder(setup.width, config)
        copy({"encoder.weight": start_FD, "W_dec": start_FD, "b_dec": mean_D}, self.sae)
        torch.set_float32_matmul_precision("high")  # as `fit` does
        self.adam = torch.optim.Adam(self.sae.parameters(), lr=setup.lr)
        self.silent_F, self.fired_F = torch.zeros(2, setup.latents, dtype=torch.int64)
        self.alpha, self.dead_after = AUX * setup.auxk, setup.dead_after

    def step(self, x_BD: Tensor) -> None:
        self.sae.set_decoder_norm_to_unit_norm()
        dead_F = self.silent_F >= self.dead_after if self.alpha else None
        variance = (x_BD - x_BD.mean(0)).pow(2).sum()
        out = self.sae(x=x_BD, y=x_BD, dead_mask=dead_F, total_variance=variance)
        self.fired_F[out.latent_indices.flatten()] = 1
        float(out.fvu.detach())  # for its log
        (out.fvu + self.alpha * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.adam.step()
        self.adam.zero_grad()
        with torch.no_grad():
            self.silent_F.add_(len(x_BD))[self.fired_F.bool()] = 0
            self.fired_F.zero_()

    def weights(self) -> Weights:
        self.sae.set_decoder_norm_to_unit_norm()
        return Weights(self.sae.encoder.weight, self.sae.W_dec, self.sae.encoder.bias, self.sae.b_dec)


class SAELens:
    """`SAETrainer.step`; its sparse activations cannot be rescaled by the decoder's norms."""

    def __init__(self, setup: Setup, start_FD: Tensor, mean_D: Tensor, sparse: bool = False, bf16: bool = False):
        topk = importlib.import_module("sae_lens.saes.topk_sae")
        config = importlib.import_module("sae_lens.config").SAETrainerConfig(
            total_training_samples=10**9, train_batch_size_samples=setup.batch, lr=setup.lr, lr_end=setup.lr / 10,
            device="cpu", autocast=bf16, dead_feature_window=1 if setup.auxk else 1000,
        )  # fmt: skip
        self.sae = topk.TopKTrainingSAE(topk.TopKTrainingSAEConfig(
            d_in=setup.width, d_sae=setup.latents, k=setup.k, device="cpu", apply_b_dec_to_input=True,
            use_sparse_activations=sparse, rescale_acts_by_decoder_norm=not sparse,
            aux_loss_coefficient=AUX * setup.auxk,
        ))  # fmt: skip
        copy({"W_enc": start_FD.T, "W_dec": start_FD, "b_dec": mean_D}, self.sae)
        trainer = importlib.import_module("sae_lens.training.sae_trainer").SAETrainer
        self.trainer, self.rescaled = trainer(config, self.sae, data_provider=iter(())), not sparse

    def step(self, x_BD: Tensor) -> None:
        self.trainer.step(x_BD)
        self.trainer.n_training_steps += 1

    def weights(self) -> Weights:
        norm_F = self.sae.W_dec.detach().norm(dim=1) if self.rescaled else None
        return Weights(self.sae.W_enc.T, self.sae.W_dec, self.sae.b_enc, self.sae.b_dec, norm_F)


class DictionaryLearning:
    """`TopKTrainer.update`, from its second step on: in the first it would look for a start of the bias."""

    def __init__(self, setup: Setup, start_FD: Tensor, mean_D: Tensor):
        self.trainer = importlib.import_module("dictionary_learning.trainers.top_k").TopKTrainer(
            steps=10**6, activation_dim=setup.width, dict_size=setup.latents, k=setup.k, layer=0, lm_name="",
            lr=setup.lr, auxk_alpha=AUX * setup.auxk, warmup_steps=0, seed=SEED, device="cpu",
        )  # fmt: skip
        self.trainer.dead_feature_threshold = setup.dead_after
        copy({"encoder.weight": start_FD, "decoder.weight": start_FD.T, "b_dec": mean_D}, self.trainer.ae)
        self.steps = 0

    def step(self, x_BD: Tensor) -> None:
        self.steps += 1
        self.trainer.update(self.steps, x_BD)

    def weights(self) -> Weights:
        sae = self.trainer.ae
        return Weights(sae.encoder.weight, sae.decoder.weight.T, sae.encoder.bias, sae.b_dec)


def copy(start: dict[str, Tensor], module: torch.nn.Module) -> None:
    """Gives a peer's module the common start; biases of its encoder become 0."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start.get(name, torch.zeros(())))
    assert start.keys() <= parameters.keys()


IMPLEMENTATIONS: dict[str, tuple[Callable[[Setup, Tensor, Tensor], Trainer], tuple[str, ...]]] = {
    "ours": (Ours, ("train.recipe", "train.step")),
    "dense": (Dense, ()),
    "dense-bf16": (partial(Dense, bf16=True), ()),
    "sparsify": (Sparsify, ("sparsify.config", "sparsify.sparse_coder")),
    "sae-lens": (SAELens, ("sae_lens.saes.topk_sae", "sae_lens.training.sae_trainer")),
    "sae-lens-sparse": (partial(SAELens, sparse=True), ("sae_lens.training.sae_trainer",)),
    "sae-lens-bf16": (partial(SAELens, bf16=True), ("sae_lens.training.sae_trainer",)),
    "dictionary-learning": (DictionaryLearning, ("dictionary_learning.trainers.top_k",)),
}


# -- data and machine -------------------------------------------------------------------------------------------------


def read(file: Any, into: Tensor) -> Tensor:
    """Fills a tensor from a file; a mapped file would count as the process's memory."""
    data = (ctypes.c_char * into.nbytes).from_address(into.data_ptr())
    assert file.readinto(data) == into.nbytes, "the file has ended"
    return into


def write(file: Any, tensor: Tensor) -> None:
    file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


def prepare(setup: Setup, folder: Path, batches: int) -> None:
    """Writes activations, their mean and the common start.

    Each token is a sum of 16 of 4 D unit directions, the i-th drawn with a weight of 1 / (i + 10), with strengths from
    half up, beside noise and a mean; scaled to a total variance of D.
    """
    dice = torch.Generator().manual_seed(SEED)
    directions_MD = functional.normalize(torch.randn(4 * setup.width, setup.width, generator=dice), dim=1)
    weights_M = 1 / (torch.arange(4 * setup.width) + 10.0)
    offset_D = 0.2 * torch.randn(setup.width, generator=dice)

    def draw(rows: int) -> Tensor:
        chosen = torch.multinomial(weights_M, rows * 16, replacement=True, generator=dice).view(rows, 16)
        strength = 0.5 + torch.empty(rows, 16).exponential_(generator=dice)
        x_BD = functional.embedding_bag(chosen, directions_MD, per_sample_weights=strength, mode="sum")
        return x_BD.add_(torch.randn(rows, setup.width, generator=dice), alpha=0.03).add_(offset_D)

    first_ND = draw(4096)
    scale = float((setup.variance / first_ND.var(0, correction=0).sum()).sqrt())
    with (folder / "activations").open("wb") as file:
        for rows in (HELD_OUT, *[setup.batch] * batches):
            write(file, draw(rows).mul_(scale))
    mean_D = first_ND.mean(0).mul_(scale)
    with (folder / "start").open("wb") as file:
        write(file, mean_D)
        write(file, sparse_step(setup, mean_D).weights["W_dec"].contiguous())


def rates(setup: Setup) -> dict[str, float]:
    """GFLOP/s of products shaped as the encoder's, and GB/s of a copy, bytes read and written together."""

    def best(work: Callable[[], object]) -> float:
        times: list[float] = []
        while len(times) < 4 or (sum(times) < 0.3 and len(times) < 1000):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return min(times)

    rows, latents, found = min(setup.batch, 1024), min(setup.latents, 4096), {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = torch.ones(rows, setup.width, dtype=dtype), torch.ones(latents, setup.width, dtype=dtype)
        out = torch.empty(rows, latents, dtype=dtype)
        work = 2 * rows * latents * setup.width
        found[name] = work / best(lambda a=a, b=b, out=out: torch.mm(a, b.t(), out=out)) / 1e9  # type: ignore[misc]
    source, target = torch.ones(2, 2**25)
    found["copy"] = 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9
    return found


class Memory:
    """The process's high-water mark of resident memory above what it had when this was made."""

    def __init__(self) -> None:
        self.before = self._read("VmRSS")

    def reset(self) -> None:
        """Forgets what setting up took."""
        gc.collect()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            print("the high-water mark of memory cannot be reset: set-up is in it", file=sys.stderr)

    def peak_gb(self) -> float:
        return round((self._read("VmHWM") - self.before) / 2**20, 3)

    @staticmethod
    def _read(key: str) -> int:
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return next((int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def others() -> float:
    """Seconds of CPU that all other processes have had so far, or 0 where the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _wait, *interrupts = map(int, stat.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - time.process_time()


def work(name: str, setup: Setup, folder: Path, versions: list[str], answers: Any) -> None:
    """Answer one JSON line with another until the input ends."""
    build, modules = IMPLEMENTATIONS[name]
    if name == "dictionary-learning":  # its package imports nnsight for a buffer that is not used here
        sys.modules["nnsight"] = types.ModuleType("nnsight")
        sys.modules["nnsight"].LanguageModel = object  # type: ignore[attr-defined]  # a stub
    for module in modules:
        importlib.import_module(module)
    memory = Memory()
    with (folder / "start").open("rb") as file:
        mean_D, start_FD = read(file, torch.empty(setup.width)), torch.empty(setup.latents, setup.width)
        trainer = build(setup, read(file, start_FD), mean_D)
    del start_FD
    with (folder / "activations").open("rb") as file:
        held_out_ND = read(file, torch.empty(HELD_OUT, setup.width))
        x_BD = torch.empty(setup.batch, setup.width)
        memory.reset()
        version = importlib.import_module("importlib.metadata").version
        answer: Any = {package: version(package) for package in ("torch", *versions)}
        while True:
            print(json.dumps(answer), file=answers, flush=True)
            line = sys.stdin.readline()
            if not line:
                return
            order = json.loads(line)
            if order["do"] == "steps":
                seconds, born, elsewhere = 0.0, time.perf_counter(), others()
                for _ in range(order["count"]):
                    read(file, x_BD)
                    began = time.perf_counter()
                    trainer.step(x_BD)
                    seconds += time.perf_counter() - began
                elsewhere = (others() - elsewhere) / (time.perf_counter() - born)
                answer = [seconds, max(0.0, elsewhere)]
            elif order["do"] == "fvu":
                answer = trainer.weights().fvu(held_out_ND, setup.k)
            elif order["do"] == "peak":
                answer = memory.peak_gb()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One implementation of sae_train.py")
    parser.add_argument("name", help="an implementation, or prepare, or rates")
    parser.add_argument("--setup", type=json.loads, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=0)
    parser.add_argument("--versions", nargs="*", default=[])
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a peer prints is not an answer
    chosen = Setup(**given.setup)
    torch.set_num_threads(chosen.threads)
    if given.name == "prepare":
        prepare(chosen, given.folder, given.batches)
    elif given.name == "rates":
        print(json.dumps(rates(chosen)), file=answers)
    else:
        work(given.name, chosen, given.folder, given.versions, answers)
