"""A dialog as Llama 3 was trained to read it, and where each message lies in it.

The text is that of the Hugging Face template of Llama 3.0: contents trimmed, no system block of its own. Contents are
encoded as plain text, so a `<|eot_id|>` typed by a user ends nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llama_3.config import config_error
from llama_3.tokenizer import Tokenizer


@dataclass(frozen=True)
class Message:
    """One turn; `role` is system, user, assistant or ipython (a tool's result)."""

    role: str
    content: str


@dataclass(frozen=True)
class MessageSpan:
    """Token offsets of one message in its dialog: header, then content, then the end-of-turn token."""

    role: str
    start: int
    content_start: int
    content_end: int
    end: int

    def moved(self, by: int) -> "MessageSpan":
        """The same message `by` tokens further on."""
        return replace(
            self,
            start=self.start + by,
            content_start=self.content_start + by,
            content_end=self.content_end + by,
            end=self.end + by,
        )


class ChatFormat:
    """Encodes dialogs with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._start_header = tokenizer.special("<|start_header_id|>")
        self._end_header = tokenizer.special("<|end_header_id|>")
        self._gap = tokenizer.encode("\n\n")

    def encode_header(self, role: str) -> list[int]:
        """The tokens that open a message of `role`."""
        return [self._start_header, *self.tokenizer.encode(role), self._end_header, *self._gap]

    def encode_message(self, message: Message) -> tuple[list[int], MessageSpan]:
        """The tokens of one message, with its span counted from 0."""
        header = self.encode_header(message.role)
        content = self.tokenizer.encode(message.content.strip())
        tokens = [*header, *content, self.tokenizer.eot_id]
        return tokens, MessageSpan(message.role, 0, len(header), len(header) + len(content), len(tokens))

    def encode_dialog(
        self, messages: Sequence[Message], *, generation_prompt: bool = True
    ) -> tuple[list[int], list[MessageSpan]]:
        """Tokens of a dialog, begin-of-text first, and a span per message; `generation_prompt` opens a reply."""
        return self._join([self.encode_message(message) for message in messages], generation_prompt)

    def fit_dialog(self, messages: Sequence[Message], budget: int) -> tuple[list[int], list[MessageSpan], int]:
        """Tokens and spans of the dialog with its oldest turns dropped until it has `budget` tokens, and how many.

        The system message and the last message always stay, and no answer is kept without its question. ValueError
        when those that stay do not fit.
        """
        assert messages, "a dialog needs a message"
        n_system = 1 if messages[0].role == "system" and len(messages) > 1 else 0
        system = [self.encode_message(message) for message in messages[:n_system]]
        turns = [self.encode_message(message) for message in messages[n_system:]]
        room = budget - 1 - len(self.encode_header("assistant")) - sum(len(tokens) for tokens, _ in system)
        sizes = [len(tokens) for tokens, _ in turns]
        dropped = 0
        while sum(sizes[dropped:]) > room:
            dropped += 1
            while dropped < len(turns) - 1 and turns[dropped][1].role not in ("user", "system"):
                dropped += 1
            if dropped >= len(turns):
                raise config_error(
                    f"the last message is {sizes[-1]} tokens long and {max(room, 0)} of the {budget} are left for it",
                    "shorten the message or the system prompt, or ask for fewer tokens in reply",
                )
        tokens, spans = self._join([*system, *turns[dropped:]], generation_prompt=True)
        return tokens, spans, dropped

    def _join(
        self, encoded: Sequence[tuple[list[int], MessageSpan]], generation_prompt: bool
    ) -> tuple[list[int], list[MessageSpan]]:
        tokens, spans = [self.tokenizer.bos_id], []
        for message, span in encoded:
            spans.append(span.moved(len(tokens)))
            tokens += message
        return tokens + (self.encode_header("assistant") if generation_prompt else []), spans
