"""`steer doctor`: is everything here that steer needs, where does it look for what, can the model run here, and is the
SAE the right one for it.

Each check gives the value to show or raises what went wrong. Those of the model (`model_checks`) build on each other,
and one whose ground is missing is left out. Where a model or an SAE is named, both are loaded and
`steer.analysis.checkup` says whether they belong together.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from steer import __version__
from steer.cli.model_checks import Subject, examine_sae, model_checks
from steer.cli.options import Json, command, put
from steer.config import DEMO_LABELS, DEMO_MODEL, DEMO_SAE, Settings, config_folder, data_folder, log_path
from steer.errors import EXPLAINED, ExitCode, SteerError, render
from steer.events import clean

Check = Callable[[Settings], str]
PACKAGES = (
    *("torch", "numpy", "safetensors", "tiktoken", "tokenizers", "sentencepiece", "gguf", "huggingface_hub"),
    *("textual", "typer"),
)
NEEDED = ("model", "tokenizer", "sae", "placement", "fit")
"""Checks that must have gone well before an SAE is loaded beside its model."""


@command()
def doctor(
    settings: Settings,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text to measure the SAE on (else the model writes it) and what --quantize costs (else a paragraph).",
            metavar="FILE",
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Check the environment, the model, and whether each SAE belongs to it.

    An SAE is read on 2,048 tokens where --model, --sae or --text is given: is it on the right hook, are its inputs
    normalised as in training, its weights laid out right, its k, the BOS and the dtype the right ones?
    """
    if text is not None and settings.scheme is None and settings.model and not settings.sae:
        raise SteerError(
            "--text is what an SAE or --quantize is measured on, and there is neither",
            "add `--sae DIR` or `--quantize int8`",
        )
    failed = {name for name, check in CHECKS.items() if not _tell(name, partial(check, settings), json)}
    subject = Subject(settings, text)
    for name, (needs, of_model) in model_checks(subject).items():
        if failed.isdisjoint(needs) and not _tell(name, partial(of_model, subject), json):
            failed.add(name)
    if (settings.model or settings.sae or text) and failed.isdisjoint(NEEDED) and subject.saes:
        failed |= _examine(subject, json)
    return ExitCode.MISTAKE if failed else ExitCode.DONE


def _tell(name: str, check: Callable[[], str], json: bool) -> bool:
    """Makes one check and prints it; whether all is well."""
    value, message, ok = "", "", True
    try:
        value = check()
    except Exception as error:  # whatever a check meets is its finding
        ok, message = False, _sentences(error)
    _show({"check": name, "ok": ok, "value": value, "message": message}, json)
    return ok


def _examine(subject: Subject, json: bool) -> set[str]:
    """Loads model and SAE and prints whether they belong together; the checks that failed."""
    if not _tell("load", partial(_load, subject), json):
        return {"load"}
    try:
        found = examine_sae(subject)
    except EXPLAINED as error:
        found = [{"check": "text", "ok": False, "value": "", "message": _sentences(error)}]
    for entry in found:
        _show(entry, json)
    return {entry["check"] for entry in found if not entry["ok"]}


def _load(subject: Subject) -> str:
    info = subject.engine.info
    return f"{info.model} on {info.device} in {info.dtype}"


def _show(entry: dict[str, Any], json: bool) -> None:
    if json:
        put(entry)
    else:
        print(
            f"{'ok' if entry['ok'] else 'FAILED':<7} {entry['check']:<10} {clean(entry['message'] or entry['value'])}"
        )


def _sentences(error: Exception) -> str:
    return render(error).removeprefix("error: ").replace("\n\n", "; ")


def _python(settings: Settings) -> str:
    return f"{platform.python_version()} on {platform.platform(terse=True)}"


def _packages(settings: Settings) -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError as error:
            raise SteerError(
                f"the package {name} is missing", "install steer again in an environment of its own"
            ) from error
    return ", ".join(found)


def _threads(settings: Settings) -> str:
    import torch

    return f"{settings.threads or torch.get_num_threads()} of {os.cpu_count()} cores"


def _devices(settings: Settings) -> str:
    import torch

    from steer.device import choose_device

    found = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    found += ["mps"] if torch.backends.mps.is_available() else []
    choose_device(settings.device)
    return ", ".join(["cpu", *found])


def _memory(settings: Settings) -> str:
    from steer.device import available_memory, gib

    free = available_memory("cpu")  # what the check `fit` goes by
    try:
        total = f" of {gib(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))}"
    except (ValueError, OSError, AttributeError):  # not every system tells
        total = ""
    return "unknown" if free is None else f"{gib(free)}{total} GiB free"


def _hub(settings: Settings) -> str:
    from huggingface_hub import constants

    return f"{constants.HF_HUB_CACHE}; downloads are {'off' if constants.HF_HUB_OFFLINE else 'on'}"


def _data(settings: Settings) -> str:
    folder = data_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise SteerError(
            f"nothing can be saved in `{folder}`: `{there}` cannot be written", "set STEER_HOME to another folder"
        )
    return str(folder)


def _shipped(settings: Settings) -> str:
    for file in (DEMO_MODEL / "config.json", DEMO_SAE / "cfg.json", DEMO_SAE / "sae.safetensors", DEMO_LABELS):
        with file.open("rb") as opened:
            opened.read(1)
    if not any(DEMO_MODEL.glob("*.safetensors")):
        raise SteerError(f"the shipped model in `{DEMO_MODEL}` has no weights", "install steer again")
    return str(DEMO_MODEL.parent)


def _settings(settings: Settings) -> str:
    """What was typed, or stands in `steer.toml`; what a model needs beyond that is in the checks below."""
    usual, told = Settings(), settings.describe()
    own = [
        f"{name} {told[name]}" for name in told if name != "file" and getattr(settings, name) != getattr(usual, name)
    ]
    return ", ".join(own) or "none typed, none in a steer.toml: all as they are by default"


CHECKS: dict[str, Check] = {
    "steer": lambda settings: __version__,
    "python": _python,
    "packages": _packages,
    "threads": _threads,
    "devices": _devices,
    "memory": _memory,
    "config": lambda settings: f"{settings.file or 'no steer.toml'}; the user's is {config_folder() / 'steer.toml'}",
    "data": _data,
    "hub": _hub,
    "log": lambda settings: str(log_path()),
    "shipped": _shipped,
    "settings": _settings,
}
