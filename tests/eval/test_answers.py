"""`python -m eval answers`: two turns against transformers, formats, settings, batches, processes, interruptions."""

import json
import os
from pathlib import Path

import pytest
import torch
from bench_files import MT_CATEGORIES, read_jsonl, turns_of, write_bench, write_jsonl, write_model
from chat_checkpoints import user
from commands import status_of
from forking import fork_group
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from eval import __main__ as evaluation
from eval.jsonl import JsonLines
from eval.judged import answers
from eval.judged.benchmarks import BENCHMARKS, read_questions


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    return {name: write_bench(root / name, name) for name in BENCHMARKS}


@pytest.fixture
def ask(model, benches, tmp_path, monkeypatch, capsys):
    """Runs the command; returns its exit status, its stderr and the records of the answer file."""

    def run(name="mt_bench", *words, out=tmp_path / "out", new=6, directory=model):
        start = ["eval", "answers", "--bench", name, "--bench-dir", benches[name], "--model", directory, "--out", out]
        options = [*start, "--dtype", "fp32", "--max-new-tokens", new, *words]
        status = status_of(monkeypatch, evaluation.main, *options)
        files = sorted((Path(out) / "model_answer").glob("*.jsonl"), key=os.path.getmtime)
        return status, capsys.readouterr().err, read_jsonl(files[-1]) if files else []

    return run


def test_both_turns_equal_transformers(model, benches, ask):
    """Greedy categories, with a chat template that transformers applies; the second turn sees the first answer."""
    status, _, records = ask()
    assert status == 0
    questions = {question.id: question for question in read_questions(BENCHMARKS["mt_bench"], benches["mt_bench"])}
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    greedy = [record for record in records if record["generate_params"]["temperature"] == 0]
    assert len(greedy) == 4
    for record in greedy:
        messages = []
        for turn, text in enumerate(questions[record["question_id"]].turns):
            messages.append({"role": "user", "content": text})
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            new = theirs.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(ids) :]
            expected = tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
            assert record["choices"][0]["turns"][turn] == expected
            messages.append({"role": "assistant", "content": expected})


def test_records_are_fastchats(ask, tmp_path):
    status, err, records = ask("mt_bench", "--json", tmp_path / "result.json")
    assert status == 0
    assert sorted(record["question_id"] for record in records) == list(range(81, 89))
    for record in records:
        assert {"question_id", "answer_id", "model_id", "choices", "tstamp"} <= record.keys()
        assert record["model_id"] == "tiny"
        assert [choice["index"] for choice in record["choices"]] == [0]
        assert len(record["choices"][0]["turns"]) == 2
        assert record["finish"] == ["length"] * 2
    assert "16 of 16 answers were cut off at --max-new-tokens" in err
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["categories"]["all"] == result["categories"]["all"] | {"questions": 8, "answers": 16, "length": 16}
    assert list(result["categories"]) == [*MT_CATEGORIES, "all"]


def test_sampled_answers_depend_on_seed_question_and_turn_alone(ask, tmp_path):
    one = turns_of(ask("mt_bench", "--batch-size", 1, out=tmp_path / "1")[2])
    assert turns_of(ask("mt_bench", out=tmp_path / "2")[2]) == one
    other = turns_of(ask("mt_bench", "--seed", 1, out=tmp_path / "3")[2])
    assert {id for id in one if one[id] != other[id]} == {81, 82, 87, 88}  # writing, roleplay, stem, humanities
    assert len({answers.random_name(id, turn) for id in range(80) for turn in range(2)}) == 160


def test_sampling_is_by_the_models_generation_config_as_in_transformers(ask, tmp_path):
    def options(*arguments, **keywords):
        parameters = ask(*arguments, **keywords)[2][0]["generate_params"]
        return tuple(parameters[name] for name in ("top_k", "top_p", "min_p", "repetition_penalty"))

    assert options() == (50, 1.0, 0.0, 1.0)
    directory = write_model(tmp_path / "tuned")
    fields = {"top_k": 20, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.05, "eos_token_id": None}
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))
    assert options(directory=directory, out=tmp_path / "old") == (20, 0.8, 0.02, 1.05)
    theirs = GenerationConfig.from_pretrained(directory, "config.json", _from_model_config=True)
    assert (theirs.top_k, theirs.top_p, theirs.min_p, theirs.repetition_penalty) == (20, 0.8, 0.02, 1.05)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps(fields))
    assert options(directory=directory) == (20, 0.8, 0.02, 1.05)
    told = ["--top-k", 3, "--top-p", 0.5, "--min-p", 0, "--repetition-penalty", 1.1]
    assert options("japanese_mt_bench", *told, directory=directory, out=tmp_path / "ja") == (3, 0.5, 0.0, 1.1)
    assert options("logickor", directory=directory, out=tmp_path / "ko") == (0, 1.0, 0.0, 1.0)
    neutral = {"num_beams": 1, "guidance_scale": 1.0, "min_length": 0, "suppress_tokens": None, "bad_words_ids": []}
    fields = {"typical_p": 0.9, "no_repeat_ngram_size": 3, **neutral, "min_new_tokens": 1, "unheard_of": "x"}
    (directory / "generation_config.json").write_text(json.dumps(fields))
    said = ask(directory=directory, out=tmp_path / "noted")[1]
    assert (
        "generation_config.json: typical_p, no_repeat_ngram_size, min_new_tokens, unheard_of: not implemented" in said
    )
    assert "not implemented" not in ask(out=tmp_path / "whole")[1]
    for content, mistake in (
        ({"top_k": "many"}, "top_k must be a whole number"),
        ({"min_p": 1.5}, "min_p must be a number from 0 to 1, not 1.5"),
        ({"min_p": -0.5}, "min_p must be a number above 0"),
    ):
        (directory / "generation_config.json").write_text(json.dumps(content))
        assert f"generation_config.json: {mistake}" in ask(directory=directory)[1]


def test_settings_of_logickor(ask, benches, model, tmp_path):
    plain = turns_of(ask("logickor")[2])
    for setting in ("1-shot", "cot-1-shot"):
        status, _, records = ask("logickor", "--setting", setting)
        assert status == 0
        assert {record["model_id"] for record in records} == {f"tiny-{setting}"}
        assert turns_of(records) != plain

    # The examples stand in front of the question, word for word.
    examples = [{"role": "user", "content": "하나?"}, {"role": "assistant", "content": "둘."}]
    (tmp_path / "examples.json").write_text(json.dumps({"1-shot": examples}))
    _, _, records = ask("logickor", "--setting", "1-shot", "--examples", tmp_path / "examples.json", out=tmp_path / "e")
    longer = json.loads((benches["logickor"] / "question.jsonl").read_text().splitlines()[0])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    messages = [*examples, {"role": "user", "content": longer["questions"][0]}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    new = theirs.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(ids) :]
    assert turns_of(records)[1][0] == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_the_projects_own_examples_are_conversations():
    for setting in ("1-shot", "cot-1-shot"):
        messages = answers.read_examples(BENCHMARKS["logickor"], setting, answers.EXAMPLES)
        assert messages[-1]["role"] == "assistant"


def test_a_full_context_is_an_empty_answer_that_is_told(benches, ask, tmp_path):
    small = write_model(tmp_path / "small", context=100)
    status, err, records = ask("mt_bench", "--limit", 1, directory=small, new=40)
    assert status == 0
    assert {record["finish"][1] for record in records} == {"context"}
    assert all(record["choices"][0]["turns"][0] and not record["choices"][0]["turns"][1] for record in records)
    assert "8 of 16 answers were cut off at the end of the model's context" in err


def test_a_run_asks_only_what_is_missing_and_forgives_a_torn_line(ask, tmp_path, monkeypatch):
    whole = turns_of(ask("mt_bench", "--batch-size", 2, out=tmp_path / "whole")[2])
    ask("mt_bench", "--batch-size", 2)
    path = tmp_path / "out" / "model_answer" / "tiny.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][: len(lines[3]) // 2])

    asked = []
    original = answers.answer
    monkeypatch.setattr(
        answers, "answer", lambda m, f, batch, *rest: asked.extend(batch) or original(m, f, batch, *rest)
    )
    status, _, records = ask("mt_bench", "--batch-size", 2)
    assert status == 0
    assert len(asked) == 6  # those of the fourth's batch once more
    assert turns_of(records) == whole
    assert len(records) == 8
    asked.clear()
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # complete, but for its line end
    assert ask("mt_bench", "--batch-size", 2, "--limit", 1)[0] == 0
    assert not asked
    ask("mt_bench", "--batch-size", 2, "--overwrite")
    assert len(asked) == 8


def test_a_run_that_goes_on_has_the_time_of_its_first_answers(ask, tmp_path, monkeypatch):
    directory = write_model(tmp_path / "timed")
    template = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").write_text("{{ strftime_now('%f') }}" + template)
    asked, original = [], answers.answer
    monkeypatch.setattr(
        answers, "answer", lambda m, f, *rest: asked.append(f.prompt([user("Hi")])) or original(m, f, *rest)
    )
    whole = ask(directory=directory)[2]
    path = tmp_path / "out" / "model_answer" / "timed.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert turns_of(ask(directory=directory)[2]) == turns_of(whole)
    assert len(asked) > 4 and all(prompt == asked[0] for prompt in asked)
    ask("mt_bench", "--overwrite", directory=directory)
    assert asked[-1] != asked[0]


def test_a_model_that_cannot_answer_overwrites_nothing(ask, tmp_path):
    before = ask()[2]
    weights = load_file(write_model(tmp_path / "broken" / "tiny") / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, tmp_path / "broken" / "tiny" / "model.safetensors", {"format": "pt"})
    status, err, records = ask("mt_bench", "--overwrite", directory=tmp_path / "broken" / "tiny")
    assert (status, records) == (2, before)
    assert err.splitlines()[-1] == "error: the model's logits are not finite numbers"


@pytest.mark.parametrize("kept", [1, 3, 4, 6])
def test_in_bf16_too_a_run_goes_on_as_if_it_had_not_been_stopped(kept, ask, tmp_path):
    """Where the same question in another batch is rounded otherwise."""
    options = ["mt_bench", "--dtype", "bf16", "--batch-size", 3]
    whole = turns_of(ask(*options, new=24)[2])
    path = tmp_path / "out" / "model_answer" / "tiny.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]))
    assert turns_of(ask(*options, new=24)[2]) == whole


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", 1], "seed was 0, is 1"),
        (["--max-new-tokens", 7], "max_new_tokens was 6, is 7"),
        (["--top-p", 0.9], "top_p was 1.0, is 0.9"),
        (["--top-k", 0], "top_k was 50, is 0"),
        (["--dtype", "bf16"], "dtype was fp32, is bf16"),
        (["--batch-size", 3], "batch_size was 16, is 3"),
        (["--chat-format", "qwen2"], "chat_format was chatml, is qwen2"),
    ],
)
def test_answers_made_in_another_way_are_not_mixed(words, message, ask):
    ask()
    status, err, records = ask("mt_bench", *words)
    assert (status, len(records)) == (2, 8)
    (line,) = err.splitlines()
    assert f"tiny.jsonl:1: made in another way: {message}; use --overwrite" in line


def test_answers_that_other_tokens_end_are_not_mixed(ask, tmp_path):
    """And what ends them is no part of them, text or not."""
    tiny = write_model(tmp_path / "tiny")
    assert ask(directory=tiny)[0] == 0
    (tiny / "generation_config.json").write_text(json.dumps({"eos_token_id": [*range(300)]}))
    assert "made in another way: stops was [" in ask(directory=tiny)[1]
    turns = turns_of(ask("mt_bench", "--overwrite", directory=tiny)[2]).values()
    assert {text for pair in turns for text in pair} == {""}


def test_a_model_that_was_trained_on_is_another(ask, tmp_path):
    write_model(tmp_path / "tiny")
    assert ask(directory=tmp_path / "tiny")[0] == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    theirs.model.layers[2].mlp.up_proj.weight.data += 1e-3
    theirs.save_pretrained(tmp_path / "tiny")
    assert "made in another way: model was" in ask(directory=tmp_path / "tiny")[1]


def test_mistakes_are_one_line(ask, tmp_path, benches):
    examples = tmp_path / "examples.json"
    for content, message in (
        ({}, "'1-shot': it must be a list of messages"),
        ({"1-shot": [user("a")]}, "its last message must be the assistant's"),
        ({"1-shot": [user("a"), {"role": "judge", "content": ""}]}, "message 2 has the role 'judge'"),
    ):
        examples.write_text(json.dumps(content))
        status, err, _ = ask("logickor", "--setting", "1-shot", "--examples", examples)
        assert (status, len(err.splitlines())) == (2, 1)
        assert message in err
    for words, message in (
        (["--setting", "1-shot"], "--setting 1-shot: mt_bench has default"),
        (["--name", "a/b"], "--name 'a/b': it becomes the name of a file"),
    ):
        status, err, _ = ask("mt_bench", *words)
        assert (status, len(err.splitlines())) == (2, 1)
        assert message in err
    path = tmp_path / "out" / "model_answer" / "tiny.jsonl"
    write_jsonl(path, [{"question_id": 81, "choices": [{"turns": ["a", "b"]}]}])
    assert "an answer that does not say how it was made" in ask()[1]
    path.unlink()
    with JsonLines(path):
        assert "another run is writing it" in ask()[1]


def test_processes_divide_the_questions_and_change_nothing(model, benches, ask, tmp_path):
    alone = turns_of(ask("mt_bench", "--dtype", "bf16", "--batch-size", 2, out=tmp_path / "1")[2])
    options = ["--bench", "mt_bench", "--bench-dir", benches["mt_bench"], "--model", model, "--out", tmp_path / "2"]
    options += ["--dtype", "bf16", "--max-new-tokens", 6, "--batch-size", 2]
    pair = fork_group(2, "eval.__main__", ["answers", *options])
    said = [process.communicate() for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    records = read_jsonl(tmp_path / "2" / "model_answer" / "tiny.jsonl")
    assert len(records) == 8
    assert turns_of(records) == alone
    assert "".join(output for output, _ in said).count("category") == 1
