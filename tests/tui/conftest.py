"""Running the app in a test: a store in a temporary folder, and waits that end when the work has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from textual import _wait
from textual.pilot import Pilot

from app import SteerApp
from steer.config import Settings
from steer.edits import SteeringSet
from steer.session import Session
from steer.store import Store
from steer.tui import features
from steer.tui.chat import ChatScreen
from tests.tui.fake_engine import FakeEngine


@dataclass
class Driver:
    """A running app and the hands on it."""

    app: SteerApp
    pilot: Pilot[int]

    async def settle(self) -> None:
        """Waits until the engine is loaded, every worker is done and what they sent is drawn."""
        while not self.app.loader.ident:
            await self.pilot.pause()
        await asyncio.to_thread(self.app.loader.join)
        await self.pilot.pause()
        await self.app.workers.wait_for_complete()
        await self.pilot.pause()

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.settle()

    async def send(self, text: str, *, wait: bool = True) -> None:
        """Types `text` into the message box at once and presses Enter."""
        self.app.chat.prompt.fill(text)
        await self.pilot.press("enter")
        await (self.settle() if wait else self.pilot.pause())

    async def reset(self) -> None:
        """Back to an empty chat, as after the start."""
        while not isinstance(self.app.screen, ChatScreen):
            self.app.pop_screen()
            await self.pilot.pause()
        session = self.app.session
        assert session is not None
        session.clear()
        session.mode = "chat"
        session.change(SteeringSet())
        assert isinstance(session.engine, FakeEngine)
        session.engine.prompts.clear()
        self.app.chat.draw_turns()
        self.app.chat.prompt.focus()

    @property
    def text(self) -> str:
        """All that is on the screen."""
        return "\n".join(line.text for line in self.app.screen._compositor.render_strips())

    def says(self) -> str:
        return self.app.chat.notice


def session_of(driver: Driver) -> Session:
    assert driver.app.session is not None
    return driver.app.session


async def until_held(driver: Driver, engine: FakeEngine) -> None:
    """Waits until the script stands at its `HOLD`, and what came before it is drawn."""
    await asyncio.to_thread(engine.held.wait)
    driver.app.chat.drain()
    await driver.pilot.pause()


Running = Callable[..., AbstractAsyncContextManager[Driver]]


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Running:
    """Runs the app with a fake engine: `async with running(engine, size=(80, 24)) as driver`."""
    monkeypatch.setattr(features, "DEBOUNCE", 0.001)
    monkeypatch.setattr(_wait, "SLEEP_GRANULARITY", 0.004)  # how long each key press of the pilot takes at least
    monkeypatch.setenv("TEXTUAL_ANIMATIONS", "none")

    @asynccontextmanager
    async def run(
        engine: FakeEngine | None = None, *, size: tuple[int, int] = (120, 36), **options: Any
    ) -> AsyncIterator[Driver]:
        made = engine or FakeEngine()
        app = SteerApp(lambda: made, Settings(pace=0), {"store": Store(tmp_path / "sessions"), "seed": 7} | options)
        async with app.run_test(size=size) as pilot:
            driver = Driver(app, pilot)
            await driver.settle()
            yield driver

    return run
