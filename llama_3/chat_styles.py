"""How each family of models spells a dialog, as pieces: special tokens, text around a message, and its content.

Facts: the templates that Meta and the fine-tunes publish with their checkpoints. Pieces stay apart from tokens because
a token may reach over the border of two pieces; `chat_format` encodes the text between two special tokens as one.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llama_3.tokenizer import Tokenizer


@dataclass(frozen=True)
class Message:
    """One turn; `role` is system, user, assistant or ipython (a tool's result)."""

    role: str
    content: str


@dataclass(frozen=True)
class Piece:
    """A stretch of a dialog: a special token's id or text, the message it belongs to, and whether it is its content."""

    what: int | str
    message: int | None = None
    is_content: bool = False


@dataclass(frozen=True)
class Style:
    """What the spelling of a dialog depends on, besides its messages."""

    tokenizer: Tokenizer
    date: str | None = None
    """shown in the system block of Llama 3.1 and later"""
    system: str | None = None
    """system message of dialogs without one (ChatML)"""
    bos: bool = False
    """whether ChatML's and Zephyr's dialogs begin with the first token"""
    trim: bool = True
    """whether Llama 3's contents are trimmed"""

    def marker(self, name: str, message: int | None) -> Piece:
        """`name` as the special token that it is in some vocabularies, else as text."""
        try:
            return Piece(self.tokenizer.special(name), message)
        except ValueError:
            return Piece(name, message)

    def opening(self) -> Iterator[Piece]:
        """The first token, where dialogs begin with it."""
        if self.bos:
            yield Piece(self.tokenizer.bos_id)


Spell = Callable[[Style, Sequence[Message], bool], Iterator[Piece]]
"""Pieces of a dialog; the flag asks for the opening of a reply."""


def llama_3(style: Style, messages: Sequence[Message], reply: bool) -> Iterator[Piece]:
    """Headers and `<|eot_id|>`, contents mostly trimmed; with a date also the system block of Llama 3.1 and later."""
    special, eot = style.tokenizer.special, style.tokenizer.eot_id

    def header(role: str, message: int | None) -> Iterator[Piece]:
        yield Piece(special("<|start_header_id|>"), message)
        yield Piece(role, message)
        yield Piece(special("<|end_header_id|>"), message)
        yield Piece("\n\n", message)

    yield Piece(style.tokenizer.bos_id)
    block = f"Cutting Knowledge Date: December 2023\nToday Date: {style.date}\n\n" if style.date else ""
    if block and (not messages or messages[0].role != "system"):
        yield from header("system", None)
        yield Piece(block)
        yield Piece(eot)
    for i, message in enumerate(messages):
        yield from header(message.role, i)
        if block and i == 0 and message.role == "system":
            yield Piece(block, i)
        yield Piece(message.content.strip() if style.trim else message.content, i, True)
        yield Piece(eot, i)
    if reply:
        yield from header("assistant", None)


def llama_2(style: Style, messages: Sequence[Message], reply: bool) -> Iterator[Piece]:
    """`<s>[INST] question [/INST] answer </s>`; the system message stands inside the first question."""
    bos, eos = style.tokenizer.bos_id, style.tokenizer.eot_id
    opened = False
    for i, message in enumerate(messages):
        if message.role == "assistant":
            yield Piece(" ", i)
            yield Piece(message.content.strip(), i, True)
            yield Piece(" ", i)
            yield Piece(eos, i)
            continue
        if not opened:
            yield Piece(bos, i or None)
            yield Piece("[INST] ", i)
        if message.role == "system" and i == 0:
            question = messages[1].content if len(messages) > 1 and messages[1].role != "assistant" else None
            yield Piece("<<SYS>>\n", i)
            yield Piece(message.content, i, True)
            # The template trims the block and the question as one: nothing is left behind a block without one.
            yield Piece("\n<</SYS>>\n\n" if question and question.strip() else "\n<</SYS>>", i)
            opened = question is not None
            if not opened:
                yield Piece(" [/INST]", i)
            continue
        yield Piece(message.content.rstrip() if opened else message.content.strip(), i, True)
        yield Piece(" [/INST]", i)
        opened = False


def zephyr(style: Style, messages: Sequence[Message], reply: bool) -> Iterator[Piece]:
    """`<|user|>`, the content as it is, `</s>`, each on a line of its own (TinyLlama's chats)."""
    yield from style.opening()
    for i, message in enumerate(messages):
        role = message.role if message.role in ("system", "assistant") else "user"
        yield style.marker(f"<|{role}|>", i)
        yield Piece("\n", i)
        yield Piece(message.content, i, True)
        yield Piece(style.tokenizer.eot_id, i)
        yield Piece("\n", i)
    if reply:
        yield style.marker("<|assistant|>", None)
        yield Piece("\n")


def chatml(style: Style, messages: Sequence[Message], reply: bool) -> Iterator[Piece]:
    """`<|im_start|>user`, the content as it is, `<|im_end|>` (SmolLM2's chats)."""
    yield from style.opening()
    if style.system is not None and (not messages or messages[0].role != "system"):
        yield style.marker("<|im_start|>", None)
        yield Piece(f"system\n{style.system}")
        yield style.marker("<|im_end|>", None)
        yield Piece("\n")
    for i, message in enumerate(messages):
        yield style.marker("<|im_start|>", i)
        yield Piece(f"{message.role}\n", i)
        yield Piece(message.content, i, True)
        yield style.marker("<|im_end|>", i)
        yield Piece("\n", i)
    if reply:
        yield style.marker("<|im_start|>", None)
        yield Piece("assistant\n")


def plain(style: Style, messages: Sequence[Message], reply: bool) -> Iterator[Piece]:
    """One running text that both sides write: a reply goes on right behind the user's text, a blank line ends it."""
    yield Piece(style.tokenizer.bos_id)
    for i, message in enumerate(messages):
        yield Piece(message.content, i, True)
        if message.role != "user" and (reply or i < len(messages) - 1):
            yield Piece("\n\n", i)


@dataclass(frozen=True)
class Recognised:
    """What a checkpoint's template says: the name of its format, and what it sets by itself."""

    name: str
    date: str | None = None
    system: str | None = None
    bos: bool = False
    trim: bool = True


def recognise(template: str) -> Recognised | None:
    """The format of a Jinja template, told by what it writes; None for one that is none of ours."""
    bos, trim = "bos_token" in template, "trim" in template or "strip()" in template
    if "<|start_header_id|>" in template:
        if "Cutting Knowledge Date" not in template:
            return Recognised("llama-3", trim=trim)
        if "strftime_now" in template:
            return Recognised("llama-3.2", trim=trim)
        date = re.search(r"date_string\s*=\s*[\"']([\w ,./-]{1,40})[\"']", template)  # it is shown to people too
        return Recognised("llama-3.1", date.group(1) if date else None, trim=trim)
    if "<|im_start|>" in template:
        # A default system message is a literal; where something is put together with + or ~ it is a given message.
        default = re.search(r"<\|im_start\|>system(?:\n|\\n)((?:(?!['\"]\s*[+~])[^<{}])*)<\|im_end\|>", template)
        return Recognised("chatml", system=default.group(1) if default else None, bos=bos)
    if "[INST]" in template and "<<SYS>>" in template:
        return Recognised("llama-2")
    if "<|user|>" in template and "<|assistant|>" in template and "eos_token" in template:
        return Recognised("zephyr", bos=bos)
    return None
