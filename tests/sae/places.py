"""Spans of tokens as a steerer asks for them."""

from dataclasses import dataclass

import torch

SPECIAL = 90


@dataclass
class Place:
    positions_BT: torch.Tensor
    tokens_BT: torch.Tensor
    rows: tuple[int, ...]
    prompt: int

    @property
    def prompt_lengths_B(self) -> torch.Tensor:
        return torch.full((len(self.rows),), self.prompt)

    @property
    def generated_BT(self) -> torch.Tensor:
        return (self.positions_BT >= 0) & (self.positions_BT >= self.prompt - 1)


def place(rows: int, tokens: int, prompt: int = 3, rows_named: tuple[int, ...] | None = None) -> Place:
    positions = torch.arange(tokens).repeat(rows, 1)
    ids = torch.arange(rows * tokens).view(rows, tokens) % 80
    return Place(positions, ids, rows_named or tuple(range(rows)), prompt)
