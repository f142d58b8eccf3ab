"""Where a model lies on disk: a path is itself, `org/name` is looked up in the Hugging Face cache, then downloaded.

A snapshot in the cache that holds all a model needs is used without any request. Of a repository only the files the
loaders read are fetched, in one form of the weights: safetensors, else PyTorch's, else Meta's own, else one GGUF file.
The branch's entry in the cache (`refs/main`) is written when everything is there; a file that is not whole never gets
its name, and Meta's shards come last to first, so that the first one vouches for the rest. Which GGUF file is the only
one of a repository is noted beside its snapshots: the cache alone cannot tell. Whatever goes wrong is one
sentence built here: what the library says may hold signed addresses or tokens and is never passed on, nor chained,
since a traceback would show it.

`huggingface_hub` is imported where it is used, since most commands never need it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from llama_3.config import find_layout
from llama_3.errors import explained

SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Everything but weights, fetched where it is there."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
INDEXED = (("model", "safetensors"), ("pytorch_model", "bin"))
"""Hugging Face's two forms of weights, the better one first."""
_NAME = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_PART = r"\w[\w.-]*"
"""Of a path in a repository or of a branch: an empty one, or one that begins with a dot, could lead elsewhere."""
_REVISION = re.compile(rf"{_PART}(?:/{_PART})*", re.ASCII)
_HUB_ID = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})(?:/(?P<file>(?:{_PART}/)*{_PART}\.gguf))?(?:@(?P<revision>{_REVISION.pattern}))?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubId(NamedTuple):
    """A model on the Hub: `org/name`, `org/name@revision`, `org/name/file.gguf`."""

    repo: str
    file: str | None
    revision: str

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision != "main" else "")


def parse_hub_id(name: str, revision: str | None = None) -> HubId | None:
    """The parts of a name that can be a model's on the Hub; None where it cannot. Looks at the name alone."""
    found = _HUB_ID.fullmatch(name)
    if found is None or ".." in name or "--" in found["repo"] or len(found["repo"]) > 96:
        return None
    revision = revision or found["revision"] or "main"
    if ".." in revision or not _REVISION.fullmatch(revision):
        return None
    if found["repo"].endswith((".git", ".gguf", ".safetensors", ".bin", ".pth")):  # a file's path, mistyped
        return None
    return HubId(found["repo"], found["file"], revision)


def resolve_model(name: str | Path, *, revision: str | None = None) -> Path:
    """The folder or file of a model: a path that exists, or the local copy of a hub id, downloaded where it must be.

    A hub id is `org/name`, `org/name@revision` or `org/name/file.gguf`; `revision` (branch, tag or commit) may be given
    apart. FileNotFoundError where there is neither; OSError or ValueError, one sentence with a `hint`, for all that can
    go wrong between here and a whole copy.
    """
    path = Path(os.path.expanduser(name))
    if str(name).strip() and path.exists():
        return path
    wanted = parse_hub_id(str(name), revision)
    if wanted is None:
        kind = "file" if path.suffix else "folder"
        hint = (
            "give a folder, a .gguf file, or a model of the Hugging Face Hub such as meta-llama/Llama-3.2-1B-Instruct"
        )
        if "://" in str(name):
            hint = "of a page on the Hub only `org/name` is the model's id"
        raise explained(FileNotFoundError, f"there is no model {kind} {name}", hint)
    return _cached(wanted) or _download(wanted)


def model_name(path: Path) -> str:
    """What to call the model at `path`: `org/name` for a snapshot in the cache, else the file's or folder's name."""
    path = path.absolute()
    for folder in (path, *path.parents):
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            return folder.parent.name.removeprefix("models--").replace("--", "/", 1)
    return path.name or path.resolve().name


def needed_files(names: Iterable[str], wanted: HubId) -> list[str]:
    """Which files of a repository to fetch, in that order: small ones, then one form of the weights.

    ValueError or FileNotFoundError where it holds no model, no tokenizer, or several GGUF files and none is named.
    """
    there = set(names)
    ggufs = sorted(name for name in there if name.endswith(".gguf"))
    if wanted.file is not None:
        if wanted.file not in there:
            held = f"it holds {_some(ggufs)}" if ggufs else "it holds no GGUF file"
            raise explained(FileNotFoundError, f"there is no {wanted.file} in {wanted}", held)
        return [_whole_gguf(wanted.file, wanted)]
    small = [name for name in SMALL if name in there]
    weights = next((found for stem, suffix in INDEXED if (found := _indexed_weights(there, stem, suffix))), None)
    if weights is None:
        for folder in ("", "original/"):
            shards = sorted((name for name in there if _is_shard(name, folder)), reverse=True)
            if shards and f"{folder}params.json" in there:
                own = [name for name in (f"{folder}params.json", f"{folder}tokenizer.model") if name in there]
                return _with_tokenizer(list(dict.fromkeys([*small, *own])) + shards, wanted)
        if len(ggufs) == 1:
            return [_whole_gguf(ggufs[0], wanted)]
        if ggufs:
            raise explained(
                ValueError, f"{wanted} holds {len(ggufs)} GGUF files", f"name one as {wanted.repo}/FILE: {_some(ggufs)}"
            )
        raise explained(
            ValueError,
            f"{wanted} holds no model weights",
            "choose a model with safetensors, PyTorch, Meta or GGUF weights (an adapter or a data set has none)",
        )
    if "config.json" not in there:
        raise explained(ValueError, f"{wanted} holds weights but no config.json", "choose a complete model")
    return _with_tokenizer(small + weights, wanted)


def _indexed_weights(there: set[str], stem: str, suffix: str) -> list[str]:
    """The shards with their index, or the single file; variants such as `model.fp16.safetensors` are left alone."""
    shards = sorted(name for name in there if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", name))
    index = f"{stem}.{suffix}.index.json"
    if shards and index in there:
        return [index, *shards]
    return [f"{stem}.{suffix}"] if f"{stem}.{suffix}" in there else []


def _is_shard(name: str, folder: str) -> bool:
    return re.fullmatch(rf"{folder}consolidated\.\d+\.pth", name) is not None


def _with_tokenizer(files: list[str], wanted: HubId) -> list[str]:
    if not any(Path(file).name in TOKENIZERS for file in files):
        raise explained(
            ValueError, f"{wanted} holds no tokenizer.json and no tokenizer.model", "choose a complete model"
        )
    return files


def _whole_gguf(name: str, wanted: HubId) -> str:
    if re.search(r"-\d+-of-\d+\.gguf$", name):
        raise explained(
            ValueError, f"{name} in {wanted} is one part of a split GGUF file", "choose one that is in one piece"
        )
    return name


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# -- the cache ---------------------------------------------------------------------------------------------------------


def _cached(wanted: HubId) -> Path | None:
    """The model in the local cache where it is whole, else None. No request is made."""
    snapshot = _snapshot(wanted)
    return None if snapshot is None else _whole_model(snapshot, wanted.file)


def _snapshot(wanted: HubId) -> Path | None:
    """The snapshot folder of the revision; the only one there is where the cache names no branch."""
    repo = _repo_folder(wanted)
    try:
        commit = (repo / "refs" / wanted.revision).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = wanted.revision
        if wanted.revision == "main" and not (repo / "refs").is_dir() and (repo / "snapshots").is_dir():
            only = [folder for folder in (repo / "snapshots").iterdir() if folder.is_dir()]
            commit = only[0].name if len(only) == 1 else commit
    folder = repo / "snapshots" / commit
    return folder if Path(commit).name == commit and folder.is_dir() else None


def _repo_folder(wanted: HubId) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{wanted.repo.replace('/', '--')}"


def _whole_model(snapshot: Path, file: str | None) -> Path | None:
    """The model in a snapshot when all its weights and a tokenizer are there; a link to nowhere is not there.

    What counts are the weights that the loader will take: others beside them do not make up for what they lack.
    """
    if file is not None:
        return snapshot / file if (snapshot / file).is_file() else None
    try:
        layout, folder = find_layout(snapshot)
    except (OSError, ValueError):  # no weights, or several GGUF files
        layout, folder = "gguf", snapshot
    if layout == "gguf":
        only = _only_gguf(snapshot)
        return next((snapshot / name for name in _held_ggufs(snapshot) if name == only), None)
    if layout == "meta":
        small, weights = ["params.json"], ["consolidated.00.pth"]
        weights += [shard.name for shard in folder.glob("consolidated.*.pth")]
    else:
        stem, suffix = next(kind for kind in INDEXED if kind[1] == layout)
        index = folder / f"{stem}.{suffix}.index.json"
        small, weights = ["config.json"], _indexed_names(index) if index.exists() else [f"{stem}.{suffix}"]
    whole = weights and _all_there(folder, small + weights) and _has_tokenizer(folder, snapshot)
    return snapshot if whole else None


def _held_ggufs(snapshot: Path) -> list[str]:
    """The GGUF files in a snapshot; its repository may have more."""
    return sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf") if path.is_file())


def _only_gguf(snapshot: Path) -> str | None:
    """The one GGUF file that is the model of a snapshot, noted when its repository was last listed."""
    try:
        return _note_of_gguf(snapshot).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _note_of_gguf(snapshot: Path) -> Path:
    return snapshot.parents[1] / ".only_gguf" / snapshot.name


def _has_tokenizer(*folders: Path) -> bool:
    return any((folder / name).is_file() for folder in folders for name in TOKENIZERS)


def _indexed_names(index: Path) -> list[str]:
    """The shards an index names; none where it cannot be read."""
    try:
        return sorted(set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _all_there(folder: Path, names: list[str]) -> bool:
    return all((folder / name).is_file() for name in names)


# -- the download ------------------------------------------------------------------------------------------------------


def _download(wanted: HubId) -> Path:
    """Fetches what is missing of a model; progress bars go to stderr."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    if constants.HF_HUB_OFFLINE:
        what, named = _what_is_cached(wanted)
        hint = named or "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE to download it"
        raise explained(FileNotFoundError, f"{wanted} {what}, and downloads are switched off", hint)
    try:
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(wanted.repo, revision=wanted.revision, files_metadata=True, timeout=timeout)
        sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}
        commit = info.sha or ""
    except Exception as error:  # the library and what lies under it have no common base
        raise _told(error, wanted) from None
    files = needed_files(sizes, wanted)
    if not _COMMIT.fullmatch(commit):
        raise explained(OSError, f"the Hub does not say which commit {wanted} is", "check HF_ENDPOINT")
    snapshot = _repo_folder(wanted) / "snapshots" / commit
    _check_space(wanted, snapshot, sum(sizes[name] for name in files if not (snapshot / name).is_file()))
    with _without_addresses():
        for name in files:
            try:
                hf_hub_download(wanted.repo, name, revision=commit)
            except Exception as error:
                raise _told(error, wanted, name) from None
    if wanted.file is None and files[0].endswith(".gguf"):
        _write_whole(_note_of_gguf(snapshot), files[0])
    found = _whole_model(snapshot, wanted.file)
    if found is None:
        raise explained(OSError, f"the copy of {wanted} in {snapshot} is not whole", "run the same command again")
    if wanted.revision != commit:
        _write_whole(_repo_folder(wanted) / "refs" / wanted.revision, commit)
    return found


def _what_is_cached(wanted: HubId) -> tuple[str, str | None]:
    """What the cache has of a model that is not whole there, and a hint where a GGUF file can be named instead."""
    snapshot = _snapshot(wanted)
    if snapshot is None:
        return "is neither a local folder nor in the cache", None
    held = _held_ggufs(snapshot) if wanted.file is None else []
    if not held:
        return "is in the cache only in part", None
    at = "" if wanted.revision == "main" else f"@{wanted.revision}"
    return (
        "may hold more GGUF files than the cache",
        f"name one that is there: {_some([f'{wanted.repo}/{name}{at}' for name in held])}",
    )


@contextmanager
def _without_addresses() -> Iterator[None]:
    """Keeps the library from logging, at every retry, the address it reads from, which may be a signed one."""
    log = logging.getLogger("huggingface_hub")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _write_whole(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _check_space(wanted: HubId, folder: Path, missing: int) -> None:
    there = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    if missing > free:
        raise explained(
            OSError,
            f"{wanted} needs {missing / 2**30:.2f} GiB more and {free / 2**30:.2f} GiB are free in {there}",
            "free some space, or set HF_HOME to a folder on a larger disk",
        )


def _told(error: Exception, wanted: HubId, file: str | None = None) -> OSError:
    """Our sentence for what the library raised; its own words may hold signed addresses and are left out."""
    from huggingface_hub import constants, errors

    what = f"{file} of {wanted}" if file else str(wanted)
    page = f"{constants.ENDPOINT}/{wanted.repo}"
    again = "run the same command again: files that are whole are kept"
    causes = list(_chain(error))
    answers = [answer for cause in causes if (answer := getattr(cause, "response", None)) is not None]
    status = getattr(answers[0], "status_code", None) if answers else None
    if isinstance(error, errors.GatedRepoError):
        hint = f"accept its licence on {page}, then set HF_TOKEN to a token of that account"
        return explained(PermissionError, f"{wanted.repo} is gated: its makers ask for an agreement first", hint)
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "check the spelling; for a private one set HF_TOKEN to a token that may read it"
        return explained(FileNotFoundError, f"there is no folder {wanted.repo} here and no such model on the Hub", hint)
    if isinstance(error, errors.RevisionNotFoundError):
        hint = f"{page}/tree/main lists its branches and tags"
        return explained(FileNotFoundError, f"{wanted.repo} has no revision {wanted.revision}", hint)
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return explained(FileNotFoundError, f"there is no {what}", f"{page}/tree/main lists its files")
    if any(isinstance(cause, OSError) and cause.errno == errno.ENOSPC for cause in causes):
        hint = "free some space, or set HF_HOME to a folder on a larger disk; " + again
        return explained(OSError, f"the disk is full while downloading {what}", hint)
    if status in (401, 403):
        return explained(PermissionError, f"the Hub refuses {what} (status {status})", "check the token in HF_TOKEN")
    if status is not None:
        return explained(OSError, f"the Hub answered with status {status} for {what}", "try again later")
    if isinstance(error, OSError) and error.strerror and error.filename:
        return explained(OSError, f"cannot write {error.filename}: {error.strerror}", "set HF_HOME to another folder")
    kind = type(causes[-1]).__name__
    if file is not None:
        return explained(OSError, f"the download of {what} broke off ({kind})", again)
    cached, named = _what_is_cached(wanted)
    hint = named or "check the connection (and HF_ENDPOINT, when it is set), or give the path of a local folder"
    return explained(ConnectionError, f"{wanted} {cached}, and the Hub cannot be reached ({kind})", hint)


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
