"""Starting the app: a message typed while the engine loads, and starts that fail or are interrupted."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from app import SteerApp
from steer.config import Settings
from steer.errors import ExitCode, SteerError
from tests.tui.conftest import Driver, session_of
from tests.tui.fake_engine import FakeEngine


async def test_a_message_typed_while_the_engine_loads_is_sent_when_it_is_there() -> None:
    go, engine = threading.Event(), FakeEngine("Hello you")

    def make() -> FakeEngine:
        go.wait()
        return engine

    app = SteerApp(make, Settings(pace=0), {"seed": 7})
    async with app.run_test(size=(120, 36)) as pilot:
        driver = Driver(app, pilot)
        assert app.chat.prompt.has_focus
        assert "loading the model" in driver.text
        await pilot.press(*"hi", "enter")
        assert "will be sent when the model is loaded" in driver.text
        await pilot.press("escape", "b")
        assert "the model is still loading" in driver.text
        go.set()
        await driver.settle()
        await driver.settle()
        assert [turn.content for turn in session_of(driver).turns] == ["hi", "Hello you"]


async def test_an_engine_that_cannot_be_loaded_ends_the_app_with_one() -> None:
    def make() -> FakeEngine:
        raise SteerError("there is no model in `nowhere`", "pass `--model DIR`")

    app = SteerApp(make, Settings(), {})
    async with app.run_test() as pilot:
        await Driver(app, pilot).settle()
    assert app.return_code == 1
    assert str(app.error) == "there is no model in `nowhere`"


async def test_ctrl_c_while_loading_ends_with_130() -> None:
    go, engine = threading.Event(), FakeEngine()

    def make() -> FakeEngine:
        go.wait()
        return engine

    app = SteerApp(make, Settings(), {})
    async with app.run_test() as pilot:
        await pilot.press("ctrl+c")
        await pilot.pause()
    go.set()
    assert app.return_code == 130


SCRIPT = """
import sys, time, os
import app
from pathlib import Path
from steer.config import Settings
from steer.errors import SteerError
def fail():
    os.write(2, b"NOISE FROM C")
    raise SteerError("there is no model in `nowhere`", "pass `--model DIR`")
def hang():
    time.sleep(60)
code = app.run({make}, Settings(), {{}}, log=Path(sys.argv[1]))
assert "torch" not in sys.modules
sys.exit(code)
"""


def in_terminal(make: str, log: Path, typed: bytes = b"") -> tuple[int, str]:
    """Runs the app in a pseudo-terminal; its exit code and all it wrote."""
    pid, terminal = pty.fork()
    if pid == 0:
        root = Path(__file__).parents[2]
        os.chdir(root)
        os.execve(
            sys.executable,
            [sys.executable, "-c", SCRIPT.format(make=make), str(log)],
            os.environ | {"TERM": "xterm-256color", "PYTHONPATH": str(root)},
        )
    seen, due = b"", time.monotonic() + 30
    while time.monotonic() < due:
        ready, _, _ = select.select([terminal], [], [], 0.2)
        try:
            chunk = os.read(terminal, 65536) if ready else None
        except OSError:
            break
        if chunk == b"":
            break
        seen += chunk or b""
        if typed and b"loading the model" in seen:
            os.write(terminal, typed)
            typed = b""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), seen.decode(errors="replace")


def test_a_failed_start_prints_one_sentence_after_leaving_and_keeps_noise_off_the_screen(tmp_path: Path) -> None:
    code, seen = in_terminal("fail", tmp_path / "log")
    assert code == 1
    assert "error: there is no model in `nowhere`" in seen.rsplit("\x1b[?1049l", 1)[1]
    assert "hint: pass `--model DIR`" in seen
    assert "Traceback" not in seen
    assert "NOISE" not in seen
    assert "NOISE FROM C" in (tmp_path / "log").read_text()


def test_ctrl_c_in_a_terminal_leaves_at_once_without_a_traceback(tmp_path: Path) -> None:
    code, seen = in_terminal("hang", tmp_path / "log", b"\x03")
    assert code == 130
    assert "Traceback" not in seen


def test_importing_the_app_leaves_torch_out() -> None:
    code = "import sys, app, steer.commands; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


async def test_a_theme_that_is_not_there_ends_the_start() -> None:
    app = SteerApp(FakeEngine, Settings(theme="puce"), {})
    async with app.run_test() as pilot:
        await Driver(app, pilot).settle()
    assert app.return_code == 1 and "there is no theme `puce`" in str(app.error)


async def test_a_terminal_that_goes_away_ends_the_app() -> None:
    app = SteerApp(lambda: FakeEngine("a"), Settings(pace=0), {})
    async with app.run_test() as pilot:
        await pilot.pause(0.2)
        os.kill(os.getpid(), signal.SIGHUP)
        await pilot.pause(0.2)
        assert app.return_value == ExitCode.INTERRUPTED
