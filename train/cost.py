"""What a run will cost in disk, memory, hours and money, from a short trial on this machine; and whether it fits.

The arithmetic is the same for capture and training: so many tokens, so many in a second. The trial runs the real work
on the first of the real data, so that nothing is assumed about the machine.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from train.errors import TrainError

TRIAL_SECONDS = 10.0


@dataclass(frozen=True)
class Cost:
    """What `tokens` tokens take."""

    tokens: int
    tokens_per_second: float
    """all processes together"""
    disk_bytes: int
    memory_bytes: int
    """the most that one process holds, its model included"""
    hours: float
    money: float | None
    """None without a price"""

    def lines(self) -> list[str]:
        """For a person, one fact a line."""
        told = [
            f"tokens  {self.tokens:,} at {self.tokens_per_second:,.0f} a second",
            f"disk    {readable(self.disk_bytes)}",
            f"memory  {readable(self.memory_bytes)}",
            f"time    {duration(3600 * self.hours)}",
        ]
        return told if self.money is None else [*told, f"money   {self.money:,.2f}"]


def estimate(
    tokens: int,
    tokens_per_second: float,
    *,
    disk_bytes: int,
    memory_bytes: int,
    processes: int = 1,
    price_per_hour: float | None = None,
) -> Cost:
    """The cost of `tokens` at the rate that one of `processes` equal processes showed.

    `price_per_hour` is that of everything which runs, in any currency.
    """
    rate = tokens_per_second * processes
    hours = tokens / rate / 3600
    money = None if price_per_hour is None else hours * price_per_hour
    return Cost(tokens, rate, disk_bytes, memory_bytes, hours, money)


def added(costs: Sequence[Cost], tokens: int) -> Cost:
    """What one after the other takes, as of one piece of work on `tokens` tokens."""
    hours = sum(cost.hours for cost in costs)
    money = None if any(cost.money is None for cost in costs) else sum(cost.money or 0.0 for cost in costs)
    memory = max(cost.memory_bytes for cost in costs)
    disk = sum(cost.disk_bytes for cost in costs)
    return Cost(tokens, tokens / (3600 * hours), disk, memory, hours, money)


def trial(work: Callable[[], int], seconds: float = TRIAL_SECONDS) -> tuple[float, int]:
    """Tokens a second of `work`, which does a piece of the run and returns its tokens (0: there is no more), and the
    most bytes that the process held on the way. The first piece, slower than all others, does not count unless it is
    the only one."""
    start = time.perf_counter()
    first, tokens = work(), 0
    warm = end = time.perf_counter()
    while end - start < seconds and (more := work()):
        tokens, end = tokens + more, time.perf_counter()
    rate = tokens / (end - warm) if tokens else first / (warm - start)
    return rate, peak_memory()


def peak_memory() -> int:
    """The most bytes this process has held: those of the card where it uses one, else of main memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_reserved()
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource
        import sys

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def check_room(folder: Path, needed: int, hint: str) -> int:
    """Bytes free where `folder` lies or will lie; `TrainError` if `needed` is more."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        raise TrainError(f"{folder} would take {readable(needed)} of disk, and {readable(free)} are free", hint)
    return free


def readable(size: float) -> str:
    """As `12.3 GB`; a kilobyte is 1,000 bytes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def duration(seconds: float) -> str:
    """As `4 h 05 min`, `3 min 20 s` or `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600:,} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"
