"""A dialog as a model was trained to read it, and where each message lies in it.

The format is that of the checkpoint's own template, told by what the template says (`chat_styles`); templates are read,
never run. Contents are encoded as plain text, so a `<|eot_id|>` typed by a user ends nothing.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from datetime import date as day
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Final

from llama_3 import chat_styles
from llama_3.chat_styles import Message, Piece, Recognised, Spell, Style, recognise
from llama_3.config import read_json
from llama_3.errors import config_error
from llama_3.tokenizer import Tokenizer, gguf_metadata, model_folders

__all__ = ["FORMATS", "ChatFormat", "Message", "MessageSpan", "load_chat_format"]

FORMATS: Final[dict[str, Spell]] = {
    "llama-3": chat_styles.llama_3,
    "llama-3.1": chat_styles.llama_3,
    "llama-3.2": chat_styles.llama_3,
    "llama-2": chat_styles.llama_2,
    "zephyr": chat_styles.zephyr,
    "chatml": chat_styles.chatml,
    "plain": chat_styles.plain,
}
"""The formats by name; Llama 3.3 has that of 3.1."""

_HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
_NAMES = ", ".join(FORMATS)
_DATED = ("llama-3.1", "llama-3.2")
_FIXED_DATE = "26 Jul 2024"
"""What Llama 3.1's template shows when it is given no date."""
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@dataclass(frozen=True)
class MessageSpan:
    """Token offsets of one message in its dialog: what opens it, its content, then what ends it.

    A token that reaches over a border belongs to the content of which it holds a part.
    """

    role: str
    start: int
    content_start: int
    content_end: int
    end: int


class ChatFormat:
    """Encodes dialogs with one tokenizer; `note` tells a user which format this is and why.

    `date` is what its system block shows, None where it shows none; `of_today`, whether that is the clock's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        name: str = "llama-3",
        *,
        date: str | None = None,
        template: Recognised | None = None,
        why: str = "",
    ) -> None:
        """A format by name; `template` is what the checkpoint's own one sets, `why` goes into the note.

        ValueError for an unknown name, a date in a format that shows none, a vocabulary without the needed headers.
        """
        if name not in FORMATS:
            raise config_error(f"there is no chat format {name!r}", f"choose one of {_NAMES}")
        lacking = [header for header in _HEADERS if not _has(tokenizer, header)]
        if lacking and FORMATS[name] is chat_styles.llama_3:
            raise config_error(
                f"chat format {name} needs the special token {lacking[0]}, which this model's vocabulary lacks",
                f"choose another of {_NAMES}",
            )
        own, self.of_today = template or Recognised(name), False
        if name in _DATED:
            self.of_today = not (date or own.date) and name == "llama-3.2"
            date = date or own.date or (_today() if self.of_today else _FIXED_DATE)
        elif date is not None:
            raise config_error(f"chat format {name} shows no date, so {date!r} cannot be shown", "leave the date out")
        self.tokenizer, self.name, self.date = tokenizer, name, date
        self.note = "".join([name, why and f", {why}", f"; its system block gives the date as {date}" if date else ""])
        self._style = Style(tokenizer, date, own.system, own.bos, own.trim)
        self._spell = FORMATS[name]

    def on(self, date: str) -> ChatFormat:
        """The same format with another date; only for one that shows a date."""
        assert self.date, f"chat format {self.name} shows no date"
        other = copy(self)
        other.date, other.of_today, other._style = date, False, replace(self._style, date=date)
        other.note = self.note.removesuffix(self.date) + date
        return other

    def encode_dialog(
        self, messages: Sequence[Message], *, generation_prompt: bool = True
    ) -> tuple[list[int], list[MessageSpan]]:
        """Tokens of a dialog and a span per message; `generation_prompt` opens a reply.

        What belongs to no message (the first token, a system block of the format's own, the opening of the reply) lies
        outside all spans.
        """
        pieces = list(self._spell(self._style, messages, generation_prompt))
        tokens, origins = self._encode(pieces)
        spans = []
        for i, message in enumerate(messages):
            own = [index for index, piece in enumerate(pieces) if piece.message == i]
            content = next(index for index in own if pieces[index].is_content)
            places = (own[0], content, content + 1, own[-1] + 1)
            spans.append(MessageSpan(message.role, *(bisect_left(origins, place) for place in places)))
        return tokens, spans

    def fit_dialog(self, messages: Sequence[Message], budget: int) -> tuple[list[int], list[MessageSpan], int]:
        """Tokens and spans of the dialog with its oldest turns dropped until it has `budget` tokens, and how many.

        The system message and the last message always stay, and no answer is kept without its question. ValueError
        when those that stay do not fit.
        """
        assert messages, "a dialog needs a message"
        tokens, spans = self.encode_dialog(messages)
        if len(tokens) <= budget:
            return tokens, spans, 0
        n_system = 1 if messages[0].role == "system" and len(messages) > 1 else 0
        system, turns = list(messages[:n_system]), messages[n_system:]
        last = len(turns) - 1
        starts = [i for i, turn in enumerate(turns) if i in (0, last) or turn.role in ("user", "system")]
        fitting = bisect_left(
            starts, True, key=lambda dropped: len(self.encode_dialog([*system, *turns[dropped:]])[0]) <= budget
        )
        if fitting == len(starts):
            tokens, spans = self.encode_dialog([*system, turns[last]])
            size = spans[-1].end - spans[-1].start
            raise config_error(
                f"the last message is {size} tokens long and {max(budget - len(tokens) + size, 0)} of the {budget} "
                "are left for it",
                "shorten the message or the system prompt, or ask for fewer tokens in reply",
            )
        dropped = starts[fitting]
        return *self.encode_dialog([*system, *turns[dropped:]]), dropped

    def _encode(self, pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
        """Tokens, and for each the index of its piece."""
        tokens: list[int] = []
        origins: list[int] = []
        for is_text, group in groupby(enumerate(pieces), key=lambda item: isinstance(item[1].what, str)):
            run = list(group)
            if not is_text:
                tokens += [piece.what for _, piece in run if isinstance(piece.what, int)]
                origins += [place for place, _ in run]
                continue
            parts = [(piece.what, piece.is_content) for _, piece in run if isinstance(piece.what, str)]
            encode = self.tokenizer.encode_after_special if tokens else self.tokenizer.encode
            ids = encode("".join(text for text, _ in parts))
            sizes = [len(self.tokenizer.token_bytes(token)) for token in ids]
            origins += [run[part][0] for part in _parts_of_tokens(parts, sizes)]
            tokens += ids
        return tokens, origins


def _parts_of_tokens(parts: Sequence[tuple[str, bool]], sizes: Sequence[int]) -> Iterator[int]:
    """For each token, given by its bytes, the part of a text (and whether it is content) that the token belongs to."""
    ends = list(accumulate(len(text.encode(errors="surrogatepass")) for text, _ in parts))
    end = ends[-1] - sum(sizes)  # below 0 where a vocabulary puts a space of its own in front
    for size in sizes:
        begin, end = end, end + size
        first, last = (min(place, len(parts) - 1) for place in (bisect_right(ends, begin), bisect_left(ends, end)))
        held = [part for part in range(first, last + 1) if parts[part][0] and parts[part][1]]
        yield held[-1] if held else last


def load_chat_format(
    path: Path | str, tokenizer: Tokenizer, name: str | None = None, date: str | None = None
) -> ChatFormat:
    """The chat format of a model folder or GGUF file: `name` if given, else what the checkpoint's own template says.

    Without a template it is Llama 3's where the vocabulary has its headers (without the date, as in Meta's own code),
    Llama 2's for a folder of Meta's, else plain text; a template that is none of ours also gives plain text, and the
    format's `note` says so. `date` is shown by the system block of `llama-3.1` and `llama-3.2`, as `26 Jul 2024`.
    Raises ValueError for an unknown name, and for a date in a format that shows none.
    """
    template = read_chat_template(Path(path))
    found = recognise(template) if template is not None else None
    why = "as asked for"
    if name is None:
        name, why = _choose(Path(path), tokenizer, template, found)
    own = found if found is not None and found.name == name else None
    return ChatFormat(tokenizer, name, date=date, template=own, why=why)


def read_chat_template(path: Path) -> str | None:
    """The Jinja source of a checkpoint's chat template; None where it has none."""
    for folder in model_folders(path):
        file = folder / "chat_template.jinja"
        if file.is_file():
            try:
                return file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise config_error(f"{file} is not text in UTF-8") from error
        for name in ("tokenizer_config.json", "chat_template.json"):
            if template := _default_template((read_json(folder / name) or {}).get("chat_template")):
                return template
    return _default_template((gguf_metadata(path) or {}).get("tokenizer.chat_template"))


def _default_template(entry: Any) -> str | None:
    """Some checkpoints list several templates by name."""
    if isinstance(entry, list):
        named = {one.get("name"): one.get("template") for one in entry if isinstance(one, dict)}
        entry = named.get("default")
    return entry if isinstance(entry, str) else None


def _choose(path: Path, tokenizer: Tokenizer, template: str | None, found: Recognised | None) -> tuple[str, str]:
    has_headers = all(_has(tokenizer, header) for header in _HEADERS)
    if found is not None and (has_headers or FORMATS[found.name] is not chat_styles.llama_3):
        return found.name, "as in the checkpoint's own template"
    if template is not None:
        return "plain", f"since the checkpoint's own template is none that is known (--chat-format: {_NAMES})"
    if has_headers:
        return "llama-3", "since the checkpoint has no template and its vocabulary has Llama 3's headers"
    if _has(tokenizer, "<s>") and any((folder / "params.json").exists() for folder in model_folders(path)):
        return "llama-2", "since the folder is one of Meta's with Llama 2's vocabulary"
    return "plain", f"since the checkpoint has no template (--chat-format: {_NAMES})"


def _today() -> str:
    """The day as templates write it, `26 Jul 2024`: in English, whatever the locale says."""
    today = day.today()
    return f"{today.day:02d} {_MONTHS[today.month - 1]} {today.year}"


def _has(tokenizer: Tokenizer, special: str) -> bool:
    try:
        tokenizer.special(special)
    except ValueError:
        return False
    return True
