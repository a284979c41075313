"""A directory with models, texts, conversations and benchmarks of the names that README.md and docs/ use, all tiny."""

import gzip
import json
import shutil

import families
import pyarrow
import pyarrow.parquet
from bench_files import write_bench
from small_tokenizer import TEXT, add_chat_tokens, write_tokenizer

from examples import questions

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)


def write_model(directory, variant, **fields):
    """A base model, or an instruct model with a chat template, of 32 layers where the README numbers them."""
    architecture, config = families.VARIANTS[variant]()
    shape = {"vocab_size": 450, "hidden_size": 24, "intermediate_size": 40, "max_position_embeddings": 4096}
    for name, value in (shape | fields).items():
        setattr(config, name, value)
    families.VARIANTS["shown"] = lambda: (architecture, config)
    families.write("shown", directory, seed="Instruct" in directory.name)
    write_tokenizer(directory)
    _, end = add_chat_tokens(directory)
    if "Instruct" in directory.name or variant == "qwen3":
        (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
        (directory / "chat_template.jinja").write_text(CHATML)
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))


def write_place(place):
    models = place / "models"
    for name in ("Llama-3.1-8B", "Llama-3.1-8B-Instruct"):
        write_model(models / name, "llama3.1", num_hidden_layers=32, num_attention_heads=2, head_dim=8)
    for name, variant in (
        *(("Qwen2-7B", "qwen2"), ("Qwen2-7B-Instruct", "qwen2"), ("Qwen3-8B-Base", "qwen3"), ("Qwen3-8B", "qwen3")),
        *(("Mistral-7B-v0.3", "mistral-v0.3"), ("Mistral-7B-Instruct-v0.3", "mistral-v0.3")),
        ("SmolLM2-135M-Instruct", "smollm2"),
    ):
        layers = {"num_hidden_layers": 30, "vocab_size": 10_000} if variant == "smollm2" else {}
        write_model(models / name, variant, **layers)
    for folder, name in {
        "Llama-3.1-8B": "Llama-3.1-8B",
        "Llama-3-70B": "Llama-3.1-8B",
        "llama-4-layers": "Mistral-7B-v0.3",
    }.items():
        shutil.copytree(models / name, place / folder)
    for folder, text in {"target": "글이 필요하다 ", "source": "some text ", "ja": "글이 끝 "}.items():
        (place / "data" / folder).mkdir(parents=True)
        lines = [json.dumps({"text": f"{number} " + text * (number % 9 + 2)}) for number in range(400)]
        (place / "data" / folder / "texts.jsonl").write_text("\n".join(lines))
    named = (
        "heldout.jsonl",
        "data/heldout.ko.jsonl",
        "data/heldout.en.jsonl",
        "data/demo/ko.train.jsonl",
        "data/demo/en.train.jsonl",
        "SAMPLE.jsonl",
        "KOREAN.jsonl.gz",
        "ENGLISH.jsonl.gz",
    )
    (place / "data/demo").mkdir()
    for name in (*named, "libreoffice-help.en.jsonl.gz", "libreoffice-help.ko.jsonl.gz"):
        opened = gzip.open if name.endswith(".gz") else open
        with opened(place / name, "wt") as file:
            file.writelines(json.dumps({"text": f"{number} {TEXT} " * 4}) + "\n" for number in range(60))
    chats = [
        {"language": language, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": answer}]}
        for language, answer in (("ko", "끝"), ("en", "end"), ("ja", "끝")) * 8
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats), place / "data/tagengo.parquet")
    questions.write(place / "data/benchmarks")
    for folder in ("data/logickor", "bench/mt_bench"):
        write_bench(place / folder, folder.split("/")[1])
    return place
