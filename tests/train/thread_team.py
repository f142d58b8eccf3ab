"""Several processes of a team played by threads of one, so that what they settle can be looked at from inside."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from train.distributed import Kind, Team

T = TypeVar("T")


class ThreadTeam(Team):
    """One of them; `meet` is the place where all lay down what they have and see what the others have."""

    meet: Callable[[int, Tensor], list[Tensor]]

    def sum_(self, tensor: Tensor, over: Any = "all") -> Tensor:
        if over == "all" or getattr(self, over) > 1:
            tensor.copy_(torch.stack(self.meet(self.rank, tensor.clone())).sum(0))
        return tensor

    def largest_(self, tensor: Tensor) -> Tensor:
        if self.readers > 1:
            tensor.copy_(torch.stack(self.meet(self.rank, tensor.clone())).amax(0))
        return tensor

    def gather(self, tensor: Tensor, dim: int = 0) -> Tensor:
        return torch.cat(self.meet(self.rank, tensor.clone()), dim)


def play(kind: Kind, work: Callable[[Team], T], size: int = 2) -> list[T]:
    """What `work` gives to each member of a team. An error of one ends all."""
    barrier = threading.Barrier(size)
    table: list[Tensor] = [torch.empty(0)] * size

    def meet(rank: int, tensor: Tensor) -> list[Tensor]:
        table[rank] = tensor
        barrier.wait(30)
        found = list(table)
        barrier.wait(30)
        return found

    def run(rank: int) -> T:
        team = ThreadTeam(rank, size, kind)
        object.__setattr__(team, "meet", meet)
        try:
            return work(team)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
