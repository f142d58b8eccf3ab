"""`steer doctor`: is everything here that steer needs, and where does it look for what."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from steer import __version__
from steer.cli.options import Json, command, put
from steer.config import DEMO_LABELS, DEMO_MODEL, DEMO_SAE, Settings, config_folder, data_folder, log_path
from steer.errors import ExitCode, SteerError, render
from steer.events import clean

Check = Callable[[Settings], str]


@command()
def doctor(settings: Settings, json: Json = False) -> int:
    """Check the environment: versions, devices, memory, folders, settings, what ships."""
    well = True
    for name, check in CHECKS.items():
        value, message, ok = "", "", True
        try:
            value = check(settings)
        except Exception as error:  # whatever a check meets is its finding
            ok, message = False, render(error).removeprefix("error: ").replace("\n\n", "; ")
        well &= ok
        if json:
            put({"check": name, "ok": ok, "value": value, "message": message})
        else:
            print(f"{'ok' if ok else 'FAILED':<7} {name:<10} {clean(value or message)}")
    return ExitCode.DONE if well else ExitCode.MISTAKE


def _python(settings: Settings) -> str:
    return f"{platform.python_version()} on {platform.platform(terse=True)}"


def _packages(settings: Settings) -> str:
    found = []
    for name in ("torch", "numpy", "safetensors", "tiktoken", "textual", "typer"):
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

    found = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    found += ["mps"] if torch.backends.mps.is_available() else []
    wanted = settings.device
    if wanted not in ("auto", "cpu") and not any(name.startswith(wanted) for name in found):
        raise SteerError(f"there is no device `{wanted}` here", f"here are {', '.join(['cpu', *found])}")
    return ", ".join(["cpu", *found])


def _memory(settings: Settings) -> str:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not every system tells
        return "unknown"
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


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


def _folder(path: str | None, file: str) -> str:
    if path is not None and not (Path(path) / file).is_file():
        raise SteerError(f"`{path}` has no {file}")
    return path or ""


CHECKS: dict[str, Check] = {
    "steer": lambda settings: __version__,
    "python": _python,
    "packages": _packages,
    "threads": _threads,
    "devices": _devices,
    "memory": _memory,
    "config": lambda settings: f"{settings.file or 'no steer.toml'}; the user's is {config_folder() / 'steer.toml'}",
    "data": _data,
    "log": lambda settings: str(log_path()),
    "shipped": _shipped,
    "sae": lambda settings: _folder(settings.sae, "cfg.json") or settings.describe()["sae"],
    "settings": lambda settings: ", ".join(
        f"{name} {value}" for name, value in settings.describe().items() if name != "file"
    ),
}
