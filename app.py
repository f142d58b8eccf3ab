"""The app: its theme, its screens, the engine that loads while a person already types, and the command palette.

`run` is what the command line calls. It keeps whatever C code writes on file descriptor 2 away from the screen, and
says after leaving what went wrong. No torch is imported here: `make_engine` does that, in its own thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from textual.app import App
from textual.binding import Binding, BindingType
from textual.command import DiscoveryHit, Hit, Hits, Provider
from textual.filter import LineFilter
from textual.message import Message
from textual.widgets import TextArea

import steer.tui
from steer import commands
from steer.config import Settings
from steer.edits import SteeringSet
from steer.errors import EXPLAINED, ExitCode, SteerError, render
from steer.session import EngineLike, Session
from steer.store import Store
from steer.tui.ascii import Ascii
from steer.tui.chat import ChatScreen
from steer.tui.compare import CompareScreen
from steer.tui.features import FeaturesScreen

WIDTHS = [(0, "-thin"), (60, "-narrow"), (100, "-normal"), (160, "-wide")]
HEIGHTS = [(0, "-low"), (16, "-short"), (30, "-tall")]
"""Columns and rows from which on a screen has a class; `app.tcss` says what each looks like."""


class Registry(Provider):
    """The commands of the registry, for the palette. One that needs an argument is put into the message box."""

    def _run(self, command: commands.Command) -> None:
        app = self.app
        assert isinstance(app, SteerApp)
        if isinstance(app.screen, FeaturesScreen | CompareScreen):
            app.pop_screen()
        if command.needs_args:
            app.chat.action_type()
            app.chat.prompt.fill(f"/{command.name} ")
        else:
            app.chat.action_command(command.name)

    async def discover(self) -> Hits:
        for command in commands.COMMANDS:
            yield DiscoveryHit(command.name, partial(self._run, command), help=command.help)

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for command in commands.COMMANDS:
            score = max(matcher.match(command.name), 0.8 * matcher.match(command.help))
            if score > 0:
                yield Hit(score, matcher.highlight(command.name), partial(self._run, command), help=command.help)


class SteerApp(App[int]):
    """See the module's docstring."""

    TITLE = "steer"
    CSS_PATH = Path(steer.tui.__file__).parent / "app.tcss"
    COMMANDS: ClassVar[Any] = {Registry}
    HORIZONTAL_BREAKPOINTS = WIDTHS
    VERTICAL_BREAKPOINTS = HEIGHTS
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c", "interrupt", show=False, priority=True),
        Binding("colon", "command_palette", "Command palette"),
    ]

    class Loaded(Message):
        """The engine is there, or will not be."""

        def __init__(self, engine: EngineLike | None, error: BaseException | None) -> None:
            super().__init__()
            self.engine, self.error = engine, error

    def __init__(
        self, make_engine: Callable[[], EngineLike], settings: Settings, session_options: Mapping[str, Any]
    ) -> None:
        """`session_options` are arguments of `Session`, and `steering`, a set, and `open`, the name of a session."""
        super().__init__()
        self.settings, self.options = settings, session_options
        self.session: Session | None = None
        self.error: BaseException | None = None
        """Why the engine could not be loaded."""
        self.chat = ChatScreen()
        self._make_engine = make_engine
        # Not a worker: leaving the app waits for those, and nothing can interrupt a load.
        self.loader = threading.Thread(target=self._load, name="load", daemon=True)

    def on_mount(self) -> None:
        if self.settings.theme in self.available_themes:
            self.theme = self.settings.theme
        self.push_screen(self.chat)
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not the main thread, not Unix
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self.action_interrupt)
            # A terminal that is gone reads as an endless end of file, at which the driver would spin.
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.exit, int(ExitCode.INTERRUPTED))
        self.call_after_refresh(self.loader.start)

    def _load(self) -> None:
        try:
            loaded = self.Loaded(self._make_engine(), None)
        except BaseException as error:
            loaded = self.Loaded(None, error)
        self.post_message(loaded)

    def on_steer_app_loaded(self, event: Loaded) -> None:
        if event.engine is None:
            assert event.error is not None
            self.fail(event.error)
            return
        options = dict(self.options)
        steering, name = options.pop("steering", SteeringSet()), options.pop("open", None)
        try:
            self.session = Session(event.engine, **({"pace": self.settings.pace} | options))
            self.session.change(steering)
            if self.settings.theme:
                self.chat.set_theme(self.settings.theme)
            notice = self.store().restore(name, self.session) if name else event.engine.info.notice
        except EXPLAINED as error:
            self.fail(error)
            return
        self.chat.begin(notice or "")

    def fail(self, error: BaseException) -> None:
        """Leaves with an explained error's sentence; anything else is a bug and keeps its traceback."""
        if not isinstance(error, EXPLAINED):
            raise error
        self.error = error
        self.chat.say(render(error), error=True)
        self.exit(int(ExitCode.MISTAKE), return_code=int(ExitCode.MISTAKE))

    def store(self) -> Store:
        store = self.options.get("store")
        if not isinstance(store, Store):
            raise SteerError("there is no folder to keep sessions in")
        return store

    def get_line_filters(self) -> Sequence[LineFilter]:
        return [*super().get_line_filters(), *([Ascii()] if self.settings.ascii else [])]

    async def action_quit(self) -> None:
        self.chat.quit()

    def action_interrupt(self) -> None:
        """Ctrl+C: leaves while the engine loads, later stops the reply or copies what is selected."""
        if self.session is None:
            self.exit(int(ExitCode.INTERRUPTED), return_code=int(ExitCode.INTERRUPTED))
        elif isinstance(self.focused, TextArea) and self.focused.selected_text:
            self.focused.action_copy()
        elif not (self.screen if isinstance(self.screen, CompareScreen) else self.chat).stop():
            self.chat.say("Ctrl+Q leaves")


@contextlib.contextmanager
def quiet_stderr(log: Path | None) -> Iterator[None]:
    """Gives Textual, which paints on `sys.__stderr__`, a duplicate, and points descriptor 2 at a log file meanwhile."""
    sys.stderr.flush()
    before, screen = sys.__stderr__, os.dup(2)
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    sink = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        with open(screen, "w", encoding=before.encoding if before else "utf-8", closefd=False) as terminal:
            sys.__stderr__ = terminal  # type: ignore[misc]  # Final for type checkers; the only way to tell Textual
            os.dup2(sink, 2)
            yield
    finally:
        sys.__stderr__ = before  # type: ignore[misc]
        os.dup2(screen, 2)
        os.close(screen)
        os.close(sink)


def run(
    make_engine: Callable[[], EngineLike],
    settings: Settings,
    session_options: Mapping[str, Any],
    *,
    log: Path | None = None,
) -> int:
    """Runs the app until it is left; its exit code. An explained failure is on stderr by then."""
    sys.setswitchinterval(0.001)  # the engine's Python between tokens would else hold the screen up for 5 ms at a time
    with quiet_stderr(log):
        app = SteerApp(make_engine, settings, session_options)
        try:
            app.run()
            code = app.return_code or 0
        except KeyboardInterrupt:
            code = int(ExitCode.INTERRUPTED)
    if app.error is not None:
        sys.stderr.write(render(app.error) + "\n")
    elif code == ExitCode.INTERRUPTED:
        sys.stderr.write("interrupted\n")
    elif code:
        sys.stderr.write("error: the screens broke off; finished replies are saved\n")
        sys.stderr.write(f"\nhint: what happened is at the end of {log}\n" if log else "")
    if app.loader.is_alive():  # it cannot be stopped, and Python may crash when torch loads while it ends
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
