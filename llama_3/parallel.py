"""One model over the processes that torchrun started on this machine, for models larger than one card.

Each process (rank) holds a share of every block: some heads and some columns of the feed-forward, read straight from
the checkpoint. Its `Transformer` is a plain one of a smaller config, so the cache of keys and values is its own heads'
and nothing else in the model knows of ranks. Two sums a block (after the two matrices that write to the residual
stream) and one gathering of the logits are all they exchange: the residual stream is whole and equal on every rank, so
hooks there see and do what they would in one process, on every rank alike.

The exchanges are parallel styles of our own on plain tensors: torch's `RowwiseParallel`, whose DTensors find out anew
at every step what is known here, costs a block of one token 1.1 ms on the host, these 0.3.
Paper: Megatron-LM (1909.08053).
"""

import atexit
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama_3.checkpoint import Checkpoint, open_checkpoint, parameter_sources, tensor_shapes, weights_dtype
from llama_3.config import ModelConfig
from llama_3.errors import config_error
from llama_3.hooks import HookPoint, Hooks
from llama_3.linear import Linear
from llama_3.model import Transformer
from llama_3.ranks import is_main as is_main
from llama_3.ranks import world as world

T = TypeVar("T")


def join() -> None:
    """Meet the other processes, once: what is agreed on goes over the host, tensors of a card from card to card."""
    if not dist.is_initialized():
        cards = torch.cuda.is_available() and dist.is_nccl_available()
        # Rank 0 may download for hours while the others wait; torchrun ends them when one of them dies.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cards else "gloo", timeout=timedelta(days=1))
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def agree(values: Sequence[T]) -> list[T]:
    """Rank 0's values, on every rank: for what is drawn at random or read once. Every rank must ask, with as many."""
    agreed = list(values)
    if world() > 1:
        join()
        dist.broadcast_object_list(agreed, src=0, device=torch.device("cpu"))
    return agreed


class AgreedStop(threading.Event):
    """Whether `stop` is set on rank 0, on every rank that asks: if one stopped alone, the others would wait for it."""

    def __init__(self, stop: threading.Event) -> None:
        super().__init__()
        self._stop = stop

    def is_set(self) -> bool:
        return agree([self._stop.is_set()])[0]


def main_first(work: Callable[[], T]) -> T:
    """The result of `work` on each rank, which the others begin when rank 0 is done, as for a download."""
    if not is_main():
        agree([None])
        return work()
    try:
        return work()
    finally:
        agree([None])


def together(work: Callable[[], T]) -> T:
    """The result of `work` on each rank; what one of them meets is raised on all, so that none waits for it."""
    if world() == 1:
        return work()
    join()
    result, met = None, None
    try:
        result = work()
    except Exception as error:
        met = error
    everywhere: list[Exception | None] = [None] * world()
    dist.all_gather_object(everywhere, met)
    for each in (met, *everywhere):
        if each is not None:
            raise each
    return cast(T, result)


def own_device(device: str) -> str:
    """This rank's part of a kind of device: `cuda:N` for `cuda`, from now on the default card; `cpu` as it is.

    ValueError for a device that processes cannot share out, and for more processes than cards.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda":
        if kind != "cpu":
            raise config_error(f"a model cannot be shared out over processes on {device}", "use cpu or cuda")
        return device
    if number:
        raise config_error(f"{device} is one card, and {world()} processes share the model", "use cuda")
    here, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    processes = int(os.environ["LOCAL_WORLD_SIZE"])
    if processes > cards:
        hint = f"start torchrun with `--nproc-per-node {cards}`" if cards > 1 else "start it without torchrun"
        raise config_error(f"torchrun started {processes} processes, and this machine has {cards} cards", hint)
    torch.cuda.set_device(here)
    return f"cuda:{here}"


def share(config: ModelConfig, ranks: int) -> ModelConfig:
    """The config of what each of so many ranks holds; ValueError where heads or columns cannot be shared out evenly."""
    parts = {"key-value heads": config.n_kv_heads, "feed-forward columns": config.d_ff}
    for name, count in parts.items():  # attention heads are a multiple of their key-value heads
        if count % ranks:
            fits = next(n for n in range(ranks - 1, 0, -1) if not any(other % n for other in parts.values()))
            hint = f"start torchrun with `--nproc-per-node {fits}`" if fits > 1 else "start it without torchrun"
            raise config_error(f"{count} {name} cannot be shared out evenly over {ranks} processes", hint)
    heads, kv_heads, d_ff = config.n_heads // ranks, config.n_kv_heads // ranks, config.d_ff // ranks
    return replace(config, n_heads=heads, n_kv_heads=kv_heads, d_ff=d_ff)


class ParallelTransformer(Transformer):
    """One rank's share of a Llama. Ranks run the same calls in the same order; logits are equal and whole on each.

    `head` holds this rank's rows of the unembedding, or all of them where the vocabulary cannot be shared out evenly.
    """

    def forward(self, tokens_BT: Tensor, **options: Any) -> Tensor:
        """As `Transformer.forward`; ValueError for a hook at `attn_z`, where a rank has only its own heads."""
        hooks: Hooks | None = options.get("hooks")
        stop_after: HookPoint | None = options.get("stop_after")
        for point in (*(hooks or ()), *((stop_after,) if stop_after else ())):
            if point.site == "attn_z":
                raise config_error(
                    f"there is no hook at {point} in a model shared out over processes: each has its own heads there",
                    "use attn_out, or one process",
                )
        return super().forward(tokens_BT, **options)

    def compile_blocks(self) -> None:
        """ValueError: blocks that wait for other ranks are not compiled."""
        raise config_error("a model shared out over processes is not compiled", "leave out `--compile`")


def load_parallel(
    path: Path | str, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> ParallelTransformer:
    """This rank's share of the model at `path`, weights frozen; `load_model` for every process of torchrun.

    `device` is cpu, or what `own_device` says. Errors are those of `load_model` and `share`.
    """
    model = together(partial(_load, path, dtype, torch.device(device)))
    _exchange(model)
    return model


def _load(path: Path | str, dtype: torch.dtype | str, device: torch.device) -> ParallelTransformer:
    with open_checkpoint(path) as checkpoint:
        checkpoint.check()
        return _fill(checkpoint, weights_dtype(dtype) or checkpoint.dtype, device).eval()


def _fill(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> ParallelTransformer:
    config, ranks, rank = checkpoint.config, world(), dist.get_rank()
    shapes, even = tensor_shapes(config), config.vocab_size % ranks == 0
    with torch.device("meta"):
        model = ParallelTransformer(share(config, ranks))
        if even:
            model.head = Linear(config.d_model, config.vocab_size // ranks)
    axes = {"qkv": 0, "gate_up": 0, "out": 1, "down": 1} | ({"head": 0} if even else {})
    for name, sources in parameter_sources(config).items():
        owner, _, leaf = name.rpartition(".")
        axis = axes.get(owner.rpartition(".")[2])
        heights = [shapes[source][0] // (ranks if axis == 0 else 1) for source in sources]
        width, columns = shapes[sources[0]][1:], slice(None)
        if axis == 1:
            width = (width[0] // ranks,)
            columns = slice(rank * width[0], (rank + 1) * width[0])
        weight = torch.empty((sum(heights), *width), dtype=dtype, device=device)
        for source, rows in zip(sources, torch.split(weight, heights), strict=True):
            checkpoint.read(source, rows, rank * len(rows) if axis == 0 else 0, columns)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
    if config.tied and model.head is not None:  # of the embedding, which each rank holds whole, it multiplies its rows
        model.head.weight = nn.Parameter(model.embedding_VD.chunk(ranks)[rank], requires_grad=False)
    return model


def _exchange(model: ParallelTransformer) -> None:
    """Let the ranks add up what they write to the residual stream, and put their logits side by side."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module  # here: takes more than a second

    class After(ParallelStyle):
        """Hands a module's output to `exchange`."""

        def __init__(self, exchange: Callable[[Tensor], Tensor]) -> None:
            self.exchange = exchange

        def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
            module.register_forward_hook(lambda module, inputs, own: self.exchange(own))
            return module

    def total(own_BTD: Tensor) -> Tensor:
        dist.all_reduce(own_BTD)
        return own_BTD

    def side_by_side(own_BTV: Tensor) -> Tensor:
        parts = [torch.empty_like(own_BTV) for _ in range(world())]
        dist.all_gather(parts, own_BTV)
        return torch.cat(parts, -1)

    plan: dict[str, ParallelStyle] = {
        "blocks.*.attention.out": After(total),
        "blocks.*.feed_forward.down": After(total),
    }
    if model.config.vocab_size % world() == 0:
        plan["head"] = After(side_by_side)
    parallelize_module(model, init_device_mesh(model.device.type, (world(),)), plan)
