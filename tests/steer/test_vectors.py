"""Directions from files: which are read, and what a wrong one is told."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llama_3.hooks import HookPoint
from steer.edits import Edit, SteeringSet
from steer.engine import Engine
from steer.errors import SteerError
from steer.events import Event
from steer.vectors import load_vector
from tests.steer.test_engine import ASK, end, run, tiny_sae, tokens
from tests.tiny import byte_tokenizer, tiny_config, tiny_model

CONFIG = tiny_config()
HOOK = HookPoint(1, "resid_post")
VECTOR = torch.linspace(-1, 1, CONFIG.d_model)


def write(folder: Path, name: str, vector: torch.Tensor = VECTOR) -> str:
    path = folder / name
    match path.suffix:
        case ".npy":
            np.save(path, vector.numpy())
        case ".safetensors":
            save_file({"direction": vector}, path)
        case ".gguf":
            writer = gguf.GGUFWriter(path, "controlvector")
            writer.add_tensor("direction.1", vector.numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    return str(path)


@pytest.mark.parametrize("name", ["v.npy", "v.safetensors", "v.gguf"])
def test_a_direction_comes_back_as_it_was_written(tmp_path: Path, name: str) -> None:
    vector, named = load_vector(write(tmp_path, name), HOOK, CONFIG)
    assert torch.equal(vector, VECTOR)
    assert named.startswith(str(tmp_path / name))


def test_a_safetensors_file_may_hold_one_for_each_hook_point(tmp_path: Path) -> None:
    file = tmp_path / "v.safetensors"
    save_file({str(HOOK): VECTOR, "blocks.0.hook_resid_post": -VECTOR}, file)
    assert torch.equal(load_vector(str(file), HOOK, CONFIG)[0], VECTOR)
    with pytest.raises(SteerError, match="holds 2 tensors, none of them named"):
        load_vector(str(file), HookPoint(1, "attn_out"), CONFIG)


@pytest.mark.parametrize("name", ["v.npy", "v.safetensors", "v.gguf"])
def test_damage_is_one_sentence(tmp_path: Path, name: str) -> None:
    path = Path(write(tmp_path, name))
    whole = path.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises((SteerError, ValueError)) as caught:
            load_vector(str(path), HOOK, CONFIG)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vector", "why"),
    [
        (torch.ones(CONFIG.d_model + 1), "have 32 numbers"),
        (torch.ones(4, CONFIG.d_model // 4), "have 32 numbers"),
        (VECTOR / 0, "not finite"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused(tmp_path: Path, vector: torch.Tensor, why: str) -> None:
    with pytest.raises(SteerError, match=why):
        load_vector(write(tmp_path, "v.npy", vector), HOOK, CONFIG)


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (VECTOR.numpy() * (1 + 2j), "complex"),
        (np.array(["a"] * CONFIG.d_model), "no numbers"),
        (np.ones(CONFIG.d_model, dtype=bool), "no numbers"),
        (np.full(CONFIG.d_model, 1e300), "not finite in 32 bits"),
        (np.zeros(0, np.float32), "damaged|have 32 numbers"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_an_array_that_is_no_vector_of_real_numbers_is_refused(tmp_path: Path, array: np.ndarray, why: str) -> None:
    np.save(tmp_path / "v.npy", array)
    with pytest.raises(SteerError, match=why):
        load_vector(str(tmp_path / "v.npy"), HOOK, CONFIG)


def test_so_are_an_archive_that_is_named_as_an_array_and_a_complex_tensor(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", a=VECTOR.numpy())
    (tmp_path / "v.npz").rename(tmp_path / "v.npy")
    with pytest.raises(SteerError, match="several arrays in an archive"):
        load_vector(str(tmp_path / "v.npy"), HOOK, CONFIG)
    save_file({"direction": VECTOR * (1 + 2j)}, tmp_path / "v.safetensors")
    with pytest.raises(SteerError, match="complex"):
        load_vector(str(tmp_path / "v.safetensors"), HOOK, CONFIG)


@pytest.mark.parametrize("name", ["v.npy", "v.safetensors", "v.gguf"])
def test_a_file_of_another_size_is_refused_before_it_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, name, torch.ones(2 * CONFIG.d_model))
    for module, reader in ((torch, "from_numpy"), (np, "fromfile"), (torch.Tensor, "reshape")):
        monkeypatch.setattr(module, reader, None)
    with pytest.raises(SteerError, match="have 32 numbers"):
        load_vector(file, HOOK, CONFIG)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32])
def test_a_column_of_another_type_is_a_vector_too(tmp_path: Path, dtype: type) -> None:
    np.save(tmp_path / "v.npy", np.arange(CONFIG.d_model).astype(dtype)[:, None])
    assert load_vector(str(tmp_path / "v.npy"), HOOK, CONFIG)[0].tolist() == list(range(CONFIG.d_model))


def test_what_is_no_vector_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("1 2 3")
    with pytest.raises(SteerError, match="no vector that is known"):
        load_vector(str(tmp_path / "v.txt"), HOOK, CONFIG)
    with pytest.raises(SteerError, match="cannot be read"):
        load_vector(str(tmp_path / "missing.npy"), HOOK, CONFIG)
    with pytest.raises(SteerError, match="cannot be read"):
        load_vector("~nobody-of-this-name/missing.npy", HOOK, CONFIG)
    with pytest.raises(SteerError, match="no direction for"):
        load_vector(write(tmp_path, "v.gguf"), HookPoint(0, "resid_post"), CONFIG)


def test_a_vector_steers_a_model_without_an_sae(tmp_path: Path) -> None:
    bare = Engine(tiny_model(), byte_tokenizer())
    file = write(tmp_path, "v.npy")
    edit = Edit.parse(f"vector {file} 9 at {HOOK} on generated")
    plain, pushed = (tokens(run(bare, [ASK], [SteeringSet(each)])) for each in ((), (edit,)))
    assert plain != pushed
    with pytest.raises(SteerError, match="does not say where"):
        bare.check(Edit.parse(f"vector {file} 9"))
    with pytest.raises(SteerError, match="no residual norm is known"):
        bare.check(Edit.parse(f"vector {file} 9% at {HOOK}"))
    with pytest.raises(SteerError, match="needs an SAE at"):
        bare.check(Edit.parse(f"5 +1 at {HOOK}"))


def test_the_row_of_a_latent_as_a_vector_does_what_adding_the_latent_does(tmp_path: Path) -> None:
    sae = tiny_sae()
    engine = Engine(tiny_model(), byte_tokenizer(), sae)
    file = write(tmp_path, "v.safetensors", sae.W_dec_FD[5].detach().clone())
    latent, vector = (
        tokens(run(engine, [ASK], [SteeringSet((Edit.parse(text),))]))
        for text in ("5 +30% on generated ramp 4", f"vector {file} 30% on generated ramp 4")
    )
    assert latent == vector != tokens(run(engine, [ASK], [SteeringSet()]))


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("gone", [False, True])
def test_the_report_names_what_ran_whatever_became_of_the_file(tmp_path: Path, gone: bool, reuse: bool) -> None:
    file = Path(write(tmp_path, "v.npy"))
    edit = Edit.parse(f"vector {file} 9 at {HOOK} on generated")
    sets = [SteeringSet((edit,)), SteeringSet((edit, Edit.parse("3 +1")))]

    def reply(meddles: bool) -> list[Event]:
        engine, used, events = Engine(tiny_model(), byte_tokenizer(), tiny_sae()), sets[:1], list[Event]()
        for event in engine.stream([ASK], lambda: used[-1], seeds=[0], max_tokens=6, reuse=reuse):
            events.append(event)
            if len(tokens(events)) == 2:
                used.append(sets[1])  # what it goes on with is still the direction that the reply began with
                if meddles:
                    file.unlink(missing_ok=True)
                if meddles and not gone:
                    write(tmp_path, "v.npy", -VECTOR)
        return events

    calm, disturbed = reply(False), reply(True)
    assert tokens(calm) == tokens(disturbed) and end(calm).report == end(disturbed).report
    assert [one.text for one in end(calm).report.edits] == [str(edit), "3 +1"] and end(calm).report.steered
