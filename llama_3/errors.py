"""How this package says what a user can put right: a built-in exception with one sentence, and the next step as `hint`.

ValueError for a value that cannot be used, an OSError for a file, a folder or a network that is not to be had. Whoever
shows the error reads `hint` with `getattr(error, "hint", None)`. Imports nothing, torch least of all.
"""

from typing import TypeVar

E = TypeVar("E", bound=Exception)


def explained(kind: type[E], sentence: str, hint: str | None = None) -> E:
    """An exception of this kind that says `sentence`, with the next step, if there is one, as its attribute `hint`."""
    error = kind(sentence)
    vars(error)["hint"] = hint
    return error


def config_error(sentence: str, hint: str | None = None) -> ValueError:
    """The error for what cannot be used as it is: a file's content, a setting, a prompt, a number of processes."""
    return explained(ValueError, sentence, hint)
