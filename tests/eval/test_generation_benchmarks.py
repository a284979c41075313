"""All three benchmarks from the question file to the table, killed twice in the answers and twice in the judge."""

import json
import threading
import time
from collections import Counter

import pytest
from bench_files import read_jsonl, write_bench, write_model
from commands import status_of
from forking import Fork
from judge_server import Hang, JudgeServer, Reply

from eval import __main__ as evaluation
from eval.judged.benchmarks import BENCHMARKS

QUESTIONS = {"mt_bench": 8, "japanese_mt_bench": 8, "logickor": 6}


def evaluate(monkeypatch, *words):
    assert status_of(monkeypatch, evaluation.main, "eval", *words) == 0


# Waits after so many lines have been written, for the kill that is to come in the middle.
PAUSE = """
import time
from eval.jsonl import JsonLines

def append(self, record, original=JsonLines.append, lines=iter(range(1, 1000))):
    original(self, record)
    if next(lines) == 2:
        time.sleep(600)

JsonLines.append = append
"""


@pytest.fixture
def start(monkeypatch):
    """Starts a command in a process of its own."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123456789")
    for proxy in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    return lambda words, before="": Fork("eval.__main__", words, before=before)


def kill_each(processes, is_time):
    """SIGKILL to each process when its time has come."""
    deadline = time.monotonic() + 600
    while processes:
        for name, process in list(processes.items()):
            assert process.poll() is None, f"{name} ended by itself"
            if is_time(name):
                process.kill()
                process.wait()
                del processes[name]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_from_the_questions_to_the_table_with_two_kills_in_each_half(start, tmp_path, monkeypatch, capsys):
    model = write_model(tmp_path / "tiny")
    benches = {name: write_bench(tmp_path / name, name) for name in BENCHMARKS}

    # ---- answers
    def answering(name):
        options = ["--model", model, "--dtype", "fp32", "--max-new-tokens", 12, "--batch-size", 1]
        return ["answers", "--bench", name, "--bench-dir", benches[name], *options]

    files = {name: benches[name] / "model_answer" / "tiny.jsonl" for name in BENCHMARKS}

    def lines(name):
        return files[name].read_bytes().count(b"\n") if files[name].exists() else 0

    for kill in (1, 2):
        started = {name: start(answering(name), PAUSE) for name in BENCHMARKS}
        kill_each(started, lambda name, expected=2 * kill: lines(name) == expected)
        for path in files.values():
            with open(path, "ab") as file:
                file.write(b'{"question_id": 9')  # a kill in the middle of a line
    before = {name: read_lines_but_the_last(files[name]) for name in BENCHMARKS}
    for name in BENCHMARKS:
        evaluate(monkeypatch, *answering(name))
        records = read_jsonl(files[name])
        assert records[: len(before[name])] == before[name]
        assert len(records) == QUESTIONS[name] == len({record["question_id"] for record in records})
        evaluate(monkeypatch, *answering(name), "--batch-size", 16, "--out", tmp_path / "whole" / name)
        whole = read_jsonl(tmp_path / "whole" / name / "model_answer" / "tiny.jsonl")
        texts = [{record["question_id"]: record["choices"] for record in answers} for answers in (records, whole)]
        assert texts[0] == texts[1]

    # ---- judgments
    stop_after = {}
    lock = threading.Lock()
    replied, hanging = Counter(), Counter()

    def server_of(name):
        def behave(number, prompt):
            with lock:
                if replied[name] >= stop_after[name]:
                    hanging[name] += 1
                    return Hang()
                replied[name] += 1
                return Reply("평가: 좋다.\n**점수: 6.5**" if name == "logickor" else f"Rating: [[{5 + number % 3}]]")

        return JudgeServer(behave)

    servers = {name: server_of(name) for name in BENCHMARKS}

    def judging(name):
        options = ["--judge-model", "judge", "--base-url", servers[name].url, "--concurrency", 3, "--retry-wait", 0.01]
        return ["judge", "--bench", name, "--bench-dir", benches[name], *options]

    try:
        for server in servers.values():
            server.__enter__()
        for kill in (1, 2):
            for name in BENCHMARKS:
                stop_after[name], hanging[name] = 4 * kill, 0
            # All three that are asked at a time wait: what was answered before has been written.
            kill_each({name: start(judging(name)) for name in BENCHMARKS}, lambda name: hanging[name] == 3)
        for name, server in servers.items():
            stop_after[name] = 1000
            evaluate(monkeypatch, *judging(name))
            evaluate(monkeypatch, *judging(name))
            # Every judgment was answered once, and only those that no answer came to were asked again.
            assert Counter(server.replied) == Counter(set(server.replied))
            assert len(server.replied) == 2 * QUESTIONS[name]
            assert len(server.asked) == 2 * QUESTIONS[name] + 2 * 3
    finally:
        for server in servers.values():
            server.__exit__()

    # ---- scores
    for name in BENCHMARKS:
        records = read_jsonl(benches[name] / "model_judgment" / "judge_single.jsonl")
        assert len(records) == 2 * QUESTIONS[name]
        capsys.readouterr()
        evaluate(monkeypatch, "score", benches[name], "--json", tmp_path / "score.json")
        figures = json.loads((tmp_path / "score.json").read_text())["models"]["tiny"]
        assert len(figures["categories"]) == QUESTIONS[name]
        for turn, figure in ((1, "first"), (2, "second")):
            scores = [record["score"] for record in records if record["turn"] == turn]
            assert figures[figure] == pytest.approx(sum(scores) / len(scores))
        assert f"{figures['average']:.2f}" in capsys.readouterr().out


def read_lines_but_the_last(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:-1]]
