"""`Engine`: the one place where a chat's model meets its SAE.

It owns the model, the tokenizer, the SAE, the label index and a lock, and turns the generator's steps into the plain
events of `steer/events.py`. Edits are resolved here: the written strength meets the SAE's statistics and becomes a raw
number. Nothing above this file sees a tensor.

A token's event waits for the forward pass that reads the token, because that pass tells which latents are active on it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from labels.index import Feature, LabelIndex
from llama_3.chat_format import ChatFormat, Message
from llama_3.checkpoint import load_model
from llama_3.config import read_generation_defaults
from llama_3.generate import Step, stream_steps
from llama_3.hooks import HookPoint, Hooks
from llama_3.model import Transformer
from llama_3.sampling import Sampling as TokenSampling
from llama_3.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from sae.checkpoint import load_sae
from sae.intervene import CompiledSet, Steerer
from sae.model import SAE, Latents
from steer.config import DEMO_LABELS, DEMO_MODEL, DEMO_SAE
from steer.device import choose_device, choose_dtype
from steer.edits import Edit, SteeringSet
from steer.errors import SteerError
from steer.events import Alternative, EditReport, Event, Finished, LatentHit, PromptRead, Report, TokenEvent
from steer.resolve import Resolver, check_labels, check_pair
from steer.session import EngineInfo, FeatureCard, Prompt, Readout, Sampling

Steering = Callable[[], SteeringSet] | Sequence[SteeringSet]
BOS = "<|begin_of_text|>"


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished reply, for callers who do not stream."""

    text: str
    tokens: tuple[int, ...]
    events: tuple[TokenEvent, ...]
    finished: Finished


@dataclass(slots=True)
class _Row:
    """What a stream keeps of one row."""

    prompt: list[int]
    dropped: int
    decoder: StreamDecoder
    pending: Step | None = None
    length: int = 0
    """Tokens of the reply whose event has left."""
    finish: Literal["stop", "length", "cancelled"] = "cancelled"
    steps: int = 0
    done: bool = False
    sets: list[SteeringSet] = field(default_factory=list)
    """Every set that was in force, for the report's wording."""


class Engine:
    """A model, its SAE and its labels, ready to talk. Any thread may call it; one reply runs at a time."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        sae: SAE | None = None,
        index: LabelIndex | None = None,
        *,
        name: str = "model",
        defaults: Sampling | None = None,
    ) -> None:
        self.model, self.tokenizer, self.sae, self.index = model, tokenizer, sae, index
        self.chat_format = ChatFormat(tokenizer)
        self._defaults = defaults or Sampling()
        self._lock = threading.Lock()
        self._hook = HookPoint.parse(sae.config.hook) if sae else None
        if sae and self._hook:
            check_pair(model, sae, self._hook)
            check_labels(sae, index.meta() if index else {})
        self._name, self._resolver = name, Resolver(sae)
        self._stop_ids = frozenset((*tokenizer.stop_ids, *model.config.stop_ids))

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        sae: str | Path | None = None,
        labels: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        threads: int | None = None,
    ) -> Engine:
        """The engine of a model folder, an SAE folder and a label index; the shipped demo where `model` is None.

        The shipped SAE and labels go only with the shipped model. `device` is auto, cpu, cuda or mps; `dtype` is auto
        (see `choose_dtype`), float32, bfloat16 or float16; `threads` bounds torch's CPU threads. Raises `SteerError`,
        `ValueError` or `OSError` with one sentence for a folder that is wrong, damaged or does not fit.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        if model is None:
            model, sae, labels = DEMO_MODEL, sae or DEMO_SAE, labels or (DEMO_LABELS if sae is None else None)
        folder, where = Path(model), choose_device(device)
        transformer = load_model(folder, choose_dtype(dtype, folder, where), where)
        generation = read_generation_defaults(folder)
        return cls(
            transformer,
            load_tokenizer(folder),
            load_sae(Path(sae), where) if sae else None,
            LabelIndex(Path(labels), read_only=True) if labels else None,
            name="Llama-Tale-14M" if folder == DEMO_MODEL else folder.resolve().name,
            defaults=Sampling(generation.temperature, generation.top_p),
        )

    @property
    def info(self) -> EngineInfo:
        config, sae = self.model.config, self.sae
        weight = self.model.unembedding_VD
        facts = self._name, str(weight.dtype).removeprefix("torch."), str(weight.device), config.max_context
        if sae is None:
            return EngineInfo(*facts, notice="no SAE for this model, so no features; `steer train` makes one")
        stats = sae.stats
        return EngineInfo(*facts, sae.config.hook, sae.config.d_sae, sae.config.k, stats.resid_norm if stats else None)

    @property
    def defaults(self) -> Sampling:
        return self._defaults

    # -- replies ----------------------------------------------------------------------------------------------------

    def stream(
        self,
        prompts: Sequence[Prompt],
        steering: Steering = SteeringSet,
        *,
        sampling: Sampling | Sequence[Sampling] | None = None,
        seeds: Sequence[int] = (0,),
        max_tokens: int = 128,
        stop: threading.Event | None = None,
        hits: bool = True,
        alternatives: int = 5,
        stop_strings: Sequence[str] = (),
        reuse: bool = False,
    ) -> Iterator[Event]:
        """The events of a batch of replies, row by row as they come.

        `steering` is asked for the set before every forward pass, or gives one set per row. `hits` records the active
        latents of every token. Raises `SteerError` before the first event for an edit or a prompt that cannot run.
        """
        if max_tokens < 1:
            raise SteerError(f"a reply of {max_tokens} tokens is none", "ask for at least 1")
        stop_flag = stop or threading.Event()
        rows = [self._read(prompt, max_tokens) for prompt in prompts]
        sets = self._sets(steering, len(rows))
        for one in set(sets):
            self.compile(one)
        drawn = [self._defaults] * len(rows) if sampling is None else sampling
        each = [drawn] * len(rows) if isinstance(drawn, Sampling) else list(drawn)
        token_sampling = [TokenSampling(s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty) for s in each]
        assert len(rows) == len(seeds) == len(each), "one seed and one sampling per row"
        return self._run(rows, steering, token_sampling, list(seeds), max_tokens, stop_flag, hits, alternatives)

    def _run(
        self,
        rows: list[_Row],
        steering: Steering,
        sampling: list[TokenSampling],
        seeds: list[int],
        max_tokens: int,
        stop: threading.Event,
        hits: bool,
        alternatives: int,
    ) -> Iterator[Event]:
        with self._lock:
            hooks, steerer = Hooks(), None
            if self.sae is not None and self._hook is not None:
                steerer = Steerer(self.sae, self.tokenizer.special_ids, recording=hits)
                hooks.add(self._hook, steerer)
            reading = hits and steerer is not None
            started = time.perf_counter()
            passes = stream_steps(
                self.model,
                [row.prompt for row in rows],
                sampling=sampling,
                seeds=seeds,
                max_tokens=max_tokens,
                stop_ids=self._stop_ids,
                hooks=hooks,
                stop=stop,
                alternatives=alternatives,
                read_last=reading,
            )
            first = True
            while True:
                sets = self._sets(steering, len(rows))
                if steerer is not None:
                    # A row cut by length is read once more only to be looked at: that pass is no part of its reply.
                    steerer.sets = {
                        number: self.compile(one) for number, one in enumerate(sets) if rows[number].finish != "length"
                    }
                live = [number for number, row in enumerate(rows) if not row.done]
                writing = [number for number in live if rows[number].finish != "length"]
                for number in live:
                    if not rows[number].sets or rows[number].sets[-1] is not sets[number]:
                        rows[number].sets.append(sets[number])
                steps = next(passes, None)
                if steps is None:
                    break
                record = self._hits_by_row(steerer) if reading and steerer else {}
                for number in writing:
                    rows[number].steps += 1
                if first:
                    first = False
                    for number, row in enumerate(rows):
                        yield self._prompt_read(number, row, record.get(number))
                for number, row_hits in record.items():
                    row = rows[number]
                    if row.pending is not None:
                        yield self._token_event(number, row, row_hits[-1])
                for step in steps:
                    row = rows[step.row]
                    if step.finish == "stop":
                        row.finish, row.done = "stop", True
                    else:
                        row.pending = step
                        if step.finish == "length":
                            row.finish = "length"
                        if not reading:
                            yield self._token_event(step.row, row, ())
                            row.done = step.finish is not None
                for number in live:
                    row = rows[number]
                    row.done |= reading and row.finish == "length" and row.pending is None
                    if row.done:
                        yield self._finished(number, row, seeds[number], steerer, started)
            for number, row in enumerate(rows):
                if not row.done:
                    if row.pending is not None:
                        yield self._token_event(number, row, ())
                    row.done = True
                    yield self._finished(number, row, seeds[number], steerer, started)

    def complete(
        self,
        prompt: str,
        edits: Sequence[str] = (),
        *,
        chat: bool = False,
        seed: int = 0,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
    ) -> Completion:
        """One whole reply to `prompt`, steered by edits as they are written on the command line (`"21863 +1.1x"`)."""
        ask = Prompt(messages=(("user", prompt),)) if chat else Prompt(text=prompt)
        chosen = SteeringSet(tuple(Edit.parse(edit) for edit in edits))
        tokens: list[TokenEvent] = []
        for event in self.stream([ask], [chosen], sampling=sampling, seeds=[seed], max_tokens=max_tokens):
            if isinstance(event, TokenEvent):
                tokens.append(event)
            elif isinstance(event, Finished):
                text = "".join(token.text for token in tokens) + event.text
                return Completion(text, tuple(token.token for token in tokens), tuple(tokens), event)
        raise AssertionError("a stream ends with Finished")

    def inspect(self, text: str, *, chat: bool = False) -> tuple[TokenEvent, ...]:
        """The tokens of a text with every latent active on them; BOS is index 0, its hits are empty."""
        if self.sae is None or self._hook is None:
            raise SteerError("there is no SAE to read features with", "pass `--sae FOLDER`")
        ask = Prompt(messages=(("user", text),)) if chat else Prompt(text=text)
        row = self._read(ask, 0)
        with self._lock, torch.inference_mode():
            tokens_BT = torch.tensor([row.prompt], device=self.model.unembedding_VD.device)
            resid_BTD = self.model.forward(tokens_BT, stop_after=self._hook)
            latents = self.sae.encode(resid_BTD.float())
        readable = [i > 0 and token not in self.tokenizer.special_ids for i, token in enumerate(row.prompt)]
        return self._prompt_read(0, row, _to_hits(latents, 0, readable)).tokens

    def _read(self, prompt: Prompt, max_tokens: int) -> _Row:
        """Token ids of a prompt; the oldest messages are left out where they do not fit beside a reply."""
        context = self.model.config.max_context
        if prompt.text is None:
            budget = context - min(max_tokens, context // 4)
            messages = [Message(role, content) for role, content in prompt.messages]
            tokens, _, dropped = self.chat_format.fit_dialog(messages, budget)
        else:
            begins = prompt.text.startswith(BOS)
            tokens, dropped = (
                self.tokenizer.encode(prompt.text.removeprefix(BOS) if begins else prompt.text, bos=True),
                0,
            )
            if len(tokens) + min(max_tokens, 1) > context:
                raise SteerError(f"the prompt has {len(tokens)} tokens, the model holds {context}", "shorten it")
        return _Row(tokens, dropped, StreamDecoder(self.tokenizer))

    def _sets(self, steering: Steering, rows: int) -> list[SteeringSet]:
        if callable(steering):
            return [steering()] * rows
        assert len(steering) == rows, "one steering set per row"
        return list(steering)

    # -- edits ------------------------------------------------------------------------------------------------------

    def compile(self, steering: SteeringSet) -> CompiledSet:
        """The live edits with raw strengths; a `SteerError` for one that cannot run here."""
        return self._resolver.compile(steering)

    def check(self, edit: Edit) -> None:
        """`SteerError` when the edit cannot run here: no SAE, a latent out of range, a unit without its reference."""
        self._resolver.check(edit)

    def readout(self, edit: Edit) -> Readout | None:
        """The edit's strength in all units; None for `ablate`, `scale`, and where it cannot run."""
        return self._resolver.readout(edit)

    # -- features ---------------------------------------------------------------------------------------------------

    def search(self, query: str, limit: int = 200) -> list[FeatureCard]:
        """Features whose labels match, best first, without examples."""
        if self.index is None:
            raise SteerError(
                "there is no label index to search", "pass `--labels FILE`, or make one with `steer label collect`"
            )
        return [_card(feature) for feature in self.index.search(query, limit)]

    def card(self, latent: int) -> FeatureCard:
        """All that is known of a latent; a `SteerError` when it is out of range."""
        self._resolver.check_latent(latent)
        feature = self.index.feature(latent) if self.index else None
        if self.index is None or feature is None:
            return FeatureCard(latent, max_activation=self._resolver.maximum(latent))
        promotes, suppresses = self.index.effects(latent)
        examples = tuple((example.kind, example.tokens, example.activations) for example in self.index.examples(latent))
        return _card(feature, tuple(promotes), tuple(suppresses), examples)

    def labels(self, latents: Sequence[int]) -> dict[int, str]:
        return self.index.labels_of(latents) if self.index else {}

    # -- events -----------------------------------------------------------------------------------------------------

    def _hits_by_row(self, steerer: Steerer) -> dict[int, list[tuple[LatentHit, ...]]]:
        """The hits of the last forward pass: row -> one tuple per token it read (padding left out)."""
        record = steerer.record
        assert record is not None
        lengths = (record.positions_BT >= 0).sum(1).tolist()
        readable = record.readable_BT.tolist()
        return {
            row: _to_hits(record.latents, place, readable[place][: lengths[place]])
            for place, row in enumerate(record.rows)
        }

    def _prompt_read(self, number: int, row: _Row, hits: Sequence[tuple[LatentHit, ...]] | None) -> PromptRead:
        decoder, special = StreamDecoder(self.tokenizer), self.tokenizer.special_ids
        events = []
        for index, token in enumerate(row.prompt):
            is_special = token in special
            text = self.tokenizer.token_text(token) if is_special else decoder.push(token)
            events.append(TokenEvent(number, index, token, text, is_special, hits=hits[index] if hits else ()))
        return PromptRead(number, tuple(events), row.dropped)

    def _token_event(self, number: int, row: _Row, hits: tuple[LatentHit, ...]) -> TokenEvent:
        step = row.pending
        assert step is not None
        row.pending = None
        index = len(row.prompt) + row.length
        row.length += 1
        special = step.token in self.tokenizer.special_ids
        others = tuple(
            Alternative(self.tokenizer.token_text(a.token), a.probability)
            for a in step.alternatives
            if a.token != step.token
        )
        text = "" if special else row.decoder.push(step.token)
        return TokenEvent(number, index, step.token, text, special, step.logprob, step.entropy, others, hits)

    def _finished(self, number: int, row: _Row, seed: int, steerer: Steerer | None, started: float) -> Finished:
        seconds = time.perf_counter() - started
        return Finished(
            number,
            row.finish,
            seed,
            self._report(number, row, steerer),
            row.length / seconds if seconds > 0 else 0.0,
            row.decoder.flush(),
        )

    def _report(self, number: int, row: _Row, steerer: Steerer | None) -> Report:
        if steerer is None:
            return Report(row.steps)
        written = {self._resolver.edit(edit): str(edit) for one in row.sets for edit in one.live}
        tallies = {edit: tally for (of_row, edit), tally in steerer.tallies.items() if of_row == number}
        edits, spans = [], []
        for edit, tally in tallies.items():
            count = int(tally.positions)
            before, after = (float(tally.before) / count, float(tally.after) / count) if count else (None, None)
            edits.append(EditReport(written[edit], count, before, after, int(tally.lost)))
            if count:
                spans.append((int(tally.first), int(tally.last)))
        first, last = (min(s[0] for s in spans), max(s[1] for s in spans)) if spans else (None, None)
        return Report(row.steps, steerer.applied.get(number, 0), tuple(edits), first, last)


def _card(
    feature: Feature,
    promotes: tuple[tuple[str, float], ...] = (),
    suppresses: tuple[tuple[str, float], ...] = (),
    examples: tuple[tuple[str, tuple[str, ...], tuple[float, ...]], ...] = (),
) -> FeatureCard:
    facts = feature.max_activation, feature.mean_on, feature.density
    return FeatureCard(feature.latent, feature.label, feature.author, *facts, promotes, suppresses, examples)


def _to_hits(latents: Latents, row: int, readable: Sequence[bool]) -> list[tuple[LatentHit, ...]]:
    """Per token of one row, its active latents, strongest first."""
    count = len(readable)
    values_TK, order = latents.values[row, :count].float().sort(-1, descending=True)
    indices_TK = latents.indices[row, :count].gather(-1, order)
    return [
        tuple(LatentHit(i, v) for i, v in zip(indices, values, strict=True) if v > 0) if reads else ()
        for indices, values, reads in zip(indices_TK.tolist(), values_TK.tolist(), readable, strict=True)
    ]
