"""Hostile questions, answers, judgments, prompts and results, and a judge's replies."""

import json
import os
import threading
from contextlib import contextmanager
from functools import cache

import pytest
from artifacts import json_lines
from bench_files import read_jsonl, write_bench
from harness import case_directory, cases, result_or_user_error
from hypothesis import given
from hypothesis import strategies as st
from mutations import changed_json_file, changed_lines, dumped

from eval.figures.plot import collect
from eval.jsonl import JsonLines
from eval.judged.answers import answers_so_far, report
from eval.judged.benchmarks import BENCHMARKS, read_questions
from eval.judged.endpoint import Endpoint, GaveUpError
from eval.judged.judge import judgments_so_far
from eval.judged.judge_prompts import UNPARSED, read_prompts
from eval.judged.matches import plan, read_answers, read_references
from eval.judged.score import read_judgments, score, score_table

# ---- benchmarks of generation


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    """name -> the benchmark's directory, answers to it and judgments of them, as records."""
    made = {}
    for name, benchmark in BENCHMARKS.items():
        directory = write_bench(tmp_path_factory.mktemp(name), name)
        asked = read_questions(benchmark, directory)
        told = {"generate_params": {"seed": 0}, "tokens": [1, 2], "finish": ["stop", "length"]}
        told |= {"model_id": "tiny", "choices": [{"index": 0, "turns": ["first", "둘째"]}]}
        answers = [{"question_id": question.id, **told} for question in asked]
        prompts = read_prompts(benchmark, directory / "judge_prompts.jsonl" if name != "logickor" else None)
        references = read_references(benchmark, asked, None, directory, "gpt-4")
        turns = {"tiny": {answer["question_id"]: answer["choices"][0]["turns"] for answer in answers}}
        matches = plan(benchmark, asked, turns, prompts, references)
        judgments = [
            {
                "question_id": match.question.id,
                "model": "tiny",
                "judge": ["gpt-4", match.prompt.name],
                "user_prompt": match.user_prompt,
                "judgment": "Rating: [[7]]",
                "score": 7,
                "turn": match.turn,
                "tstamp": 1.5,
                "bench": name,
                "category": match.question.category,
            }
            for match in matches
        ]
        files = {path.name: path.read_bytes() for path in directory.iterdir()}
        made[name] = files, answers, judgments
    return made


def judge_everything(benchmark, directory):
    """All that is read before a judge is asked, and what it would be asked."""
    asked = read_questions(benchmark, directory)
    answers = read_answers([directory / "tiny.jsonl"], asked)
    published = directory / "judge_prompts.jsonl"
    prompts = read_prompts(benchmark, published if published.is_file() else None)
    references = read_references(benchmark, asked, None, directory, "gpt-4")
    matches = plan(benchmark, asked, answers, prompts, references)
    with JsonLines(directory / "judgments.jsonl") as results:
        judgments_so_far(results, matches, "gpt-4")
    for match in matches:
        match.user_prompt.encode()
        assert match.prompt.rating("[[5]] 점수: 5") in (5, UNPARSED)
    return matches


TEMPLATES = ["{question", "}", "{}", "{0}", "{question:>99999999999}", "{question!r}", "{answer.__class__}", "{a[0]}"]


@cases(80, share=1.5)
@given(st.data(), st.sampled_from(sorted(BENCHMARKS)))
def test_what_is_judged(benches, data, name):
    files, answers, judgments = benches[name]
    files = files | {"tiny.jsonl": json_lines(answers), "judgments.jsonl": json_lines(judgments)}
    file = data.draw(st.sampled_from(sorted(files)))
    records = [json.loads(line) for line in files[file].splitlines()]
    if file == "judge_prompts.jsonl" and data.draw(st.booleans()):
        records[1]["prompt_template"] = data.draw(st.sampled_from(TEMPLATES))
    with case_directory() as directory:
        for other, content in files.items():
            (directory / other).write_bytes(content)
        (directory / file).write_bytes(data.draw(changed_lines(records)))
        result_or_user_error(lambda: judge_everything(BENCHMARKS[name], directory), writes=directory)


@cases(40)
@given(st.data(), st.sampled_from(sorted(BENCHMARKS)))
def test_answers_so_far(benches, data, name):
    files, answers, _ = benches[name]
    with case_directory() as directory:
        (directory / "question.jsonl").write_bytes(files["question.jsonl"])
        (directory / "tiny.jsonl").write_bytes(data.draw(changed_lines(answers)))
        asked = read_questions(BENCHMARKS[name], directory)

        def go_on():
            with JsonLines(directory / "tiny.jsonl") as results:
                answered = answers_so_far(results, {question.id: {"seed": 0} for question in asked})
            there = [question for question in asked if question.id in answered]
            if there:
                report(there, answered, str(directory / "report.json"), {})

        result_or_user_error(go_on, writes=directory)


@cases(50)
@given(st.data(), st.sampled_from(sorted(BENCHMARKS)))
def test_scores(benches, data, name):
    _, _, judgments = benches[name]
    if name == "logickor" and data.draw(st.booleans()):  # as LogicKor's own scripts write it
        turn, about = {"judge_message": "...", "judge_score": 7.5}, {"id": 1, "category": "수학(Math)"}
        judgments = [{**about, "outputs": ["a", "b"], "query_single": turn, "query_multi": turn}]
    with case_directory() as directory:
        (directory / "tiny.jsonl").write_bytes(data.draw(changed_lines(judgments)))
        result_or_user_error(lambda: score_table(score(read_judgments([directory]))))


FIGURES = {"first": 1.5, "second": None, "average": 2, "categories": {"math": {"average": 3}}}
SCORE = {"bench": "mt_bench", "models": {"tiny": FIGURES}}
STEP = {"step": 1, "tokens": 10, "loss": 2.5, "tokens_per_second": 1.0, "memory_bytes": 10**9}
METRICS = [STEP, STEP | {"step": 2}]


@cases(40)
@given(st.data())
def test_plots(data):
    with case_directory() as directory:
        path = directory / "score.json"
        if data.draw(st.booleans()):
            path.write_bytes(data.draw(changed_json_file(SCORE)))
        else:
            path = directory
            (path / "metrics.jsonl").write_bytes(data.draw(changed_lines(METRICS)))
        result_or_user_error(lambda: collect([path]))


# ---- a judge's replies


COMPLETION = {
    "id": "1",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Rating: [[7]]"}, "finish_reason": "stop"}],
    "error": {"message": "no", "type": None},
}
RATINGS = ["Rating: [[", "]]", "[[7.5]]", "[[1e9]]", "[[-3]]", "점수: ", "점수: 7.", "9" * 5000, "*"]
RATINGS += ["\ud800", "\0", "[[٧]]"]
PROMPTS = [prompt for benchmark in BENCHMARKS.values() for prompt in read_prompts(benchmark, None).values()]


@cache
def endpoint():
    os.environ["OPENAI_API_KEY"] = "sk-secret-0123456789"
    return Endpoint("judge", "http://127.0.0.1:9/v1", {}, timeout=5, retries=0, first_wait=0)


class Client:
    """In the place of the package's client: a reply in pieces."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.chat = self.completions = self.with_streaming_response = self

    @contextmanager
    def create(self, **_):
        yield self

    def iter_bytes(self):
        yield from self.pieces


def reply(pieces, directory):
    """What becomes of a reply; none at all is an error of this one question, which `run` reports in its one line."""
    asked = endpoint()
    asked._client, asked.stop = Client(pieces), threading.Event()
    try:
        text, finish = asked.ask("system", "user")
    except GaveUpError as error:
        assert len(str(error)) < 1000
        return
    for prompt in PROMPTS:
        assert prompt.rating(text) == UNPARSED or 0 <= prompt.rating(text) <= 10
    with JsonLines(directory / "judgments.jsonl") as results:
        results.append({"judgment": text, "finish_reason": finish})
    assert read_jsonl(directory / "judgments.jsonl")


@cases(60)
@given(st.data())
def test_replies(data):
    if data.draw(st.booleans()):
        content = data.draw(st.lists(st.sampled_from(RATINGS), max_size=5).map("".join))
        message = {"role": "assistant", "content": content}
        body = dumped(COMPLETION | {"choices": [{"message": message}]})
    else:
        body = data.draw(changed_json_file(COMPLETION))
    pieces = [body[start : start + 1000] for start in range(0, len(body), 1000)]
    with case_directory() as directory:
        result_or_user_error(lambda: reply(pieces, directory), writes=directory)


def test_a_reply_without_end():
    result_or_user_error(lambda: reply(iter(lambda: b" " * 10**6, None), None))
