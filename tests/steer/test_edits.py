"""What an edit says is what it prints."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.edits import KINDS, PLACES, Edit, SteeringSet, Strength
from steer.errors import SteerError, sentence

strengths = st.builds(
    Strength, st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["raw", "max", "norm"])
)
plain = st.builds(Strength, st.floats(allow_nan=False, allow_infinity=False))


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    kind = draw(st.sampled_from(KINDS))
    strength = None if kind == "ablate" else draw(plain if kind == "scale" else strengths)
    if_on = kind == "clamp" and draw(st.booleans())
    return Edit(draw(st.integers(0, 10**6)), kind, strength, if_on, draw(st.sampled_from(PLACES)))


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
    ],
)
def test_a_mistake_is_named(text: str, why: str) -> None:
    with pytest.raises(SteerError, match=why):
        Edit.parse(text)


def test_a_set_changes_into_another_and_keeps_the_first() -> None:
    one, two, three = (Edit.parse(text) for text in ("1 +1", "2 +1", "3 +1"))
    first = SteeringSet().add(one).add(two)
    assert first.put(0, three).edits == (three, two)
    assert first.move(0, 1).edits == (two, one)
    assert first.remove(0).edits == (two,)
    assert first.edits == (one, two)
    assert first.find(2) == 1
    assert first.find(9) is None


def test_muted_and_bypassed_edits_do_not_act() -> None:
    loud, quiet = Edit.parse("1 +1"), Edit(2, "ablate", muted=True)
    assert SteeringSet((loud, quiet)).live == (loud,)
    assert SteeringSet((loud, quiet), bypass=True).live == ()
