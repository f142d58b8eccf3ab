"""The `steer` command: data on stdout, everything else on stderr, one sentence for what a person got wrong.

One file for each group of commands; what every command takes is declared in `options.py`. Only the file of the command
that is asked for is imported, and torch and Textual inside the commands that need them, so that help is instant.

Under torchrun every process runs the same command on its share of the model, and the first one speaks for all.

Exit codes: 0 done; 1 a mistake or a failed check, explained; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import gc
import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module

import typer

from llama_3.ranks import is_main, world
from steer.cli.options import app, narrate
from steer.errors import EXPLAINED, ExitCode, SteerError, render
from steer.events import clean

COMMANDS = (
    "chat", "complete", "batch", "inspect", "why", "patch", "features", "calibrate", "controls", "recipe",
    "split", "capture", "preprocess", "train", "evaluate", "label", "doctor",
)  # fmt: skip
"""In the order of the help; each is put on `app` by the module of its name."""
SHARED = ("complete", "inspect", "capture", "train")
"""Commands that several processes run together; the others ask a person, or write files that are one process's."""


def register(command: str | None = None) -> typer.Typer:
    """The application with one command, or with all where there is none of that name."""
    for name in (command,) if command in COMMANDS else COMMANDS:
        import_module(f"steer.cli.{name}")
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code. Only a bug, or `--debug`, prints a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    gc.set_threshold(50_000, 20, 50)  # to look through what torch's import leaves takes 0.4 s, a quarter at the end
    closed = _open_streams()
    try:
        if is_main():
            return _main(arguments, closed)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            return _main(arguments, closed)
    finally:
        gc.freeze()


def _open_streams() -> bool:
    """Whether stdout was closed. Python has None for a closed stream, and print takes stdout for such a stderr."""
    closed = sys.stdout is None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # each gets the lowest descriptor: its own
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # as long as the process lives
    return closed


def _main(arguments: Sequence[str], closed: bool = False) -> int:
    try:
        if closed:
            raise SteerError("stdout is closed, so there is nowhere to write to", "send it to a file or a pipe")
        if world() > 1:
            _check_shared(arguments)
        register(next(iter(arguments), None))
        code = app(list(arguments), prog_name="steer", standalone_mode=False)
        sys.stdout.flush()
        if code == ExitCode.INTERRUPTED:  # typer has turned the interruption into its code
            print("interrupted", file=sys.stderr)
        return code if isinstance(code, int) else ExitCode.DONE
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        # Whoever read our output has enough. Python's own flush at the end must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
        return ExitCode.DONE
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except typer.TyperException as error:
        message = _plainly(error)
        context = getattr(error, "ctx", None)
        hint = f"\n\nhint: `{context.command_path} --help` lists what it takes" if context else ""
        print(f"error: {message.rstrip('.')}{hint}", file=sys.stderr)
        return ExitCode.USAGE
    except EXPLAINED as error:
        if "--debug" in arguments:
            narrate(traceback.format_exc())
        print(render(error), file=sys.stderr)
        return ExitCode.MISTAKE
    except (MemoryError, RuntimeError) as error:
        # Torch says that memory ran out by a RuntimeError, in words that differ from device to device.
        # A process that is not heard crashes instead: its memory may be short where that of the first is not.
        known = isinstance(error, MemoryError) or "memory" in str(error)
        if not known or "--debug" in arguments or not is_main():
            raise
        why = str(error).partition("\n")[0] or "no more could be had"
        hint = "a smaller model, SAE or batch, fewer tokens, `--dtype bfloat16` or `--quantize int8` needs less"
        print(render(SteerError(f"the memory does not suffice: {why}", hint)), file=sys.stderr)
        return ExitCode.MISTAKE


def _plainly(error: typer.TyperException) -> str:
    """What typer says of wrong usage, in our words where pydantic speaks: the value, and what it should be."""
    message, told = error.format_message(), getattr(error.__cause__, "errors", None)
    if told is None:
        return message
    (entry,) = told()
    kinds = {
        "int_parsing": "is no whole number",
        "int_from_float": "is no whole number",
        "float_parsing": "is no number",
    }
    why = entry["msg"].replace("Input should", "should")
    why = kinds.get(entry["type"]) or re.sub("^Value error, .* is not one of ", "is none of ", why)
    return f"{message.partition(': ')[0]}: `{clean(str(entry['input']))}` {why}"


def _check_shared(arguments: Sequence[str]) -> None:
    """`SteerError` for a command that is none for several processes."""
    name = next((argument for argument in arguments if not argument.startswith("-")), "chat")
    if name not in SHARED and not {"--help", "--version"}.intersection(arguments):
        raise SteerError(
            f"`steer {name}` is for one process, and torchrun started {world()}",
            "several run `steer complete`, `inspect`, `capture` and `train`",
        )
