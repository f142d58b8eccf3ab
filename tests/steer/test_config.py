"""Settings: which file counts, what beats it, and what is said about a wrong one."""

from pathlib import Path

import pytest

from steer.config import DEMO_MODEL, Settings, config_folder, data_folder, find_file, log_path, sessions_folder
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


def test_describe_says_what_an_unset_choice_means() -> None:
    assert Settings().describe()["model"] == str(DEMO_MODEL)
    assert Settings(model="m").describe()["sae"] == "none: features are off"
    assert Settings(seed=3).describe()["seed"] == "3"
