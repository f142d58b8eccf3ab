"""Kills captures with SIGKILL at random moments and resumes them: `python -m tests.train.killing FOLDER --kills 20`.

Captures run in forks of one process that has torch loaded, each killed somewhere in the time that an undisturbed one
takes, and gone on with in the same folder until one ends by itself. Then every file must be that of the undisturbed
capture, and the next folder begins. Prints how many were killed, and where; exits 1 at the first difference.
"""

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from tests.tiny import byte_tokenizer, tiny_model
from train.capture import capture
from train.shards import read_manifest
from train.text import TextPlan

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_mid")


def run(text: Path, out: Path) -> None:
    """One capture, from the beginning or going on."""
    capture(
        tiny_model(), byte_tokenizer(), [text], out, HOOKS, 12_000,
        plan=TextPlan(context=60), batch_tokens=240, shard_bytes=2 * 32 * 300,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under `folder`."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def fork(text: Path, out: Path, seconds: float | None) -> bool:
    """Runs a capture in a child and kills it after `seconds`; whether it was killed before its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(text, out)
            code = 0
        finally:
            os._exit(code)
    until = time.monotonic() + (seconds if seconds is not None else 3600)
    while time.monotonic() < until:
        if (ended := os.waitpid(child, os.WNOHANG))[0]:
            assert ended[1] == 0, f"the capture failed with {ended[1]}"
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    text, dice = args.folder / "t.txt", random.Random(args.seed)
    text.write_text("\n<|endoftext|>\n".join(f"{n} cats sat " * dice.randrange(1, 30) for n in range(200)))
    began = time.monotonic()
    assert not fork(text, args.folder / "whole", None)
    takes, whole = time.monotonic() - began, contents(args.folder / "whole")
    kills, folder, moments = 0, 0, []
    while kills < args.kills:
        out = args.folder / f"killed-{folder}"
        while fork(text, out, dice.uniform(0, takes / 2) if kills < args.kills else None):
            kills += 1
            there = out / HOOKS[0]
            moments.append(len(read_manifest(there)["shards"]) if (there / "manifest.json").exists() else 0)
        if contents(out) != whole:
            sys.stdout.write(f"{out} differs from {args.folder / 'whole'} after {kills} kills\n")
            return 1
        folder += 1
    shards = len(read_manifest(args.folder / "whole" / HOOKS[0])["shards"])
    sys.stdout.write(f"{kills} kills over {folder} captures of {shards} shards, of which were there: {moments}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
