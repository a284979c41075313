"""Chat formats: messages to the ids that an instruct model was trained on, and which of them are the assistant's.

    format = chat_format("models/Qwen2-7B-Instruct", tokenizer)
    ids = format.prompt([{"role": "user", "content": "Hi"}])    # ... <|im_start|>assistant\\n

The ids are those of `transformers.apply_chat_template` with the published templates, for Mistral those of
mistral-common. Special tokens are added by code: a message that contains <|im_end|> or [/INST] stays text.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from elo.common.errors import UserError
from elo.common.fields import shown
from elo.text.tokenizer import Tokenizer
from elo.text.tokenizer_files import TokenizerFiles, token_text

ROLES = ("system", "user", "assistant")
LLAMA31_DATE = "26 Jul 2024"  # what the published template says, whatever day it is

Messages = Sequence[Mapping[str, str]]  # {"role": ..., "content": ...}


class Token(NamedTuple):
    """A special token; `trained` if the model has to learn to say it."""

    text: str
    trained: bool = False


class Text(NamedTuple):
    """`header` and `content`, tokenized as one text: after "user\\n" the content "\\nHi" gives a token "\\n\\n"."""

    header: str
    content: str = ""
    trained: bool = False  # the content


Piece = Token | Text


# ---- the three layouts


def _chatml(messages: Messages, default_system: str | None) -> Iterator[Piece]:
    """`default_system` is the system message of conversations that have none."""
    if default_system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": default_system}, *messages]
    for message in messages:
        trained = message["role"] == "assistant"
        yield Token("<|im_start|>")
        yield Text(message["role"] + "\n", message["content"], trained)
        yield Token("<|im_end|>", trained)
        yield Text("\n")


def _llama3(messages: Messages, preamble: str | None) -> Iterator[Piece]:
    """`preamble` stands at the start of the system message: with one, there always is a system message."""
    if preamble is not None:
        system = messages[0]["content"].strip() if messages[0]["role"] == "system" else ""
        # Whole: without a system message it ends in line ends that `strip` must not reach.
        yield from _llama3_turn("system", preamble + system)
    for message in messages:
        if preamble is None or message["role"] != "system":
            yield from _llama3_turn(message["role"], message["content"].strip())


def _llama3_turn(role: str, content: str) -> Iterator[Piece]:
    trained = role == "assistant"
    yield Token("<|start_header_id|>")
    yield Text(role)
    yield Token("<|end_header_id|>")
    yield Text("\n\n", content, trained)
    yield Token("<|eot_id|>", trained)


def _mistral(messages: Messages, _: None) -> Iterator[Piece]:
    """The system message stands in the last user turn only; messages of one role in a row are one turn."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    spoken = [message for message in messages if message["role"] != "system"]
    turns = [
        (role, "\n\n".join(message["content"] for message in group if message["content"]))
        for role, group in groupby(spoken, itemgetter("role"))
    ]
    last = max(index for index, (role, _) in enumerate(turns) if role == "user")
    for index, (role, content) in enumerate(turns):
        if role == "user":
            yield Token("[INST]")
            yield Text("", f"{system}\n\n{content}" if system and index == last else content)
            yield Token("[/INST]")
        else:
            yield Text("", content.rstrip(" "), trained=True)
            yield Token("</s>", trained=True)


# ---- the formats


class Format(NamedTuple):
    """A row of the table of formats."""

    layout: Callable[[Messages, str | None], Iterator[Piece]]
    system: str | None  # the layout's second argument
    bos: str | None
    tokens: tuple[str, ...]  # special tokens that the layout writes
    answer: tuple[Piece, ...]  # what stands before the assistant's text
    stops: tuple[str, ...]  # special tokens that end the assistant's turn, as far as the tokenizer has them


CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MISTRAL = ("[INST]", "[/INST]", "</s>")
CHATML_ANSWER = (Token("<|im_start|>"), Text("assistant\n"))
LLAMA3_ANSWER = (Token("<|start_header_id|>"), Text("assistant"), Token("<|end_header_id|>"), Text("\n\n"))

QWEN2_SYSTEM = "You are a helpful assistant."
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
LLAMA31_PREAMBLE = "Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"

BOS, END = "<|begin_of_text|>", "<|endoftext|>"
LLAMA3_STOPS = ("<|end_of_text|>", "<|eot_id|>")
FORMATS = {
    "llama3": Format(_llama3, None, BOS, LLAMA3, LLAMA3_ANSWER, LLAMA3_STOPS),
    "llama3.1": Format(_llama3, LLAMA31_PREAMBLE, BOS, LLAMA3, LLAMA3_ANSWER, (*LLAMA3_STOPS, "<|eom_id|>")),
    "mistral": Format(_mistral, None, "<s>", MISTRAL, (), ("</s>",)),
    "qwen2": Format(_chatml, QWEN2_SYSTEM, None, CHATML, CHATML_ANSWER, ("<|im_end|>", END)),
    "qwen2.5": Format(_chatml, QWEN25_SYSTEM, None, CHATML, CHATML_ANSWER, ("<|im_end|>", END)),
    "smollm2": Format(_chatml, SMOLLM2_SYSTEM, None, CHATML, CHATML_ANSWER, ("<|im_end|>",)),
    # Fine-tunes of any family, no default system message.
    "chatml": Format(_chatml, None, None, CHATML, CHATML_ANSWER, ("<|im_end|>", END)),
}


@dataclass(frozen=True)
class ChatFormat:
    """One model's chat format; made by `chat_format`."""

    name: str
    tokenizer: Tokenizer
    bos_id: int | None
    stop_ids: frozenset[int]  # each of them ends the assistant's turn
    date: str

    def prompt(self, messages: Messages) -> list[int]:
        """The ids of a conversation that ends with the user's turn, up to where the assistant's text starts.

        Raises UserError for messages that are not such a conversation.
        """
        check_messages(messages)
        if messages[-1]["role"] != "user":
            raise UserError(f"the last message is the {messages[-1]['role']}'s; an answer follows the user's")
        return self._encode([*self._pieces(messages), *FORMATS[self.name].answer])[0]

    def conversation(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """The ids of a conversation, and which of them are trained: the assistant's text and its end-of-turn token.

        Raises UserError for messages that are not a conversation.
        """
        check_messages(messages)
        return self._encode(self._pieces(messages))

    def _pieces(self, messages: Messages) -> Iterator[Piece]:
        layout, system = FORMATS[self.name][:2]
        return layout(messages, system and system.replace("{date}", self.date))

    def _encode(self, pieces: Iterator[Piece] | list[Piece]) -> tuple[list[int], list[bool]]:
        ids = [] if self.bos_id is None else [self.bos_id]
        trained = [False] * len(ids)
        for piece in pieces:
            if isinstance(piece, Token):
                ids.append(self.tokenizer.special_tokens[piece.text])
            else:
                ids += self.tokenizer.encode(piece.header + piece.content)
                if piece.trained:
                    # A token in which header and content meet counts as header: the prompt has the header's own.
                    trained += [False] * len(self.tokenizer.encode(piece.header))
            trained += [piece.trained] * (len(ids) - len(trained))
        return ids, trained


def check_messages(messages: Messages) -> None:
    """UserError unless it is an optional system message, a user's, and then users' and assistants' in any order."""
    if not messages:
        raise UserError("a conversation without messages")
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"message {number} has the role {shown(role)}; roles are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"message {number}: its content is {shown(content)}, not a string")
        if role == "system" and number > 1:
            raise UserError(f"message {number} is the system's, which can only be the first")
    first = [message["role"] for message in messages if message["role"] != "system"][:1]
    if first != ["user"]:
        raise UserError("the assistant speaks first" if first else "a conversation with a system message only")


# ---- which format a checkpoint has


def chat_format(
    directory: str | Path, tokenizer: Tokenizer, override: str | None = None, date: str = LLAMA31_DATE
) -> ChatFormat:
    """The chat format of a checkpoint, or the one of `FORMATS` that `override` (--chat-format) names.

    Raises UserError where the checkpoint does not tell, and where its tokenizer lacks a token of the format.
    """
    files = TokenizerFiles(Path(directory))
    template = _template(files)
    name = override or _recognize(files, template, tokenizer)
    if name not in FORMATS:
        raise UserError(f"--chat-format {name}: there are {', '.join(FORMATS)}")
    row, special = FORMATS[name], tokenizer.special_tokens
    needed = [*row.tokens, *([row.bos] if row.bos else [])]
    missing = [token for token in needed if token not in special]
    if missing:
        fitting = [other for other, row in FORMATS.items() if all(token in special for token in row.tokens)]
        raise UserError(
            f"{directory}: the chat format {name} needs the special token {missing[0]}, which the tokenizer does not "
            f"have; it has those of {', '.join(fitting) or 'none of the formats'} (--chat-format)"
        )
    if name == "chatml":
        bos_id = _chatml_bos(files, template, tokenizer)
    else:
        bos_id = None if row.bos is None else special[row.bos]
    stops = {special[token] for token in row.stops if token in special}
    return ChatFormat(name, tokenizer, bos_id, frozenset(stops | _generation_stops(files)), date)


def _template(files: TokenizerFiles) -> str | None:
    """The text of the checkpoint's Jinja template."""
    if (data := files.read("chat_template.jinja")) is not None:
        return data.decode("utf-8", "replace")
    template = files.config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else None
    return template if isinstance(template, str) else None


def _recognize(files: TokenizerFiles, template: str | None, tokenizer: Tokenizer) -> str:
    """The name of the checkpoint's format: from its template, or else from the tokens that its tokenizer has."""
    has = template.__contains__ if template is not None else tokenizer.special_tokens.__contains__
    families = [tokens for tokens in (CHATML, LLAMA3, MISTRAL) if has(tokens[0])]
    # [SYSTEM_PROMPT] is of Mistral's later formats.
    if len(families) != 1 or has("[SYSTEM_PROMPT]"):
        source = "chat template is" if template is not None else "special tokens are those"
        raise UserError(
            f"{files.directory}: its {source} of no format known here, or of several; "
            f"name one with --chat-format: {', '.join(FORMATS)}"
        )
    if families == [MISTRAL]:
        return "mistral"
    if families == [LLAMA3]:
        if template is not None:
            return "llama3.1" if "Cutting Knowledge Date" in template else "llama3"
        config = files.json("config.json") or {}
        rope: Any = config.get("rope_parameters") or config.get("rope_scaling")
        scaled = isinstance(rope, dict) and "llama3" in (rope.get("rope_type"), rope.get("type"))
        return "llama3.1" if scaled else "llama3"

    named = [name for name, row in FORMATS.items() if row.layout is _chatml]
    if template is None:
        raise UserError(
            f"{files.directory}: ChatML, but without a chat template it cannot be told which default system message "
            f"it has; name the format with --chat-format: {', '.join(named)}"
        )
    # A text between these two tokens is a default; "' + messages[0]['content'] + '" is not.
    found = re.search(r"<\|im_start\|>system(?:\n|\\n)([^'\"{}][^{}]{0,2000}?)<\|im_end\|>", template)
    system = found[1] if found else None
    for name in named:
        if FORMATS[name].system == system:
            return name
    raise UserError(
        f"{files.directory}: its chat template has the default system message {system!r:.100}, which no format here "
        f"has; name one with --chat-format: {', '.join(named)}"
    )


def _chatml_bos(files: TokenizerFiles, template: str | None, tokenizer: Tokenizer) -> int | None:
    """ChatML itself has no BOS, but a family's models may never have seen a text without theirs."""
    if template is None:
        return tokenizer.bos_id
    bos = token_text(files.config.get("bos_token")) if "bos_token" in template else None
    return tokenizer.special_tokens.get(bos) if bos else None


def _generation_stops(files: TokenizerFiles) -> set[int]:
    """eos_token_id of generation_config.json, one or several."""
    eos = (files.json("generation_config.json") or {}).get("eos_token_id")
    stops = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for id in stops:
        if type(id) is not int or id < 0:
            raise UserError(f"{files.path('generation_config.json')}: eos_token_id {eos!r:.60} is not ids of tokens")
    return set(stops)
