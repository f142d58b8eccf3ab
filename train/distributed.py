"""Several processes that train one SAE, and how they agree; on one process nothing here does anything.

There are two ways to share the work. `data`: every process holds the whole SAE and reads its part of each batch; the
gradients are summed. `latents`: every process holds a slice of the dictionary and reads the whole batch; the winners of
the race for k are settled among all, and the reconstructions of the slices are summed. The loss is that of one process
either way, up to the order of sums.

torchrun starts the processes, on one machine or many, and says in the environment who is who.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
from torch import Tensor, distributed

from train.errors import GoneError

Kind = Literal["alone", "data", "latents"]


@dataclass(frozen=True)
class Team:
    """The processes of a run as one of them sees them."""

    rank: int = 0
    size: int = 1
    kind: Kind = "alone"

    @property
    def readers(self) -> int:
        """Processes that read different rows."""
        return self.size if self.kind == "data" else 1

    @property
    def shards(self) -> int:
        """Processes that hold different latents."""
        return self.size if self.kind == "latents" else 1

    def part(self, latents: int, rank: int | None = None) -> slice:
        """The latents that this process holds, or that of another rank."""
        if self.shards == 1:
            return slice(0, latents)
        rank = self.rank if rank is None else rank
        return slice(rank * latents // self.size, (rank + 1) * latents // self.size)

    def rows(self, batch: int) -> slice:
        """The rows of a batch that this process reads."""
        if self.readers == 1:
            return slice(0, batch)
        return slice(self.rank * batch // self.size, (self.rank + 1) * batch // self.size)

    def sum_(self, tensor: Tensor, over: Literal["all", "readers", "shards"] = "all") -> Tensor:
        """The sum over the processes of that kind, in place."""
        if self.size > 1 and (over == "all" or getattr(self, over) > 1):
            _explained(lambda: distributed.all_reduce(tensor))
        return tensor

    def largest_(self, tensor: Tensor) -> Tensor:
        """The largest over all processes that read different rows, in place."""
        if self.readers > 1:
            _explained(lambda: distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX))
        return tensor

    def gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The tensors of all processes one after the other along `dim`, whose size may differ; the same for all."""
        if self.size == 1:
            return tensor
        sizes = torch.zeros(self.size, dtype=torch.int64, device=tensor.device)
        sizes[self.rank] = tensor.shape[dim]
        most = int(self.sum_(sizes).max())
        shape = list(tensor.shape)
        shape[dim] = most
        padded = tensor.new_zeros(shape)
        padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        _explained(lambda: distributed.all_gather(parts, padded))
        return torch.cat([part.narrow(dim, 0, int(size)) for part, size in zip(parts, sizes, strict=True)], dim)

    def send_first(self, piece: Tensor | None, sender: int, into: Tensor | None) -> None:
        """Copies `piece` of the process `sender` to `into`, on the CPU of the first process; nothing to do for others.

        `piece` is None but on the sender, `into` but on the first process."""
        if self.rank == sender and piece is not None:
            if into is not None:
                into.copy_(piece)
            else:
                _explained(lambda: distributed.send(piece.cpu().contiguous(), 0))
        elif into is not None:
            _explained(lambda: distributed.recv(into, sender))

    def agree(self, fine: bool) -> bool:
        """Whether all processes are fine."""
        faults = torch.tensor(0 if fine else 1)
        return not int(self.sum_(faults))

    def wait(self) -> None:
        """Returns once all processes have come here."""
        self.sum_(torch.zeros(1))

    def leave(self) -> None:
        """Ends the connection."""
        if self.size > 1 and distributed.is_initialized():
            distributed.destroy_process_group()


ALONE = Team()


def join_team(kind: Literal["data", "latents"], *, device: str = "cpu", minutes: float = 10.0) -> Team:
    """The team that torchrun started this process in; `ALONE` where it started none or one.

    A process that has heard nothing of another for `minutes` gives up, with a `GoneError`.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size == 1:
        return ALONE
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        _explained(lambda: distributed.init_process_group(backend, timeout=timedelta(minutes=minutes)))
    return Team(rank, size, kind)


def _explained(exchange: Callable[[], object]) -> None:
    """Runs an exchange; a process that is gone becomes one sentence."""
    try:
        exchange()
    except (RuntimeError, distributed.DistError) as error:
        why = str(error).strip().partition("\n")[0]
        raise GoneError(
            f"another process of this run is gone ({why})", "start all again with --resume: nothing written is lost"
        ) from error


def block_seeds(seed: int, blocks: Sequence[int]) -> list[torch.Generator]:
    """A generator for each block of latents, so that any process can make the first weights of its slice alone."""
    return [torch.Generator().manual_seed((seed * 1_000_003 + block) % (1 << 63)) for block in blocks]
