"""Chat formats: messages to the ids that an instruct model was trained on, and which of them are the assistant's.

    format = chat_format("models/Qwen2-7B-Instruct", tokenizer)
    ids = format.prompt([{"role": "user", "content": "Hi"}])    # ... <|im_start|>assistant\\n

A format is a Jinja template: the checkpoint's own, or one of `FORMATS`. The ids are those of
`transformers.apply_chat_template`, but that a message that contains <|im_end|> or [/INST] stays text; those of the
built-in format for Mistral are mistral-common's.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elo.common.errors import UserError
from elo.common.fields import shown
from elo.text.built_in_formats import CHATML, FORMATS, LLAMA3, MISTRAL_TOKENS
from elo.text.chat_template import (
    CLOSE,
    ChatTemplate,
    Messages,
    added_pattern,
    find_template,
    template_variables,
    unmarked,
)
from elo.text.sentencepiece_bpe import SentencePieceModel
from elo.text.tokenizer import Tokenizer
from elo.text.tokenizer_files import TokenizerFiles

ROLES = ("system", "user", "assistant")


# ---- messages to ids


@dataclass(frozen=True)
class ChatFormat:
    """One model's chat format; made by `chat_format`.

    name: of `FORMATS`, or of the template by its content. is_own: the template is the checkpoint's. end_of_turn: the
    text of the token that ends what the assistant says, None where there is none. stop_ids: each ends its turn.
    prefix: where SentencePiece's space goes between special tokens, as `tokenizer_json.Prefix` has it.
    """

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate
    is_own: bool
    end_of_turn: str | None
    stop_ids: frozenset[int]
    prefix: str

    def prompt(self, messages: Messages) -> list[int]:
        """The ids of a conversation that ends with the user's turn, up to where the assistant's text starts.

        Raises UserError for messages that are not such a conversation.
        """
        check_messages(messages)
        if messages[-1]["role"] != "user":
            raise UserError(f"the last message is the {messages[-1]['role']}'s; an answer follows the user's")
        return self._encode(self.template.prompt(messages), [])[0]

    def conversation(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """The ids of a conversation, and which of them are trained: what the model has to say after each prompt, with
        the token that ends its turn.

        Raises UserError for messages that are not a conversation, TemplateError where the template cannot follow it.
        """
        check_messages(messages)
        return self._encode(*self.template.conversation(messages))

    def ordered_stops(self) -> list[int]:
        """`stop_ids` with the end of turn first."""
        end = self.tokenizer.special_tokens.get(self.end_of_turn or "", -1)
        return sorted(self.stop_ids, key=lambda id: (id != end, id))

    @property
    def needs_time(self) -> bool:
        """Whether what it writes depends on `now`."""
        return "strftime_now" in self.template.text

    def _encode(self, marked: str, learned: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        trained: list[bool] = []
        at = 0
        for match in [*self.template.added.finditer(marked), None]:
            stop = match.start() if match else len(marked)
            text = self._text(marked[at:stop], at == 0)
            # A token in which header and answer meet counts as header: the prompt has the header's own.
            start = min((max(start, at) for start, end in learned if start < stop and end > at), default=stop)
            header = len(text) if start == stop else len(self._text(marked[at:start], at == 0))
            ids += text
            trained += [number >= header for number in range(len(text))]
            if match:
                token = match.lastindex
                ids.append(self.tokenizer.special_id(match[token]))
                trained.append(any(start <= match.start(token) < end for start, end in learned))
                at = match.end()
        return ids, trained

    def _text(self, marked: str, is_first: bool) -> list[int]:
        text = unmarked(marked)
        has_space = text.startswith(" ") or self.prefix == "never" or (self.prefix == "first" and not is_first)
        if self.prefix == "prepend" or not has_space:
            return self.tokenizer.encode(text)
        # NUL takes the space that SentencePiece puts in front, and merges with nothing: no token has it but its own.
        return self.tokenizer.encode("\0" + text)[len(self.tokenizer.encode("\0")) :]


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


def _chat(*contents: str, system: str | None = None) -> Messages:
    spoken = zip(["user", "assistant"] * len(contents), contents, strict=False)
    roles = [*([] if system is None else [("system", system)]), *spoken]
    return [{"role": role, "content": content} for role, content in roles]


# A template that writes these as a built-in format does is taken for it.
PROBES = (
    _chat("Hi"),
    _chat("Hi", system="Be kind."),
    _chat("Hi", "Hello", "And?", "So."),
    _chat(" \n a\n ", "\n b \n", " c ", " d\n\n", " e", system="\n s \n"),
    [*_chat("one"), *_chat("two", "three")],
)


def chat_format(
    directory: str | Path, tokenizer: Tokenizer, override: str | None = None, now: float | None = None
) -> ChatFormat:
    """The chat format of a checkpoint, or the one of `FORMATS` that `override` (--chat-format) names.

    `now`, in seconds since 1970, is the time for templates that write it (default: the present). Raises UserError
    where the checkpoint does not tell, where its tokenizer lacks a token of the format, and for a template that cannot
    be used.
    """
    files, now = TokenizerFiles(Path(directory)), time.time() if now is None else now
    special = tokenizer.special_tokens
    text_of = {id: text for text, id in special.items()}
    bos = None if tokenizer.bos_id is None else text_of[tokenizer.bos_id]
    variables = template_variables(files, bos, text_of[tokenizer.eos_id])
    patterns = added_pattern(tokenizer.added), added_pattern(tokenizer.added, special_only=True)
    try:
        own = find_template(files)
    except UserError:
        if override is None:
            raise
        own = None
    prefix = tokenizer.model.prefix.where if isinstance(tokenizer.model, SentencePieceModel) else "prepend"

    def made(text: str) -> ChatTemplate:
        return ChatTemplate(text, variables, str(directory), *patterns, now)

    is_own = own is not None and override is None
    if is_own:
        template = made(own)
        name = _recognize(template, [(other, made(text)) for other, text in _candidates(tokenizer, variables, prefix)])
    else:
        name = override or _guess(files, tokenizer)
        _check_tokens(name, tokenizer, directory)
        row_bos = FORMATS[name].bos
        if name == "chatml":
            # ChatML itself has no BOS, but a family's models may never have seen a text without theirs.
            row_bos = bos if own is None else variables.get("bos_token") if "bos_token" in own else None
        template = made(_built_in(name, row_bos, prefix))
    end = template.end_of_turn()
    stops = FORMATS[name].stops if name in FORMATS else (end or text_of[tokenizer.eos_id],)
    stop_ids = {special[token] for token in stops if token in special}
    return ChatFormat(name, tokenizer, template, is_own, end, frozenset(stop_ids | generation_stops(files)), prefix)


def _built_in(name: str, bos: str | None, prefix: str) -> str:
    # Mistral's texts begin with a space, which some tokenizers put in front of every text themselves.
    space = "''" if prefix == "prepend" else "' '"
    return (bos or "") + FORMATS[name].template.replace("SPACE", space)


def _candidates(tokenizer: Tokenizer, variables: dict[str, str], prefix: str) -> list[tuple[str, str]]:
    """Names and templates of the built-in formats that the tokenizer has the tokens of."""
    fitting = [(name, row) for name, row in FORMATS.items() if set(row.tokens) <= tokenizer.special_tokens.keys()]
    found = [(name, _built_in(name, row.bos, prefix)) for name, row in fitting]
    bos = variables.get("bos_token")
    return found + [(name, bos + text) for name, text in found if name == "chatml" and bos]


def _recognize(template: ChatTemplate, candidates: Sequence[tuple[str, ChatTemplate]]) -> str:
    """The name of the built-in format that writes all probes as a template does, or else a name for the template."""
    if CLOSE not in template.prompt(PROBES[0]):  # which raises what else is wrong with it
        raise template.unfit("it leaves out what the user says")

    def written(by: ChatTemplate) -> list[str | None]:
        return [text for probe in PROBES for text, _ in by.render(probe, [(len(probe), False), (len(probe), True)])]

    expected = written(template)
    digest = hashlib.sha256(template.text.encode()).hexdigest()
    return next((name for name, other in candidates if written(other) == expected), f"template-{digest[:12]}")


def _check_tokens(name: str, tokenizer: Tokenizer, directory: str | Path) -> None:
    """UserError unless there is such a format and the tokenizer has its tokens."""
    if name not in FORMATS:
        raise UserError(f"--chat-format {name}: there are {', '.join(FORMATS)}")
    row, special = FORMATS[name], tokenizer.special_tokens
    if missing := [token for token in (*row.tokens, row.bos) if token and token not in special]:
        fitting = [other for other, row in FORMATS.items() if set(row.tokens) <= special.keys()]
        raise UserError(
            f"{directory}: the chat format {name} needs the special token {missing[0]}, which the tokenizer does not "
            f"have; it has those of {', '.join(fitting) or 'none of the formats'} (--chat-format)"
        )


def _guess(files: TokenizerFiles, tokenizer: Tokenizer) -> str:
    """The name of the format of a checkpoint without a template, from the tokens that its tokenizer has."""
    has = tokenizer.special_tokens.__contains__
    families = [tokens for tokens in (CHATML, LLAMA3, MISTRAL_TOKENS) if has(tokens[0])]
    # [SYSTEM_PROMPT] is of Mistral's later formats.
    if len(families) != 1 or has("[SYSTEM_PROMPT]"):
        raise UserError(
            f"{files.directory}: it has no chat template, and its special tokens are those of no format known here, or "
            f"of several; name one with --chat-format: {', '.join(FORMATS)}"
        )
    if families == [MISTRAL_TOKENS]:
        return "mistral"
    if families == [LLAMA3]:
        config = files.json("config.json")
        rope: Any = config.get("rope_parameters") or config.get("rope_scaling")
        scaled = isinstance(rope, dict) and "llama3" in (rope.get("rope_type"), rope.get("type"))
        return "llama3.1" if scaled else "llama3"
    named = [name for name, row in FORMATS.items() if row.tokens == CHATML]
    raise UserError(
        f"{files.directory}: ChatML, but without a chat template it cannot be told which default system message "
        f"it has; name the format with --chat-format: {', '.join(named)}"
    )


def generation_stops(files: TokenizerFiles) -> set[int]:
    """eos_token_id, one or several, of generation_config.json, or without that file of config.json."""
    name = "config.json" if files.read("generation_config.json") is None else "generation_config.json"
    eos = files.json(name).get("eos_token_id")
    stops = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for id in stops:
        if type(id) is not int or id < 0:
            raise UserError(f"{files.path(name)}: eos_token_id {eos!r:.60} is not ids of tokens")
    return set(stops)
