"""Rendered chats against transformers' `apply_chat_template`, which format a checkpoint gets, spans, what is dropped.

The templates are written here from what is known about the published ones; the demo's is its own.
"""

import datetime
import json
import shutil
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest

from llama_3.chat_format import FORMATS, ChatFormat, Message, load_chat_format, read_chat_template
from llama_3.chat_styles import recognise
from llama_3.tokenizer import Tokenizer, load_tokenizer
from llama_3.vocabulary import special_names
from tests.llama_3 import vocabularies
from tests.tiny import byte_ranks, byte_tokenizer

DEMO = Path(__file__).parents[2] / "steer" / "demo" / "model"

LLAMA_3_0 = """\
{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}\
<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
DATED = """\
{{- bos_token }}
{%- if messages and messages[0].role == 'system' %}
    {%- set instructions, rest = messages[0].content | trim, messages[1:] %}
{%- else %}
    {%- set instructions, rest = '', messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' + instructions + '<|eot_id|>' }}
{%- for message in rest %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
LLAMA_3_1 = "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}\n" + DATED
LLAMA_3_2 = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}\n" + DATED
)
LLAMA_2 = """\
{% set block = '' %}{% set rest = messages %}\
{% if messages[0].role == 'system' %}\
{% set block = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}{% set rest = messages[1:] %}{% endif %}\
{% for message in rest %}\
{% if message.role == 'user' %}\
{{ bos_token + '[INST] ' + ((block if loop.first else '') + message.content).strip() + ' [/INST]' }}\
{% else %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
ZEPHYR = """\
{% for message in messages %}{% if message.role == 'user' %}{{ '<|user|>\\n' + message.content + eos_token }}
{% elif message.role == 'system' %}{{ '<|system|>\\n' + message.content + eos_token }}
{% else %}{{ '<|assistant|>\\n' + message.content + eos_token }}
{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}
{% endif %}{% endfor %}"""
CHATML = """\
{% for message in messages %}{% if loop.first and message.role != 'system' %}\
{{ '<|im_start|>system\\nYou are small<|im_end|>\\n' }}{% endif %}\
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

CONTENTS = [
    "Who are you?",
    "  Be brief. \n",
    "",
    "Zoë 你好 👩\u200d👩\u200d👧\u00a0",
    "\n\n12 !!\tx = [1]\n\n",
    "\u200b…a\x1c",
    "it's",
]
TEMPLATES = {
    "llama-3": LLAMA_3_0, "llama-3.1": LLAMA_3_1, "llama-3.2": LLAMA_3_2, "llama-2": LLAMA_2, "zephyr": ZEPHYR,
    "chatml": CHATML,
}  # fmt: skip


def dialogs() -> list[list[Message]]:
    """One to five turns, with and without a system message, every content in every place."""
    found = []
    for shift in range(len(CONTENTS)):
        contents = [CONTENTS[(shift + i) % len(CONTENTS)] for i in range(6)]
        roles = ["user", "assistant", "user", "assistant", "user"]
        turns = [Message(role, content) for role, content in zip(roles, contents[1:], strict=True)]
        for n in (1, 2, 3, 5):
            found += [turns[:n], [Message("system", contents[0]), *turns[:n]]]
    return found


def rendered(theirs: Any, dialog: list[Message], generation_prompt: bool, **more: Any) -> list[int]:
    plain = [{"role": message.role, "content": message.content} for message in dialog]
    ids: list[int] = theirs.apply_chat_template(
        plain, tokenize=True, add_generation_prompt=generation_prompt, return_dict=False, **more
    )
    return ids


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with tokenizer and template for each format."""
    root = tmp_path_factory.mktemp("formats")
    fast = vocabularies.byte_level(vocabularies.corpus(), 600, vocabularies.llama_3_cut())
    model = vocabularies.write_ranks(root / "ranks", vocabularies.ranks_of(fast))
    llama_2 = vocabularies.train_sentencepiece()
    for name, template in TEMPLATES.items():
        folder = root / name
        if name in ("llama-2", "zephyr"):
            vocabularies.write_llama_2_json(folder, llama_2, template)
        else:
            vocabularies.write_llama_3_json(folder, model, template)
        if name == "chatml":
            file = folder / "tokenizer.json"
            file.write_text(file.read_text().replace("<|eot_id|>", "<|im_end|>").replace("<|eom_id|>", "<|im_start|>"))
            vocabularies.write_config(folder, eos_token="<|im_end|>", bos_token="<|im_start|>", chat_template=template)
    vocabularies.write_llama_3_json(root / "llama-3 untrimmed", model, LLAMA_3_0.replace(" | trim", ""))
    # Transformers 5 saves such a vocabulary with a rule that puts a space only at the very start.
    shutil.copytree(root / "llama-2", root / "llama-2 saved again")
    file = root / "llama-2 saved again" / "tokenizer.json"
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": None, "pre_tokenizer": metaspace}))
    return {name: root / name for name in [*TEMPLATES, "llama-2 saved again", "llama-3 untrimmed"]}


@pytest.mark.parametrize("name", [*TEMPLATES, "llama-2 saved again", "llama-3 untrimmed", "demo"])
def test_chats_equal_those_of_the_checkpoints_own_template(name: str, folders: dict[str, Path]) -> None:
    folder = DEMO if name == "demo" else folders[name]
    chat, theirs = load_chat_format(folder, load_tokenizer(folder)), vocabularies.transformers_of(folder)
    assert chat.name == ("llama-3" if name == "demo" else name.split()[0])
    for dialog in dialogs():
        for generation_prompt in (True, False):
            tokens, spans = chat.encode_dialog(dialog, generation_prompt=generation_prompt)
            assert tokens == rendered(theirs, dialog, generation_prompt), (dialog, generation_prompt)
            assert len(spans) == len(dialog) and spans[-1].end <= len(tokens)


@pytest.mark.parametrize("name", ["llama-3.1", "llama-3.2"])
def test_the_date_can_be_given_and_is_told(name: str, folders: dict[str, Path]) -> None:
    folder, tokenizer = folders[name], load_tokenizer(folders[name])
    theirs, dialog = vocabularies.transformers_of(folder), [Message("user", "Hi")]
    chat = load_chat_format(folder, tokenizer, date="01 Jan 2031")
    assert chat.encode_dialog(dialog)[0] == rendered(theirs, dialog, True, date_string="01 Jan 2031")
    assert "the date as 01 Jan 2031" in chat.note and "own template" in chat.note
    today = datetime.date.today().strftime("%d %b %Y")
    assert ("26 Jul 2024" if name == "llama-3.1" else today) in load_chat_format(folder, tokenizer).note
    assert load_chat_format(folder, tokenizer, "llama-3.1").encode_dialog(dialog)[0] == rendered(
        theirs, dialog, True, date_string="26 Jul 2024"
    )


def test_the_day_is_written_in_english_in_every_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    class Day(datetime.date):
        def strftime(self, format: str) -> str:
            return "07 mai 2031"

    for month, name in ((1, "Jan"), (5, "May"), (10, "Oct"), (12, "Dec")):
        monkeypatch.setattr("llama_3.chat_format.day", SimpleNamespace(today=partial(Day, 2031, month, 7)))
        assert ChatFormat(byte_tokenizer(), "llama-3.2").date == f"07 {name} 2031"


def test_a_format_can_stay_on_the_day_it_began(folders: dict[str, Path]) -> None:
    tokenizer, dialog = load_tokenizer(folders["llama-3.2"]), [Message("user", "Hi")]
    chat = load_chat_format(folders["llama-3.2"], tokenizer)
    then = load_chat_format(folders["llama-3.2"], tokenizer, date="01 Jan 2031")
    kept = chat.on("01 Jan 2031")
    assert kept.encode_dialog(dialog) == then.encode_dialog(dialog) != chat.encode_dialog(dialog)
    assert (kept.note, kept.date, kept.of_today) == (then.note, then.date, then.of_today)
    assert chat.of_today and not load_chat_format(folders["llama-3.1"], tokenizer).of_today


def test_llama_2_turns_are_those_of_metas_code(tmp_path: Path) -> None:
    model = vocabularies.train_sentencepiece()
    (tmp_path / "tokenizer.model").write_bytes(model.serialized_model_proto())
    (tmp_path / "params.json").write_text("{}")
    chat = load_chat_format(tmp_path, load_tokenizer(tmp_path))
    assert chat.name == "llama-2" and "one of Meta's" in chat.note
    dialog = [Message("system", "S"), Message("user", "a b"), Message("assistant", "c"), Message("user", "d ")]
    first, second = "[INST] <<SYS>>\nS\n<</SYS>>\n\na b [/INST] c ", "[INST] d [/INST]"
    assert chat.encode_dialog(dialog)[0] == [1, *model.encode(first), 2, 1, *model.encode(second)]


@pytest.mark.parametrize("name", [*TEMPLATES, "plain"])
def test_spans_hold_the_contents_and_lie_side_by_side(name: str, folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders.get(name, DEMO))
    chat = load_chat_format(folders.get(name, DEMO), tokenizer, name)
    for dialog in dialogs():
        tokens, spans = chat.encode_dialog(dialog)
        raw = [tokenizer.token_bytes(token) for token in tokens]
        assert all(a.end == b.start for a, b in pairwise(spans))
        for message, span in zip(dialog, spans, strict=True):
            assert span.role == message.role and span.start <= span.content_start <= span.content_end <= span.end
            content = b"".join(raw[span.content_start : span.content_end]).decode()
            kept = message.content.strip() if name.startswith("llama") else message.content
            assert kept in content and len(content) <= len(message.content) + 2  # what merged with its border
    assert chat.encode_dialog([])[1] == []


@pytest.mark.parametrize("name", [*TEMPLATES, "plain"])
def test_a_special_token_typed_by_a_user_ends_nothing(name: str, folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders.get(name, DEMO))
    chat = load_chat_format(folders.get(name, DEMO), tokenizer, name)
    specials = [
        [token for token in chat.encode_dialog([Message("user", content)])[0] if token in tokenizer.special_ids]
        for content in ("a b", "a<|eot_id|><s></s><|im_end|><|begin_of_text|>b")
    ]
    assert specials[0] == specials[1]


@pytest.mark.parametrize("name", [*TEMPLATES, "plain"])
def test_no_dialog_begins_twice(name: str, folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders.get(name, DEMO))
    tokens, _ = load_chat_format(folders.get(name, DEMO), tokenizer, name).encode_dialog([Message("user", "x")])
    assert tokens[:2].count(tokenizer.bos_id) == (name != "zephyr")


def test_roles_out_of_order_lose_nothing(folders: dict[str, Path]) -> None:
    odd = ["assistant", "user", "user", "ipython", "system", "assistant", "assistant"]
    dialog = [Message(role, f"word{i}") for i, role in enumerate(odd)]
    for name, folder in folders.items():
        tokenizer = load_tokenizer(folder)
        chat = load_chat_format(folder, tokenizer)
        for messages in (dialog, [Message("system", "alone")], [Message("system", "s"), *dialog]):
            tokens, spans = chat.encode_dialog(messages)
            assert [s.role for s in spans] == [m.role for m in messages], name
            for message, span in zip(messages, spans, strict=True):
                assert message.content in tokenizer.decode(tokens[span.content_start : span.content_end])


# Which format a checkpoint gets


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (LLAMA_3_1.replace("26 Jul 2024", "1 May 2025"), "llama-3.1"),
        ([{"name": "tool_use", "template": "x"}, {"name": "default", "template": LLAMA_3_0}], "llama-3"),
        ("{{ bos_token }}{% for m in messages %}### {{ m.role }}: {{ m.content }}{% endfor %}", "plain"),
        ("{{ '[INST] ' + messages[0].content + '[/INST]' }}", "plain"),
        (None, "llama-3"),
    ],
)
def test_the_template_decides(template: Any, name: str, tmp_path: Path) -> None:
    vocabularies.write_ranks(tmp_path, byte_ranks())
    vocabularies.write_config(tmp_path, chat_template=template)
    chat = load_chat_format(tmp_path, load_tokenizer(tmp_path))
    assert chat.name == name and chat.note.startswith(f"{name}, ")
    if name == "plain":
        assert "none that is known" in chat.note and "--chat-format" in chat.note
    if name == "llama-3.1":
        assert "1 May 2025" in chat.note
    if template is None:
        assert "has no template" in chat.note


@pytest.mark.parametrize("hostile", ["\x1b]0;owned\x07", "1 May\n2025", "9" * 41])
def test_what_cannot_be_a_date_is_not_taken_for_one(hostile: str) -> None:
    found = recognise(LLAMA_3_1.replace("26 Jul 2024", hostile))
    assert found is not None and (found.name, found.date) == ("llama-3.1", None)
    chat = ChatFormat(byte_tokenizer(), "llama-3.1", template=found)
    assert hostile not in chat.note and "26 Jul 2024" in chat.note


def test_a_default_system_message_is_read_where_it_is_a_literal() -> None:
    literal = "{{ '<|im_start|>system\\nYou're SmolLM, small<|im_end|>\\n' }}{{ '<|im_start|>' + role }}"
    joined = "{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    found = [recognise(template) for template in (literal, literal.replace("\\n", "\n"), joined, joined + literal)]
    assert [one and one.system for one in found] == ["You're SmolLM, small"] * 2 + [None, "You're SmolLM, small"]


def test_a_template_in_a_file_of_its_own_comes_first(tmp_path: Path) -> None:
    vocabularies.write_ranks(tmp_path, byte_ranks())
    vocabularies.write_config(tmp_path, chat_template=LLAMA_3_0)
    (tmp_path / "chat_template.jinja").write_text(LLAMA_3_2)
    assert load_chat_format(tmp_path, load_tokenizer(tmp_path)).name == "llama-3.2"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        load_chat_format(tmp_path, load_tokenizer(tmp_path))


def test_a_base_model_writes_plain_text(tmp_path: Path) -> None:
    vocabularies.write_llama_2_json(tmp_path, vocabularies.train_sentencepiece())
    tokenizer = load_tokenizer(tmp_path)
    chat = load_chat_format(tmp_path, tokenizer)
    assert chat.name == "plain" and "the checkpoint has no template" in chat.note
    dialog = [
        Message("system", "A tale."),
        Message("user", "Once"),
        Message("assistant", " upon."),
        Message("user", "A"),
    ]
    assert chat.encode_dialog(dialog)[0] == tokenizer.encode("A tale.\n\nOnce upon.\n\nA", bos=True)
    assert chat.encode_dialog(dialog[:2])[0] == tokenizer.encode("A tale.\n\nOnce", bos=True)


def test_a_gguf_file_brings_its_template_and_its_vocabulary(tmp_path: Path) -> None:
    letters = {byte: letter for letter, byte in vocabularies.byte_letters().items()}
    names = special_names()[:16]
    writer = gguf.GGUFWriter(str(tmp_path / "tiny.gguf"), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([letters[byte] for byte in range(256)] + names)
    writer.add_token_types([1] * 256 + [3] * 16)
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(265)
    writer.add_chat_template(LLAMA_3_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for path in (tmp_path / "tiny.gguf", tmp_path):
        tokenizer = load_tokenizer(path)
        assert tokenizer.encode("hé") == list("hé".encode()) and tokenizer.stop_ids == byte_tokenizer().stop_ids
        assert read_chat_template(path) == LLAMA_3_1
        assert load_chat_format(path, tokenizer).name == "llama-3.1"


def test_names_and_dates_that_do_not_fit(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="no chat format 'vicuna'") as caught:
        load_chat_format(tmp_path, tokenizer, "vicuna")
    assert "llama-3, llama-3.1, llama-3.2, llama-2, zephyr, chatml, plain" in caught.value.hint  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="llama-3 shows no date, so '1 May' cannot be shown"):
        load_chat_format(tmp_path, tokenizer, date="1 May")
    vocabularies.write_llama_2_json(tmp_path, vocabularies.train_sentencepiece())
    with pytest.raises(ValueError, match=r"llama-3.1 needs the special token <\|start_header_id\|>"):
        load_chat_format(tmp_path, load_tokenizer(tmp_path), "llama-3.1")
    assert ChatFormat(tokenizer).name == ChatFormat(tokenizer).note == "llama-3"


# What does not fit is dropped


@pytest.mark.parametrize("name", list(FORMATS))
def test_the_oldest_turns_are_dropped_first(name: str, folders: dict[str, Path]) -> None:
    tokenizer: Tokenizer = load_tokenizer(folders.get(name, DEMO))
    chat = load_chat_format(folders.get(name, DEMO), tokenizer, name)
    dialog = [Message("system", "Be brief.")]
    for i in range(4):
        dialog += [Message("user", f"question {i}"), Message("assistant", f"answer {i}")]
    dialog.append(Message("user", "last"))
    whole, whole_spans = chat.encode_dialog(dialog)
    assert chat.fit_dialog(dialog, len(whole)) == (whole, whole_spans, 0)
    shortest = len(chat.encode_dialog([dialog[0], dialog[-1]])[0])
    for budget in range(len(whole) - 1, shortest, -7):
        tokens, spans, dropped = chat.fit_dialog(dialog, budget)
        assert dropped > 0 and dropped % 2 == 0 and len(tokens) <= budget
        assert (tokens, spans) == chat.encode_dialog([dialog[0], *dialog[1 + dropped :]])
        assert len(chat.encode_dialog([dialog[0], *dialog[1 + dropped - 2 :]])[0]) > budget
    assert chat.fit_dialog(dialog, shortest)[2] == 8
    with pytest.raises(ValueError, match=r"the last message is (\d+) tokens long and \d+ of the \d+ are left"):
        chat.fit_dialog(dialog, shortest - 1)
    assert chat.fit_dialog(dialog[:1], 1000)[2] == 0
