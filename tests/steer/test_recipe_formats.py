"""Other tools' steering files, there and back: what a format can express comes back, what it cannot is named."""

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer.edits import Edit, Strength
from steer.errors import SteerError
from steer.recipe import Line, Recipe, SAEMark
from steer.recipe_formats import FORMATS, Asked, Read, find_format
from tests.steer.test_edits import edits

WIDTH, NOTHING = 6, Asked()
HOOKS = ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"]
NAMES = ("neuronpedia:llama/{}-res", "sparsify:org/repo")
LLAMA_70B = "meta-llama/Llama-3.3-70B-Instruct"
checked = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Rows:
    """A `Decoder` of made-up rows, biases and maxima."""

    def raw(self, edit: Edit) -> float:
        assert edit.strength is not None
        return edit.strength.number * {"raw": 1.0, "max": 4.0, "norm": 0.03}[edit.strength.unit]

    def maximum(self, edit: Edit) -> float | None:
        return 4.0

    def row(self, edit: Edit) -> Sequence[float]:
        seed = edit.latent if edit.latent is not None else 10**7 + len(edit.file)
        return np.random.default_rng(seed).normal(size=WIDTH).tolist()

    def along_bias(self, edit: Edit) -> float:
        return np.random.default_rng(edit.latent or 0).normal() * 3

    def scaled(self, edit: Edit) -> bool:
        return False


def marks(*hooks: str) -> tuple[SAEMark, ...]:
    return tuple(SAEMark(hook, names=tuple(name.format(hook.split(".")[1]) for name in NAMES)) for hook in hooks)


def there_and_back(name: str, recipe: Recipe, folder: Path, asked: Asked = NOTHING) -> tuple[Read, list[str]]:
    """What is read of what was written, and the sentences of the writing."""
    file = folder / ("vector.gguf" if name == "gguf" else f"file.{name}")
    written = find_format(name, "", "write").write(recipe, asked, Rows)
    file.write_bytes(written.content)
    return find_format(name, "", "read").read(file, asked, Rows), written.notes


def told(recipe: Recipe) -> list[tuple[Any, ...]]:
    """The edits in an order of their own, numbers to nine digits."""
    parts = [
        (str(replace(edit, strength=None if edit.kind == "project" else Strength(0.0))), edit.strength)
        for edit in recipe.steering.edits
    ]
    return sorted((text, strength and f"{strength.number:.9g}", strength and strength.unit) for text, strength in parts)


latents = st.integers(0, 500)
hooks = st.sampled_from(HOOKS)
values = st.floats(-1e4, 1e4).filter(lambda value: abs(value) > 1e-3)


def adds(place: str = "all+special") -> st.SearchStrategy[list[Edit]]:
    one = st.builds(
        lambda latent, value, hook: [Edit(latent, "add", Strength(value), place=place, hook=hook)],
        latents,
        values,
        hooks,
    )
    return one


def projects() -> st.SearchStrategy[list[Edit]]:
    """A latent projected out, alone or with something added along it."""

    def pair(latent: int, hook: str, value: float | None) -> list[Edit]:
        project = Edit(latent, "project", place="all+special", hook=hook)
        push = [] if value is None else [Edit(latent, "add", Strength(value), place="all+special", hook=hook)]
        return [project, *push]

    return st.builds(pair, latents.map(lambda latent: latent + 1000), hooks, st.none() | values)


@checked
@given(st.lists(adds() | projects(), min_size=1, max_size=5))
def test_what_a_csv_can_express_comes_back(tmp_path: Path, groups: list[list[Edit]]) -> None:
    recipe = Recipe.of(*(edit for group in groups for edit in group), saes=marks(*HOOKS))
    back, notes = there_and_back("lm-eval", recipe, tmp_path)
    assert told(back.recipe) == told(recipe)
    assert not any(note.startswith("left out") for note in notes)
    assert all(mark.names == ("sparsify:org/repo",) for mark in back.recipe.saes)


@checked
@given(st.sampled_from(["all", "all+special"]).flatmap(lambda place: st.lists(adds(place), min_size=1, max_size=5)))
def test_what_a_preset_can_add_comes_back(tmp_path: Path, groups: list[list[Edit]]) -> None:
    sampling = {"temperature": 0.5, "frequency_penalty": 1.0}
    recipe = Recipe.of(*(edit for [edit] in groups), saes=marks(*HOOKS), sampling=sampling, seed=16, max_tokens=32)
    back, notes = there_and_back("neuronpedia", recipe, tmp_path)
    assert back.recipe.steering == recipe.steering
    assert back.recipe.settings == recipe.settings
    assert {note.split(":")[0] for note in notes} <= {"changed"} and all("up to 300" in note for note in notes)


@pytest.mark.parametrize(("raw", "strength", "times"), [(300, 300, 1), (465.66, 232.83, 2), (-2400, -300, 8)])
def test_a_preset_stays_within_what_the_site_takes(tmp_path: Path, raw: float, strength: float, times: int) -> None:
    recipe = Recipe.of(Edit.parse(f"21 {raw}"), saes=marks(HOOKS[1]), special_tokens=True)
    written = find_format("neuronpedia", "", "write").write(recipe, NOTHING, Rows)
    preset = json.loads(written.content)
    assert (preset["features"][0]["strength"], preset["strength_multiplier"]) == (strength, times)
    assert [f"the file has {strength:g} and a" in note for note in written.notes] == [True] * (times > 1)


def test_a_strength_beyond_what_the_site_takes_is_said(tmp_path: Path) -> None:
    recipe = Recipe.of(Edit.parse("21 +4000"), Edit.parse("22 +8"), saes=marks(HOOKS[1]), special_tokens=True)
    back, [note] = there_and_back("neuronpedia", recipe, tmp_path)
    assert "the site may still cut it" in note and [str(edit)[:8] for edit in back.recipe.steering.edits] == [
        "21 +4000",
        "22 +8 on",
    ]


@checked
@given(st.lists(st.tuples(latents, hooks, st.integers(1, 4)), min_size=1, max_size=4, unique_by=lambda one: one[:2]))
def test_what_a_preset_can_project_comes_back(tmp_path: Path, times: list[tuple[int, str, int]]) -> None:
    each = [
        Edit(latent, "project", place="all+special", hook=hook) for latent, hook, count in times for _ in range(count)
    ]
    recipe = Recipe.of(*each, saes=marks(*HOOKS))
    back, notes = there_and_back("neuronpedia", recipe, tmp_path)
    assert back.recipe.steering == recipe.steering
    many = len({hook for _, hook, _ in times}) < len(times)
    assert [note.split(":")[0] for note in notes] == ["changed"] * many


@st.composite
def goodfire_edits(draw: st.DrawFn) -> Edit:
    kind = draw(st.sampled_from(["add", "clamp", "scale"]))
    strength = Strength(draw(values), "raw" if kind == "scale" else "max")
    when = f" when {draw(latents)} > {draw(values)!r}x" if draw(st.booleans()) else ""
    edit = Edit.parse(f"{kind} {draw(latents)} 1{when} at blocks.50.hook_resid_post")
    return replace(edit, strength=strength)


@checked
@given(st.lists(goodfire_edits(), min_size=1, max_size=5))
def test_what_goodfire_can_express_comes_back(tmp_path: Path, chosen: list[Edit]) -> None:
    recipe = Recipe.of(*chosen, saes=(SAEMark("blocks.50.hook_resid_post", d_sae=65536),))
    plain = len({edit.latent for edit in chosen}) == len(chosen) and {edit.kind for edit in chosen} == {"add"}
    is_variant = plain and not any(edit.when for edit in chosen)
    asked = Asked() if is_variant else Asked(sae_name=f"goodfire:{LLAMA_70B}")  # a controller does not name its model
    back, notes = there_and_back("goodfire", recipe, tmp_path, asked)
    assert told(back.recipe) == told(recipe)
    assert back.recipe.saes[0].d_sae == 65536
    assert not any("changed" in note for note in notes)
    assert ("edits" in json.loads((tmp_path / "file.goodfire").read_text())) == is_variant


def added(recipe: Recipe) -> dict[str, Any]:
    """By hook point, what the edits of a recipe add together."""
    from llama_3.config import ModelConfig
    from llama_3.hooks import HookPoint
    from steer.vectors import load_vector
    from tests.tiny import tiny_config

    config: ModelConfig = tiny_config(d_model=WIDTH)
    sums: dict[str, Any] = defaultdict(float)
    for edit in recipe.steering.edits:
        assert edit.strength is not None and edit.place == "all+special"
        is_ours = edit.kind == "vector"
        row = load_vector(edit.file, HookPoint.parse(edit.hook), config)[0] if is_ours else Rows().row(edit)
        sums[edit.hook] = sums[edit.hook] + edit.strength.number * np.asarray(row, np.float64)
    return sums


@checked
@given(st.lists(adds(), min_size=1, max_size=5))
def test_a_control_vector_adds_by_layer_what_the_edits_add(tmp_path: Path, groups: list[list[Edit]]) -> None:
    recipe = Recipe.of(*(edit for [edit] in groups))
    back, notes = there_and_back("gguf", recipe, tmp_path)
    before, after = added(recipe), added(back.recipe)
    assert before.keys() == after.keys() and len(back.recipe.lines) == len(after)
    scale = max(abs(direction).max() for direction in before.values())
    for hook, direction in before.items():
        np.testing.assert_allclose(after[hook], direction, atol=1e-6 * scale)
    assert len(notes) == 1 and "counted from 0" in notes[0]


def test_a_control_vector_is_one_that_llama_cpp_and_repeng_take(tmp_path: Path) -> None:
    """Read back by the package that both use, by their rules."""
    from gguf import GGMLQuantizationType, GGUFReader

    recipe = Recipe.of(
        Edit.parse("7 +2 on all+special at blocks.3.hook_resid_post"),
        Edit.parse("8 -1 on all+special at blocks.2.hook_resid_pre"),  # what enters block 2 leaves block 1
        Edit.parse("9 +1 on all+special at blocks.0.hook_resid_post"),
    )
    _, notes = there_and_back("gguf", recipe, tmp_path)
    reader = GGUFReader(tmp_path / "vector.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"  # type: ignore[union-attr]
    assert reader.get_field("controlvector.layer_count").contents() == 2  # type: ignore[union-attr]
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.3"]
    assert all(tensor.tensor_type == GGMLQuantizationType.F32 for tensor in reader.tensors)
    expected = 2 * np.asarray(Rows().row(recipe.lines[0].edit), np.float32)
    np.testing.assert_allclose(reader.tensors[1].data, expected, rtol=1e-6)
    assert "direction.0" in next(note for note in notes if "`9 +1" in note)


def plain(edit: Edit) -> Edit:
    """The edit with its hook point in our spelling, and 0 for `0x`."""
    from steer.recipe_formats import canonical

    edit = replace(edit, hook=canonical(edit.hook)) if edit.hook else edit
    if edit.strength and not edit.strength.number:  # nothing of a max is nothing
        edit = replace(edit, strength=Strength(0.0))
    if edit.when and not edit.when.above.number:
        edit = replace(edit, when=replace(edit.when, above=Strength(0.0)))
    return edit


@pytest.mark.parametrize("name", ["lm-eval", "neuronpedia", "goodfire", "gguf"])
@checked
@given(edit=edits(), raw=st.floats(-100, 100))
def test_an_edit_comes_back_or_is_named_with_the_reason(tmp_path: Path, name: str, edit: Edit, raw: float) -> None:
    edit = plain(edit)
    hook = edit.hook or "blocks.3.hook_resid_post"
    known = edit.strength is not None and edit.kind != "scale"
    recipe = Recipe((Line(edit, raw=raw if known else None),), saes=marks(hook))
    asked = Asked(sae_name=f"goodfire:{LLAMA_70B}") if name == "goodfire" else Asked()
    try:
        written = find_format(name, "", "write").write(recipe, asked, Rows)
    except SteerError as error:
        assert name == "gguf" and "32-bit" in str(error)
        return
    named = [note for note in written.notes if f"`{edit}`" in note]
    assert all(len(note) > len(str(edit)) + 20 for note in named)
    assert written.entries == (not any(note.startswith("left out") for note in named))
    if named or name == "gguf":
        return
    back, _ = there_and_back(name, recipe, tmp_path, asked)
    same = {replace(one, hook="") for one in back.recipe.steering.edits}
    assert same == {replace(edit, hook="")}


def test_a_muted_edit_and_settings_without_a_place_are_named(tmp_path: Path) -> None:
    muted = replace(Edit.parse("7 +2 on all+special at blocks.50.hook_resid_post"), muted=True)
    live = Edit.parse("8 +2 on all+special at blocks.50.hook_resid_post")
    recipe = Recipe.of(muted, live, saes=marks("blocks.50.hook_resid_post"), error="drop", seed=3, system="be brief")
    for name in FORMATS:
        asked = Asked(sae_name=f"goodfire:{LLAMA_70B}") if name == "goodfire" else Asked()
        back, notes = there_and_back(name, recipe, tmp_path, asked)
        assert len(back.recipe.lines) == 1
        assert f"left out: `{muted}`: it is muted" in notes
        assert any("error = drop" in note for note in notes)
        lost = next(note for note in notes if "no place for" in note)
        assert "system" in lost and ("seed" in lost) == (name != "neuronpedia") == lost.endswith("them")


def test_a_set_that_edits_special_tokens_needs_no_word_about_them(tmp_path: Path) -> None:
    edit = Edit.parse("8 +2 at blocks.3.hook_resid_post")
    recipe = Recipe.of(edit, saes=marks(HOOKS[1]), special_tokens=True)
    for name in ("lm-eval", "neuronpedia"):
        back, notes = there_and_back(name, recipe, tmp_path)
        assert notes == [] and back.recipe.steering.edits == (replace(edit, place="all+special"),)
    _, notes = there_and_back("lm-eval", replace(recipe, special_tokens=False), tmp_path)
    assert len(notes) == 1 and "first token" in notes[0]


def test_csv_cells_are_quoted(tmp_path: Path) -> None:
    line = Line(Edit.parse("8 +2 on all+special at blocks.3.hook_resid_post"), label='a, "b"\nc')
    there_and_back("lm-eval", Recipe((line,), saes=marks(HOOKS[1])), tmp_path)
    with (tmp_path / "file.lm-eval").open(newline="") as handle:
        assert next(csv.DictReader(handle))["description"] == line.label


@pytest.mark.parametrize("name", FORMATS)
def test_an_edit_on_a_place_or_without_a_hook_is_left_out_by_every_format(name: str) -> None:
    asked = Asked(sae_name=f"goodfire:{LLAMA_70B}") if name == "goodfire" else NOTHING
    reply, nowhere = Edit.parse("8 +2 on generated at blocks.50.hook_resid_post"), Edit.parse("9 +2")
    notes = find_format(name, "", "write").write(Recipe.of(reply, nowhere), asked, Rows).notes
    assert f"left out: `{reply}`: the format does not tell tokens apart, and it acts on generated" in notes
    homeless = f"left out: `{nowhere}`: nothing says where it acts: give it `at HOOK`"
    assert (homeless in notes) == (name != "goodfire")  # whose model says where
