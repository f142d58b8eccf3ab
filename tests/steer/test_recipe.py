"""A recipe comes back as it was, and a file that is none is refused in one sentence."""

import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.edits import Edit
from steer.errors import SteerError, sentence
from steer.events import CONTROL
from steer.recipe import LARGEST, Line, ModelMark, Recipe, SAEMark
from tests.steer.test_edits import edits

numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
counts = st.none() | st.integers(0, 2**40)
texts = st.text(st.characters(codec="utf-8"), max_size=20)
biases = st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e6, 1e6) | st.just(-math.inf)), max_size=3).map(tuple)
samplings = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 5),
        "top_p": st.floats(0.01, 1),
        "top_k": st.integers(0, 100),
        "repetition_penalty": st.floats(0.5, 2),
        "logit_bias": biases,
    },
)
lines = st.builds(
    Line,
    st.builds(lambda edit, muted: replace(edit, muted=muted), edits(), st.booleans()),
    numbers,
    numbers,
    numbers,
    texts,
    texts,
)
recipes = st.builds(
    Recipe,
    st.lists(lines, max_size=4).map(tuple),
    st.sampled_from(["keep", "drop"]),
    st.booleans(),
    samplings,
    st.none() | st.integers(0, 2**31 - 1),
    st.none() | st.integers(1, 10**6),
    st.none() | texts,
    texts,
    texts,
    texts,
    texts,
    st.none() | st.builds(ModelMark, texts, texts, texts, counts, counts, texts, texts),
    st.lists(
        st.builds(
            SAEMark,
            texts.filter(bool),
            texts,
            counts,
            counts,
            texts,
            st.lists(texts, min_size=1, max_size=2).map(tuple),
        ),
        max_size=2,
    ).map(tuple),
)


@settings(max_examples=150, deadline=None)
@given(recipes)
def test_what_is_written_reads_back_as_the_same_recipe(recipe: Recipe) -> None:
    text = recipe.text()
    assert Recipe.parse(text) == recipe
    assert not CONTROL.search(text)  # so that a terminal may print it
    assert tomllib.loads(text)["format"] == "steer-recipe"


def test_three_lines_are_a_recipe() -> None:
    recipe = Recipe.parse('format = "steer-recipe"\nversion = 1\n[[edit]]\nedit = "21863 +1.1x"\n')
    assert recipe == Recipe.of(Edit.parse("21863 +1.1x"))
    assert recipe.settings == {}


def test_a_file_of_a_vector_is_meant_from_the_recipes_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    near, far = tmp_path / "kept" / "kind one.npy", tmp_path / "far.npy"
    made = Recipe.of(*(Edit(None, "vector", Edit.parse("1 2").strength, file=str(file)) for file in (near, far)))
    made.write(tmp_path / "kept" / "r.toml")
    text = (tmp_path / "kept" / "r.toml").read_text()
    assert "vector 'kind one.npy' 2" in text and str(far) in text
    (tmp_path / "kept").rename(tmp_path / "moved")
    files = [line.edit.file for line in Recipe.read(tmp_path / "moved" / "r.toml").lines]
    assert files == [str(tmp_path / "moved" / "kind one.npy"), str(far)]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "r.toml"
    Recipe.of(Edit.parse("1 +2")).write(file)
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(SteerError, match="No space left"):
        Recipe.of(Edit.parse("1 +3")).write(file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


HEAD = 'format = "steer-recipe"\nversion = 1\n'


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("sed = 3", "`sed`", "known"),
        ('seed = "3"', "`seed`", "'3'"),
        ("seed = -3", "seed", "-3"),
        ("seed = true", "`seed`", "True"),
        ("max_tokens = 0", "tokens", "0"),
        ('error = "loose"', "`error`", "'loose'"),
        ("special_tokens = 1", "`special_tokens`", "1"),
        ("edit = 3", "`edit`", "3"),
        ("[[edit]]\nmuted = true", "`edit`", "edit 1"),
        ('[[edit]]\nedit = "21863 +1.1y"', "1.1y", "strength"),
        ('[[edit]]\nedit = "1 +1"\nwhen = 3', "`when`", "edit 1"),
        ('[[edit]]\nedit = "1 +1"\nraw = "x"', "`raw`", "'x'"),
        ('[[edit]]\nedit = "1 +1"\nraw = nan', "`raw`", "nan"),
        ("[sampling]\ntemprature = 0", "`temprature`", "[sampling]"),
        ("[sampling]\ntop_p = 4", "top_p", "4"),
        ("[sampling]\nlogit_bias = [3]", "`logit_bias`", "[3]"),
        ("[model]\nwidth = 1.5", "`width`", "1.5"),
        ("[[sae]]\nd_sae = 5", "`hook`", "[[sae]]"),
        ("[[sae]]\nhook = 'x'\nnames = 'y'", "`names`", "'y'"),
        ("sae = 3", "`sae`", "3"),
    ],
)
def test_what_is_wrong_is_named_with_its_value(tmp_path: Path, text: str, key: str, value: str) -> None:
    (tmp_path / "r.toml").write_text(HEAD + text)
    with pytest.raises(SteerError) as error:
        Recipe.read(tmp_path / "r.toml")
    said = sentence(error.value)
    assert "r.toml" in said and key in said and value in said


def test_a_near_miss_is_guessed() -> None:
    with pytest.raises(SteerError) as error:
        Recipe.parse(HEAD + "[sampling]\ntemprature = 0")
    assert error.value.hint == "did you mean `temperature`?"


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"\xff", b"a = " + b"[" * 100_000, b'version = 1\nformat = "other"', HEAD.replace("1", "2").encode()],
    ids=["empty", "no toml", "no text", "deep", "other", "newer"],
)
def test_a_file_that_is_no_recipe_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.toml").write_bytes(content)
    with pytest.raises(SteerError) as error:
        Recipe.read(tmp_path / "r.toml")
    assert "r.toml" in str(error.value) and "\n" not in sentence(error.value)


def test_a_file_that_is_too_large_or_missing_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bridges.csv").write_text("loader,action\nsae,add\n")
    with pytest.raises(SteerError, match=r"bridges.csv. cannot be used: it is no TOML") as caught:
        Recipe.read(tmp_path / "bridges.csv")
    assert caught.value.hint and "steer recipe import" in caught.value.hint
    with pytest.raises(SteerError, match="No such file"):
        Recipe.read(tmp_path / "none.toml")
    (tmp_path / "large.toml").write_bytes(b"#" * (LARGEST + 1))
    with pytest.raises(SteerError, match="bytes"):
        Recipe.read(tmp_path / "large.toml")


def _values() -> st.SearchStrategy[Any]:
    return st.sampled_from(['"x"', "3", "-1", "1.5", "nan", "true", "[]", "[[1, 2]]", "{a = 1}", '["a"]', "1979-05-27"])


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["seed", "edit", "sae", "model", "sampling", "error", "system", "max_tokens", "notes"]),
            _values(),
        ),
        unique_by=lambda pair: pair[0],
    ),
    st.lists(st.tuples(st.sampled_from(["edit", "muted", "raw", "hook", "top_k", "logit_bias"]), _values())),
    st.sampled_from(["[[edit]]", "[[sae]]", "[sampling]", "[model]"]),
)
def test_any_toml_is_a_recipe_or_one_sentence(
    keys: list[tuple[str, str]], inner: list[tuple[str, str]], table: str
) -> None:
    text = HEAD + "".join(f"{key} = {value}\n" for key, value in keys)
    text += table + "\n" + "".join(f"{key} = {value}\n" for key, value in inner)
    try:
        recipe = Recipe.parse(text)
    except SteerError as error:
        assert "\n" not in sentence(error)
    else:
        assert Recipe.parse(recipe.text()) == recipe
