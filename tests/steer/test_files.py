"""A file is written whole or not at all, whoever else writes it and whatever goes wrong."""

import os
import threading
from pathlib import Path

import pytest

from steer.cli.heatmap import write_picture
from steer.errors import SteerError
from steer.files import replacing, write_whole
from steer.session import Session
from steer.store import Store, export
from tests.steer.fake import FakeEngine


def test_two_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    with replacing(file) as one, replacing(file) as other:
        assert one != other and one.suffix == other.suffix == ".png"
        one.write_bytes(b"one")
        other.write_bytes(b"other")
        assert not file.exists()
    assert file.read_bytes() == b"one" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_fails_leaves_the_old_file_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    file = tmp_path / "a.txt"
    write_whole(file, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(SteerError, match=f"`{file}` cannot be written: No space left on device"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(SteerError, match="cannot be written: No such file or directory"):
        write_whole(tmp_path / "none" / "a.txt", b"new")
    with pytest.raises(SteerError, match="cannot be written: Not a directory"):
        write_whole(file / "a.txt", b"new")


def test_sessions_exports_and_pictures_are_written_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(FakeEngine(), system="half a character: \ud800")
    export(session, tmp_path / "x.json")
    monkeypatch.setattr("steer.cli.heatmap._page", lambda found: "page")
    write_picture(tmp_path / "p.html", None)  # type: ignore[arg-type]  # the page is not looked at
    saved = Store(tmp_path).save(session, "mine")
    assert saved.read_bytes() == (tmp_path / "x.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.json", "p.html", "x.json"]


def test_a_link_stays_a_link_and_a_file_keeps_its_mode(tmp_path: Path) -> None:
    file, link = tmp_path / "real.txt", tmp_path / "link.txt"
    file.write_text("before")
    file.chmod(0o600)
    link.symlink_to(file)
    write_whole(link, b"after")
    assert link.is_symlink() and file.read_text() == "after" and file.stat().st_mode & 0o777 == 0o600


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, b"through")
    reader.join(10)
    assert got == [b"through"] and pipe.is_fifo()


@pytest.mark.parametrize("name", [".", "/", "folder"])
def test_a_folder_is_refused_in_a_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(SteerError, match="is a folder"):
        write_whole(Path(name), b"x")
