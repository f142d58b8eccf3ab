"""Draws `docs/chat.svg`: a real chat on the demo model, steered, at 120x36.

python docs/picture.py
"""

import asyncio
import os
from pathlib import Path

os.environ |= {"COLORTERM": "truecolor", "TERM": "xterm-256color"}  # whatever terminal draws it

from app import SteerApp
from steer.config import Settings
from steer.edits import Edit, SteeringSet
from steer.engine import Engine
from steer.session import Sampling


async def draw() -> None:
    edits = (Edit.parse("2229 +0.5x"), Edit.parse("ablate 828"))
    options = {"seed": 3, "sampling": Sampling(), "max_tokens": 110, "pace": 0.0, "steering": SteeringSet(edits)}
    app = SteerApp(Engine.load, Settings(theme="textual-dark"), options)
    async with app.run_test(size=(120, 36)) as pilot:
        while app.session is None:
            await pilot.pause(0.1)
        app.chat.prompt.fill("Tell me a story about a dog.")
        await pilot.press("enter")
        await app.workers.wait_for_complete()
        await pilot.pause(0.5)
        app.chat.prompt.fill("/paint *")
        await pilot.press("enter")
        await pilot.press("escape")
        await pilot.pause(0.5)
        app.save_screenshot(str(Path(__file__).parent / "chat.svg"))


if __name__ == "__main__":
    asyncio.run(draw())
