"""Checkpoints with the published templates, Llama's without their branches for tools; random chats."""

import json

import tokenizers
from small_tokenizer import write_tokenizer

from elo.text.built_in_formats import CHATML, LLAMA3, MISTRAL_TOKENS
from elo.text.chat_format import chat_format
from elo.text.tokenizer import load_tokenizer


def chatml_template(default_system):
    default = (
        "{% if loop.first and messages[0]['role'] != 'system' %}"
        f"{{{{ '<|im_start|>system\\n{default_system}<|im_end|>\\n' }}}}{{% endif %}}"
    )
    return (
        "{% for message in messages %}" + (default if default_system else "") + "{{'<|im_start|>' + message['role'] + "
        "'\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


LLAMA3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31_TEMPLATE = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TEMPLATES = {
    "chatml": chatml_template(None),
    "qwen2": chatml_template("You are a helpful assistant."),
    "qwen2.5": chatml_template("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "smollm2": chatml_template(SMOLLM_SYSTEM),
    "llama3": LLAMA3_TEMPLATE,
    "llama3.1": LLAMA31_TEMPLATE,
}
SPECIALS = {
    "chatml": CHATML,
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", *LLAMA3),
    "llama3.1": ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", *LLAMA3),
    "mistral": ("<s>", *MISTRAL_TOKENS),
}


def checkpoint(directory, specials, template=None, **files):
    """A directory with a small byte-level tokenizer that has these special tokens. `files`: JSON by file name."""
    write_tokenizer(directory)
    path = str(directory / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.add_special_tokens(list(specials))
    tokenizer.save(path)
    bos = [token for token in ("<|begin_of_text|>", "<s>") if token in specials]
    config = {"eos_token": "<|endoftext|>", **({"bos_token": bos[0]} if bos else {})}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def specials_of(name):
    return SPECIALS.get(name, CHATML)


def open_format(directory, override=None, **options):
    tokenizer = load_tokenizer(directory)
    return tokenizer, chat_format(directory, tokenizer, override, **options)


CONTENTS = [
    *("Hi", "안녕하세요, 반갑습니다!", "日本語です。", "😀👍🏽", "a   1", "don't 12345"),
    *("", " ", "\n", "\n\n", "\nHi", "\n\nHi", "\n  Hi", " leading", "trailing  "),
    *("trailing\n", "\ttab\t", "\u00a0x\u3000"),
    *("def f():\n    return 1\n", "user\n", "one\n\n\ntwo", "</s>x", "Text " * 30),
]


def random_chat(rng, contents=CONTENTS, alternating=False):
    """Messages that end with the user's or the assistant's."""
    messages = [{"role": "system", "content": rng.choice(contents)}] if rng.random() < 0.4 else []
    role = "user"
    for _ in range(rng.randint(1, 6)):
        messages.append({"role": role, "content": rng.choice(contents)})
        if alternating or rng.random() < 0.8:
            role = "assistant" if role == "user" else "user"
    return messages


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def stretches(ids, trained):
    """The ids of each stretch that is trained."""
    found = [[]]
    for id, counts in zip(ids, trained, strict=True):
        if counts:
            found[-1].append(id)
        elif found[-1]:
            found.append([])
    return [stretch for stretch in found if stretch]
