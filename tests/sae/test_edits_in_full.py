"""Every kind of edit in every place, under every condition and schedule, against a float64 loop over a whole reply."""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sae.compiled import CompiledEdit, CompiledSet
from sae.intervene import Steerer, Tally
from tests.sae.places import SPECIAL, place
from tests.sae.reference import KINDS, NORMALISE, D, F, Reference, Vector, make_sae

TOKENS, PROMPT = 9, 4
SPECIAL_AT = 2
SAID = ((1, 2),)
NEEDS_SAE = ("add", "clamp", "scale", "ablate", "floor", "cap", "bias", "project")


@dataclass
class Timing:
    """What the loop remembers of one edit."""

    met: bool = False
    began: int | None = None


def held(edit: CompiledEdit, t: int) -> bool:
    """Whether a position belongs to the place of an edit."""
    return {
        "all": True,
        "prompt": t < PROMPT - 1,
        "generated": t >= PROMPT - 1,
        "assistant": t >= PROMPT - 1 or any(first <= t < end for first, end in SAID),
        "last": t == PROMPT - 1,
        "range": edit.first <= t <= edit.last,
    }[edit.place]


def share64(edit: CompiledEdit, timing: Timing, t: int, f: Vector, special_too: bool) -> float | None:
    """What share of its strength an edit has at a position; None where it does not act."""
    readable = t not in (0, SPECIAL_AT)
    if edit.other is not None and readable and f[edit.other] > edit.above:
        timing.met = True
    if not held(edit, t) or not (readable or special_too or edit.special) or not (timing.met or edit.other is None):
        return None
    if timing.began is None:
        timing.began = t
    since = t - timing.began
    if edit.lasts is not None and since >= edit.lasts:
        return None
    return min(1.0, (since + 1) / (edit.ramp or 1)) * 0.5 ** (since / edit.decay if edit.decay else 0)


def delta64(of: Reference, edit: CompiledEdit, x: Vector, f: Vector) -> Vector | None:
    """What an edit adds at full strength; None where it does not act after all."""
    w_dec, (_, scale) = of.w["W_dec"], of.moments(x)
    if edit.kind == "vector":
        assert edit.direction_D is not None
        return [edit.value * each for each in edit.direction_D.double().tolist()]
    a, d = f[edit.latent], w_dec[edit.latent]
    if edit.kind == "project":
        along = sum(a * b for a, b in zip(x, d, strict=True)) / sum(each * each for each in d)
        return [-along * each for each in d]
    if edit.kind == "bias":
        pushed = of.encode(x, (edit.latent, edit.value))
        assume(pushed.gap > 1e-4)
        change = [new - old for new, old in zip(pushed.f, f, strict=True)]
        return [scale * sum(c * row[j] for c, row in zip(change, w_dec, strict=True)) for j in range(D)]
    if edit.if_on and a <= 0:
        return None
    amount = {
        "add": edit.value,
        "clamp": edit.value - a,
        "scale": (edit.value - 1) * a,
        "ablate": -a,
        "floor": max(a, edit.value) - a,
        "cap": min(a, edit.value) - a,
    }[edit.kind]
    return [scale * amount * each for each in d]


def steered64(of: Reference, xs: list[Vector], compiled: CompiledSet) -> tuple[list[Vector], list[int]]:
    """The stream of a whole reply, and at how many positions each edit acted."""
    timings, acted, ys = [Timing() for _ in compiled.edits], [0] * len(compiled.edits), []
    for t, x in enumerate(xs):
        f, y = of.encode(x), list(x)
        assume(f.gap > 1e-4)
        assume(all(abs(f.f[e.other] - e.above) > 1e-4 for e in compiled.edits if e.other is not None))
        if compiled.drop_error and (compiled.special_tokens or t not in (0, SPECIAL_AT)):
            y = of.decode(f.f, x)
        for number, (edit, timing) in enumerate(zip(compiled.edits, timings, strict=True)):
            share = share64(edit, timing, t, f.f, compiled.special_tokens)
            delta = delta64(of, edit, x, f.f) if share is not None else None
            if delta is not None and share is not None:
                acted[number] += 1
                y = [a + compiled.factor * share * b for a, b in zip(y, delta, strict=True)]
        ys.append(y)
    return ys, acted


counts = st.none() | st.integers(1, 6)


@st.composite
def edits(draw: st.DrawFn) -> CompiledEdit:
    kind = draw(st.sampled_from([*NEEDS_SAE, "vector"]))
    at = draw(st.sampled_from(["all", "prompt", "generated", "assistant", "last", "range"]))
    ends = sorted(draw(st.tuples(st.integers(0, TOKENS), st.integers(0, TOKENS)))) if at == "range" else (0, 0)
    direction = torch.randn(D, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    vector = kind == "vector"
    return CompiledEdit(
        kind,
        -1 if vector else draw(st.integers(0, F - 1)),
        draw(st.floats(-4, 4, width=32)),
        kind == "clamp" and draw(st.booleans()),
        at,
        draw(st.booleans()),
        *ends,
        other=draw(st.none() | st.integers(0, F - 1)),
        above=draw(st.sampled_from([0.0, 0.5, 1.5])),
        lasts=draw(counts),
        ramp=draw(counts),
        decay=draw(counts),
        source="file" if vector else "",
        direction_D=direction if vector else None,
    )


def run(steerer: Steerer, x: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """The stream as several forward passes leave it, cut before each of some positions."""
    parts, borders = [], [0, *cuts, x.shape[1]]
    for start, end in pairwise(borders):
        where = place(1, end - start, PROMPT)
        where.positions_BT += start
        where.tokens_BT[where.positions_BT == SPECIAL_AT] = SPECIAL
        parts.append(steerer(x[:, start:end], where))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    chosen=st.lists(edits(), min_size=1, max_size=3),
    seed=st.integers(0, 2**20),
    normalise=st.sampled_from(NORMALISE),
    cuts=st.sets(st.integers(1, TOKENS - 1)),
    drop=st.booleans(),
    special=st.booleans(),
    factor=st.sampled_from([1.0, 0.5]),
)
def test_every_set_of_edits_in_any_passes_equals_a_float64_loop(
    kind: str,
    chosen: list[CompiledEdit],
    seed: int,
    normalise: str,
    cuts: set[int],
    drop: bool,
    special: bool,
    factor: float,
) -> None:
    sae = make_sae(kind, normalise, seed % 7)
    x = torch.randn(1, TOKENS, D, generator=torch.Generator().manual_seed(seed)) * 2
    compiled = CompiledSet(tuple(chosen), drop, special, factor)
    wanted, acted = steered64(Reference(sae), x[0].double().tolist(), compiled)
    steerer = Steerer(sae, {SPECIAL}, sets={0: compiled})
    steerer.gate.assistant = {0: SAID}
    y = run(steerer, x, sorted(cuts))
    torch.testing.assert_close(y[0].double(), torch.tensor(wanted, dtype=torch.float64), atol=1e-4, rtol=1e-4)
    for edit, count in zip(chosen, acted, strict=True):
        if chosen.count(edit) == 1:
            assert Tally.of(steerer.traces[0, edit]).positions == count


@settings(max_examples=60, deadline=None)
@given(first=st.lists(edits(), max_size=2), then=st.lists(edits(), max_size=2), at=st.integers(PROMPT, TOKENS - 1))
def test_rows_of_different_sets_that_change_on_the_way_equal_the_rows_alone(
    first: list[CompiledEdit], then: list[CompiledEdit], at: int
) -> None:
    """Row 3 goes from one set to another, row 5 the other way round; a third has none."""
    sae, x = make_sae(), torch.randn(3, TOKENS, D, generator=torch.Generator().manual_seed(at))
    one, two = CompiledSet(tuple(first)), CompiledSet(tuple(then))
    sets = {3: (one, two), 5: (two, one)}

    def through(rows: tuple[int, ...], x_BTD: torch.Tensor) -> torch.Tensor:
        steerer, parts = Steerer(sae, {SPECIAL}), []
        for start, end in ((0, PROMPT), *((t, t + 1) for t in range(PROMPT, TOKENS))):
            steerer.sets = {row: both[start >= at] for row, both in sets.items()}
            where = place(len(rows), end - start, PROMPT, rows_named=rows)
            where.positions_BT += start
            parts.append(steerer(x_BTD[:, start:end], where))
        return torch.cat(parts, 1)

    together = through((3, 4, 5), x)
    for number, row in enumerate((3, 4, 5)):
        alone = through((row,), x[number : number + 1])
        torch.testing.assert_close(together[number], alone[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(together[1], x[1])


def test_a_schedule_survives_a_change_of_strength_and_starts_anew_when_the_edit_comes_back() -> None:
    sae, x = make_sae(), torch.zeros(1, 8, D)
    edit = CompiledEdit("add", 3, 1.0, lasts=3)
    steerer, acted = Steerer(sae), []
    for t, one in enumerate([(), (edit,), (replace(edit, value=2.0),), (), (edit,), (edit,), (edit,), (edit,)]):
        steerer.sets = {0: CompiledSet(one)}
        where = place(1, 1, 1)
        where.positions_BT += t
        acted.append(float((steerer(x[:, t : t + 1], where) - x[:, t : t + 1]).norm()))
    assert acted == pytest.approx([0, 1, 2, 0, 1, 1, 1, 0], abs=1e-6)
