"""An OpenAI-compatible chat endpoint that may be slow, busy or broken.

What can pass is asked again, with exponential backoff and jitter, or when Retry-After says so: 429, 5xx, timeouts,
lost connections, and replies that are cut short, empty or no JSON. The key comes from the environment and is taken out
of everything that comes back.
"""

import json
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn
from urllib.parse import urlsplit

from elo.common.errors import UserError
from elo.common.fields import shown

KEY = "OPENAI_API_KEY"
OPENAI = "https://api.openai.com/v1"
LARGEST_REPLY = 2**23  # bytes; a judgment has a few thousand, and hostile JSON needs 30 times as much memory
LONGEST_WAIT = 60.0  # between two tries, unless the server asks for more
LONGEST_RETRY_AFTER = 3600.0
SHORTEST_KEY = 6
PASSING = (408, 409, 425, 429)  # statuses below 500 that can pass


class GaveUpError(Exception):
    """One question that got no reply; another may."""


class StoppedError(Exception):
    """A question that was not asked any more."""


class _TryAgain(Exception):  # noqa: N818
    def __init__(self, problem: str, retry_after: str | None = None) -> None:
        super().__init__(problem)
        self.retry_after = retry_after


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
        if not is_url(base_url):
            raise UserError(f"--base-url {base_url}: it must be as in http://localhost:8000/v1")
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
        self._base_url, self._timeout, self._retries, self._first_wait = base_url, timeout, retries, first_wait
        self.stop = threading.Event()

    def close(self) -> None:
        self._client.close()

    def ask(self, system: str, user: str) -> str:
        """The reply to a message. GaveUpError if there is none, UserError if there cannot be any."""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": user})
        for attempt in range(self._retries + 1):
            if self.stop.is_set():
                raise StoppedError
            try:
                return self._redacted(self._try(messages))
            except _TryAgain as error:
                problem, wait = str(error), self._wait(attempt, error.retry_after)
            if attempt < self._retries:
                self.stop.wait(wait)
        raise GaveUpError(f"{self._base_url}: {problem}, after {self._retries + 1} tries")

    def _try(self, messages: list[dict[str, str]]) -> str:
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
            self._status(error.status_code, error.response.headers.get("retry-after"), error)
        except self._lost as error:  # in the middle of a reply
            raise _TryAgain(self._redacted(f"no connection, or lost: {error or type(error).__name__}")) from None
        except (ValueError, RecursionError):
            raise _TryAgain("a reply that is no JSON") from None
        try:
            content = body["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            error = body.get("error") if isinstance(body, dict) else None
            said = f": {shown(error)}" if error else ""
            raise _TryAgain(self._redacted(f"a reply without choices[0].message.content{said}")) from None
        if not isinstance(content, str) or not content.strip():
            raise _TryAgain("an empty reply")
        return content

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

    def _status(self, status: int, retry_after: str | None, error: Any) -> NoReturn:
        message = error.body.get("message") if isinstance(error.body, dict) else None
        message = message if message and isinstance(message, str) else error.response.text
        said = self._redacted(f"HTTP {status}: {' '.join(message[:4000].split())[:300]}")
        if status >= 500 or status in PASSING:
            raise _TryAgain(said, retry_after)
        if status in (401, 403, 404):
            self.stop.set()  # every other question would hear the same
        if status in (401, 403):
            raise UserError(f"{self._base_url}: {said} (the key is {KEY} of the environment)")
        if status == 404:
            raise UserError(f"{self._base_url}: {said} (are --base-url and --judge-model right?)")
        raise GaveUpError(f"{self._base_url}: {said}")

    def _wait(self, attempt: int, retry_after: str | None) -> float:
        """Seconds to the next try: twice as long each time, less a random part so that not all come back at once."""
        backoff = min(LONGEST_WAIT, self._first_wait * 2**attempt) * random.uniform(0.5, 1.0)
        return max(backoff, min(seconds_of(retry_after), LONGEST_RETRY_AFTER))

    def _redacted(self, text: str) -> str:
        """Servers without keys are often given a word as one, such as EMPTY, which may stand in a judgment."""
        return text.replace(self._key, "[key]") if len(self._key) >= SHORTEST_KEY else text


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
