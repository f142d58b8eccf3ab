"""A conversation: its turns, the steering set and its timeline, sampling, and the replies with their events.

Plain Python. The session is the only place where a chat's state changes; screens and commands call its verbs and draw
what it holds. It talks to an `EngineLike`, which is the real engine or a scripted one in tests.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from steer.edits import Edit, SteeringSet
from steer.errors import SteerError
from steer.events import Event, Failed, Finished, PromptRead, TokenEvent

Role = Literal["system", "user", "assistant"]
MAX_SEED = 2**31 - 1


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the header and `doctor` say about a loaded engine."""

    model: str
    dtype: str
    device: str
    context: int
    """Tokens the model can hold."""
    hook: str | None = None
    """Where the SAE reads and writes, as `blocks.4.hook_resid_post`; None without an SAE."""
    latents: int = 0
    k: int = 0
    resid_norm: float | None = None
    """Median norm of the residual stream at the hook."""
    notice: str | None = None
    """One line for the user, for instance that this model runs without features."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the likeliest."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    """0: off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one row starts from: messages for the chat format, or raw text to go on from."""

    messages: tuple[tuple[Role, str], ...] = ()
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Readout:
    """One strength in all three units; a unit is None where its reference is not known."""

    raw: float
    of_max: float | None
    of_norm: float | None
    """In percent."""


@dataclass(frozen=True, slots=True)
class FeatureCard:
    """A latent as a person sees it."""

    latent: int
    label: str = ""
    author: str = ""
    max_activation: float | None = None
    mean_on: float | None = None
    density: float | None = None
    promotes: tuple[tuple[str, float], ...] = ()
    suppresses: tuple[tuple[str, float], ...] = ()
    examples: tuple[tuple[str, tuple[str, ...], tuple[float, ...]], ...] = ()
    """Each: kind (top, middle, random), token texts, activations."""


class EngineLike(Protocol):
    """What a session and the screens need of an engine. Every method may be called from any thread."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def defaults(self) -> Sampling:
        """The checkpoint's own sampling defaults."""

    def stream(
        self,
        prompts: Sequence[Prompt],
        steering: Callable[[], SteeringSet] | Sequence[SteeringSet],
        *,
        sampling: Sampling | Sequence[Sampling],
        seeds: Sequence[int],
        max_tokens: int,
        stop: threading.Event | None = None,
        hits: bool = True,
        alternatives: int = 5,
    ) -> Iterator[Event]:
        """The events of a batch of replies. A callable is asked for the set before every token; a sequence gives each
        row its own. Raises `SteerError` before the first event for what a user got wrong."""

    def check(self, edit: Edit) -> None:
        """`SteerError` when the edit cannot run here: no SAE, latent out of range, a unit without its reference."""

    def readout(self, edit: Edit) -> Readout | None:
        """The edit's strength in all units; None for `ablate`, `scale` and without an SAE."""

    def search(self, query: str, limit: int = 200) -> list[FeatureCard]:
        """Features whose labels match, without examples. `SteerError` for a malformed filter."""

    def card(self, latent: int) -> FeatureCard: ...

    def labels(self, latents: Sequence[int]) -> dict[int, str]: ...
