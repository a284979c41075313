"""The judge's prompts, the project's own and upstream's, and how a rating is read from a reply."""

import pytest
from bench_files import LOGICKOR_CATEGORIES, SHARED, read_jsonl, write_answers, write_bench, write_jsonl
from judge_server import JudgeServer, Reply

from eval.judged.benchmarks import BENCHMARKS
from eval.judged.judge_prompts import read_prompts


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
        options = ["--answers", answers, "--out", tmp_path / "out", "--limit", 1, "--concurrency", 4]
        status, err, _ = judge(server.url, *options, name=name, directory=SHARED / name)
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
        ("점수: 8, 좋다", True, 8),
        ("점수: 8,5", True, -1),
        ("[[8,5]]", False, -1),
    ],
)
def test_ratings_are_read_as_upstream_reads_them(judgment, korean, score):
    prompts = read_prompts(BENCHMARKS["logickor" if korean else "japanese_mt_bench"], None)
    found = prompts["logickor-v1" if korean else "single-v1-multi-turn"].rating(judgment)
    assert found == score
    assert type(found) is type(score)
