"""One sentence, then a hint."""

from steer.errors import ExitCode, SteerError, render, sentence


def test_an_error_is_a_sentence_then_a_hint() -> None:
    assert render(SteerError("no latent 5", "they go to 4")) == "error: no latent 5\n\nhint: they go to 4"
    assert render(SteerError("no latent 5")) == "error: no latent 5"


def test_a_hint_on_any_explained_error_is_shown() -> None:
    error = ValueError("no such hook")
    error.hint = "choose another"  # type: ignore[attr-defined]
    assert render(error).endswith("hint: choose another")


def test_a_system_error_names_its_file() -> None:
    assert (
        sentence(FileNotFoundError(2, "No such file or directory", "a\x1bb")) == "No such file or directory: `a\ufffdb`"
    )


def test_a_sentence_is_one_line_and_never_empty() -> None:
    assert sentence(ValueError("two\nlines\x1b")) == "two lines\ufffd"
    assert sentence(ValueError()) == "ValueError"


def test_exit_codes_are_those_of_the_manual() -> None:
    assert [int(code) for code in ExitCode] == [0, 1, 2, 130]
