"""A first label for every live latent without any API: what it fires on and, behind an arrow, what it promotes.

    sea, ocean, waves -> water, wet      the words it fires on, the words it makes likelier
    names: tom, tim                      words with a capital inside sentences
    "to" after wanted, going -> play     a function word, told apart by what precedes it (or follows: `before`)
    once upon                            one word, always behind the same one
    full stop after said                 punctuation and line breaks
    start of a sentence: then, one       words of no other kind in common
    word ending -ing: running, playing   a piece of many words

A word counts by the share of the latent's activation that falls on it (once an example, so that no single text decides)
times the logarithm of its lift: that share over the word's share in the random examples of all latents.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from labels.index import Label, LabelIndex
from labels.words import FUNCTION_WORDS, MARKS, Place, read_places, words_of

AUTHOR: Final = "local"
MOST_WORDS: Final = 4
MOST_PROMOTED: Final = 3
FAINT: Final = 0.3
"""Activations below this share of an example's largest are left out."""
Shares = dict[str, float]


def label_local(index: LabelIndex, *, relabel: bool = False) -> dict[str, int]:
    """Labels every live latent in `index`, by author `local`; counts of `labelled`, `unchanged`, `kept` and `dead`.

    Labels by others are kept, unless `relabel`. A label that would not change is not written again.
    """
    texts = index.token_bytes()
    base, seen = read_words(index, texts)
    complete = completion(seen)
    counts = dict.fromkeys(("labelled", "unchanged", "kept", "dead"), 0)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    new: list[Label] = []
    for latent in index.latents():
        feature = index.feature(latent)
        assert feature is not None
        if feature.label and feature.author != AUTHOR and not relabel:
            counts["kept"] += 1
            continue
        text = describe(index, latent, texts, base, complete)
        outcome = (
            "dead" if not text else "unchanged" if (text, AUTHOR) == (feature.label, feature.author) else "labelled"
        )
        counts[outcome] += 1
        if outcome == "labelled":
            new.append(Label(latent, text, AUTHOR, now))
    index.add_labels(new)
    return counts


def read_words(index: LabelIndex, texts: Mapping[int, bytes]) -> tuple[Counter[str], Counter[str]]:
    """In how many random examples each word or mark occurs (under "" how many there are), and all words of all."""
    base, seen = Counter[str](), Counter[str]()
    for latent in index.latents():
        for example in index.raw_examples(latent):
            if example.kind == "random":
                base.update({place.word or place.mark for place in read_places(example, texts)})
                base[""] += 1
            # The last word may be cut off by the window's end.
            seen.update(words_of(example, texts)[:-1])
    return base, seen


@dataclass
class Evidence:
    """Where the activation of one latent lies, as shares that sum to 1."""

    words: Shares = field(default_factory=dict)
    marks: Shares = field(default_factory=dict)
    pieces: dict[tuple[str, str], float] = field(default_factory=dict)
    before: Shares = field(default_factory=dict)
    after: Shares = field(default_factory=dict)
    opens: Shares = field(default_factory=dict)
    capital: Shares = field(default_factory=dict)
    """of each word, the share seen with a capital inside a sentence"""
    examples: int = 0
    first: float = 0.0
    """share on the first token of a window, which is where a text starts"""


def gather(places: Iterable[tuple[int, int, Place, float]]) -> Evidence:
    """The evidence in (example, place number, place, weight) of every token that fires."""
    strongest: dict[tuple[int, str], tuple[float, int, Place]] = {}
    for example, number, place, weight in places:
        once = (example, place.word or place.mark)
        if weight > strongest.get(once, (0.0, 0, place))[0]:
            strongest[once] = (weight, number, place)
    total = sum(weight for weight, _, _ in strongest.values())
    evidence = Evidence(examples=len({example for example, _ in strongest}))

    for weight, number, place in strongest.values():
        if place.piece is not None:
            evidence.pieces[place.piece] = evidence.pieces.get(place.piece, 0.0) + weight / total
        for shares, key in (
            (evidence.words, place.word), (evidence.marks, place.mark), (evidence.before, place.before),
            (evidence.after, place.after), (evidence.opens, place.opens),
            (evidence.capital, place.word if place.capital else ""),
        ):  # fmt: skip
            if key:
                shares[key] = shares.get(key, 0.0) + weight / total
        evidence.first += weight / total if number == 0 else 0.0
    return evidence


def describe(
    index: LabelIndex, latent: int, texts: Mapping[int, bytes], base: Counter[str], complete: Callable[[str], str]
) -> str:
    """The label of one latent; "" when it has no examples."""
    firing: list[tuple[int, int, Place, float]] = []
    for number, example in enumerate(index.raw_examples(latent)):
        if (peak := max(example.activations, default=0.0)) <= 0:
            continue
        for at, (place, value) in enumerate(zip(read_places(example, texts), example.activations, strict=True)):
            if value >= FAINT * peak:
                firing.append((number, at, place, value))
    if not firing:
        return ""
    on = fires_on(gather(firing), base)
    said = set(re.findall(r"[\w']+", on))
    promoted = [word for word in promoted_words(index.effects(latent)[0], complete) if word not in said][:MOST_PROMOTED]
    return f"{on} -> {', '.join(promoted)}" if promoted else on


def fires_on(evidence: Evidence, base: Counter[str]) -> str:
    """The words for what a latent fires on."""
    marks, words = sum(evidence.marks.values()), sum(evidence.words.values())
    if evidence.first > 0.7 and len(evidence.words) > 2:
        return f"start of the text: {', '.join(_best(evidence.words, base))}"
    if marks > 0.6:
        return _beside(_leading(evidence.marks), evidence, base)
    if (piece := _piece(evidence)) is not None:
        return f"{piece}: {', '.join(_leading(evidence.words, 3))}"
    function = sum(share for word, share in evidence.words.items() if word in FUNCTION_WORDS)
    if function > 0.6 * words:
        leading = _leading({word: share for word, share in evidence.words.items() if word in FUNCTION_WORDS}, 3)
        return _beside([f'"{word}"' for word in leading], evidence, base)
    best = _best({word: share for word, share in evidence.words.items() if word not in FUNCTION_WORDS}, base)
    if _names(best, evidence):
        return f"names: {', '.join(best)}"
    if sum(evidence.opens.values()) > 0.8 and evidence.words[best[0]] < 0.5:
        kind = "line" if evidence.opens.get("line", 0.0) > 0.5 else "sentence"
        return f"start of a {kind}: {', '.join(best)}"
    if evidence.words[best[0]] > 0.7:
        return _phrase(best[0], evidence, base) or ", ".join(best)
    return ", ".join(best)


def completion(seen: Counter[str]) -> Callable[[str], str]:
    """A function that turns the beginning of a word into the commonest word of `seen` with it, if it is none itself."""

    @functools.cache
    def complete(start: str) -> str:
        if start in seen:
            return start
        whole = [word for word in seen if word.startswith(start)]
        return max(whole, key=lambda word: (seen[word], word), default=start) if len(start) > 2 else ""

    return complete


def promoted_words(promotes: Iterable[tuple[str, float]], complete: Callable[[str], str]) -> list[str]:
    """Words that begin with promoted tokens at half the strength of the strongest or more: case-folded, each once.

    A token that is no word itself, such as ` aftern`, stands for the one that `complete` makes of it.
    """
    found: list[str] = []
    tokens = list(promotes)
    for text, value in tokens:
        word = text.strip().casefold()
        if value < 0.5 * tokens[0][1] or text[:1] != " " or not re.fullmatch(r"[^\W\d_]{2,}", word):
            continue
        word = complete(word)
        if word and word not in found:
            found.append(word)
    return found


def _beside(what: list[str], evidence: Evidence, base: Counter[str]) -> str:
    """`what` with the words that stand before it, else behind it, where those tell anything."""
    name = ", ".join(what)
    for side, shares in (("after", evidence.before), ("before", evidence.after)):
        telling = {word: share for word, share in shares.items() if word not in FUNCTION_WORDS and word not in _NAMED}
        likely = [word for word in _best(telling, base) if telling[word] >= 0.15]
        # One of them must come back: in a few examples every neighbour has a large share.
        often = any(telling[word] > 1.5 / evidence.examples for word in likely)
        if often and sum(telling[word] for word in likely) >= 0.4:
            return f"{name} {side} {', '.join(likely)}"
    constant = _leading(evidence.before, 1)
    if constant and evidence.before[constant[0]] > 0.6:
        return f"{name} after {constant[0]}" if constant[0] in _NAMED else f'{name} after "{constant[0]}"'
    return name


def _phrase(word: str, evidence: Evidence, base: Counter[str]) -> str:
    """Two words where the second fires and the first is nearly always the same, else ""."""
    for front, share in evidence.before.items():
        rare = _lift(front, share, base) > 5 and front not in _NAMED and not front.startswith("'")
        if share > 0.7 and rare:
            return f"{front} {word}"
    return ""


def _piece(evidence: Evidence) -> str | None:
    """`word ending -ing` when one piece of different words takes most of the activation."""
    total: Shares = {}
    for (_, text), share in evidence.pieces.items():
        total[text] = total.get(text, 0.0) + share
    for text, share in total.items():
        if share > 0.6 and max(evidence.words.values()) < 0.5 * share:
            for place, pattern in (("start", "word starting {}-"), ("end", "word ending -{}")):
                if evidence.pieces.get((place, text), 0.0) > 0.8 * share:
                    return pattern.format(text)
            return f"word with -{text}-"
    return None


def _names(words: list[str], evidence: Evidence) -> bool:
    capital = sum(evidence.capital.get(word, 0.0) for word in words)
    return len(words) > 1 and capital > 0.6 * sum(evidence.words[word] for word in words)


def _leading(shares: Shares, most: int = 2) -> list[str]:
    """The largest shares, down to a third of the largest."""
    order = sorted(shares, key=lambda key: (-shares[key], key))[:most]
    return [key for key in order if shares[key] >= shares[order[0]] / 3]


def _best(shares: Shares, base: Counter[str]) -> list[str]:
    """Words by share times the logarithm of their lift, to a tenth of the best; the largest share if none lifts."""
    scores = {word: share * math.log(max(_lift(word, share, base), 1.0)) for word, share in shares.items()}
    order = sorted((word for word in scores if scores[word] > 0), key=lambda word: (-scores[word], word))[:MOST_WORDS]
    return [word for word in order if scores[word] >= scores[order[0]] / 10] or _leading(shares, 1)


def _lift(word: str, share: float, base: Counter[str]) -> float:
    return share / ((base[word] + 0.5) / (base[""] + 1))


_NAMED: Final = frozenset(MARKS.values()) | {"line break", "space", ""}
