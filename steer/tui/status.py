"""The lines around the panes, each a plain function of the session: headline, reply header, status strip, footer.

A reply's header is written from the engine's report and from nothing else: the panel may hold ten edits, but "steered"
stands there only when the report says at how many positions they acted.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from rich.text import Text

from steer.commands import COMMANDS
from steer.events import PromptRead, Report, TokenEvent
from steer.session import Reply, Session
from steer.tui import palette

HERTZ = 20
"""How often a second a screen draws what has been written since."""
TAIL_ROWS = 4
_EDITED = re.compile("[a-z ]*[0-9]*")
"""The kind and the latent at the beginning of an edit, whatever its strength."""


def spread(left: str, right: str, width: int) -> str:
    """One line with `left` and `right` at its ends; the left gives way."""
    left = palette.line(left)
    room = max(width - len(right) - 3, 0)
    return f" {palette.fit(left, room)} {right} "[:width]


def headline(session: Session | None, width: int) -> str:
    """Model, hook, session name; then what the next reply is drawn with and how full the context is."""
    if session is None:
        return spread("steer  loading the model ...", "", width)
    info, narrow = session.engine.info, width < 100
    model = info.model if narrow else f"{info.model} {info.dtype} {info.device}"
    parts = [f"steer  {model}"]
    if info.hook is not None:
        hook = info.hook.replace("blocks.", "").replace(".hook_", " ").split()
        place = f"{hook[-1]}.{hook[0]}" if len(hook) == 2 else info.hook
        parts.append(f"sae {place} {short(info.latents) if narrow else f'{info.latents:,}'} {info.sae_kind}")
    if session.name and not narrow:
        parts.append(session.name)
    steering = session.steering
    count = len(steering.live)
    right = [] if info.hook is None else ["BYPASS" if steering.bypass else f"{count} edit{'s' * (count != 1)}"]
    if not narrow:
        right.append(f"seed {'random' if session.seed is None else session.seed}")
        right.append(f"T {session.sampling.temperature:g}")
    used = context_used(session)
    right.append(f"ctx {used}/{short(info.context)}" if narrow else f"ctx {used}/{info.context}")
    return spread(" | ".join(parts), "  ".join(right), width)


def context_used(session: Session) -> int:
    """Tokens the model has read for the last reply."""
    for turn in reversed(session.turns):
        if turn.reply is not None:
            tokens = turn.reply.events or (turn.reply.prompt.tokens if turn.reply.prompt else ())
            return tokens[-1].index + 1 if tokens else 0
    return 0


def short(number: int) -> str:
    """A count in at most four characters: `812`, `4k`, `65k`."""
    return str(number) if number < 1000 else f"{number // 1000}k"


def reply_status(reply: Reply) -> str:
    """`steered, 2 edits  41 tok  34 tok/s`, `steered, error dropped  12 tok`, `not steered  12 tok`, with the guard
    `steered, 2 edits x 0.56  41 tok  KL 1.2, strained`; `writing...` until the engine has reported."""
    count, guard = f"{len(reply.events)} tok", reply.guard
    if reply.failed is not None:
        return f"failed  {count}"
    if reply.finished is None:
        return "  ".join(["writing...", *([count] if reply.events else []), *([guard.summary] if guard else [])])
    report = reply.finished.report
    acted = edits_acted(report)
    weakened = f" x {guard.factor:.2g}" if guard and guard.factor < 1 else ""
    what = [
        *([f"{acted} edit{'s' * (acted != 1)}{weakened}"] if acted else []),
        *(["error dropped"] if report.dropped else []),
    ]
    parts = [", ".join(["steered", *what])] if report.steered else []
    if report.edits and not report.steered:
        parts.append("not steered")
    parts += [count, *([guard.verdict] if guard else [])]
    if reply.finished.tokens_per_second:
        parts.append(f"{reply.finished.tokens_per_second:.0f} tok/s")
    ends = {"cancelled": "stopped", "length": "cut off at the limit", "stop": ""}
    return "  ".join(part for part in (*parts, ends[reply.finished.finish]) if part)


def edits_acted(report: Report) -> int:
    """How many edits acted. One whose strength was moved while the reply was written stands in the report once for each
    strength and counts once; two of one latent that were in one set are two."""
    acted = {edit.text for edit in report.edits if edit.positions > 0}
    most = Counter({_name(text): 1 for text in acted})
    for carried in report.carried:
        most |= Counter(_name(text) for text in carried.edits if text in acted)
    return most.total()


def _name(text: str) -> str:
    match = _EDITED.match(text)
    assert match is not None, "it matches anything"
    return match[0]


def dropped(prompt: PromptRead) -> str:
    """What is said when the oldest messages did not fit; empty when all did."""
    if not prompt.dropped:
        return ""
    if prompt.dropped == 1:
        return "the oldest message no longer fits and was left out"
    return f"the {prompt.dropped} oldest messages no longer fit and were left out"


def tokens_of(content: str, prompt: PromptRead | None) -> Sequence[TokenEvent]:
    """The prompt's tokens that spell `content`, found from the end; none when they do not end where it does."""
    content = content.strip()
    if prompt is None or not content:
        return ()
    ends: list[int] = []
    whole = ""
    for event in prompt.tokens:
        whole += "\0" if event.special else event.text
        ends.append(len(whole))
    start = whole.rfind(content)
    if start < 0:
        return ()
    first = next(place for place, end in enumerate(ends) if end > start)
    last = next(place for place, end in enumerate(ends) if end >= start + len(content))
    found = prompt.tokens[first : last + 1]
    text = "".join(event.text for event in found)
    return found if text.strip() == content and not any(event.special for event in found) else ()


def tail(text: str, width: int) -> Text:
    """The end of a reply, as much as `TAIL_ROWS` rows hold: what the steering sheet covers while it steers it."""
    lines = textwrap.wrap(palette.line(text), max(width - 2, 1))
    return Text("\n".join(f" {line}" for line in lines[-TAIL_ROWS:]), style="dim", no_wrap=True, overflow="crop")


def strip(
    event: TokenEvent | None,
    width: int,
    *,
    lead: str,
    labels: Mapping[int, str],
    maxima: Callable[[int], float | None],
    tags: Mapping[int, str],
) -> Text:
    """The cursor's token and its two strongest features, for where the Token pane is not on the screen."""
    line = Text(f" {lead}", no_wrap=True, overflow="crop")
    if event is None:
        return line
    line.append(f"'{palette.visible(palette.drawable(event.text))}'", "bold")
    if event.logprob is not None:
        line.append(f" p {palette.share(math.exp(min(event.logprob, 0.0)))}", "dim")
    hits = event.hits[:2]
    room = (width - line.cell_len - 1) // max(len(hits), 1)
    for hit in hits:
        tag = tags.get(hit.latent, "")
        number = palette.number(hit.activation)
        bar = palette.bar(hit.activation, maxima(hit.latent) or event.hits[0].activation, 5)
        head = f"  {f'{tag} ' if tag else ''}{hit.latent} "
        label = palette.line(labels.get(hit.latent) or "(no label)")
        space = max(room - len(head) - len(number) - 8, 0)
        line.append(head)
        line.append(palette.fit(label, space) if len(label) > space else label)
        line.append(f" {number} {bar}")
    return line


def footer(
    session: Session | None, width: int, *, typing: bool, writing: bool, pane: Sequence[tuple[str, str]] = ()
) -> Text:
    """The keys that work now, those of the focused `pane` first; as many as fit."""
    esc = ("Esc", "stop" if writing else "keys")
    if typing:
        go_on = session is not None and session.mode == "completion"
        live = writing and session is not None and session.engine.info.hook is not None
        keys = [
            esc,
            ("Tab", "steer this reply" if live else "panes"),
            ("Enter", "go on" if go_on else "send"),
            ("Ctrl+J", "new line"),
        ]
        keys += [("/", "commands"), ("Ctrl+P", "palette"), ("Ctrl+S", "save"), ("Ctrl+Q", "quit")]
    else:
        always = [("i", "type"), ("?", "help")]
        keys = [*([esc] if writing else []), *pane, *(reversed(always) if pane else always)]
        keys += [(c.key, c.short) for c in COMMANDS if c.key and c.short and c.name != "help"]
        keys += [("Ctrl+P", "commands")]
    return keys_line(keys, width)


def keys_line(keys: Sequence[tuple[str, str]], width: int) -> Text:
    """Keys with what they do, as many as fit."""
    line = Text(no_wrap=True, overflow="crop")
    for key, does in keys:
        if line.cell_len + len(key) + len(does) + 3 > width:
            break
        line.append("  " if line else " ")
        line.append(key, "bold")
        line.append(f" {does}")
    return line
