"""Settings: which file counts, what beats it, and what is said about a wrong one."""

import math
from pathlib import Path

import pytest

from steer.config import (
    DEMO_MODEL,
    Settings,
    config_folder,
    data_folder,
    find_file,
    log_path,
    read_biases,
    sessions_folder,
)
from steer.errors import SteerError
from steer.session import Sampling


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder; the user's home of steer is beside it."""
    monkeypatch.setenv("STEER_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_the_working_folder_comes_before_the_users(folders: Path) -> None:
    assert find_file() is None and Settings.load() == Settings()
    (config_folder() / "steer.toml").write_text("seed = 1\npace = 5")
    assert Settings.load().seed == 1
    (folders / "steer.toml").write_text("seed = 2")
    assert (Settings.load().seed, Settings.load().pace) == (2, 30.0)


def test_a_typed_flag_beats_the_file(folders: Path) -> None:
    (folders / "steer.toml").write_text('temperature = 1\ndevice = "cpu"\nmodel = "m"\nsae = "s"\nlabels = "l"')
    kept = Settings.load(temperature=None, device=None)
    assert (kept.temperature, kept.device) == (1.0, "cpu")
    assert (kept.model, kept.sae, kept.labels) == tuple(str(folders / name) for name in "msl")
    assert Settings.load(temperature=0.2).temperature == 0.2
    typed = Settings.load(model="other")
    assert (typed.model, typed.sae, typed.labels) == ("other", None, None)
    assert (Settings.load(sae="t").model, Settings.load(sae="t").labels) == (str(folders / "m"), None)


@pytest.mark.parametrize(
    ("content", "why", "hint"),
    [
        ("temprature = 1", "`temprature` in .* is no setting", "did you mean `temperature`?"),
        ("zzzzzz = 1", "is no setting", "it knows model"),
        ('seed = "x"', "should be a whole number", None),
        ("seed = true", "should be a whole number", None),
        ("model = 3", "should be text in quotes", None),
        ("ascii = 1", "should be true or false", None),
        ('pace = "fast"', "should be a number", None),
        ("seed = -1", "the seed is -1", "seeds go from 0"),
        ("temperature = nan", "temperature is nan", "from 0"),
        ("top_p = 2.0", "top_p is 2", "at most 1"),
        ("max_tokens = 0", "most tokens of a reply is 0", "at least 1"),
        ("threads = 0", "threads is 0", "at least 1"),
        ("pace = inf", "pace is inf", "0 is no limit"),
        ("= 3", "is no TOML", None),
        ("top_k = -1", "top_k is -1", "from 0"),
        ("min_p = 2.0", "min_p is 2", "from 0"),
        ("repetition_penalty = 0", "repetition_penalty is 0", "from 0.000001"),
        ("frequency_penalty = nan", "frequency_penalty is nan", "a number"),
        ('quantize = "int3"', "quantize is int3", "none, int8, int4"),
        ("compile = 1", "should be true or false", None),
        ("logit_bias = 3", "should be a table", None),
        ("logit_bias = { x = 1 }", "`x=1` is no logit bias", "a token id and a number"),
        ("logit_bias = { 3 = true }", "`3=True` is no logit bias", "a token id and a number"),
        ("logit_bias = { -3 = 1 }", "logit_bias is", "a token id from 0"),
        ("logit_bias = { 3 = inf }", "logit_bias is", "a number"),
    ],
)
def test_a_wrong_file_is_one_sentence(content: str, why: str, hint: str | None, folders: Path) -> None:
    (folders / "steer.toml").write_text(content)
    with pytest.raises(SteerError, match=why) as caught:
        Settings.load()
    assert (hint or "") in (caught.value.hint or "")


def test_steer_home_holds_configuration_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_folder() == data_folder() == tmp_path / "home"
    assert log_path().parent == sessions_folder().parent == tmp_path / "home"
    monkeypatch.delenv("STEER_HOME")
    assert data_folder().is_absolute() and "steer" in data_folder().parts[-1]
    assert data_folder() != config_folder()


def test_sampling_keeps_the_models_own_where_nothing_is_given() -> None:
    own = Sampling(0.6, 0.9, 5)
    assert Settings().sampling(own) == own
    assert Settings(temperature=0.0).sampling(own) == Sampling(0.0, 0.9, 5)


def test_every_sampling_knob_is_a_setting(folders: Path) -> None:
    (folders / "steer.toml").write_text("top_k = 40\nmin_p = 0\nlogit_bias = { 12 = -5, 265 = 1.5 }")
    read = Settings.load(repetition_penalty=1.1, frequency_penalty=0.5).sampling(Sampling(0.6, 0.9, 5, 0.1))
    assert read == Sampling(0.6, 0.9, 40, 0.0, 1.1, 0.5, ((12, -5.0), (265, 1.5)))
    assert Settings.load(logit_bias=((3, 1.0),)).logit_bias == ((3, 1.0),)


def test_a_bias_is_an_id_and_a_number() -> None:
    assert read_biases([]) is None
    assert read_biases(["12=-5", "13=-inf"]) == ((12, -5.0), (13, -math.inf))
    for wrong in ("12", "12=", "=3", "a=3", "1.5=3", "12=x\x1b"):
        with pytest.raises(SteerError, match="is no logit bias") as caught:
            read_biases([wrong])
        assert "\x1b" not in str(caught.value)


def test_a_hub_id_in_the_file_stays_one(folders: Path) -> None:
    for name in ("org/model", "org/model@v2", "org/model/model.Q8_0.gguf"):
        (folders / "steer.toml").write_text(f'model = "{name}"')
        assert Settings.load().model == name
    for name in ("model", "./org/model", "a/b/c", "model.gguf", "org/model.gguf"):
        (folders / "steer.toml").write_text(f'model = "{name}"')
        assert Settings.load().model == str(folders / name)
    (folders / "org" / "model").mkdir(parents=True)
    (folders / "steer.toml").write_text('model = "org/model"')
    assert Settings.load().model == str(folders / "org" / "model")


def test_a_typed_model_leaves_the_chat_format_of_the_files_behind(folders: Path) -> None:
    (folders / "steer.toml").write_text('model = "m"\nchat_format = "plain"\nquantize = "int8"\ncompile = true')
    assert Settings.load().chat_format == "plain"
    typed = Settings.load(model="other", quantize="none", compile=False)
    assert (typed.chat_format, typed.quantize, typed.compile) == (None, "none", False)


def test_describe_says_what_an_unset_choice_means() -> None:
    assert Settings().describe()["model"] == str(DEMO_MODEL)
    assert Settings(model="m").describe()["sae"] == "none: features are off"
    assert Settings(seed=3).describe()["seed"] == "3"
