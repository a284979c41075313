"""What was paid for is not paid again: replies that asking again makes no better, and judgments that are there."""

import json
import re
from collections import Counter

from bench_files import read_jsonl, write_jsonl
from judge_server import RATED, Body, JudgeServer, Reply, Status, completion

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
                *({"type": "text", "text": text} for text in ("Rating: ", "[[9]]")),
            ]
        ),
        ("Rating: [[9]]", 9),
        "stop",
    ),
    "no text in the parts": (completion([{"type": "image_url"}], "length"), ("", -1), "length"),
}


def in_turn(replies):
    """What a server does that gives each of the first questions and turns a reply of its own; of the rest a rating."""

    def behave(number, prompt):
        return replies.get(place(int(re.search(r"number (\d+)", prompt)[1]), 1 + ("Q2" in prompt)), Reply(RATED))

    replies = dict(enumerate(replies))
    return behave


def place(question, turn):
    return 2 * (question - 81) + turn - 1


def test_replies_that_cannot_be_better_are_paid_once_and_told(judge):
    with JudgeServer(in_turn(Body(body) for body, _, _ in PAID.values())) as server:
        status, err, records = judge(server.url)
        assert (status, len(server.asked), len(records)) == (0, 16, 16)
        found = {place(record["question_id"], record["turn"]): record for record in records}
        for number, (name, (_, expected, finish)) in enumerate(PAID.items()):
            record = found[number]
            assert (record["judgment"], record["score"], record["finish_reason"]) == (*expected, finish), name
        (line,) = err.splitlines()
        assert line.startswith("10 judgments have no rating and count for nothing: tiny, question 81, turn 1; ")
        assert "--retry-unparsed asks again" in line
        for finish, count in Counter(finish for *_, finish in PAID.values() if finish != "stop").items():
            assert f"{count} ended with {finish}" in line
        judge(server.url)
        assert len(server.asked) == 16
        server.behave = lambda number, prompt: Reply(RATED)
        judge(server.url, "--retry-unparsed")
        assert len(server.asked) == 16 + 10


def test_an_empty_reply_without_a_reason_is_paid_twice_at_most(judge):
    with JudgeServer(lambda number, prompt: Reply("") if "math" in prompt else Reply(RATED)) as server:
        status, err, records = judge(server.url)
    assert (status, len(server.asked), len(records)) == (0, 18, 16)
    assert "(2 ended with empty; " in err


CODES = ("context_length_exceeded", "content_filter", "content_policy_violation", "string_above_max_length")


def test_questions_that_cannot_be_answered_are_asked_once_and_told(judge):
    errors = [{"message": "no", "type": "invalid_request_error", "code": code} for code in CODES]
    bad = [Body(json.dumps({"error": error})) for error in errors] + [Status(400, **error) for error in errors]
    with JudgeServer(in_turn(bad)) as server:
        status, err, records = judge(server.url)
        assert (status, len(server.asked), len(records)) == (0, 16, 16)
        for code in CODES:
            assert f"2 ended with {code}" in err
        judge(server.url)
    assert len(server.asked) == 16


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
