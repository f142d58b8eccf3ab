"""What a run counts between two entries of its metrics: sums of losses, norms, and where the time went.

The sums are part of a checkpoint, so that a resumed run writes the entries of an unbroken one; times are not.
"""

import time
from typing import Any


class Log:
    """The sums since the last entry, and since the last density histogram the tokens."""

    def __init__(self) -> None:
        self.waited, self.began = 0.0, time.monotonic()
        self.steps = self.tokens = self.active = self.density_from = 0
        self.norm = 0.0
        self.losses: dict[str, float] = {}
        self.since_start = 0
        """tokens since this process began to count, for the speed"""

    def add(self, parts: list[dict[str, float]], active: int, norm: float, tokens: int) -> None:
        """A step: the losses of each of its equal parts (but `aux` is that of all), active pairs, norm, tokens."""
        for losses in parts:
            for name, loss in losses.items():
                self.losses[name] = self.losses.get(name, 0.0) + loss / (1 if name == "aux" else len(parts))
        self.steps, self.tokens, self.active = self.steps + 1, self.tokens + tokens, self.active + active
        self.norm, self.since_start = self.norm + norm, self.since_start + tokens

    def entry(self) -> dict[str, Any]:
        """The means since the last entry, which is now."""
        losses = {name: loss / self.steps for name, loss in self.losses.items()}
        counted = [loss for name, loss in losses.items() if name != "reconstruction" or "prefixes" not in losses]
        took = max(time.monotonic() - self.began, 1e-9)
        found = {
            "loss": sum(counted),
            "losses": losses,
            "fvu": losses["reconstruction"],
            "l0": self.active / self.tokens,
            "grad_norm": self.norm / self.steps,
            "tokens_per_second": self.since_start / took,
            "loader_wait": self.waited / took,
        }
        self.steps = self.tokens = self.active = self.since_start = 0
        self.norm, self.losses = 0.0, {}
        self.waited, self.began = 0.0, time.monotonic()
        return found

    def since_density(self, tokens: int) -> int:
        """Tokens since this was last asked, for a run that has come to `tokens`."""
        since, self.density_from = tokens - self.density_from, tokens
        return since

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        names = ("steps", "tokens", "active", "norm", "losses", "density_from")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave."""
        for name in self.state():
            setattr(self, name, state[name])
