"""Small benchmarks in the formats of MT-Bench, Japanese MT-Bench and LogicKor, and a model that answers them."""

import json
from pathlib import Path

import families
from small_tokenizer import write_tokenizer
from tokenizers import Tokenizer, decoders

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data" / "bench"
MT_CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
TEXTS = {
    "mt_bench": ("Tell me of {} number {}. {{x}} 🙂", "And now shorter, as “{{answer}}”."),
    "japanese_mt_bench": ("{}について教えて。{}番目の質問です。", "もっと短く。"),
    "logickor": ("{}에 관해 알려 줘. {}번째 질문이야.", "더 짧게 말해 줘."),
}
LOGICKOR_CATEGORIES = (
    *("추론(Reasoning)", "수학(Math)", "글쓰기(Writing)"),
    *("코딩(Coding)", "이해(Understanding)", "문법(Grammar)"),
)


def write_jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_bench(directory, name, per_category=1):
    """question.jsonl and, but for LogicKor, judge_prompts.jsonl and reference_answer.jsonl; returns the directory."""
    first, second = TEXTS[name]
    categories = LOGICKOR_CATEGORIES if name == "logickor" else MT_CATEGORIES
    questions, references = [], []
    for index, category in enumerate([category for category in categories for _ in range(per_category)]):
        number = (1 if name != "mt_bench" else 81) + index
        turns = [first.format(category, number), second.format()]
        if name == "logickor":
            given = [f"정답은 {number}", None] if index % 2 else [None, None]
            questions.append({"id": number, "category": category, "questions": turns, "references": given})
            continue
        questions.append({"question_id": number, "category": category, "turns": turns})
        if category in ("reasoning", "math", "coding"):
            answer = {"index": 0, "turns": [f"reference {number} one", f"reference {number} two"]}
            references.append({"question_id": number, "answer_id": "r", "model_id": "gpt-4", "choices": [answer]})
    write_jsonl(directory / "question.jsonl", questions)
    if name != "logickor":
        write_jsonl(directory / "reference_answer.jsonl", references)
        write_jsonl(directory / "judge_prompts.jsonl", judge_prompts(name))
    return directory


def judge_prompts(name):
    """Those of FastChat by name and slots; the Japanese file has no second turn, as published."""
    conversation = "Q1 {question_1} A1 {answer_1} Q2 {question_2} A2 {answer_2}"
    templates = {
        "single-v1": "Q {question} A {answer}",
        "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
        "single-v1-multi-turn": conversation,
        "single-math-v1-multi-turn": "R1 {ref_answer_1} R2 {ref_answer_2} " + conversation,
    }
    prompts = [
        {
            "name": prompt,
            "type": "single",
            "system_prompt": f"You judge by {prompt}.",
            "prompt_template": template,
            "description": "",
            "category": "general",
            "output_format": "[[rating]]" if name == "mt_bench" else "[[評価]]",
        }
        for prompt, template in templates.items()
        if name == "mt_bench" or not prompt.endswith("multi-turn")
    ]
    pair = {"name": "pair-v2", "type": "pairwise", "system_prompt": "", "prompt_template": "{answer_a}"}
    return [{**pair, "output_format": "[[A]]"}, *prompts]


def write_model(directory, context=2000):
    """A random model with the template of ChatML, which never stops by itself."""
    write_tokenizer(directory, vocab_size=300)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    families.write("llama3", directory)
    (directory / "generation_config.json").unlink()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    template = (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
        "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
    )
    (directory / "chat_template.jinja").write_text(template)
    return directory


def write_answers(directory, name, model="tiny", text="answer {} turn {}"):
    """An answer file of a model whose answers say which ones they are."""
    questions = read_jsonl(directory / "question.jsonl")
    ids = [question["id" if name == "logickor" else "question_id"] for question in questions]
    turns = {id: [text.format(id, 1), text.format(id, 2)] for id in ids}
    records = [
        {
            "question_id": id,
            "answer_id": "a",
            "model_id": model,
            "choices": [{"index": 0, "turns": turns[id]}],
            "tstamp": 1.0,
        }
        for id in ids
    ]
    return write_jsonl(directory / "model_answer" / f"{model}.jsonl", records)


def turns_of(records):
    """Of an answer file, by question."""
    return {record["question_id"]: record["choices"][0]["turns"] for record in records}


def scores_file(path, bench, categories, *models):
    """What `eval score --json` writes, with made-up figures."""
    figures = {}
    for shift, name in enumerate(models):
        means = {
            category: {"first": 5.0, "second": 6.0, "average": 1.0 + index + shift % 5 / 4}
            for index, category in enumerate(categories)
        }
        figures[name] = {"first": 5.0 + shift % 5, "second": 4.25, "average": 4.5, "categories": means}
    path.write_text(json.dumps({"bench": bench, "models": figures}))
    return path
