"""The chat formats that --chat-format names: those of the families' instruct models, as templates."""

from typing import NamedTuple


def _chatml(default_system: str | None = None) -> str:
    """`default_system` is the system message of conversations that have none."""
    default = (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\n"
        + default_system
        + "<|im_end|>\\n' }}{% endif %}"
        if default_system
        else ""
    )
    return (
        default + "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def _llama3(first: str = "{% set turns = messages %}") -> str:
    return (
        first + "{% for message in turns %}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    )


# There always is a system message. The date is the published template's, whatever day it is.
LLAMA31_SYSTEM = (
    "{% set has_system = messages[0].role == 'system' %}{% set turns = messages[1:] if has_system else messages %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: ' + "
    "(date_string or '26 Jul 2024') + '\\n\\n' + (messages[0].content | trim if has_system else '') + '<|eot_id|>' }}"
)
# The system message stands in the last user turn only; messages of one role in a row are one turn.
MISTRAL = """\
{%- set has_system = messages[0].role == 'system' %}
{%- set turns = messages[1:] if has_system else messages %}
{%- set seen = namespace(last=0, text='') %}
{%- for message in turns if message.role == 'user' %}{% set seen.last = loop.length %}{% endfor %}
{%- set seen.users = 0 %}
{%- for message in turns %}
    {%- if loop.first or loop.previtem.role != message.role %}{% set seen.text = '' %}{% endif %}
    {%- if message.role == 'user' %}{% set seen.users = seen.users + 1 %}{% endif %}
    {%- if message.content %}
        {%- set seen.text = seen.text + ('\\n\\n' if seen.text else '') + message.content %}
    {%- endif %}
    {%- if loop.last or loop.nextitem.role != message.role %}
        {%- if message.role == 'user' %}
            {%- set is_last = has_system and messages[0].content and seen.users == seen.last %}
            {%- set seen.text = (messages[0].content + '\\n\\n' if is_last else '') + seen.text %}
            {{- '[INST]' + (SPACE + seen.text if seen.text else '') + '[/INST]' }}
        {%- else %}
            {%- set seen.text = seen.text.rstrip(' ') %}
            {{- (SPACE + seen.text if seen.text else '') + '</s>' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}"""


class Format(NamedTuple):
    """A row of the table of formats."""

    template: str
    bos: str | None
    tokens: tuple[str, ...]  # special tokens that the template writes
    stops: tuple[str, ...]  # special tokens that end the assistant's turn, as far as the tokenizer has them


CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MISTRAL_TOKENS = ("[INST]", "[/INST]", "</s>")
LLAMA3_STOPS = ("<|eot_id|>", "<|end_of_text|>")
QWEN_STOPS = ("<|im_end|>", "<|endoftext|>")

QWEN2_SYSTEM = "You are a helpful assistant."
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

BOS = "<|begin_of_text|>"
FORMATS = {
    "llama3": Format(_llama3(), BOS, LLAMA3, LLAMA3_STOPS),
    "llama3.1": Format(_llama3(LLAMA31_SYSTEM), BOS, LLAMA3, (*LLAMA3_STOPS, "<|eom_id|>")),
    "mistral": Format(MISTRAL, "<s>", MISTRAL_TOKENS, ("</s>",)),
    "qwen2": Format(_chatml(QWEN2_SYSTEM), None, CHATML, QWEN_STOPS),
    "qwen2.5": Format(_chatml(QWEN25_SYSTEM), None, CHATML, QWEN_STOPS),
    "smollm2": Format(_chatml(SMOLLM2_SYSTEM), None, CHATML, ("<|im_end|>",)),
    # Fine-tunes of any family, no default system message.
    "chatml": Format(_chatml(), None, CHATML, QWEN_STOPS),
}
