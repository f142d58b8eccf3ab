"""Hub ids against a small hub on this machine: what is fetched, what the cache is trusted with, what goes wrong."""

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from llama_3.config import find_layout
from llama_3.hub import HubId, model_name, needed_files, parse_hub_id, resolve_model
from tests.llama_3.fake_hub import COMMIT, SECRET, Hub, serve_hub

WEIGHTS = bytes(range(256)) * 1024
MODEL = {
    "config.json": b"the config",
    "generation_config.json": b"sampling",
    "tokenizer.json": b"a tokenizer",
    "tokenizer_config.json": b"its config",
    "README.md": b"# a card",
    "model.fp16.safetensors": b"a variant",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"again",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"again",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub(tmp_path, monkeypatch) as hub:
        hub.repos["org/tiny"] = dict(MODEL)
        yield hub


def refused(name: str, kind: type[Exception] = OSError) -> tuple[str, str]:
    """Sentence and hint of what goes wrong with `name`; neither holds the token nor an address with one."""
    with pytest.raises(kind) as caught:
        resolve_model(name)
    sentence, hint = str(caught.value), caught.value.hint  # type: ignore[attr-defined]
    assert hint and "\n" not in sentence + hint
    assert SECRET not in sentence + hint
    return sentence, hint


def cached_folder(tmp_path: Path, repo: str = "org--tiny") -> Path:
    """A snapshot `abc` written by hand as other tools leave it, its config and weights links to blobs."""
    repo_folder = tmp_path / "cache" / f"models--{repo}"
    snapshot = repo_folder / "snapshots" / "abc"
    for folder in (snapshot, repo_folder / "refs", repo_folder / "blobs"):
        folder.mkdir(parents=True)
    (repo_folder / "refs" / "main").write_text("abc")
    for name in ("config.json", "model.safetensors"):
        (repo_folder / "blobs" / f"of-{name}").write_bytes(MODEL[name])
        (snapshot / name).symlink_to(f"../../blobs/of-{name}")
    (snapshot / "tokenizer.json").write_text("{}")
    return snapshot


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("meta-llama/Llama-3.2-1B", ("meta-llama/Llama-3.2-1B", None, "main")),
        ("org/name@v2", ("org/name", None, "v2")),
        ("org/name@refs/pr/3", ("org/name", None, "refs/pr/3")),
        ("org/name-GGUF/name.Q8_0.gguf", ("org/name-GGUF", "name.Q8_0.gguf", "main")),
        ("org/name/sub/name.gguf@v2", ("org/name", "sub/name.gguf", "v2")),
        ("name", None),
        ("./org/name", None),
        ("../name", None),
        ("/org/name", None),
        ("~/name", None),
        ("a/b/c", None),
        ("org/name/", None),
        ("org/na me", None),
        ("org/name.gguf", None),
        ("org/name.safetensors", None),
        ("org/na--me", None),
        ("org/name@../../x", None),
        ("org/name@/etc/passwd", None),
        ("org/name@a//b", None),
        ("org/name@a/../b", None),
        ("org/name@./a", None),
        ("org/name@v2/", None),
        ("org/name//etc/x.gguf", None),
        ("org/name/a//x.gguf", None),
        ("org/name/../x.gguf", None),
        ("org/name/./x.gguf", None),
        ("org/name/x.gguf/", None),
        ("org/name/.gguf", None),
        ("org/" + "n" * 96, None),
        ("örg/name", None),
    ],
)
def test_what_a_hub_id_is(name: str, parts: tuple[str, str | None, str] | None) -> None:
    assert parse_hub_id(name) == (parts and HubId(*parts))


def test_a_revision_given_apart_leads_nowhere_else_either() -> None:
    assert parse_hub_id("org/name@v2", "v1.0/b") == HubId("org/name", None, "v1.0/b")
    for revision in ("/etc/passwd", "../x", "a//b", "a/", "."):
        assert parse_hub_id("org/name", revision) is None


def test_a_path_that_exists_is_itself(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    (tmp_path / "a.gguf").touch()
    assert resolve_model("org/tiny") == Path("org/tiny")
    assert resolve_model(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/a.gguf") == tmp_path / "a.gguf"
    assert hub.asked == []


def test_what_is_neither_path_nor_id_is_not_looked_for(hub: Hub) -> None:
    assert refused("no/such/folder", FileNotFoundError)[0] == "there is no model folder no/such/folder"
    sentence, hint = refused("x.gguf", FileNotFoundError)
    assert sentence == "there is no model file x.gguf" and "Hugging Face Hub" in hint
    assert hub.asked == []


def test_only_the_needed_files_are_fetched_and_once(hub: Hub, tmp_path: Path) -> None:
    folder = resolve_model("org/tiny")
    wanted = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"]
    assert hub.fetched() == wanted
    assert sorted(file.name for file in folder.iterdir()) == sorted(wanted)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert (tmp_path / "cache" / "models--org--tiny" / "refs" / "main").read_text() == COMMIT
    asked = len(hub.asked)
    assert resolve_model("org/tiny") == resolve_model(f"org/tiny@{COMMIT}") == folder
    assert len(hub.asked) == asked


def test_a_revision_is_asked_for_and_kept(hub: Hub, tmp_path: Path) -> None:
    assert resolve_model("org/tiny@v2") == resolve_model("org/tiny", revision="v2")
    assert "GET /api/models/org/tiny/revision/v2" in hub.asked
    assert (tmp_path / "cache" / "models--org--tiny" / "refs" / "v2").read_text() == COMMIT
    sentence, hint = refused("org/tiny@v9", FileNotFoundError)
    assert sentence == "org/tiny has no revision v9" and "tree/main" in hint


def test_sharded_bin_and_metas_own_are_chosen_in_that_order() -> None:
    wanted = HubId("org/tiny", None, "main")
    small = ["config.json", "tokenizer.json"]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    bins = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    original = [
        f"original/{name}" for name in ("params.json", "tokenizer.model", *(f"consolidated.0{i}.pth" for i in (0, 1)))
    ]
    indices = ["model.safetensors.index.json", "pytorch_model.bin.index.json"]
    everything = [*small, *shards, *bins, *original, *indices, "a.gguf", "training_args.bin"]
    assert needed_files(everything, wanted) == [*small, indices[0], *shards]
    without = [name for name in everything if not name.endswith(".safetensors")]
    assert needed_files(without, wanted) == [*small, indices[1], *bins]
    assert needed_files([*small, "pytorch_model.bin"], wanted) == [*small, "pytorch_model.bin"]
    # The first shard comes last: where it is, the others are.
    assert needed_files([*original, "config.json"], wanted) == ["config.json", *original[:2], original[3], original[2]]
    root = ["consolidated.00.pth", "params.json", "tokenizer.model", "USE_POLICY.md"]
    assert needed_files(root, wanted) == ["tokenizer.model", "params.json", "consolidated.00.pth"]


@pytest.mark.parametrize(
    ("names", "why", "hint"),
    [
        (["config.json", "tokenizer.json", "adapter_model.safetensors"], "holds no model weights", "adapter"),
        (["model.safetensors", "tokenizer.json"], "weights but no config.json", "complete"),
        (["model.safetensors", "config.json"], "no tokenizer.json and no tokenizer.model", "complete"),
        (["a.Q4.gguf", "a.Q8.gguf"], "holds 2 GGUF files", "org/tiny/FILE: a.Q4.gguf, a.Q8.gguf"),
        (["a-00001-of-00002.gguf"], "one part of a split", "one piece"),
        ([], "holds no model weights", "GGUF"),
    ],
)
def test_a_repository_without_a_whole_model_is_told_before_anything_is_fetched(
    names: list[str], why: str, hint: str, hub: Hub
) -> None:
    hub.repos["org/tiny"] = dict.fromkeys(names, b"x")
    said = refused("org/tiny", ValueError)
    assert why in said[0] and hint in said[1]
    assert hub.fetched() == []


def test_one_gguf_file_is_the_model(hub: Hub) -> None:
    hub.repos["org/tiny"] = {"README.md": b"", "tiny.Q8_0.gguf": WEIGHTS}
    file = resolve_model("org/tiny")
    assert file.name == "tiny.Q8_0.gguf" and file.read_bytes() == WEIGHTS
    hub.repos["org/tiny"]["sub/tiny.F16.gguf"] = b"other"
    assert resolve_model("org/tiny/sub/tiny.F16.gguf").read_bytes() == b"other"
    assert hub.fetched() == ["tiny.Q8_0.gguf", "sub/tiny.F16.gguf"]
    assert resolve_model("org/tiny/tiny.Q8_0.gguf") == file
    sentence, hint = refused("org/tiny/tiny.Q2.gguf", FileNotFoundError)
    assert sentence == "there is no tiny.Q2.gguf in org/tiny" and "tiny.Q8_0.gguf" in hint


def test_the_only_gguf_file_is_found_in_the_cache_again(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/tiny"] = {"README.md": b"", "sub/tiny.Q8_0.gguf": WEIGHTS}
    file = resolve_model("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert resolve_model("org/tiny") == file and len(hub.asked) == asked


def test_a_gguf_file_that_was_asked_for_by_name_is_not_the_model(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/tiny"] = {"a.gguf": WEIGHTS, "b.gguf": b"other"}
    file = resolve_model("org/tiny/a.gguf")
    sentence, hint = refused("org/tiny", ValueError)
    assert sentence == "org/tiny holds 2 GGUF files" and "a.gguf, b.gguf" in hint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    sentence, hint = refused("org/tiny", FileNotFoundError)
    assert sentence == "org/tiny may hold more GGUF files than the cache, and downloads are switched off"
    assert hint == "name one that is there: org/tiny/a.gguf"
    assert resolve_model("org/tiny/a.gguf") == file
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as taken, monkeypatch.context() as away:
        taken.bind(("127.0.0.1", 0))
        away.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        sentence, hint = refused("org/tiny", ConnectionError)
    assert "and the Hub cannot be reached" in sentence and hint == "name one that is there: org/tiny/a.gguf"
    hub.repos["org/tiny"] = {"a.gguf": WEIGHTS}
    assert resolve_model("org/tiny") == file


def test_metas_own_files_are_found_in_the_cache_again(hub: Hub) -> None:
    names = ("params.json", "tokenizer.model", "consolidated.00.pth", "consolidated.01.pth")
    hub.repos["org/tiny"] = {f"original/{name}": name.encode() for name in names}
    folder = resolve_model("org/tiny")
    assert all((folder / "original" / name).is_file() for name in names)
    asked = len(hub.asked)
    assert resolve_model("org/tiny") == folder and len(hub.asked) == asked
    (folder / "original" / "consolidated.01.pth").resolve().unlink()
    assert resolve_model("org/tiny") == folder and len(hub.asked) > asked


def test_gated_missing_and_forbidden_are_told_apart(hub: Hub) -> None:
    hub.gated.add("org/tiny")
    sentence, hint = refused("org/tiny", PermissionError)
    assert "org/tiny is gated" in sentence and "/org/tiny" in hint and "HF_TOKEN" in hint
    sentence, hint = refused("org/none", FileNotFoundError)
    assert sentence == "there is no folder org/none here and no such model on the Hub" and "spelling" in hint
    hub.gated.clear()
    hub.status = 403
    assert refused("org/tiny")[0] == "the Hub refuses config.json of org/tiny (status 403)"
    hub.status = 500
    assert refused("org/tiny")[0] == "the Hub answered with status 500 for config.json of org/tiny"


def test_a_download_that_breaks_off_goes_on_in_the_middle(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    hub.cut = 1
    assert (resolve_model("org/tiny") / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [request for request in hub.asked if "bytes=" in request]
    assert ranges == [f"GET /org/tiny/resolve/{COMMIT}/model.safetensors bytes={len(WEIGHTS) // 2}-"]
    assert "http:" not in capfd.readouterr().err


def test_an_unfinished_copy_is_never_taken_as_whole(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.cut = 99
    sentence, hint = refused("org/tiny")
    assert sentence.startswith("the download of model.safetensors of org/tiny broke off") and "again" in hint
    repo = tmp_path / "cache" / "models--org--tiny"
    assert not (repo / "refs" / "main").exists() and not (repo / "snapshots" / COMMIT / "model.safetensors").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused("org/tiny", FileNotFoundError)[0].startswith("org/tiny is in the cache only in part")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.cut = 0
    hub.asked.clear()
    assert (resolve_model("org/tiny") / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.fetched() == ["model.safetensors"]


def test_a_cache_of_other_tools_needs_no_request(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cached_folder(tmp_path)
    assert resolve_model("org/tiny") == snapshot
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("org/tiny") == snapshot
    shutil.rmtree(snapshot.parents[1] / "refs")  # one snapshot, and no branch is named
    assert resolve_model("org/tiny") == snapshot
    sentence, hint = refused("org/tiny@v2", FileNotFoundError)
    assert sentence.startswith("org/tiny@v2 is neither a local folder nor in the cache") and "HF_HUB_OFFLINE" in hint
    assert hub.asked == []


def test_a_link_to_nowhere_is_an_unfinished_download(hub: Hub, tmp_path: Path) -> None:
    snapshot = cached_folder(tmp_path)
    (snapshot / "model.safetensors").resolve().unlink()
    assert (snapshot / "model.safetensors").is_symlink()
    assert resolve_model("org/tiny").name == COMMIT
    assert "model.safetensors" in hub.fetched()


def test_every_shard_that_the_index_names_must_be_there(hub: Hub, tmp_path: Path) -> None:
    snapshot = cached_folder(tmp_path)
    index = snapshot / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    assert resolve_model("org/tiny") != snapshot
    for damaged in ("[]", "{", '{"weight_map": 3}'):
        (tmp_path / "cache" / "models--org--tiny" / "refs" / "main").write_text("abc")
        index.write_text(damaged)
        assert resolve_model("org/tiny") != snapshot


def layout_files(kind: str, part: bool) -> dict[str, bytes]:
    """A layout's files; with `part` the last of its weights is missing."""
    if kind == "meta":
        return {f"original/{name}": b"x" for name in ("params.json", *([] if part else ["consolidated.00.pth"]))}
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    shards = [f"{stem}-0000{i}-of-00002.{kind}" for i in (1, 2)]
    index = {f"{stem}.{kind}.index.json": json.dumps({"weight_map": dict(enumerate(shards))}).encode()}
    return index | dict.fromkeys(shards[:-1] if part else shards, WEIGHTS)


@pytest.mark.parametrize(("first", "second"), [("safetensors", "bin"), ("safetensors", "meta"), ("bin", "meta")])
def test_other_weights_do_not_make_up_for_missing_ones(first: str, second: str, hub: Hub, tmp_path: Path) -> None:
    small = {"config.json": b"{}", "tokenizer.json": b"{}"}
    hub.repos["org/tiny"] = small | layout_files(first, part=False) | layout_files(second, part=False)
    snapshot = tmp_path / "cache" / "models--org--tiny" / "snapshots" / COMMIT

    def cache(files: dict[str, bytes]) -> None:
        shutil.rmtree(snapshot.parents[1], ignore_errors=True)
        for name, content in files.items():
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_bytes(content)
        hub.asked.clear()

    cache(small | layout_files(first, part=True) | layout_files(second, part=False))
    assert resolve_model("org/tiny") == snapshot
    missing = layout_files(first, part=False).keys() - layout_files(first, part=True).keys()
    assert set(hub.fetched()) == missing
    assert find_layout(snapshot)[0] == first and all((snapshot / name).is_file() for name in layout_files(first, False))
    cache(small | layout_files(first, part=False) | layout_files(second, part=True))
    assert resolve_model("org/tiny") == snapshot and hub.asked == []


def test_metas_files_beside_the_config_come_before_original(hub: Hub) -> None:
    names = ("params.json", "tokenizer.model", "consolidated.00.pth")
    hub.repos["org/tiny"] = {each + name: (each + name).encode() for each in ("", "original/") for name in names}
    folder = resolve_model("org/tiny")
    assert find_layout(folder) == ("meta", folder) and "consolidated.00.pth" in hub.fetched()


def test_no_network_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: whoever comes is turned away
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        sentence, hint = refused("org/tiny", ConnectionError)
    assert (
        "org/tiny is neither a local folder nor in the cache, and the Hub cannot be reached" in sentence
        and "local folder" in hint
    )


def test_too_little_disk_is_told_before_the_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage._replace(free=1000))
    sentence, hint = refused("org/tiny")
    assert re.match(r"org/tiny needs 0\.00 GiB more and 0\.00 GiB are free in ", sentence) and "HF_HOME" in hint
    assert hub.fetched() == []


def test_a_disk_that_fills_up_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    sentence, hint = refused("org/tiny")
    assert sentence == "the disk is full while downloading config.json of org/tiny" and "again" in hint


def test_the_library_waits_until_it_is_needed() -> None:
    code = "import sys, llama_3.hub, steer.config; print('huggingface_hub' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_a_models_name_comes_from_its_place(tmp_path: Path) -> None:
    assert model_name(tmp_path / "models--org--a-b" / "snapshots" / "abc") == "org/a-b"
    assert model_name(tmp_path / "models--org--a" / "snapshots" / "abc" / "original") == "org/a"
    assert model_name(tmp_path / "my-llama") == "my-llama"
    assert model_name(tmp_path / "a.gguf") == "a.gguf"
