"""A checkpoint's own chat template: conversations to special tokens and text, exactly as transformers renders them.

    template = ChatTemplate(text, {"bos_token": "<s>"}, "models/X", re.compile(...))
    template.render(messages, add_generation_prompt=True)

Contents are marked on their way through the template, so that afterwards it is known which characters are whose: a
special token's text in a message stays text, and the assistant's words can be told from the rest. What remains without
the marks must be the rendering of the messages themselves; a template for which it is not is refused.
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import IO, Any, NamedTuple

from elo.common.errors import UserError
from elo.text.added_tokens import AddedToken, named_tokens, word_character
from elo.text.tokenizer_files import TokenizerFiles

TRAIN = "train"  # the key of a message under which False says that it is not to be learned
Messages = Sequence[Mapping[str, Any]]  # {"role": ..., "content": ...}, and perhaps TRAIN
Render = tuple[int, bool]  # how many of the messages, add_generation_prompt

# Marks: around what a user or the system says, around what the assistant says, and inside of a special token's text.
# Lone surrogates, which no text has.
OPEN, CLOSE, ANSWER, ANSWERED, BREAK = MARKS = "\udc00\udc01\udc02\udc03\udc04"
ANY = f"[{MARKS}]"
MOST_CHARACTERS = 2**24  # of renderings asked for at once


class TemplateError(UserError):
    """A template cannot be used, or not for these messages."""


class Answer(NamedTuple):
    """What the assistant says at some place in a marked rendering, from `start` to the end of its turn."""

    start: int
    end: int | None  # None: no special token ends it
    text: str


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template with all that its renderings depend on.

    added: matches the added tokens in a text, `special` those that in a message are text. now: seconds since 1970 for
    templates that write the date.
    """

    text: str
    variables: Mapping[str, str]
    where: str  # for errors
    added: re.Pattern[str]
    special: re.Pattern[str]
    now: float

    def prompt(self, messages: Messages) -> str:
        """The marked rendering of messages up to where the assistant's text starts. Raises TemplateError."""
        return self._marked(messages, [(len(messages), True)])[0][0]

    def conversation(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """The marked rendering of a conversation, and from where to where in it the assistant has to be learned.

        A message of the assistant with TRAIN: False is not.

        An answer that the template writes in another way while it is the last one (Qwen3 takes the thoughts out of the
        ones before) is not to be learned in the way in which no model says it. Raises TemplateError.
        """
        said = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        # Where an answer's turn may end: assistants' messages in a row may be one turn.
        ends = [number for number in said if number + 1 not in said]
        last = [(end + 1, False) for end in ends if end + 1 < len(messages)]
        openings = [(number, True) for number in said]
        (whole, *others), blank = self._marked(messages, [(len(messages), False), *last, *openings])
        opened = dict(zip(said, others[len(last) :], strict=True))
        alone = [*others[: len(last)], whole][: len(ends)]
        opened = {number: text for number, text in opened.items() if blank or messages[number]["content"].strip()}
        when_last: list[Answer] = []
        for end, text in zip(ends, alone, strict=True):
            answers = self._answers(text, messages, {number: opened[number] for number in opened if number <= end})
            when_last += answers[len(when_last) :]
        learned: list[tuple[int, int]] = []
        for number, answer, last in zip(opened, self._answers(whole, messages, opened), when_last, strict=True):
            if last.end is None:
                raise self.unfit(f"no special token ends message {number + 1}, the assistant's")
            if not messages[number].get(TRAIN, True):
                continue
            if _without_space(messages[number]["content"]) not in _without_space(unmarked(last.text)):
                raise self.unfit(f"it leaves out part of message {number + 1}, the assistant's, such as its thoughts")
            if answer.end is not None and answer.text == last.text:
                learned.append((answer.start, answer.end))
        return whole, learned

    def end_of_turn(self) -> str | None:
        """The added token that ends what the assistant says; None where none does."""
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        try:
            marked, learned = self.conversation(chat)
        except TemplateError:
            return None
        ending = [match[match.lastindex] for answer in learned for match in self.added.finditer(marked, *answer)]
        return ending[-1] if ending else None

    def _answers(self, marked: str | None, messages: Messages, opened: Mapping[int, str | None]) -> list[Answer]:
        """What the assistant says in a marked rendering. `opened`: number of the message -> the prompt for it."""
        if marked is None:
            raise self.unfit("it does not take the conversation up to an answer before the last")
        closes = [match.start() for match in re.finditer(ANSWERED, marked)]
        if len(closes) != len(opened):
            raise self.unfit("it leaves out what the assistant says, or part of it, or says it twice")
        answers = []
        for (number, prompt), close in zip(opened.items(), closes, strict=True):
            before = 1 + max(marked.rfind(CLOSE, 0, close), marked.rfind(ANSWERED, 0, close))
            first = marked.find(ANSWER, before, close)
            # What the model is given to begin with; what stands before the answer besides, it has to say itself.
            given = None if prompt is None else re.split(f"[{CLOSE}{ANSWERED}]", prompt)[-1]
            if given is not None and marked.startswith(given, before):
                start = before + len(given)
            elif first >= 0:
                content = messages[number]["content"]
                space = content[: len(content) - len(content.lstrip())]
                start = first - len(space) if marked.endswith(space, before, first) else first
            elif given is not None:
                start = before + len(os.path.commonprefix([given, marked[before:close]]))
            else:
                raise self.unfit(f"it changes where message {number + 1} begins, the assistant's")
            following = re.compile(ANY).search(marked, close + 1)
            limit = following.start() if following else len(marked)
            token = self.added.search(marked, close + 1, limit)
            is_followed = number + 1 in opened and following is not None
            end = token.end() if token else limit if is_followed else None
            answers.append(Answer(start, end, marked[before : limit if end is None else end]))
        return answers

    def _marked(self, messages: Messages, renders: Sequence[Render]) -> tuple[list[Any], bool]:
        """`renders` of messages with marks, and whether blank ones have them too: templates may ask for those.

        The first rendering is checked; others that fail are None.
        """
        if found := re.search("[\ud800-\udfff]", "".join(message["content"] for message in messages)):
            raise UserError(f"a message has the lone surrogate {found[0]!r}, which is no text")
        ((plain, why),) = self.render(messages, renders[:1])
        if plain is None:
            raise self.unfit(why or "")
        for also_blank in (True, False):
            results = self.render([mark(message, self.special, also_blank) for message in messages], renders)
            if results[0][0] is not None and unmarked(results[0][0]) == plain:
                return [text for text, _ in results], also_blank
        raise self.unfit("what it writes of a message depends on the message in a way that cannot be followed")

    def render(self, messages: Messages, renders: Sequence[Render]) -> list[tuple[str | None, str | None]]:
        """For each of `renders` its text, or None and why not."""
        request = {
            "template": self.text,
            "variables": dict(self.variables),
            "now": self.now,
            "messages": [{"role": message["role"], "content": message["content"]} for message in messages],
        }
        some = max(1, MOST_CHARACTERS // (1 + sum(len(message["content"]) for message in messages)))
        return [
            (text, why)
            for start in range(0, len(renders), some)
            for text, why in PROCESS.ask(request | {"renders": renders[start : start + some]})
        ]

    def unfit(self, reason: str) -> TemplateError:
        return TemplateError(f"{self.where}: its chat template cannot be used: {reason}; --chat-format names another")


def mark(message: Mapping[str, str], special: re.Pattern[str], also_blank: bool) -> dict[str, str]:
    """A message with marks in its content: inside of white space at its ends, which templates may take away."""
    content = message["content"]
    core = content.strip()
    if core or also_blank:
        at = content.find(core) if core else len(content)
        first, last = (ANSWER, ANSWERED) if message["role"] == "assistant" else (OPEN, CLOSE)
        core = special.sub(lambda match: match[0].replace(token := match[match.lastindex], BREAK.join(token)), core)
        content = f"{content[:at]}{first}{core}{last}{content[at + len(content.strip()) :]}"
    return {"role": message["role"], "content": content}


def added_pattern(added: Mapping[str, AddedToken], special_only: bool = False) -> re.Pattern[str]:
    """Matches added tokens in marked text, as the last group, with the white space that they take to themselves."""
    longest_first = sorted((text for text in added if added[text].special or not special_only), key=len, reverse=True)
    shapes = {text: re.escape(text) for text in longest_first}
    if any(added[text].single_word for text in longest_first):
        word = word_character()
        begins = "".join(f"(?<!{word}{ANY * marks})" for marks in range(4))  # a lookbehind has a fixed length
        shapes |= {t: f"{begins}{shape}(?!{ANY}*{word})" for t, shape in shapes.items() if added[t].single_word}
    alternatives = []
    for left, right in product((False, True), repeat=2):
        texts = [shapes[text] for text in longest_first if (added[text].lstrip, added[text].rstrip) == (left, right)]
        before = rf"(?<![\s{MARKS}])[\s{MARKS}]*" if left else ""  # from its start only: never the square of its length
        after = rf"[\s{MARKS}]*" if right else ""
        alternatives += [f"{before}({'|'.join(texts)}){after}"] * bool(texts)
    return re.compile("|".join(alternatives) or "(?!)")


def _without_space(text: str) -> str:
    return "".join(text.split())


def unmarked(text: str) -> str:
    return re.sub(ANY, "", text)


# ---- the templates of a checkpoint


def find_template(files: TokenizerFiles) -> str | None:
    """The checkpoint's default template, from the first place that has one, as transformers looks for it."""
    if (data := files.read("chat_template.jinja")) is not None:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{files.path('chat_template.jinja')}: not UTF-8: {error}; --chat-format") from error
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = files.json(name).get("chat_template")
        if isinstance(template, list):  # several, by name
            entries = [entry for entry in template if isinstance(entry, dict)]
            template = {str(entry.get("name")): entry.get("template") for entry in entries}
        if isinstance(template, dict):
            if "default" not in template:
                names = ", ".join(template)
                raise UserError(f"{files.path(name)}: chat templates {names:.200}, none called default; --chat-format")
            template = template["default"]
        if isinstance(template, str):
            return template
        if template is not None:
            raise UserError(f"{files.path(name)}: chat_template is not a text; name a format with --chat-format")
    return None


def template_variables(files: TokenizerFiles, bos: str | None, eos: str) -> dict[str, str]:
    """The special tokens by the names that templates know; `bos` and `eos` where the files do not say."""
    named = {"bos_token": bos, "eos_token": eos} | files.config
    if "added_tokens_decoder" not in files.config:  # as transformers has it: the older file says the last word
        named |= files.json("special_tokens_map.json")
    return named_tokens(named)


# ---- the process that renders


class TemplateProcess:
    """`template_process`, started at the first use, and again after a template has made it end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def ask(self, request: dict[str, Any]) -> list[list[str | None]]:
        """The answer to a request, which `template_process` explains."""
        with self._lock:
            stdin, stdout = self._pipes()
            try:
                stdin.write(json.dumps(request) + "\n")
                stdin.flush()
                reply = stdout.readline()
            except OSError:
                reply = ""
            if reply.endswith("\n"):
                return json.loads(reply)
            self._end()
        return [[None, "it needs too much time or memory"]] * len(request["renders"])

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        # A fork of this process must not share its pipes.
        if self._process is None or self._owner != os.getpid():
            self._process = subprocess.Popen(
                [sys.executable, "-P", Path(__file__).with_name("template_process.py")],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="ascii",
                start_new_session=True,  # Ctrl-C is for us
            )
            self._owner = os.getpid()
        assert self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


PROCESS = TemplateProcess()
