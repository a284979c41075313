"""Every command that README.md and docs/ show runs, in the order of its page, in a tiny form.

The words are the page's; models and texts of those names are made small, and values of `TINY` take the place of those
that would take hours. torchrun's eight processes are two.
"""

import gzip
import json
import shutil

import families
import pyarrow
import pyarrow.parquet
import pytest
from bench_files import write_bench
from forking import Fork, fork_group
from judge_server import JudgeServer
from shown_commands import PAGES, ROOT, commands, script_of
from small_tokenizer import TEXT, add_chat_tokens, write_tokenizer

from examples import questions

TINY = {
    "--seq-len": "32",
    "--samples": "12",
    "--epochs": "1",
    "--rounds": "1",
    "--limit": "1",
    "--seconds": "0.001",
    "--batch-tokens": "64",
    "--max-new-tokens": "4",
    "--methods": "lora",
}
LEFT_OUT = ("--figure3",)  # needs all methods, each in processes of its own; tests/benchmarks has it
GB = 3e-6  # for each of the command's
# For scripts whose defaults are for models and texts of a real size.
ADDED = {
    "train": "--seq-len 32 --batch-tokens 256 --dtype fp32 --workers 1",
    "align": "--seq-len 32 --batch-tokens 256 --dtype fp32 --workers 1",
    "sft": "--seq-len 64 --epochs 1 --dtype fp32",
    "elo.generation": "--prompt 무엇? --max-new-tokens 3",
    "eval answers": "--max-new-tokens 4 --dtype fp32",
    "eval choice": "--dtype fp32",
    "eval perplexity": "--seq-len 32 --dtype fp32",
    "benchmarks.training_step": "--dtype fp32 --batch 1",
    "benchmarks.ideas": "--only products --batch 1 --seq-len 32",
    "benchmarks.training_memory": "--batch 1 --seq-len 32 --steps 1",
    "benchmarks.generation_speed": "--dtype fp32 --batch 1 --prompt-tokens 4 --new-tokens 2 --rounds 1",
    "benchmarks.lm_eval_speed": "--tasks kobest_copa",
}
MAIN = {"elo.generation": "elo.generation.chat", "elo.planning": "elo.planning.plan", "eval": "eval.__main__"}
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


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("shown")
    models = place / "models"
    for name in ("Llama-3.1-8B", "Llama-3.1-8B-Instruct"):
        write_model(models / name, "llama3.1", num_hidden_layers=32, num_attention_heads=2, head_dim=8)
    for name, variant in (
        *(("Qwen2-7B", "qwen2"), ("Qwen2-7B-Instruct", "qwen2"), ("Qwen3-8B-Base", "qwen3"), ("Qwen3-8B", "qwen3")),
        *(("Mistral-7B-v0.3", "mistral-v0.3"), ("Mistral-7B-Instruct-v0.3", "mistral-v0.3")),
        ("SmolLM2-135M-Instruct", "smollm2"),
    ):
        layers = {"num_hidden_layers": 30} if variant == "smollm2" else {}
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
    named = ("heldout.jsonl", "SAMPLE.jsonl", "KOREAN.jsonl.gz", "ENGLISH.jsonl.gz")
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


def tiny(words):
    """A command's module, and its words with other values."""
    script, arguments = script_of([word for word in words if word not in LEFT_OUT])
    name = ".".join(script.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    values = [TINY.get(option, value) for option, value in zip([None, *arguments], arguments, strict=False)]
    if "--gb" in values and name in ("train", "align"):
        at = values.index("--gb") + 1
        values[at] = f"{float(values[at]) * GB:g}"
    added = ADDED.get(f"{name} {arguments[0]}" if name == "eval" else name, "").split()
    for option, value in zip(added[::2], added[1::2], strict=True):
        values += [] if option in values else [option, value]
    return name, values


def run(place, words, judge):
    name, arguments = tiny(words)
    if arguments[:1] == ["judge"]:
        arguments += ["--base-url", judge.url]
    if "*" in " ".join(arguments):
        arguments = [str(path) for word in arguments for path in (sorted(place.glob(word)) if "*" in word else [word])]
    module = MAIN.get(name, name)
    if words[0] == "torchrun":
        processes = fork_group(2, module, arguments, place)
    else:
        processes = [Fork(module, arguments, place)]
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, f"{' '.join(words)}\n{out}{err}"
    return out


def shown(page):
    """The page's commands that are whole: without those that are only named."""
    for words in commands(page.read_text()):
        arguments = script_of(words)[1]
        if arguments and not {"...", "--help"} & set(arguments):
            yield words


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "performance"], ids=lambda path: path.stem)
def test_commands_run(page, place, monkeypatch):
    shutil.rmtree(place / "runs", ignore_errors=True)
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    with JudgeServer() as judge:
        for words in shown(page):
            run(place, words, judge)


OTHERS = {"Mistral-7B-v0.3": "Mistral-7B-Instruct-v0.3", "Qwen3-8B-Base": "Qwen3-8B"}


@pytest.mark.parametrize("base", OTHERS)
def test_the_pipeline_of_other_models(base, place):
    """Qwen2's commands with other names, as README.md promises."""
    text = PAGES[0].read_text()
    assert f"`mistralai/{base}`" in text or f"`Qwen/{base}`" in text
    chain = [words for words in shown(PAGES[0]) if any("qwen" in word for word in words)]
    assert len(chain) == 4
    names = {"Qwen2-7B-Instruct": OTHERS[base], "Qwen2-7B": base, "qwen": base}
    for command in chain:
        line = "\n".join(command)
        for name, other in names.items():
            line = line.replace(name, other)
        run(place, line.split("\n"), None)
    assert (place / f"runs/{base}-sft/sft.json").exists()
