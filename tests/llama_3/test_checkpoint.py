"""Folders on disk: what loads, and the one sentence each broken folder gets."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_3.checkpoint import load_model
from llama_3.config import GenerationDefaults, RopeScaling, read_config, read_generation_defaults
from tests.tiny import tiny_config, write_tiny_checkpoint

TOKENS = torch.tensor([[256, 72, 101, 108, 108, 111]])


def edit_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw = {key: value for key, value in {**raw, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(raw))


def shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("tied", [True, False])
def test_single_and_sharded_files_load_what_was_written(tmp_path: Path, tied: bool) -> None:
    model = write_tiny_checkpoint(tmp_path, 5, tiny_config(tied=tied))
    single = load_model(tmp_path)
    shard(tmp_path)
    sharded = load_model(tmp_path)
    for loaded in (single, sharded):
        assert loaded.config == model.config
        assert torch.equal(loaded(TOKENS), model(TOKENS))
        assert not any(weight.requires_grad for weight in loaded.parameters())


def test_dtype_is_the_files_unless_asked(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert load_model(tmp_path).dtype == torch.bfloat16
    assert load_model(tmp_path, "float32").dtype == torch.float32
    assert load_model(tmp_path, torch.float16).unembedding_VD.dtype == torch.float16
    save_file({name: tensor.double() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    assert load_model(tmp_path).dtype == torch.float32


@pytest.mark.parametrize("dtype", ["int8", "int32", "float64", "float8_e4m3fn", "nn", "", torch.int8, torch.float64])
def test_a_dtype_that_no_model_computes_in_is_refused(dtype: torch.dtype | str, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"^weights are not loaded in '{name}'$") as caught:
        load_model(tmp_path, dtype)
    assert vars(caught.value)["hint"] == "use auto, bfloat16, float16, float32"


def test_a_config_may_say_that_nothing_is_quantised(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path)
    edit_config(tmp_path, quantization_config=None)
    assert read_config(tmp_path) == model.config


def test_a_tied_model_may_carry_its_head_and_rope_frequencies(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path)(TOKENS), model(TOKENS))


def drop(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return change


def put(name: str, *shape: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        save_file({**load_file(folder / "model.safetensors"), name: torch.ones(shape)}, folder / "model.safetensors")

    return change


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (drop("model.norm.weight"), "lack model.norm.weight"),
    "extra tensor": (put("model.layers.0.self_attn.q_proj.bias", 32), "q_proj.bias, which this Llama has no place for"),
    "wrong shape": (put("model.norm.weight", 31), r"model.norm.weight .* has shape \(31,\) .* asks for \(32,\)"),
    "cut short": (cut, "model.safetensors is damaged or cut short"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "there is no model.safetensors in"),
    "lost shard": (lose_shard, "there is no model-00002-of-00002.safetensors in"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "there is no config.json in"),
    "bad json": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "holds a list where a JSON object"),
    "other model": (
        lambda folder: edit_config(folder, architectures=["GemmaForCausalLM"]),
        "describes GemmaForCausalLM",
    ),
    "other rope": (
        lambda folder: edit_config(folder, rope_scaling={"type": "yarn", "factor": 2}),
        "RoPE scaling 'yarn'",
    ),
    "biases": (lambda folder: edit_config(folder, attention_bias=True), "sets attention_bias"),
    "activation": (lambda folder: edit_config(folder, hidden_act="gelu"), "hidden_act 'gelu'"),
    "quantised": (lambda folder: edit_config(folder, quantization_config={}), "quantised weights"),
    "missing key": (lambda folder: edit_config(folder, hidden_size="absent"), "'?hidden_size'? is missing"),
    "wrong type": (lambda folder: edit_config(folder, hidden_size=[1]), "a value has the wrong type"),
    "not a number": (lambda folder: edit_config(folder, hidden_size="many"), "config.json does not describe a Llama"),
    "no heads": (lambda folder: edit_config(folder, num_attention_heads=0, head_dim=None), "does not describe a Llama"),
    "architectures": (lambda folder: edit_config(folder, architectures=3, model_type="x"), "describes x"),
    "too deep": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json is not valid JSON"),
    "odd index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": ["b"]}}'),
        "there is no .* in",
    ),
    "uneven heads": (lambda folder: edit_config(folder, num_key_value_heads=3), "4 attention heads cannot share 3"),
}


@pytest.mark.parametrize(("breaks", "sentence"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_folder_gets_one_sentence(breaks: Callable[[Path], object], sentence: str, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    breaks(tmp_path)
    with pytest.raises((ValueError, OSError), match=sentence) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no model folder .*nowhere"):
        load_model(tmp_path / "nowhere")


def test_absent_keys_take_their_defaults(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    absent = ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "tie_word_embeddings", "architectures")
    edit_config(tmp_path, **dict.fromkeys(absent, "absent"), eos_token_id=257)
    config = read_config(tmp_path)
    assert (config.n_kv_heads, config.head_dim, config.rope_theta, config.rope_scaling) == (4, 8, 10000.0, None)
    assert not config.tied and config.stop_ids == (257,)


def test_rope_parameters_of_transformers_5_are_read(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    rope = dict(
        rope_type="llama3", rope_theta=5e5, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )  # fmt: skip
    edit_config(tmp_path, rope_theta="absent", rope_scaling="absent", rope_parameters=rope)
    config = read_config(tmp_path)
    assert config.rope_theta == 5e5 and config.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)


def test_generation_defaults_come_from_the_folder(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    assert read_generation_defaults(tmp_path) == GenerationDefaults(0.7, 0.95)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": [257, 270]}))
    assert read_generation_defaults(tmp_path) == GenerationDefaults(0.6, 0.9)
    assert read_config(tmp_path).stop_ids == (257, 264, 265, 270)
    path.write_text(json.dumps({"do_sample": False}))
    assert read_generation_defaults(tmp_path).temperature == 0.0


@pytest.mark.parametrize("value", ["[1]", '"warm"'])
def test_generation_defaults_that_are_no_numbers_are_named(value: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(f'{{"temperature": {value}}}')
    with pytest.raises(ValueError, match="has a temperature or top_p that is no number"):
        read_generation_defaults(tmp_path)
