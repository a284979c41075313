"""An OpenAI-compatible chat endpoint that may be slow, busy or broken.

What can pass is asked again, with exponential backoff and jitter, or when Retry-After says so: 429, 5xx, timeouts,
lost connections, and replies that are cut short or no JSON. What cannot pass is asked once, since every request may be
paid for: by its code an error is one of the whole endpoint, such as a quota, or of one question, such as a prompt that
is too long; and a reply that ended for a reason is a reply, even without a text. The key comes from the environment and
is taken out of everything that comes back, as is a password in the URL.
"""

import json
import os
import random
import re
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from elo.common.errors import UserError
from elo.common.fields import shown

KEY = "OPENAI_API_KEY"
OPENAI = "https://api.openai.com/v1"
KEY_HINT = f" (the key is {KEY} of the environment)"
LARGEST_REPLY = 2**23  # bytes; a judgment has a few thousand, and hostile JSON needs 30 times as much memory
LONGEST_WAIT = 60.0  # between two tries, unless the server asks for more
LONGEST_RETRY_AFTER = 3600.0
SHORTEST_KEY = 6
TEXTS = ("text", "output_text")  # kinds of parts
THOUGHTS = ("reasoning_content", "reasoning", "reasoning_details", "thinking", "tool_calls", "function_call")
PASSING = (408, 409, 425, 429)  # statuses below 500 that can pass
# Codes and types of errors, whatever the status: what every question would hear, and what is wrong with one question.
HOPELESS = {
    *("insufficient_quota", "quota_exceeded", "exceeded_current_quota_error", "insufficient_balance"),
    *("insufficient_credits", "billing_hard_limit_reached", "billing_not_active", "payment_required"),
    *("account_deactivated", "access_terminated", "invalid_organization", "project_archived"),
    *("invalid_api_key", "invalid_authentication", "authentication_error", "permission_error", "permission_denied"),
    *("model_not_found", "model_not_available", "not_found_error", "deploymentnotfound"),
    "unsupported_country_region_territory",
}
UNANSWERABLE = {
    *("context_length_exceeded", "string_above_max_length", "request_too_large", "invalid_prompt"),
    *("content_filter", "content_policy_violation", "responsibleaipolicyviolation", "moderation_blocked"),
}
BROKEN_OFF = ("error", "abort")  # finish reasons of a server in trouble


class GaveUpError(Exception):
    """One question that got no reply; another may."""


class Reply(NamedTuple):
    """text: "" if there is none. finish: "stop" if the judge ended it, else why it is short, or missing."""

    text: str
    finish: str


class StoppedError(Exception):
    """A question that was not asked any more."""


class _TryAgain(Exception):  # noqa: N818
    def __init__(self, problem: str, retry_after: str | None = None) -> None:
        super().__init__(problem)
        self.retry_after = retry_after


class _Empty(_TryAgain):
    """A reply that has ended without a text or a reason: paid for, so once more and no more."""


class Endpoint:
    """Asks one model; any number of threads may. Once `stop` is set nothing is asked any more.

    base_url: up to and with /v1. request: fields of the request besides model and messages; None leaves one out.
    """

    def __init__(
        self, model: str, base_url: str, request: dict[str, Any], timeout: float, retries: int, first_wait: float
    ) -> None:
        try:
            import openai
        except ImportError:
            raise UserError("eval judge asks its judge with the package openai: pip install openai") from None
        self._shown_url = without_secrets(base_url)
        if not is_url(base_url):
            raise UserError(f"--base-url {self._shown_url}: it must be as in http://localhost:8000/v1")
        self._key = os.environ.get(KEY, "").strip()
        if not self._key and base_url == OPENAI:
            raise UserError(f"the environment has no {KEY}, which {OPENAI} needs; another endpoint: --base-url")
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"{KEY} has characters that no key has")
        self._openai = openai
        # The package's own transport, whose errors it lets pass while a reply is read: httpx or, from openai 3, httpx2.
        self._lost = tuple(sys.modules[name].RequestError for name in ("httpx", "httpx2") if name in sys.modules)
        self._client = openai.OpenAI(api_key=self._key or "none", base_url=base_url, timeout=timeout, max_retries=0)
        self._model = model
        self._fields = {name: value for name, value in request.items() if value is not None}
        self._timeout, self._retries, self._first_wait = timeout, retries, first_wait
        # Servers without keys are often given a word as one, such as EMPTY, which may stand in a judgment.
        self._secrets = {
            "[key]": [self._key] if len(self._key) >= SHORTEST_KEY else [],
            "[password]": secrets_of(base_url),
        }
        self.stop = threading.Event()

    def close(self) -> None:
        self._client.close()

    def ask(self, system: str, user: str) -> Reply:
        """The reply to a message. GaveUpError if there is none, UserError if there cannot be any."""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": user})
        was_empty = False
        for attempt in range(self._retries + 1):
            if self.stop.is_set():
                raise StoppedError
            try:
                return self._try(messages)
            except _TryAgain as error:
                is_empty = isinstance(error, _Empty)
                if is_empty and (was_empty or attempt == self._retries):
                    return Reply("", "empty")
                was_empty |= is_empty
                problem, wait = str(error), self._wait(attempt, error.retry_after)
            if attempt < self._retries:
                self.stop.wait(wait)
        raise GaveUpError(f"{self._shown_url}: {problem}, after {self._retries + 1} tries")

    def _try(self, messages: list[dict[str, str]]) -> Reply:
        openai = self._openai
        try:
            # The body as it is: the package would pass on one that is no JSON, and read one that has no end.
            with self._client.chat.completions.with_streaming_response.create(
                model=self._model, messages=messages, extra_body=self._fields
            ) as reply:
                body = json.loads(self._bounded(reply.iter_bytes()))
        except openai.APITimeoutError:
            raise _TryAgain(f"no reply within {self._timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise _TryAgain(self._redacted(f"no connection, or lost: {error.__cause__ or error}")) from None
        except openai.APIStatusError as error:
            return self._error(error.body or error.response.text, error.status_code, error.response.headers)
        except self._lost as error:  # in the middle of a reply
            raise _TryAgain(self._redacted(f"no connection, or lost: {error or type(error).__name__}")) from None
        except (ValueError, RecursionError):
            raise _TryAgain("a reply that is no JSON") from None
        try:
            choice = body["choices"][0]
            message = choice["message"]
            text = text_of(message.get("content"))
        except (KeyError, IndexError, TypeError, AttributeError):
            if isinstance(body, dict) and (error := body.get("error")):
                return self._error(error)
            raise _TryAgain("a reply without choices[0].message") from None
        finish = choice.get("finish_reason")
        finish = self._redacted(finish)[:40].lower() if finish and isinstance(finish, str) else None
        if message.get("refusal"):
            text, finish = text or text_of(message["refusal"]), "refusal"
        if finish in BROKEN_OFF:
            raise _TryAgain(f"a reply that ended with {finish}")
        if text.strip():
            return Reply(self._redacted(text), finish or "stop")
        if any(message.get(name) for name in THOUGHTS):
            return Reply("", "thoughts only" if finish in (None, "stop") else finish)
        if finish in (None, "stop"):
            raise _Empty("an empty reply") if finish else _TryAgain("an empty reply")
        return Reply("", finish)

    def _bounded(self, pieces: Iterator[bytes]) -> bytes:
        """A whole reply that comes in time and is not too long."""
        reply, deadline = bytearray(), time.monotonic() + self._timeout
        for piece in pieces:
            reply += piece
            if len(reply) > LARGEST_REPLY:
                raise _TryAgain(f"a reply of more than {LARGEST_REPLY:,} bytes")
            if time.monotonic() > deadline:
                raise _TryAgain(f"no whole reply within {self._timeout:g} s")
        return bytes(reply)

    def _error(self, error: Any, status: int | None = None, headers: Mapping[str, str] = {}) -> Reply:
        """What an error means, by its code or else its status, which some servers send as the code."""
        fields = error if isinstance(error, dict) else {"message": error}
        codes = [code for name in ("code", "type") if isinstance(code := fields.get(name), str | int)]
        what = f"HTTP {status}" if status else "an error"
        if status is None:
            status = next((int(code) for code in codes if re.fullmatch("[1-5][0-9]{2}", str(code))), 500)
        codes = {str(code).lower() for code in codes}
        message = fields.get("message")
        message = message if message and isinstance(message, str) else shown(error)
        said = self._redacted(f"{what}: {' '.join(message[:4000].split())[:300]}")
        if named := codes & UNANSWERABLE:
            return Reply("", min(named))
        if codes & HOPELESS or status in (401, 402, 403, 404):
            self.stop.set()  # every other question would hear the same
            hint = {401: KEY_HINT, 403: KEY_HINT, 404: " (are --base-url and --judge-model right?)"}
            raise UserError(f"{self._shown_url}: {said}{hint.get(status, '')}")
        if status >= 500 or status in PASSING:
            raise _TryAgain(said, headers.get("retry-after"))
        raise GaveUpError(f"{self._shown_url}: {said}")

    def _wait(self, attempt: int, retry_after: str | None) -> float:
        """Seconds to the next try: twice as long each time, less a random part so that not all come back at once."""
        backoff = min(LONGEST_WAIT, self._first_wait * 2**attempt) * random.uniform(0.5, 1.0)
        return max(backoff, min(seconds_of(retry_after), LONGEST_RETRY_AFTER))

    def _redacted(self, text: str) -> str:
        for mark, secrets in self._secrets.items():
            for secret in secrets:
                text = text.replace(secret, mark)
        return text


def text_of(content: object) -> str:
    """The text of a message: a string, or a list of parts, of which some are thoughts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") in TEXTS else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str))


def without_secrets(url: str) -> str:
    """A URL to show: without user, password and query, also where it is no URL."""
    return re.sub(r"\?.*", "?...", re.sub(r"^([^/@]*//)?.*@", r"\1[password]@", url, flags=re.DOTALL), flags=re.DOTALL)


def secrets_of(url: str) -> list[str]:
    """What a server may say aloud of a URL's password, in all its forms."""
    parts = urlsplit(url)
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    basic = b64encode(f"{user}:{password}".encode()).decode()
    forms = [basic, parts.netloc.rpartition("@")[0], parts.password, password, *(v for _, v in parse_qsl(parts.query))]
    return [form for form in forms if form and len(form) >= SHORTEST_KEY]  # shorter ones may be words of a judgment


def is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def seconds_of(retry_after: str | None) -> float:
    """Retry-After is a number of seconds or a date (RFC 9110, 10.2.3)."""
    if not retry_after:
        return 0.0
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return seconds if 0 < seconds < float("inf") else 0.0
