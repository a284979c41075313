"""A judge that does everything a server can do wrong, and what it must never be shown to say."""

import json
import socket
import sys
import time
from base64 import b64encode
from email.utils import formatdate

import pytest
from judge_server import RATED, SECRET, Body, Drip, Hang, HangUp, JudgeServer, Reply, Status, Truncated, completion

from eval.judged.endpoint import seconds_of

BAD = {
    "429": Status(429),
    "500": Status(500),
    "503 with HTML": Status(503, body="<html>Bad gateway</html>"),
    "408": Status(408),
    "empty content": Body(completion("")),
    "no content": Body(completion(None, None)),
    "blank content": Body(completion(" \n")),
    "a server in trouble": Body(completion("Rating: [[1]]", "error")),
    "rate limit": Status(429, code="rate_limit_exceeded", type="requests"),
    "rate limit inside": Body('{"error": {"message": "slow down", "code": 429}}'),
    "no choices": Body('{"choices": []}'),
    "an error inside": Body('{"error": {"message": "overloaded"}}'),
    "not an object": Body("[1, 2]"),
    "null": Body("null"),
    "invalid JSON": Body('{"choices": [{"mess'),
    "empty body": Body(""),
    "truncated": Truncated(),
    "reset in the body": Truncated(reset=True),
    "hung up": HangUp(),
    "hanging": Hang(),
}


def test_everything_that_can_pass_is_asked_again(judge):
    """Each misbehaviour once, two in a row on some questions."""
    bad = list(BAD.values())

    def behave(number, prompt):
        return bad.pop() if number % 3 < 2 and bad else Reply(RATED)

    count = len(bad)
    with JudgeServer(behave) as server:
        status, err, records = judge(server.url, "--timeout", 2)
        assert (status, err) == (0, "")
        assert len(records) == 16 == len(server.replied)
        assert {record["score"] for record in records} == {7}
        assert len(server.asked) == 16 + count
        assert set(server.asked) == set(server.replied)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Status(429, message="slow down"), "HTTP 429: slow down, after 3 tries"),
        (Status(502, body="<h1>Bad\ngateway</h1>"), "HTTP 502: <h1>Bad gateway</h1>, after 3 tries"),
        (Body(completion("", None)), "an empty reply, after 3 tries"),
        (Body("not json"), "a reply that is no JSON, after 3 tries"),
        (Body("[" * 100_000), "a reply that is no JSON, after 3 tries"),
        (Body(" " * 9_000_000), "a reply of more than 8,388,608 bytes, after 3 tries"),
        (Drip(), "no whole reply within 1 s, after 3 tries"),
        (Hang(), "no reply within 1 s, after 3 tries"),
        (Truncated(), "no connection, or lost: "),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_one_that_never_passes_costs_the_others_nothing(bad, message, judge):
    def behave(number, prompt):
        return bad if "math" in prompt else Reply(RATED)

    with JudgeServer(behave) as server:
        # Long enough for a good reply on a slow machine, and short where it is waited for.
        options = ["--retries", 2, "--timeout", 1 if isinstance(bad, Drip | Hang) else 60, "--concurrency", 3]
        status, err, records = judge(server.url, *options)
        assert (status, len(records)) == (2, 14)
        assert sum("math" in prompt for prompt in server.asked) == 2 * 3  # another may be late too
        assert len(err.splitlines()) == 1
        assert message in err
        assert "tiny, question 84, turn " in err
        assert "2 judgments are missing, the others are saved: the same command goes on" in err
        server.behave = lambda number, prompt: Reply(RATED)
        status, _, records = judge(server.url)
    assert (status, len(records), len(server.replied)) == (0, 16, 16)


def test_a_server_that_is_down_is_noticed(judge):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        status, err, records = judge(url, "--retries", 2)
    assert (status, records) == (2, [])
    assert "no connection, or lost" in err
    assert "16 judgments are missing" in err


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_cannot_pass_ends_the_run_at_once(status, judge):
    def behave(number, prompt):
        # A server that says the key aloud.
        return Status(status, message=f"wrong: {SECRET}\nreally {SECRET}") if number == 3 else Reply(RATED)

    with JudgeServer(behave) as server:
        code, err, records = judge(server.url)
        assert (code, len(records)) == (2, 3)
        assert len(server.asked) == 4
        (line,) = err.splitlines()
        assert line.startswith(f"error: {server.url}: HTTP {status}: wrong: [key] really [key] (")
        assert judge(server.url)[0] == 0
    assert len(server.replied) == 16


def test_a_bad_request_is_one_line_and_not_repeated(judge):
    with JudgeServer(lambda number, prompt: Status(400, message="max_tokens is not supported")) as server:
        status, err, records = judge(server.url)
        (line,) = err.splitlines()
        assert (status, records) == (2, [])
        assert 3 <= len(server.asked) <= 4
        assert "HTTP 400: max_tokens is not supported; 16 judgments are missing" in line
        server.behave = lambda number, prompt: Reply(RATED)
        judge(server.url, "--request", '{"max_tokens": null, "max_completion_tokens": 9}')
    body = server.requests[-1][2]
    assert body["max_completion_tokens"] == 9
    assert "max_tokens" not in body


HOPELESS = [
    Status(429, code="insufficient_quota", type="insufficient_quota"),
    Status(429, type="insufficient_quota"),
    Status(400, code="billing_hard_limit_reached"),
    Status(400, code="invalid_api_key"),
    Status(503, code="model_not_found"),
    Status(402, message="Insufficient Balance"),
    Body('{"error": {"message": "try later", "code": "insufficient_quota"}}'),
    Body('{"error": {"message": "no credits", "code": 402}}'),
    Status(429, body='{"message": "top level", "code": "insufficient_quota"}'),
]


def test_what_every_question_would_hear_is_heard_once(judge):
    with JudgeServer() as server:
        for count, bad in enumerate(HOPELESS, start=1):
            server.behave = lambda number, prompt, bad=bad: bad
            status, err, records = judge(server.url)
            assert (status, records, len(server.asked), len(err.splitlines())) == (2, [], count, 1), bad


def test_waits_grow_and_obey_retry_after(judge):
    with JudgeServer(lambda number, prompt: Status(500) if number < 5 else Reply(RATED)) as server:
        judge(server.url, "--retry-wait", 0.04, "--limit", 1)
    waits = [after - before for before, after in zip(server.times[:5], server.times[1:6], strict=True)]
    for attempt, wait in enumerate(waits):
        assert wait >= 0.04 * 2**attempt / 2

    def behave(number, prompt):
        date = formatdate(time.time() + 2, usegmt=True)  # in whole seconds
        return Status(429, [("Retry-After", date)]) if number == 0 else Reply(RATED)

    with JudgeServer(behave) as server:
        judge(server.url, "--judge-model", "other", "--limit", 1)
    assert server.times[1] - server.times[0] >= 0.9
    for header in ("", "soon", "-5", "nan", "inf", "Thu, 99 Jan 2026", "Thu, 01 Jan 1970 00:00:00 GMT"):
        assert seconds_of(header) == 0
    assert seconds_of("1.5") == 1.5


def test_concurrency(judge):
    def behave(number, prompt):
        while number < 5 and server.most_at_once < 5:  # the first five wait for each other
            time.sleep(0.01)
        return Reply(RATED, seconds=0.1)  # in which a sixth would come

    with JudgeServer(behave) as server:
        judge(server.url, "--concurrency", 5)
    assert server.most_at_once == 5


def test_the_key_comes_from_the_environment_and_only_when_it_is_there(judge, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    status, err, _ = judge("https://api.openai.com/v1")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "the environment has no OPENAI_API_KEY" in err
    with JudgeServer() as server:
        assert judge(server.url)[0] == 0  # a server of one's own may need none
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\n")  # $(cat file)
    with JudgeServer() as server:
        assert judge(server.url, "--judge-model", "other")[0] == 0
    assert server.requests[0][1]["Authorization"] == f"Bearer {SECRET}"
    for bad in (f"{SECRET}\n{SECRET}", f"{SECRET}é"):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        status, err, _ = judge(server.url)
        assert (status, err) == (2, "error: OPENAI_API_KEY has characters that no key has\n")


@pytest.mark.parametrize("password", ["p4ss-word", "p%34ss-w%6Frd"])
def test_the_urls_password_is_shown_nowhere(password, judge, tmp_path):
    """It works, and neither our words nor a server that says it aloud shows it, in any of its forms."""
    said = f"p4ss-word {password} " + b64encode(b"user:p4ss-word").decode()
    bad = [Status(500, message=said), Status(400, message=said), Status(401, message=said), Body("{"), Hang(), HangUp()]
    with JudgeServer(lambda number, prompt: bad[0]) as server:
        url = server.url.replace("//", f"//user:{password}@") + "?key=p4ss-word"
        for _ in range(len(bad)):
            status, err, _ = judge(url, "--retries", 0, "--timeout", 0.3)
            assert status == 2
            assert server.url.replace("//", "//[password]@").removesuffix("/v1") in err
            assert not [form for form in (*said.split(), "user:") if form in err]
            bad.append(bad.pop(0))
        bad[0] = Reply(f"{said} [[5]]")
        status, err, records = judge(url, "--json", tmp_path / "result.json")
    assert (status, err) == (0, "")
    text = json.dumps(records) + (tmp_path / "result.json").read_text()
    assert not [form for form in (*said.split(), "user:") if form in text]
    assert server.requests[-1][1]["Authorization"] == "Basic " + said.split()[2]
    for bad in ("http://u:p4ss-word@", "http://u:p4ss/w@rd@host:x/v1", "u:p4ss-word@host", "http://u:p4ss-word@[1/v1"):
        status, err, _ = judge(bad)
        assert status == 2
        assert "[password]@" in err
        assert "p4ss" not in err


def test_a_judgment_that_says_the_key_aloud(judge):
    with JudgeServer(lambda number, prompt: Reply(f"{SECRET}? [[5]]")) as server:
        _, _, records = judge(server.url)
    assert {record["judgment"] for record in records} == {"[key]? [[5]]"}


def test_without_the_package_one_line_says_what_to_install(judge, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    status, err, _ = judge("http://127.0.0.1:9/v1")
    assert (status, err) == (2, "error: eval judge asks its judge with the package openai: pip install openai\n")
