"""What an edit says is what it prints."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.edits import KINDS, PLACES, VALUELESS, Condition, Edit, SteeringSet, Strength
from steer.errors import SteerError, sentence

numbers = st.floats(allow_nan=False, allow_infinity=False)
units = st.sampled_from(["raw", "max", "norm"])
counts = st.none() | st.integers(1, 10**9)
ranges = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)).map(lambda ends: f"{min(ends)}..{max(ends)}")


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    kind = draw(st.sampled_from(KINDS))
    unit = draw({"scale": st.just("raw"), "vector": st.sampled_from(["raw", "norm"])}.get(kind, units))
    condition = st.builds(
        Condition, st.integers(0, 10**6), st.builds(Strength, numbers, st.sampled_from(["raw", "max"]))
    )
    return Edit(
        None if kind == "vector" else draw(st.integers(0, 10**6)),
        kind,
        None if kind in VALUELESS else Strength(draw(numbers), unit),
        kind == "clamp" and draw(st.booleans()),
        draw(st.sampled_from(list(PLACES)) | ranges),
        when=draw(st.none() | condition),
        lasts=draw(counts),
        ramp=draw(counts),
        decay=draw(counts),
        hook=draw(st.sampled_from(["", "blocks.3.hook_resid_post", "L5R"])),
        file=draw(st.text(min_size=1).filter(str.strip)) if kind == "vector" else "",
    )


@given(edits())
def test_what_is_printed_parses_back_to_the_same_edit(edit: Edit) -> None:
    assert Edit.parse(str(edit)) == edit


@given(st.text(max_size=40))
def test_any_text_is_an_edit_or_one_sentence(text: str) -> None:
    try:
        edit = Edit.parse(text)
    except SteerError as error:
        assert error.hint
        assert "\x1b" not in sentence(error)
    else:
        assert Edit.parse(str(edit)) == edit


@pytest.mark.parametrize(
    ("text", "edit"),
    [
        ("21863 +1.1x", Edit(21863, "add", Strength(1.1, "max"))),
        ("21863 -30%", Edit(21863, "add", Strength(-30.0, "norm"))),
        ("clamp 4410 0", Edit(4410, "clamp", Strength(0.0))),
        ("scale 902 2", Edit(902, "scale", Strength(2.0))),
        ("ABLATE 77", Edit(77, "ablate")),
        ("bias 5 3.0", Edit(5, "bias", Strength(3.0))),
        ("clamp 4410 0 if on on generated", Edit(4410, "clamp", Strength(0.0), True, "generated")),
        ("add 7 1e-3 on prompt", Edit(7, "add", Strength(0.001), place="prompt")),
        (
            "clamp 4410 0 when 902 > 2 on generated decay 20",
            Edit(4410, "clamp", Strength(0.0), place="generated", when=Condition(902, Strength(2.0)), decay=20),
        ),
        ("5 1x when 9>0.5x", Edit(5, "add", Strength(1.0, "max"), when=Condition(9, Strength(0.5, "max")))),
        ("5 +1 on 4..9 for 40 tokens ramp 10", Edit(5, "add", Strength(1.0), place="4..9", lasts=40, ramp=10)),
        ("floor 5 1 for 1 token", Edit(5, "floor", Strength(1.0), lasts=1)),
        ("cap 5 1 for 7", Edit(5, "cap", Strength(1.0), lasts=7)),
        ("project out 5 on all+special", Edit(5, "project", place="all+special")),
        ("vector 'a b.npy' 30% at L5R", Edit(None, "vector", Strength(30, "norm"), file="a b.npy", hook="L5R")),
    ],
)
def test_the_forms_of_the_manual(text: str, edit: Edit) -> None:
    assert Edit.parse(text) == edit


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "the latent is missing"),
        ("clamp", "the latent is missing"),
        ("-3 1", "`-3` is no latent"),
        ("\N{ARABIC-INDIC DIGIT THREE} 1", "is no latent"),
        ("5", "add needs a value"),
        ("5 nan", "`nan` is no strength"),
        ("5 1e999", "`1e999` is no strength"),
        ("ablate 5 1", "ablate takes no value"),
        ("scale 5 2x", "scale takes a plain factor"),
        ("5 1 if on", "goes with clamp"),
        ("5 1 on moon", "`moon` is no place"),
        ("5 1 and more", "was not understood"),
        ("5 1 on 9..4", "`9..4` is no place"),
        ("5 1 for 0 tokens", "for takes a whole number of tokens from 1"),
        ("5 1 ramp -2", "ramp takes a whole number of tokens from 1"),
        ("5 1 decay 2 decay 3", "it says `decay` twice"),
        ("5 1 when 4", "a condition reads `when OTHER > X`"),
        ("5 1 when x > 4", "`x` is no latent"),
        ("5 1 when 4 > 3%", "a condition is raw or a share of max"),
        ("project 5 1", "project takes no value"),
        ("floor 5", "floor needs a value"),
        ("vector", "the file is missing"),
        ("vector a.npy", "vector needs a value"),
        ("vector a.npy 1x", "a vector has no recorded max"),
        ("vector 'a.npy 1", "a quotation is not closed"),
    ],
)
def test_a_mistake_is_named(text: str, why: str) -> None:
    with pytest.raises(SteerError, match=why):
        Edit.parse(text)


@pytest.mark.parametrize(
    ("text", "why", "hint"),
    [
        ("klamp 2229 0", "`klamp` is no latent", "did you mean `clamp`?"),
        ("book +0.4x", "`book` is no latent", "`steer features search book`"),
        ("2229+1x", r"`2229\+1x` is no latent", "a space stands before its strength"),
        ("+1x 5", r"`\+1x` is no latent", "its strength comes after it"),
        ("5 1 on 9..4", r"`5 \+1 on 9..4` .* its first position is after its last", "write `on 4..9`"),
        ("5 1 on nowhere", "`nowhere` is no place", "all, all+special, prompt, generated, assistant, last and ranges"),
        ("5 1 when 902 < 1", "knows `>` alone, and no `<`", "`when 902 > 2`"),
        ("5 1 when 902>=1", "knows `>` alone, and no `>=`", "`when 902 > 2`"),
        ("5 1 onn all", "`onn all` was not understood", "did you mean `on`?"),
        ("scale 5", "scale needs a value", "as `scale 5 2`"),
        ("5 1 and more", "was not understood", "write [KIND] LATENT"),
    ],
)
def test_a_mistake_has_its_own_hint(text: str, why: str, hint: str) -> None:
    with pytest.raises(SteerError, match=why) as error:
        Edit.parse(text)
    assert error.value.hint and hint in error.value.hint


def test_a_set_changes_into_another_and_keeps_the_first() -> None:
    one, two, three = (Edit.parse(text) for text in ("1 +1", "2 +1", "3 +1"))
    first = SteeringSet().add(one).add(two)
    assert first.put(0, three).edits == (three, two)
    assert first.move(0, 1).edits == (two, one)
    assert first.remove(0).edits == (two,)
    assert first.edits == (one, two)
    assert first.find(2) == 1
    assert first.find(9) is None


def test_the_latents_of_the_first_sae_are_told_with_or_without_its_hook_point() -> None:
    texts = "7 +1", "5 +1 at blocks.1.hook_resid_post", "9 +1 at blocks.0.hook_resid_post", "ablate 7", "vector v.npy 1"
    edits = SteeringSet(tuple(map(Edit.parse, texts)))
    assert list(edits.places("blocks.1.hook_resid_post").items()) == [(7, 0), (5, 1)]
    assert edits.places(None) == {7: 0}


def test_muted_and_bypassed_edits_do_not_act() -> None:
    loud, quiet = Edit.parse("1 +1"), Edit(2, "ablate", muted=True)
    assert SteeringSet((loud, quiet)).live == (loud,)
    assert SteeringSet((loud, quiet), bypass=True).live == ()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_strength_is_finite(number: float) -> None:
    with pytest.raises(SteerError, match="is no number to steer with"):
        Strength(number)
