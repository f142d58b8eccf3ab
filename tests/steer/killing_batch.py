"""Proof that a `steer batch` that is killed goes on to the same file.

    python -m tests.steer.killing_batch --lines 500 --kills 3 -- --batch-size 4

Writes requests of every sort, wrong ones among them, and answers them twice: undisturbed, and with `kill -9` at random
moments, each followed by the same command. Ends with 1 where the two files are not the same bytes. What follows `--` is
passed on to `steer batch`.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "run", "to", "big", "red", "house", "by", "sea")


def write_requests(path: Path, lines: int, latents: int, longest: int = 24, seed: int = 0) -> None:
    """Requests to a model whose SAE has so many latents; every tenth cannot be answered."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as handle:
        for line in range(lines):
            text = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
            ask: dict[str, object] = {"id": f"r{line}", "max_tokens": draw.randint(1, longest)}
            ask |= {"messages": [{"role": "user", "content": text}]} if line % 4 == 1 else {"prompt": text}
            if line % 3 == 0:
                ask["edits"] = [f"{draw.randrange(latents)} +30%", f"clamp {draw.randrange(latents)} 2 decay 9"]
            if line % 5 == 0:
                ask |= {"seed": line, "temperature": 1.0, "top_p": 1.0}
            if line % 50 == 9:
                ask["edits"] = [f"{latents} +1"]
            elif line % 50 == 19:
                ask["prompt"], _ = text * 10_000, ask.pop("messages", None)
            handle.write("{broken\n" if line % 50 == 29 else json.dumps(ask) + "\n")


def start(source: Path, out: Path, options: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "steer", "batch", str(source), str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT)


def run(source: Path, out: Path, options: Sequence[str]) -> float:
    """Let the command end; its seconds."""
    began = time.monotonic()
    process = start(source, out, options)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    return time.monotonic() - began


def count(out: Path) -> int:
    """Lines in the results."""
    return out.read_bytes().count(b"\n") if out.exists() else 0


def kill_at(source: Path, out: Path, options: Sequence[str], lines: int, delay: float) -> int:
    """Start the command and kill it `delay` seconds after OUT has so many lines; how many it then has."""
    process = start(source, out, options)
    while process.poll() is None and count(out) < lines:
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    return count(out)


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=500)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--latents", type=int, default=4096, help="those of the SAE in use")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("options", nargs="*", help="for `steer batch`, after --")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 31) if arguments.seed is None else arguments.seed
    draw, options = random.Random(seed), ["--seed", "11", *arguments.options]
    with tempfile.TemporaryDirectory() as name:
        source, whole, killed = (Path(name) / each for each in ("in.jsonl", "whole.jsonl", "killed.jsonl"))
        write_requests(source, arguments.lines, arguments.latents)
        seconds = run(source, whole, options)
        failed = sum("error" in json.loads(line) for line in whole.read_text().splitlines())
        tell(f"undisturbed: {count(whole)} lines, {failed} with an error, {seconds:.1f} s (seed of the kills: {seed})")
        for target in sorted(draw.randrange(arguments.lines * 3 // 4) for _ in range(arguments.kills)):
            left = kill_at(source, killed, options, target, draw.uniform(0, seconds / 10))
            tell(f"killed: {left} lines were in OUT")
            assert left < arguments.lines, "it had ended: try another --seed"
        run(source, killed, options)
        same = whole.read_bytes() == killed.read_bytes()
        tell(f"after {arguments.kills} kills: {count(killed)} lines, {'the same bytes' if same else 'ANOTHER FILE'}")
    return 0 if same else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
