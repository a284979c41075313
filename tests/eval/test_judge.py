"""`python -m eval judge` against a server on loopback that does everything a server can do wrong."""

import json
import signal
import socket
import sys
import time
from base64 import b64encode
from email.utils import formatdate

import pytest
from bench_files import LOGICKOR_CATEGORIES, MT_CATEGORIES, read_jsonl, write_bench, write_jsonl
from forking import Fork
from judge_server import RATED, Body, Drip, Hang, HangUp, JudgeServer, Reply, Status, Truncated, completion
from test_answers import SHARED

from elo.common.errors import exit_status
from eval import __main__ as evaluation
from eval.jsonl import JsonLines
from eval.judged.benchmarks import BENCHMARKS
from eval.judged.endpoint import seconds_of
from eval.judged.judge_prompts import read_prompts

SECRET = "sk-secret-0123456789"


def write_answers(directory, name, model="tiny", text="answer {} turn {}"):
    questions = read_jsonl(directory / "question.jsonl")
    ids = [question["id" if name == "logickor" else "question_id"] for question in questions]
    records = [
        {
            "question_id": id,
            "answer_id": "a",
            "model_id": model,
            "choices": [{"index": 0, "turns": [text.format(id, 1), text.format(id, 2)]}],
            "tstamp": 1.0,
        }
        for id in ids
    ]
    return write_jsonl(directory / "model_answer" / f"{model}.jsonl", records)


@pytest.fixture
def bench(tmp_path):
    directory = write_bench(tmp_path / "mt_bench", "mt_bench")
    write_answers(directory, "mt_bench")
    return directory


@pytest.fixture
def judge(bench, monkeypatch, capfd):
    """Runs the command; returns its exit status, its stderr and the judgments in its file."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)

    def run(url, *words, name="mt_bench", directory=bench, read=True):
        start = ["eval", "judge", "--bench", name, "--bench-dir", directory, "--judge-model", "gpt-4"]
        options = [*start, "--base-url", url, "--retry-wait", "0.01", "--concurrency", "1", *words]
        monkeypatch.setattr(sys, "argv", [str(word) for word in options])
        with pytest.raises(SystemExit) as exit_:
            exit_status(evaluation.main)
        shown = capfd.readouterr()
        path = directory / "model_judgment" / "gpt-4_single.jsonl"
        written = path.read_text(encoding="utf-8") if path.exists() else ""
        assert SECRET not in shown.out + shown.err + written
        return exit_.value.code, shown.err, read_jsonl(path) if written and read else []

    return run


# ---- what is asked


def test_requests_and_records_are_fastchats(judge):
    with JudgeServer() as server:
        status, err, records = judge(server.url)
    assert (status, err) == (0, "")
    assert len(records) == 16
    by_turn = {(record["question_id"], record["turn"]): record for record in records}
    for index, category in enumerate(MT_CATEGORIES):
        id = 81 + index
        with_reference = category in ("reasoning", "math", "coding")
        first, second = by_turn[id, 1], by_turn[id, 2]
        questions = f"Tell me of {category} number {id}. {{x}} 🙂", "And now shorter, as “{answer}”."
        answers = f"answer {id} turn 1", f"answer {id} turn 2"
        reference = f" R reference {id} one" if with_reference else ""
        references = f"R1 reference {id} one R2 reference {id} two " if with_reference else ""
        assert first["user_prompt"] == f"Q {questions[0]}{reference} A {answers[0]}"
        assert second["user_prompt"] == (
            f"{references}Q1 {questions[0]} A1 {answers[0]} Q2 {questions[1]} A2 {answers[1]}"
        )
        name = "single-math-v1" if with_reference else "single-v1"
        assert [first["judge"], second["judge"]] == [["gpt-4", name], ["gpt-4", f"{name}-multi-turn"]]
    for record in records:
        expected = {"model": "tiny", "judgment": RATED, "score": 7}
        assert record == record | expected
        assert isinstance(record["tstamp"], float)
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {SECRET}"
    system = {"role": "system", "content": "You judge by single-v1."}
    messages = [system, {"role": "user", "content": by_turn[81, 1]["user_prompt"]}]
    assert body == {"model": "gpt-4", "temperature": 0, "max_tokens": 2048, "messages": messages}


def test_the_second_turn_of_japanese_has_the_projects_prompts(judge, tmp_path):
    directory = write_bench(tmp_path / "ja", "japanese_mt_bench")
    write_answers(directory, "japanese_mt_bench")
    with JudgeServer(lambda number, prompt: Reply("評価：[[4]]")) as server:
        status, _, records = judge(server.url, name="japanese_mt_bench", directory=directory)
    assert (status, {record["score"] for record in records}) == (0, {4})
    math = {record["turn"]: record for record in records if record["category"] == "math"}
    assert math[1]["user_prompt"] == "Q mathについて教えて。4番目の質問です。 R reference 4 one A answer 4 turn 1"
    order = ["reference 4 one", "reference 4 two", "answer 4 turn 1", "もっと短く。", "answer 4 turn 2"]
    places = [math[2]["user_prompt"].rindex(text) for text in order]
    assert places == sorted(places)
    assert "[[評価]]" in math[2]["system_prompt"]


def test_logickor_has_the_projects_korean_prompts_which_a_file_replaces(judge, tmp_path):
    directory = write_bench(tmp_path / "ko", "logickor")
    write_answers(directory, "logickor")
    with JudgeServer(lambda number, prompt: Reply("**평가:** 좋다.\n**점수:** 7.5")) as server:
        status, _, records = judge(server.url, name="logickor", directory=directory)
        assert (status, len(records), {record["score"] for record in records}) == (0, 12, {7.5})
        by_turn = {(record["question_id"], record["turn"]): record["user_prompt"] for record in records}
        assert "정답은 2" in by_turn[2, 1]
        assert "정답은 2" in by_turn[2, 2]
        assert "[참고 답안]" not in by_turn[1, 1] + by_turn[1, 2]
        assert "answer 1 turn 2" not in by_turn[1, 1]
        assert by_turn[1, 2].index("answer 1 turn 1") < by_turn[1, 2].index("answer 1 turn 2")

        own = [
            {"name": name, "system_prompt": "", "prompt_template": "{question_1}{reference_1} {answer_1}",
             "reference_template": " / {reference}", "output_format": "[[rating]]"}
            for name in ("logickor-v1", "logickor-v1-multi-turn")
        ]  # fmt: skip
        prompts = write_jsonl(tmp_path / "own.jsonl", own)
        server.behave = lambda number, prompt: Reply("[[3]]")
        status, _, records = judge(server.url, "--judge-prompts", prompts, name="logickor", directory=directory)
    assert (status, len(records)) == (0, 24)
    category = LOGICKOR_CATEGORIES[1]
    assert records[14]["user_prompt"] == f"{category}에 관해 알려 줘. 2번째 질문이야. / 정답은 2 answer 2 turn 1"
    assert [message["role"] for message in server.requests[-1][2]["messages"]] == ["user"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_published_prompts_and_references(name, judge, tmp_path):
    if not SHARED.exists():
        pytest.skip(f"no {SHARED}")
    questions = read_jsonl(SHARED / name / "question.jsonl")
    write_jsonl(tmp_path / "x" / "question.jsonl", questions)
    answers = write_answers(tmp_path / "x", name)
    with JudgeServer(lambda number, prompt: Reply("[[1]] 점수: 1")) as server:
        monkey = ["--answers", answers, "--out", tmp_path / "out", "--limit", 1, "--concurrency", 4]
        status, err, _ = judge(server.url, *monkey, name=name, directory=SHARED / name)
    assert status == 0, err
    records = read_jsonl(tmp_path / "out" / "model_judgment" / "gpt-4_single.jsonl")
    categories = {question["category"] for question in questions}
    assert len(records) == 2 * len(categories)
    references = {
        record["question_id"]: record["choices"][0]["turns"]
        for path in (SHARED / name).glob("reference_answer.jsonl")
        for record in read_jsonl(path)
    }
    for record in records:
        assert f"answer {record['question_id']} turn {record['turn']}" in record["user_prompt"]
        if record["category"] in ("reasoning", "math", "coding"):
            assert references[record["question_id"]][record["turn"] - 1] in record["user_prompt"]


def test_all_models_or_some_and_what_others_published(judge, bench, tmp_path):
    write_answers(bench, "mt_bench", "another")
    (bench / "reference_answer").mkdir()
    (bench / "reference_answer.jsonl").rename(bench / "reference_answer" / "gpt-4.jsonl")  # where FastChat has it
    with JudgeServer() as server:
        _, _, records = judge(server.url, "--concurrency", 8)
        assert len(records) == 32
        directory = write_bench(tmp_path / "ko", "logickor")
        generated = [  # LogicKor's own file
            {"id": q["id"], "category": q["category"], "questions": q["questions"], "outputs": ["하나", "둘"]}
            for q in read_jsonl(directory / "question.jsonl")
        ]
        path = write_jsonl(tmp_path / "Model-7B" / "cot-1-shot.jsonl", generated)
        _, _, records = judge(server.url, "--answers", path, name="logickor", directory=directory)
    assert {record["model"] for record in records} == {"Model-7B-cot-1-shot"}


# ---- ratings


@pytest.mark.parametrize(
    ("judgment", "korean", "score"),
    [
        ("Rating: [[5]]", False, 5),
        ("Good. Rating: [[5.5]].", False, 5.5),
        ("**Rating: [[8]]**", False, 8),
        ("Rating: [[**8**]]", False, 8),
        ("評価：[[10]]", False, 10),
        ("Rating: [6]", False, 6),  # FastChat's backup pattern
        ("see [1]; Rating: [[9]]", False, 9),
        ("[[7]] and then [[3]]", False, 7),
        ("Rating: 5", False, -1),
        ("Rating: [[five]]", False, -1),
        ("[[rating]]", False, -1),
        ("In [[1984]]", False, -1),
        ("[[7]", False, 7),
        ("<think>perhaps [[3]]</think> Rating: [[9]]", False, 9),
        ("<think>\nhe thinks: <think>[[2]]</think> [[3]]\n</think>\n\n**Rating: [[9]]**", False, 9),
        ("perhaps [[3]]\n</think>\n\nRating: [[9]]", False, 9),  # where the prompt opens the thought
        ("Okay. <THINKING type='long'>[[3]]</THINKING >[[9]]", False, 9),
        ("<think>perhaps [[3]]", False, -1),
        ("<think>a</think> So [[9]]. <think>or [[3]]", False, 9),
        ("[THINK]perhaps [[3]][/THINK]Rating: [[9]]", False, 9),
        ("◁think▷perhaps [[3]]◁/think▷Rating: [[9]]", False, 9),
        ("<|START_THINKING|>[[3]]<|END_THINKING|>[[9]]", False, 9),
        ("<|channel|>analysis<|message|>[[3]]?<|end|><|start|>assistant<|channel|>final<|message|>[[9]]", False, 9),
        ("<|channel|>analysis<|message|>perhaps [[3]]", False, -1),
        ("analysisThe answer [[3]] is fine.assistantfinalRating: [[9]]", False, 9),
        ("<|channel>thought\n[[3]]<channel|>Rating: [[9]]", False, 9),
        ("The answer shows its `<think>` block. Rating: [[4]]", False, 4),
        ("Analysis: good. I think so. Rating: [[4]]", False, 4),
        ("<think>점수: 3?</think>\n점수: 9", True, 9),
        ("<reasoning>점수: 3", True, -1),
        ("평가: 좋다.\n점수: 7.5", True, 7.5),
        ("**평가**: 좋다.\n**점수**: **8**점", True, 8),
        ("점수:10", True, 10),
        ("점수: 0", True, 0),
        ("점수: 없음", True, -1),
        ("7점", True, -1),
        ("점수: 100", True, -1),
    ],
)
def test_ratings_are_read_as_upstream_reads_them(judgment, korean, score):
    prompts = read_prompts(BENCHMARKS["logickor" if korean else "japanese_mt_bench"], None)
    found = prompts["logickor-v1" if korean else "single-v1-multi-turn"].rating(judgment)
    assert found == score
    assert type(found) is type(score)


def test_judgments_without_a_rating_are_kept_counted_and_asked_again_only_on_demand(judge, tmp_path):
    with JudgeServer(lambda number, prompt: Reply("No idea." if number < 3 else RATED)) as server:
        status, err, records = judge(server.url, "--json", tmp_path / "result.json")
        assert status == 0
        assert [record["score"] for record in records[:4]] == [-1, -1, -1, 7]
        assert records[0]["judgment"] == "No idea."
        assert "3 judgments have no rating and count for nothing: tiny, question 81, turn 1" in err
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["models"] == {"tiny": {"answers": 16, "judged": 16, "unparsed": 3}}
        assert (result["asked"], result["judge"]) == (16, "gpt-4")
        status, err, _ = judge(server.url)
        assert len(server.asked) == 16
        assert "3 judgments have no rating" in err
        status, err, records = judge(server.url, "--retry-unparsed")
        assert (status, err, len(server.asked), len(records)) == (0, "", 19, 19)
        judge(server.url, "--retry-unparsed")
    assert len(server.asked) == 19


# ---- what goes wrong and passes

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


PAID = {
    # a reply, what it is recorded as, its finish_reason
    "all of its tokens thought away": (completion("", "length"), ("", -1), "length"),
    "cut off in a thought": (completion("<think>[[3]] or [[4]]", "length"), ("<think>[[3]] or [[4]]", -1), "length"),
    "cut off before a rating": (completion("It is", "length"), ("It is", -1), "length"),
    "filtered": (completion(None, "content_filter"), ("", -1), "content_filter"),
    "a tool": (completion(None, "tool_calls", tool_calls=[{"id": "1"}]), ("", -1), "tool_calls"),
    "thoughts beside nothing": (completion(None, reasoning_content="[[3]]"), ("", -1), "thoughts only"),
    "thoughts beside blanks": (completion(" ", None, reasoning="[[3]]"), ("", -1), "thoughts only"),
    "refused": (completion(None, refusal="I cannot."), ("I cannot.", -1), "refusal"),
    "another reason": (completion("", "max_tokens"), ("", -1), "max_tokens"),
    "thoughts beside a rating": (completion("Rating: [[9]]", reasoning_content="[[3]]"), ("Rating: [[9]]", 9), "stop"),
    "parts": (
        completion(
            [
                {"type": "thinking", "thinking": "[[3]]"},
                {"type": "text", "text": "Rating: "},
                {"type": "text", "text": "[[9]]"},
            ]
        ),
        ("Rating: [[9]]", 9),
        "stop",
    ),
    "no text in the parts": (completion([{"type": "image_url"}], "length"), ("", -1), "length"),
}


@pytest.mark.parametrize(("body", "expected", "finish"), PAID.values(), ids=PAID)
def test_a_reply_that_cannot_be_better_is_paid_once_and_told(body, expected, finish, judge):
    with JudgeServer(lambda number, prompt: Body(body) if "math" in prompt else Reply(RATED)) as server:
        status, err, records = judge(server.url)
        assert (status, len(server.asked), len(records)) == (0, 16, 16)
        math = [record for record in records if record["category"] == "math"]
        assert [(record["judgment"], record["score"]) for record in math] == [expected] * 2
        assert {record["finish_reason"] for record in math} == {finish}
        assert len(err.splitlines()) == (expected[1] == -1)
        if finish != "stop":
            assert "2 judgments have no rating and count for nothing: tiny, question 84, turn 1; " in err
            assert f"(2 ended with {finish}; --retry-unparsed asks again" in err
        judge(server.url)
        assert len(server.asked) == 16
        server.behave = lambda number, prompt: Reply(RATED)
        judge(server.url, "--retry-unparsed")
        assert len(server.asked) == 16 + 2 * (expected[1] == -1)


def test_an_empty_reply_without_a_reason_is_paid_twice_at_most(judge):
    with JudgeServer(lambda number, prompt: Reply("") if "math" in prompt else Reply(RATED)) as server:
        status, err, records = judge(server.url)
    assert (status, len(server.asked), len(records)) == (0, 18, 16)
    assert "(2 ended with empty; " in err


@pytest.mark.parametrize(
    "code", ["context_length_exceeded", "content_filter", "content_policy_violation", "string_above_max_length"]
)
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "status"])
def test_a_question_that_cannot_be_answered_is_asked_once_and_told(code, inside, judge):
    error = {"message": "no", "type": "invalid_request_error", "code": code}
    bad = Body(json.dumps({"error": error})) if inside else Status(400, **error)
    with JudgeServer(lambda number, prompt: bad if "math" in prompt else Reply(RATED)) as server:
        status, err, records = judge(server.url)
        assert (status, len(server.asked), len(records)) == (0, 16, 16)
        assert f"(2 ended with {code}; " in err
        judge(server.url)
    assert len(server.asked) == 16


@pytest.mark.parametrize(
    "bad",
    [
        Status(429, code="insufficient_quota", type="insufficient_quota"),
        Status(429, type="insufficient_quota"),
        Status(400, code="billing_hard_limit_reached"),
        Status(400, code="invalid_api_key"),
        Status(503, code="model_not_found"),
        Status(402, message="Insufficient Balance"),
        Body('{"error": {"message": "try later", "code": "insufficient_quota"}}'),
        Body('{"error": {"message": "no credits", "code": 402}}'),
        Status(429, body='{"message": "top level", "code": "insufficient_quota"}'),
    ],
    ids=str,
)
def test_what_every_question_would_hear_is_heard_once(bad, judge):
    with JudgeServer(lambda number, prompt: bad if number == 3 else Reply(RATED)) as server:
        status, err, records = judge(server.url)
        assert (status, len(records), len(server.asked), len(err.splitlines())) == (2, 3, 4, 1)
        assert judge(server.url)[0] == 0
    assert len(server.replied) == 16


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


# ---- paid once


def test_nothing_is_asked_twice_and_a_changed_answer_is(judge, bench):
    with JudgeServer() as server:
        judge(server.url)
        assert judge(server.url)[0] == 0
        assert len(server.asked) == 16
        path = bench / "model_answer" / "tiny.jsonl"
        before = path.read_text()
        path.write_text(before.replace("answer 83 turn 2", "better"))
        _, _, records = judge(server.url)
        assert (len(server.asked), len(records)) == (17, 17)  # the first turn of 83 is what it was
        path.write_text(before.replace("answer 83 turn 1", "better"))
        judge(server.url)
        assert len(server.asked) == 19  # the second turn shows the first

        # As it was at first: nothing to pay, but the last line of each turn is the one that counts.
        path.write_text(before)
        server.behave = None
        status, _, records = judge(server.url)
        assert (status, len(server.asked), len(records)) == (0, 19, 21)
        last = {(record["question_id"], record["turn"]): record for record in records}
        assert "better" not in last[83, 1]["user_prompt"] + last[83, 2]["user_prompt"]
        assert len(judge(server.url)[2]) == 21

        server.behave = lambda number, prompt: Reply(RATED)
        prompts = bench / "judge_prompts.jsonl"
        prompts.write_text(prompts.read_text().replace("You judge by single-v1.", "You judge by another."))
        judge(server.url)
        assert len(server.asked) == 24  # the five first turns that are judged without references


def test_judgments_that_fastchat_made_are_not_paid_for_again(judge, bench):
    with JudgeServer() as server:
        judge(server.url)
        path = bench / "model_judgment" / "gpt-4_single.jsonl"
        fields = ("question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp")
        theirs = [{name: record[name] for name in fields} for record in read_jsonl(path)]
        path.write_text("".join(json.dumps(record) + "\n" for record in theirs))
        assert judge(server.url)[0] == 0
    assert len(server.asked) == 16


def test_a_torn_line_is_asked_again_alone(judge, bench):
    with JudgeServer() as server:
        judge(server.url)
        path = bench / "model_judgment" / "gpt-4_single.jsonl"
        path.write_bytes(path.read_bytes()[:-40])
        _, _, records = judge(server.url)
        assert (len(server.asked), len(records)) == (17, 16)
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([*lines[:2], "{torn\n", *lines[3:]]))
        status, err, _ = judge(server.url, read=False)
    assert status == 2
    assert "gpt-4_single.jsonl:3: not a line of JSON" in err


def test_a_judgment_by_another_prompt_is_asked_for_again(judge, bench):
    """Though the words that were sent are the same: those who read the file go by the prompt's name."""
    with JudgeServer() as server:
        lines = judge(server.url)[2]
        lines[3]["judge"][1] = "single-v0"
        write_jsonl(bench / "model_judgment" / "gpt-4_single.jsonl", lines)
        assert len(judge(server.url)[2]) == len(lines) + 1
        assert server.asked[len(lines) :] == [server.asked[3]]


def test_ctrl_c_keeps_what_was_asked(judge, bench):
    """In a process of its own, as its main thread is the one that gets the signal."""
    with JudgeServer(lambda number, prompt: Reply(RATED, seconds=0.0 if number < 4 else 8.0)) as server:
        options = ["--bench", "mt_bench", "--bench-dir", bench, "--judge-model", "gpt-4", "--base-url", server.url]
        words = ["judge", *options, "--concurrency", 2]
        process = Fork("eval.__main__", words)
        while len(server.asked) < 6:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=600)
        assert process.returncode == 2
        assert "error: stopped by Ctrl-C; 10 judgments are missing" in err
        assert len(err.splitlines()) == 1
        assert len(server.replied) == 6
        server.behave = lambda number, prompt: Reply(RATED)
        assert len(judge(server.url)[2]) == 16
    assert len(server.asked) == 16


# ---- mistakes


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


def test_mistakes_are_one_line(judge, bench, tmp_path):
    answers, prompts = bench / "model_answer" / "tiny.jsonl", bench / "judge_prompts.jsonl"
    references = bench / "reference_answer.jsonl"
    url = "http://127.0.0.1:9/v1"

    def said(*words, url=url):
        status, err, records = judge(url, *words)
        assert (status, len(err.splitlines()), records) == (2, 1, [])
        return err

    for bad in ("127.0.0.1:9", "http://", "http://[1", "http://a:b/v1", "ftp://a/v1"):
        assert f"--base-url {bad}: it must be as in http://localhost:8000/v1" in said(url=bad)
    absent = tmp_path / "absent" / "result.json"
    assert f"--json {absent}: its directory does not exist" in said("--json", absent)
    assert "--request: '[1]' is not a JSON object" in said("--request", "[1]")
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl: no answers" in said("--answers", tmp_path / "empty.jsonl")
    assert "absent.jsonl: cannot be read: No such file" in said("--answers", tmp_path / "absent.jsonl")
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"question_id": 81, "choices": []}])
    assert "bad.jsonl:1: no answers here: neither" in said("--answers", bad)
    bad = write_jsonl(
        tmp_path / "short.jsonl", [{"question_id": id, "choices": [{"turns": ["a"]}]} for id in range(81, 89)]
    )
    assert "short: the answer to question 81 has 1 of 2 turns" in said("--answers", bad)
    assert "answers of tiny are in another file too" in said("--answers", answers, answers)
    with JsonLines(bench / "model_judgment" / "gpt-4_single.jsonl"):
        assert "another run is writing it" in said()
    kept = references.read_text()
    references.write_text(kept.splitlines()[0])
    assert "reference_answer.jsonl: no reference answer to question 84" in said()
    references.unlink()
    assert "reference_answer.jsonl: no such file, and no --references" in said()
    references.write_text(kept)
    for change, message in (
        (("{question}", "{quest}"), "unknown slot {quest}; there are question, answer"),
        (("Q {question}", "Q {question"), "not a template"),
        (("[[rating]]", "[[A,B]]"), "output_format '[[A,B]]'"),
        (('"system_prompt": "You judge by single-v1."', '"system_prompt": 1'), "system_prompt must be a text, not 1"),
        (("single-math-v1-multi-turn", "single-other"), "no judge prompt 'single-math-v1-multi-turn'; the prompts are"),
    ):
        text = prompts.read_text()
        prompts.write_text(text.replace(*change))
        assert message in said()
        prompts.write_text(text)


def test_missing_answers_are_told(judge, bench):
    path = bench / "model_answer" / "tiny.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    with JudgeServer() as server:
        status, err, records = judge(server.url)
    assert (status, len(records)) == (0, 12)
    assert "tiny.jsonl: no answers to 2 of 8 questions: 87, 88" in err
