"""Steering files as other tools write them; damage is one sentence, whatever the file holds."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.edits import Edit, Strength
from steer.errors import SteerError, sentence
from steer.recipe import Recipe, SAEMark
from steer.recipe_formats import FORMATS, Asked, Read, find_format
from tests.steer.test_recipe_formats import LLAMA_70B, NOTHING, Rows, checked


def read(name: str | None, file: Path, content: str | bytes, asked: Asked = NOTHING) -> Read:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return find_format(name, str(file), "read").read(file, asked, Rows)


def test_the_csv_of_the_harness_documentation_is_read(tmp_path: Path) -> None:
    text = """loader,action,sparse_model,hookpoint,feature_index,steering_coefficient,sae_id,description,
sparsify,add,EleutherAI/sae-pythia-70m-32k,layers.3,30,10.0,,,
sae_lens,add,gemma-scope-2b-pt-res-canonical,layers.20,12082,240.0,layer_20/width_16k/canonical,increase dogs,
"""
    back = read(None, tmp_path / "steer.csv", text)
    assert [str(edit) for edit in back.recipe.steering.edits] == [
        "30 +10 on all+special at blocks.3.hook_resid_post",
        "12082 +240 on all+special at blocks.20.hook_resid_post",
    ]
    assert back.recipe.lines[1].label == "increase dogs"
    assert [mark.names for mark in back.recipe.saes] == [
        ("sparsify:EleutherAI/sae-pythia-70m-32k",),
        ("sae_lens:gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical",),
    ]
    assert any("last row" in note for note in back.notes)


def test_rows_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    header = "loader,action,sparse_model,hookpoint,feature_index,steering_coefficient,head_index,colour\n"
    rows = "sparsify,add,a,layers.3,30,10,2,red\nsparsify,add,a,layers.3,31,1,,\nsparsify,add,b,layers.3,32,1,,\n"
    back = read("lm-eval", tmp_path / "x.csv", header + rows)
    assert [line.edit.latent for line in back.recipe.lines] == [31]
    assert [note for note in back.notes if "head_index 2" in note and "line 2" in note]
    assert [note for note in back.notes if "another SAE" in note and "line 4" in note]
    assert [note for note in back.notes if "colour" in note]


def test_a_neuronpedia_link_and_a_file_of_links_are_read(tmp_path: Path) -> None:
    link = "https://www.neuronpedia.org/llama3-8b-it/25-res-jh/18895"
    reader = find_format(None, link, "read")
    one = reader.read(Path(link), Asked(strength=Strength.parse("30%")), Rows)
    assert [str(edit) for edit in one.recipe.steering.edits] == ["18895 +30% at blocks.25.hook_resid_post"]
    assert one.recipe.saes[0].names == ("neuronpedia:llama3-8b-it/25-res-jh",)
    assert "18895" in one.notes[0]
    assert (one.recipe.name, one.recipe.notes) == ("llama3-8b-it/25-res-jh/18895", f"from {link}")
    many = read(None, tmp_path / "links.txt", f"# mine\n{link}?embed=true 12.5\n\n{link[:-1]}6 -2x\n")
    assert [str(edit).split(" at")[0] for edit in many.recipe.steering.edits] == ["18895 +12.5", "18896 -2x"]
    assert many.notes == []


def test_a_request_of_the_steering_api_is_read(tmp_path: Path) -> None:
    feature = {"modelId": "llama3.1-8b", "layer": "19-llamascope-res-32k", "index": "10200", "strength": 5}
    request = {
        "prompt": "hi",
        "modelId": "llama3.1-8b",
        "features": [feature, feature | {"index": 3, "strength": None}],
    }
    request |= {"temperature": 0.2, "n_tokens": 16, "freq_penalty": 1.0, "seed": 16, "strength_multiplier": 4}
    request |= {"features": [*request["features"], {"vector": [1, 2]}], "steer_special_tokens": False, "shiny": True}
    back = read(None, tmp_path / "request.json", json.dumps(request))
    assert [str(edit) for edit in back.recipe.steering.edits] == [
        "10200 +20 at blocks.19.hook_resid_post",
        "3 +1x at blocks.19.hook_resid_post",
    ]
    assert back.recipe.settings == {"temperature": 0.2, "frequency_penalty": 1.0, "seed": 16, "max_tokens": 16}
    assert [note.split(":")[0] for note in back.notes] == ["assumed", "left out", "left out"]
    assert "shiny" in back.notes[2] and "feature 3" in back.notes[1]


@pytest.mark.parametrize(
    ("method", "strengths", "kinds"),
    [
        ("ORTHOGONAL_DECOMP", [0, -1, 1, 0.5], ["project"] * 3),
        ("PROJECTION_CAP", [3], []),
        ("SIMPLE_ADDITIVE", [3], ["add"]),
    ],
)
def test_what_a_steering_method_does_is_said_or_named(
    tmp_path: Path, method: str, strengths: list[float], kinds: list[str]
) -> None:
    features = [{"layer": "3-res", "index": 40 + i, "strength": value} for i, value in enumerate(strengths)]
    preset = json.dumps({"steerMethod": method, "features": features, "modelId": "m"})
    back = read("neuronpedia", tmp_path / "preset.json", preset)
    assert [edit.kind for edit in back.recipe.steering.edits] == kinds
    lost = [note for note in back.notes if note.startswith("left out")]
    assert len(lost) == {"ORTHOGONAL_DECOMP": 1, "PROJECTION_CAP": 1}.get(method, 0)
    assert method == "SIMPLE_ADDITIVE" or "feature 4" in lost[0]


def feature(latent: int) -> dict[str, Any]:
    return {"uuid": "u", "label": f"label {latent}", "max_activation_strength": 3, "index_in_sae": latent}


def scope(latent: int, operator: str, bound: Any, **more: Any) -> dict[str, Any]:
    condition = {"left_hand": {"features": [feature(latent)]}, "right_hand": bound, "operator": operator}
    inner = {"interventions": [{"mode": "pin", "features": {"features": [feature(9)]}, "value": 0.0}], "scopes": []}
    group = {"conditionals": [condition], "operator": "AND"}
    return {"conditionals": group, "controller": inner, "is_active": False, "event_name": None} | more


def test_a_goodfire_variant_is_read(tmp_path: Path) -> None:
    edit = {"feature_id": "a16920eb", "feature_label": "like a pirate", "index_in_sae": 33234, "value": 0.9}
    variant = {"base_model": LLAMA_70B, "edits": [edit], "scopes": []}
    back = read(None, tmp_path / "variant.json", json.dumps(variant))
    assert [str(edit) for edit in back.recipe.steering.edits] == ["33234 +0.9x at blocks.50.hook_resid_post"]
    assert back.recipe.lines[0].label == "like a pirate"
    assert back.recipe.saes == (SAEMark("blocks.50.hook_resid_post", d_sae=65536, names=(f"goodfire:{LLAMA_70B}",)),)


def test_a_goodfire_controller_is_read_and_what_it_cannot_say_is_named(tmp_path: Path) -> None:
    interventions = [
        {"mode": "nudge", "features": {"features": [feature(5), feature(6)]}, "value": 0.4},
        {"mode": "mul", "features": {"features": [feature(7)]}, "value": 2},
        {"mode": "pin", "features": {"features": [feature(8)]}, "value": True},
    ]
    scopes = [
        scope(3, ">", 0.5),
        scope(3, "==", 0.5),
        scope(3, ">", 1, event_name="stop"),
        scope(3, ">", {"features": []}),
    ]
    controller = {"interventions": interventions, "scopes": scopes, "name": "c", "min_nudge_entropy": 0.5}
    with pytest.raises(SteerError, match="does not name its model"):
        read(None, tmp_path / "c.json", json.dumps(controller))
    back = read(None, tmp_path / "c.json", json.dumps(controller), Asked(hook="blocks.50.hook_resid_post"))
    assert [str(edit).split(" at ")[0] for edit in back.recipe.steering.edits] == [
        "5 +0.4x",
        "6 +0.4x",
        "scale 7 2",
        "clamp 8 0.5x",
        "clamp 9 0 when 3 > 0.5x",
    ]
    lost = [note for note in back.notes if note.startswith("left out")]
    assert [note.split(":")[1].strip()[:7] for note in lost] == ["scope 2", "scope 3", "scope 4", "min_nud"]


def test_goodfire_files_are_of_goodfires_saes_unless_it_is_told(tmp_path: Path) -> None:
    variant = json.dumps({"base_model": "org/other", "edits": [], "scopes": []})
    with pytest.raises(SteerError, match="org/other"):
        read("goodfire", tmp_path / "v.json", variant)
    recipe = Recipe.of(Edit.parse("5 +1x"), saes=(SAEMark("blocks.3.hook_resid_post"),))
    writer = find_format("goodfire", "", "write")
    with pytest.raises(SteerError, match="not of one") as refused:
        writer.write(recipe, Asked(), Rows)
    assert "--sae-name" in (refused.value.hint or "")
    small = Recipe.of(Edit.parse("5 +1x"), saes=(SAEMark("blocks.50.hook_resid_post", d_sae=4096),))
    with pytest.raises(SteerError, match="not of one"):
        writer.write(small, Asked(), Rows)
    written = writer.write(recipe, Asked(sae_name=f"goodfire:{LLAMA_70B}"), Rows)
    assert json.loads(written.content)["base_model"] == LLAMA_70B
    assert any("act at blocks.3" in note for note in written.notes)


def _deep(text: str) -> str:
    return text * 100_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lm-eval", "a,b\n1,2\n"),
        ("lm-eval", "feature_index,steering_coefficient,hookpoint\nx,1,layers.3\n"),
        ("lm-eval", "feature_index,steering_coefficient,hookpoint\n1,nan,layers.3\n"),
        ("lm-eval", "feature_index,steering_coefficient,hookpoint\n1,1,nowhere\n"),
        ("lm-eval", "feature_index,steering_coefficient\n1,1\n"),
        ("lm-eval", "feature_index,steering_coefficient,hookpoint,action\n1,1,layers.3,dance\n"),
        ("lm-eval", 'feature_index,"steering_coefficient\n1,1'),
        ("lm-eval", b"\xff\xfe\x00"),
        ("lm-eval", ""),
        ("gguf", b"GGUF" + bytes(20)),
        ("gguf", b"not a gguf"),
        ("gguf", b""),
        ("neuronpedia", "{"),
        ("neuronpedia", _deep("[")),
        ("neuronpedia", '{"features": 3}'),
        ("neuronpedia", '{"features": [{"index": -1, "layer": "3-res", "strength": 1}]}'),
        ("neuronpedia", '{"features": [{"index": 1, "layer": "", "strength": 1}]}'),
        ("neuronpedia", '{"features": [{"index": 1, "layer": "3-res", "strength": "much"}]}'),
        ("neuronpedia", '{"features": [], "steer_method": "DANCE"}'),
        ("neuronpedia", '{"features": [{"index": 1, "layer": "3-res", "strength": 1}], "seed": -4}'),
        ("neuronpedia", '{"features": [{"index": 1, "layer": "3-res", "strength": 1}], "temperature": -4}'),
        ("neuronpedia", "https://example.org/a/b/3"),
        ("goodfire", "[]"),
        ("goodfire", '{"edits": 3, "base_model": "MODEL"}'),
        (
            "goodfire",
            '{"edits": [{"index_in_sae": 1.5, "value": 1}], "base_model": "MODEL"}',
        ),
        (
            "goodfire",
            '{"edits": [{"index_in_sae": 1, "value": null}], "base_model": "MODEL"}',
        ),
        (
            "goodfire",
            '{"edits": [{"index_in_sae": 1, "value": {"mode": "x", "value": 1}}], "base_model": "MODEL"}',
        ),
    ],
)
def test_damage_is_one_sentence(tmp_path: Path, name: str, content: str | bytes) -> None:
    with pytest.raises((SteerError, ValueError)) as error:
        read(name, tmp_path / "file", content.replace("MODEL", LLAMA_70B) if isinstance(content, str) else content)
    assert type(error.value) is not UnicodeDecodeError and "\n" not in str(error.value) and len(str(error.value)) > 20


@pytest.mark.parametrize("name", list(FORMATS))
@checked
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_content_is_a_recipe_or_one_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    try:
        read(name, tmp_path / "file", content)
    except (SteerError, ValueError) as error:
        assert "\x1b" not in sentence(error)


def test_a_control_vector_that_ends_early_is_damaged(tmp_path: Path) -> None:
    edit = Edit.parse("8 +2 on all+special at blocks.3.hook_resid_post")
    content = find_format("gguf", "", "write").write(Recipe.of(edit), NOTHING, Rows).content
    assert len(read("gguf", tmp_path / "whole.gguf", content).recipe.lines) == 1
    with pytest.raises(SteerError, match="beyond its end"):
        read("gguf", tmp_path / "cut.gguf", content[:-16])


def test_control_vectors_of_others_are_read_with_what_is_odd_about_them(tmp_path: Path) -> None:
    """A file as repeng's `export_gguf` writes it, for another model, with a layer 0 and a tensor that is none of it."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", 2)
    for layer in (15, 0):
        writer.add_tensor(f"direction.{layer}", np.ones(6, np.float32))
    writer.add_tensor("direction.3", np.ones(6, np.float16))
    writer.add_tensor("bias", np.ones(6, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = tmp_path / "v.gguf"
    back = find_format(None, str(file), "read").read(file, Asked(coefficient=-0.5), Rows)
    assert [str(edit) for edit in back.recipe.steering.edits] == [
        f"vector {file} -0.5 on all+special at blocks.{layer}.hook_resid_post" for layer in (0, 15)
    ]
    for told in ("bias", "direction.3", "direction.0", "`mistral`", "counted from 0"):
        assert any(told in note for note in back.notes), told


def _json() -> st.SearchStrategy[Any]:
    keys = st.sampled_from(
        ["edits", "interventions", "scopes", "features", "index", "strength", "layer", "value", "mode", "conditionals"]
        + ["index_in_sae", "left_hand", "right_hand", "operator", "controller", "seed", "temperature", "base_model"]
    )
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([LLAMA_70B, "3-res", ">", "pin"])
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner), max_leaves=12)


@pytest.mark.parametrize("name", ["neuronpedia", "goodfire"])
@checked
@given(data=_json())
def test_any_json_is_a_recipe_or_one_sentence(tmp_path: Path, name: str, data: Any) -> None:
    try:
        read(name, tmp_path / "file", json.dumps(data), Asked(hook="blocks.3.hook_resid_post"))
    except SteerError as error:
        assert "\n" not in sentence(error)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "large.csv"
    with file.open("wb") as handle:
        handle.truncate(1 << 30)
    with pytest.raises(SteerError, match="bytes"):
        find_format(None, str(file), "read").read(file, Asked(), Rows)


def test_the_format_is_told_by_the_file_or_by_a_flag(tmp_path: Path) -> None:
    (tmp_path / "v.json").write_text('{"edits": []}')
    (tmp_path / "p.json").write_text('{"features": []}')
    for file, what, title in (
        ("a.csv", "read", "lm-evaluation-harness"),
        ("a.gguf", "write", "GGUF"),
        (str(tmp_path / "v.json"), "read", "Goodfire"),
        (str(tmp_path / "p.json"), "read", "Neuronpedia"),
        ("links.txt", "read", "Neuronpedia"),
    ):
        assert find_format(None, file, what).TITLE.startswith(title)
    for name, file, what in ((None, "a.json", "write"), (None, "a", "read"), ("x", "a.csv", "read")):
        with pytest.raises(SteerError) as error:
            find_format(name, file, what)
        assert "neuronpedia" in (error.value.hint or "")
