"""What `steer doctor` finds out about a model before anyone waits for it: what it is, where it runs, whether it fits.

Nothing of the weights but headers is read, save for what quantising costs, which compares two loaded models, and for
whether the SAE is the right one, which runs the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.analysis.prose import PARAGRAPH
from steer.cli import engines
from steer.cli.options import narrate, text_of
from steer.config import DEMO_MODEL, Settings
from steer.errors import SteerError

if TYPE_CHECKING:
    from llama_3.config import ModelConfig
    from llama_3.tokenizer import Tokenizer
    from sae.model import SAEConfig
    from steer.device import Placement
    from steer.engine import Engine

MOST_TOKENS = 512
"""Tokens of a given text that are measured on."""


class Subject:
    """The model that the settings name; each part is read once, when a check first asks for it."""

    def __init__(self, settings: Settings, text: Path | None = None) -> None:
        self.settings, self.text = settings, text

    @cached_property
    def path(self) -> Path:
        from llama_3.hub import resolve_model

        return resolve_model(self.settings.model) if self.settings.model else DEMO_MODEL

    @cached_property
    def config(self) -> ModelConfig:
        from llama_3.config import read_config

        return read_config(self.path)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from llama_3.tokenizer import load_tokenizer

        return load_tokenizer(self.path)

    @cached_property
    def placement(self) -> Placement:
        from steer.device import choose_placement

        return choose_placement(self.settings.device, self.settings.dtype, self.path)

    def read_text(self) -> str:
        """What to measure on: the text given, else a paragraph of our own."""
        return PARAGRAPH if self.text is None else text_of(self.text)

    @cached_property
    def saes(self) -> list[SAEConfig]:
        """The SAEs that go with the model: those named, with the demo the one that ships, else none."""
        from sae.checkpoint import read_config
        from steer.made_with import sae_folders

        return [read_config(folder) for folder in sae_folders(self.settings)]

    @cached_property
    def engine(self) -> Engine:
        """Model and SAEs, loaded; labels play no part here."""
        return engines.load_engine(replace(self.settings, labels=None))

    @property
    def kept_layers(self) -> int:
        """Blocks that are not quantised unless all are asked for: those up to the last SAE's hook."""
        from llama_3.hooks import HookPoint

        if self.settings.quantize_all:
            return 0
        return max((HookPoint.parse(sae.hook).layer + 1 for sae in self.saes), default=0)


def _model(subject: Subject) -> str:
    from llama_3.checkpoint import open_checkpoint, parameter_count, stored_dtype
    from llama_3.config import find_layout
    from llama_3.hub import model_name

    config, (layout, _) = subject.config, find_layout(subject.path)
    with open_checkpoint(subject.path) as checkpoint:
        checkpoint.check()  # names and shapes; the numbers themselves are looked at when a model is loaded
    shape = f"{config.n_layers} layers of {config.d_model}, {config.n_heads} heads on {config.n_kv_heads}"
    name = "the demo" if subject.settings.model is None else model_name(subject.path)
    stored = str(stored_dtype(subject.path)).removeprefix("torch.")
    return f"{name}: Llama, {shape}, {parameter_count(config) / 1e6:,.1f} M parameters, {layout}, {stored}"


def _tokenizer(subject: Subject) -> str:
    tokenizer, size = subject.tokenizer, subject.config.vocab_size
    kind = type(tokenizer).__name__.removesuffix("Tokenizer")
    known = max(tokenizer.vocab_size, 1 + max(tokenizer.special_ids, default=0))
    if known > size:
        raise SteerError(
            f"the tokenizer's ids go up to {known - 1:,} and the model's to {size - 1:,}", "it is another's"
        )
    return f"{kind}, {tokenizer.vocab_size:,} tokens of the model's {size:,}"


def _chat(subject: Subject) -> str:
    from llama_3.chat_format import load_chat_format

    return load_chat_format(subject.path, subject.tokenizer, subject.settings.chat_format).note


def _sae(subject: Subject) -> str:
    from train.evaluate import hook_point

    if not subject.saes:
        return subject.settings.describe()["sae"]
    for sae in subject.saes:
        hook_point(subject.config, sae)
    return "; ".join(f"{sae.d_sae:,} latents at {sae.hook}" for sae in subject.saes)


def _placement(subject: Subject) -> str:
    placement = subject.placement
    dtype = "as stored" if placement.dtype == "auto" else str(placement.dtype).removeprefix("torch.")
    return f"{placement.device}, {dtype} ({placement.reason or 'as asked for'})"


def _fit(subject: Subject) -> str:
    from steer.device import check_fit, gib, sae_bytes

    where, kept = subject.placement, subject.kept_layers
    beside = sum(sae_bytes(sae, where.device) for sae in subject.saes)
    fit = check_fit(subject.config, subject.path, where, subject.settings.scheme, sae_bytes=beside, kept_layers=kept)
    parts = ", ".join(f"{name} {gib(size)}" for name, size in fit.parts.items() if size)
    free = "an unknown amount" if fit.available is None else f"{gib(fit.available)} GiB"
    return f"{gib(fit.needed)} GiB of {free} free ({parts})"


def _quantize(subject: Subject) -> str:
    from llama_3.checkpoint import stored_dtype
    from llama_3.quantize import quantization_cost
    from steer.device import check_fit

    scheme, placement = subject.settings.scheme, subject.placement
    assert scheme is not None
    check_fit(subject.config, subject.path, placement)  # it is compared with the model as it is
    tokens = subject.tokenizer.encode(subject.read_text(), bos=True)[: min(MOST_TOKENS, subject.config.max_context)]
    if len(tokens) < 2:
        raise SteerError(f"`{subject.text}` holds no text to measure on")
    dtype = stored_dtype(subject.path) if placement.dtype == "auto" else placement.dtype
    cost = quantization_cost(subject.path, scheme, subject.kept_layers, tokens, placement.device, dtype)
    kept = f", {subject.kept_layers} of {subject.config.n_layers} layers kept" if subject.kept_layers else ""
    return (
        f"{scheme}{kept}: KL {cost.mean_kl:.2g} nats a token on average, {cost.max_kl:.2g} at most, "
        f"the same likeliest token at {cost.same_top:.1%} of {len(tokens)}"
    )


def examine_sae(subject: Subject) -> list[dict[str, Any]]:
    """What `steer.analysis.checkup` finds of each SAE beside its model, as the entries of the report; with several SAEs
    their messages begin with the hook point."""
    from steer.analysis.checkup import examine

    engine = subject.engine
    entries: list[dict[str, Any]] = []
    for hook, sae in engine.saes.items():
        whose = f"{hook}: " if len(engine.saes) > 1 else ""
        for each in examine(
            engine.model, sae, engine.tokenizer, subject.text, chat=engine.chat_format, narrate=narrate
        ):
            message = whose + each.message + (f"; hint: {each.hint}" if each.hint else "")
            entries.append({"check": each.check, "ok": each.ok, "value": each.value, "message": message})
    return entries


def model_checks(subject: Subject) -> dict[str, tuple[tuple[str, ...], Callable[[Subject], str]]]:
    """The checks by name, each with those that must have gone well before it."""
    checks: dict[str, tuple[tuple[str, ...], Callable[[Subject], str]]] = {
        "model": ((), _model),
        "tokenizer": (("model",), _tokenizer),
        "chat": (("model", "tokenizer"), _chat),
        "sae": (("model",), _sae),
        "placement": (("model",), _placement),
        "fit": (("model", "placement", "sae"), _fit),
    }
    if subject.settings.scheme is not None:
        checks["quantize"] = (tuple(checks), _quantize)
    return checks
