"""`python -m eval judge`: what is asked and recorded, for which answers; mistakes."""

import json
import signal
import time

from bench_files import MT_CATEGORIES, read_jsonl, write_answers, write_bench, write_jsonl
from forking import Fork
from judge_server import RATED, SECRET, JudgeServer, Reply

from eval.jsonl import JsonLines


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
        (("Q {question}", "Q {question_2}"), "question 81 has nothing for the slot {question_2}"),
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
