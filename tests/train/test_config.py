"""Choices of a run: presets, settings as they are typed, schedules, and the file a run keeps them in."""

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config import (
    AUTO,
    ONLY,
    TrainConfig,
    check_effect,
    check_same,
    default_rate,
    kinds,
    parse_settings,
    read_run,
    read_settings,
    typed,
    write_run,
)
from train.errors import TrainError
from train.presets import DESCRIPTIONS, PRESETS
from train.recipe import Recipe


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_leaves_nothing_open_and_changes_what_it_says(name: str) -> None:
    config = TrainConfig.of(name).resolve(3072, 1_000_000)
    assert config.preset == name and name in DESCRIPTIONS
    assert all(getattr(config, field) > 0 for field in AUTO)
    assert {key: getattr(config, key) for key in PRESETS[name]} == PRESETS[name]
    assert replace(config).resolve(3072, 1_000_000) == config, "resolving again changes nothing"


def test_the_published_configurations() -> None:
    theirs = TrainConfig.of("llama3-interpretability-sae").resolve(3072, 20_000_000)
    assert (theirs.latents, theirs.k, theirs.k_aux, theirs.batch) == (65_536, 64, 2048, 8192)
    assert theirs.dead_after == 655_360_000 and theirs.tokens == 200_000_000 and theirs.early_stop == 0
    assert (theirs.beta1, theirs.beta2, theirs.eps, theirs.held_out) == (0.85, 0.9999, 6.25e-10, 0.05)
    assert theirs.rate(1) == pytest.approx(5e-5) and theirs.rate(theirs.steps - 1) == pytest.approx(1e-5, rel=1e-3)
    assert theirs.rate(theirs.steps // 2) == pytest.approx(3e-5, rel=1e-3), "half way down a cosine"
    openai = TrainConfig.of("openai").resolve(768, 1)
    assert openai.lr == pytest.approx(2e-4 / 2**0.5) == openai.rate(openai.steps - 1), "the law alone, constant"


def test_a_typed_length_takes_the_place_of_a_presets_epochs() -> None:
    assert TrainConfig.of("llama3-interpretability-sae", tokens=5000).resolve(16, 10**6).tokens == 5000
    with pytest.raises(TrainError, match="tokens is 5 and epochs is 2"):
        TrainConfig.of(tokens=5, epochs=2)


def test_every_default_is_chosen_for_a_quick_run() -> None:
    config = TrainConfig.quick().resolve(384, 10**6)
    assert config.latents == 3072 and config.k_aux == 192 and config.dead_after == 70_000
    assert config.lr == pytest.approx(10 * 2e-4 / (3072 / 2**14) ** 0.5) and config.screen in ("bfloat16", "float32")
    assert config.rate(0) < config.lr == config.rate(config.steps // 2)
    assert 0 < config.rate(config.steps - 1) < config.lr / 50


def test_the_default_rate_is_the_published_law_in_long_runs_and_higher_in_short_ones() -> None:
    assert default_rate(2**14, 10**9) == pytest.approx(2e-4)
    assert default_rate(2**16, 25_000_000) == pytest.approx(2e-4)
    assert default_rate(2**14, 1000) == pytest.approx(2e-3)


def test_k_and_the_sparsity_term_change_over_the_first_steps() -> None:
    config = TrainConfig(k=8, k_anneal=32, k_anneal_share=0.5, sparsity_warmup=0.1, tokens=102_400, latents=64)
    ks = [config.k_at(step) for step in range(config.steps)]
    assert ks[0] == 32 and ks[25] == 20 and set(ks[50:]) == {8} and ks == sorted(ks, reverse=True)
    shares = [config.sparsity_share(step) for step in range(config.steps)]
    assert shares[0] == 0.1 and shares[9:] == [1.0] * 91


@given(
    st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 1), st.sampled_from(["linear", "cosine"]), st.integers(1, 300)
)
def test_a_rate_is_positive_up_to_the_last_step_and_never_above_its_peak(
    warmup: float, decay_share: float, final: float, decay: Any, steps: int
) -> None:
    config = TrainConfig(
        lr=1.0, warmup=warmup, decay_share=decay_share, final_lr=final, decay=decay, tokens=steps, batch=1
    )
    rates = [config.rate(step) for step in range(steps)]
    assert all(0 < rate <= 1 + 1e-12 for rate in rates)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("k=64", 64),
        ("tokens=4e6", 4_000_000),
        ("tokens = 5_000", 5000),
        ("lr=auto", 0),
        ("lr=2e-4", 2e-4),
        ("learn_b_dec=off", False),
        ("prefixes=64, 128", (64, 128)),
        ("arch=gated", "gated"),
        ("seed=0", 0),
        ("aux_coefficient=0", 0.0),
    ],
)
def test_a_setting_is_read_as_its_field_holds_it(text: str, value: Any) -> None:
    (read,) = parse_settings([text]).values()
    assert read == value and (isinstance(value, tuple) or type(read) is type(value))


@pytest.mark.parametrize(
    ("text", "words", "hint"),
    [
        ("kaux=3", "no setting 'kaux'", "k_aux"),
        ("k", "'k' is not of the form key=value", "--set"),
        ("k=1.5", "k is '1.5', but must be a whole number", None),
        ("k=many", "k is 'many'", None),
        ("lr=nan", "lr is 'nan', but must be a number", None),
        ("arch=topq", "arch is 'topq', but must be one of topk, batchtopk", None),
        ("project=maybe", "project is 'maybe', but must be true or false", None),
        ("tokens=0", "tokens is 0", "auto"),
        ("lr=0.0", "lr is 0", "auto"),
        ("lr=0e-3", "lr is 0", "auto"),
        ("latents=0", "latents is 0", "auto"),
        ("preset=openai", "no setting 'preset'", None),
        ("prefixes=a,b", "prefixes is 'a,b', but must be whole numbers", None),
    ],
)
def test_a_bad_setting_is_one_sentence_with_a_hint(text: str, words: str, hint: str | None) -> None:
    with pytest.raises(TrainError, match=words.replace("(", r"\(")) as caught:
        parse_settings([text])
    assert hint is None or hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latents": 8, "k": 9}, "k is 9"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 10, "accumulate": 3}, "batch of 10 does not fall into 3"),
        ({"lr": -1.0}, "learning rate is -1"),
        ({"screen": "int3"}, "screen is 'int3'"),
        ({"warmup": 0.7, "decay_share": 0.7}, "more than the whole run"),
        ({"k_anneal": 3, "k": 4}, "k_anneal is 3"),
        ({"held_out": 0.9}, "held_out is 0.9"),
        ({"keep": 0}, "keep is 0"),
        ({"early_stop": -1}, "early_stop is -1"),
        ({"beta1": 1.0}, "beta1 is 1.0"),
    ],
)
def test_a_value_that_cannot_be_is_one_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainError, match=words):
        TrainConfig(**changes).resolve(16, 100)


def test_a_runs_file_gives_back_its_config_and_is_a_file_of_settings(tmp_path: Path) -> None:
    config = TrainConfig.of("openai", prefixes=(16, 64), latents=64, k=4, learn_b_enc=False).resolve(16, 5000)
    write_run(tmp_path, config, {"activations": "a\nb", "activations_sha256": "f" * 64})
    read, more = read_run(tmp_path)
    assert read == config and more["activations"] == "a\nb" and more["activations_sha256"] == "f" * 64
    again = read_settings(tmp_path / "config.toml")
    assert TrainConfig.of(again.pop("preset"), **again).resolve(16, 5000) == config


def test_a_file_of_settings_may_name_a_preset_and_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text('preset = "openai"\nk = 16\nlr = "auto"\nprefixes = [8, 32]\n')
    assert read_settings(file) == {"preset": "openai", "k": 16, "lr": 0, "prefixes": (8, 32)}
    file.write_text("k = 0.5\n")
    with pytest.raises(TrainError, match=r"my.toml: k is 0.5"):
        read_settings(file)
    file.write_text("k = [")
    with pytest.raises(TrainError, match="not readable TOML"):
        read_settings(file)
    with pytest.raises(TrainError, match="there is no file"):
        read_settings(tmp_path / "none.toml")


def test_a_run_of_an_earlier_version_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('latents = 64\nk = 3\nactivations_sha256 = "0"\n')
    with pytest.raises(TrainError, match="was begun by an earlier version of steer"):
        read_run(tmp_path)
    (tmp_path / "config.toml").write_text("title = 'something else'\n")
    with pytest.raises(TrainError, match="not the config of a run"):
        read_run(tmp_path)


def test_a_field_that_does_nothing_is_only_refused_if_it_does_nothing_anywhere() -> None:
    check_effect([TrainConfig(), TrainConfig(arch="jumprelu")], ["k", "bandwidth", "lr"])
    for arch, name in (("relu", "k"), ("topk", "sparsity"), ("gated", "prolu_plain"), ("batchtopk", "screen")):
        with pytest.raises(TrainError, match=f"{name} does nothing where arch is {arch}"):
            check_effect([TrainConfig(arch=arch)], [name])
    assert set(ONLY) <= set(kinds())


def test_a_kind_without_k_starts_at_twice_its_target() -> None:
    asked = ((0, 0), (20, 0), (20, 9))
    started = [TrainConfig(l0_target=l0, initial_l0=start).resolve(16, 100).initial_l0 for l0, start in asked]
    assert started == [64, 40, 9]


def test_what_differs_from_the_run_that_goes_on_is_named() -> None:
    config = TrainConfig(latents=64, k=3)
    check_same(Path("run"), config, replace(config, preset="quick"))
    with pytest.raises(TrainError, match="the run in run has k = 3, not 4"):
        check_same(Path("run"), config, replace(config, k=4))


def test_a_recipe_takes_its_values_from_the_config() -> None:
    config = TrainConfig(arch="gated", dead_after=7, eps=1e-8)
    assert asdict(config.recipe()) == {field.name: getattr(config, field.name) for field in fields(Recipe)}


def test_every_field_can_be_typed_as_it_is_written() -> None:
    config = TrainConfig.quick().resolve(64, 1000)
    for name, value in asdict(config).items():
        if name != "preset":
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            assert typed(name, text) == value, name
    assert list(kinds()) == [field.name for field in fields(TrainConfig)]
