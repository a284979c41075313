"""Chat templates as they are published, or nearly so: a layout each, with the tokens that it writes."""

# ruff: noqa: E501  lines as published

from chat_checkpoints import LLAMA31_TEMPLATE

IM = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURNS = ("<start_of_turn>", "<end_of_turn>")


def each(turn, before="", after=""):
    return before + "{% for m in messages %}" + turn + "{% endfor %}" + after


def opens(text):
    return "{% if add_generation_prompt %}{{ '" + text + "' }}{% endif %}"


CHATML_TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
ASSISTANT = opens("<|im_start|>assistant\\n")
ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system_message = false %}{% endif %}{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}\
{% endif %}{% if loop.index0 == 0 and system_message != false %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
MISTRAL_V1 = each(
    ALTERNATE + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}",
    "{{ bos_token }}",
)
MISTRAL_V2 = MISTRAL_V1.replace("m['content'] + eos_token + ' '", "m['content'] + eos_token")
MISTRAL_V3 = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(\
message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' \
+ content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + each(
        ALTERNATE + "{% if (m['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}"
        "{% endif %}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}",
        after="{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    )
)
GEMMA3 = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set first = messages[0]['content'] + '\n\n' -%}"
    "{%- set turns = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set turns = messages -%}{%- endif -%}"
    "{%- for m in turns -%}{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}{{ m['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"
)
PHI3 = each(
    "{% if m['role'] == 'system' %}{{'<|system|>\n' + m['content'] + '<|end|>\n'}}{% elif m['role'] == 'user' %}"
    "{{'<|user|>\n' + m['content'] + '<|end|>\n'}}{% elif m['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + m['content'] + '<|end|>\n'}}{% endif %}",
    after="{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
)
ZEPHYR = each(
    "\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n{% elif m['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + m['content'] + eos_token }}\n{% elif m['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0]['content'].strip() "
    "+ '\n\n' %}{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}{{ bos_token + system }}"
    "{% for m in turns %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'].strip() + '\n' }}{% else %}"
    "{{ 'ASSISTANT: ' + m['content'].strip() + eos_token + '\n' }}{% endif %}{% if loop.last and m['role'] == 'user' and "
    "add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}{% endfor %}"
)
ALPACA = "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}" + each(
    "{% if m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'].strip() + '\n\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ '### Response:\n' + m['content'].strip() + eos_token + '\n\n' }}{% endif %}",
    after=opens("### Response:\n"),
)
LLAMA32 = LLAMA31_TEMPLATE.replace(
    '    {%- set date_string = "26 Jul 2024" %}\n',
    """    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
""",
)
LLAMA3_TURN = "{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
LLAMA3_OPENS = opens("<|start_header_id|>assistant<|end_header_id|>\\n\\n")
DEEPSEEK_R1 = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{% set ns = namespace(is_first=false, system_prompt='') %}{%- for message in messages %}\
{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}\
{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}\
{{'<|User|>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' %}{% set content = message['content'] %}\
{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}\
{{'<|Assistant|>' + content + '<|eos|>'}}{%- endif %}{%- endfor -%}\
{% if add_generation_prompt %}{{'<|Assistant|><think>\\n'}}{% endif %}"""
CHATGLM = each("{{ '<|' + m['role'] + '|>' }}\n{{ m['content'] }}", "[gMASK]<sop>", opens("<|assistant|>"))
COMMAND_R = "{{ bos_token }}" + each(
    "{% if m['role'] == 'system' %}{{ '<|TURN|><|SYSTEM|>' + m['content'].strip() + '<|END_TURN|>' }}"
    "{% elif m['role'] == 'user' %}{{ '<|TURN|><|USER|>' + m['content'].strip() + '<|END_TURN|>' }}"
    "{% else %}{{ '<|TURN|><|CHATBOT|>' + m['content'].strip() + '<|END_TURN|>' }}{% endif %}",
    after=opens("<|TURN|><|CHATBOT|>"),
)
TULU = each(
    "{% if m['role'] == 'system' %}{{ '<|system|>\n' + m['content'] + '\n' }}{% elif m['role'] == 'user' %}"
    "{{ '<|user|>\n' + m['content'] + '\n' }}{% elif m['role'] == 'assistant' %}{% if not loop.last %}"
    "{{ '<|assistant|>\n'  + m['content'] + eos_token + '\n' }}{% else %}{{ '<|assistant|>\n'  + m['content'] + eos_token }}"
    "{% endif %}{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GENERATION = each(
    "{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}" + CHATML_TURN + "{% endif %}",
    after=ASSISTANT,
)
BREAKS = "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}{% break %}{% endif %}"


class Layout:
    """A template, its special tokens, what ends a turn, and the conversations that it refuses."""

    def __init__(self, template, tokens, end, bos=None, eos=None, text=(), rstrip=False, system=True, alternate=False):
        self.template, self.tokens, self.end, self.bos, self.eos = template, tokens, end, bos, eos
        self.text, self.rstrip, self.system, self.alternate = text, rstrip, system, alternate


S = {"bos": "<s>", "eos": "</s>"}
LAYOUTS = {
    "llama2": Layout(LLAMA2, (), "</s>", **S, alternate=True),
    "mistral-v0.1": Layout(MISTRAL_V1, (), "</s>", **S, system=False, alternate=True),
    "mistral-v0.2": Layout(MISTRAL_V2, (), "</s>", **S, system=False, alternate=True),
    "mistral-v0.3": Layout(MISTRAL_V3, ("[INST]", "[/INST]"), "</s>", **S),
    "qwen3": Layout(QWEN3, IM, "<|im_end|>", text=("<think>", "</think>")),
    "gemma": Layout(GEMMA, TURNS, "<end_of_turn>", bos="<bos>", eos="<eos>", system=False, alternate=True),
    "gemma3": Layout(GEMMA3, TURNS, "<end_of_turn>", bos="<bos>", eos="<eos>"),
    "phi3": Layout(PHI3, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), "<|end|>", rstrip=True, **S),
    "zephyr": Layout(ZEPHYR, (), "</s>", **S),
    "vicuna": Layout(VICUNA, (), "</s>", **S),
    "alpaca": Layout(ALPACA, (), "</s>", **S),
    "tulu": Layout(TULU, (), "</s>", **S),
    "llama3.2": Layout(LLAMA32, HEADERS, "<|eot_id|>", bos="<|begin_of_text|>"),
    "llama3-default-system": Layout(
        "{{ bos_token }}{% if messages[0]['role'] != 'system' %}{{ '<|start_header_id|>system<|end_header_id|>\n\nBe nice."
        "<|eot_id|>' }}{% endif %}" + each(LLAMA3_TURN + "{{ content }}") + LLAMA3_OPENS,
        HEADERS,
        "<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "llama3-without-bos": Layout(
        each(LLAMA3_TURN + "{{ content }}") + LLAMA3_OPENS, HEADERS, "<|eot_id|>", bos="<|begin_of_text|>"
    ),
    "deepseek-r1": Layout(
        DEEPSEEK_R1, ("<|User|>", "<|Assistant|>", "<|eos|>"), "<|eos|>", **S, text=("<think>", "</think>")
    ),
    "command-r": Layout(
        COMMAND_R, ("<|TURN|>", "<|END_TURN|>", "<|SYSTEM|>", "<|USER|>", "<|CHATBOT|>"), "<|END_TURN|>", bos="<BOS>"
    ),
    "chatml-prefill": Layout(each(CHATML_TURN, after=opens("<|im_start|>assistant\\n<think>\\n")), IM, "<|im_end|>"),
    "chatml-set-system": Layout(
        "{% set system = 'You are Bob.' %}{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n' + system + "
        "'<|im_end|>\\n' }}{% endif %}" + each(CHATML_TURN, after=ASSISTANT),
        IM,
        "<|im_end|>",
    ),
    "chatml-trim": Layout(
        each(CHATML_TURN.replace("m['content']", "m['content']|trim"), after=ASSISTANT), IM, "<|im_end|>"
    ),
    "chatml-bot": Layout(
        each(
            "{% set role = 'bot' if m['role'] == 'assistant' else m['role'] %}"
            + CHATML_TURN.replace("m['role']", "role"),
            after=opens("<|im_start|>bot\\n"),
        ),
        IM,
        "<|im_end|>",
    ),
    "chatml-no-newline": Layout(each(CHATML_TURN.replace(" + '\\n' }}", " }}"), after=ASSISTANT), IM, "<|im_end|>"),
    "chatml-no-system": Layout(
        each("{% if m['role'] != 'system' %}" + CHATML_TURN + "{% endif %}", after=ASSISTANT), IM, "<|im_end|>"
    ),
    "chatml-bos-eos": Layout(each(CHATML_TURN, "{{ bos_token }}", ASSISTANT + "{{ '' }}"), IM, "<|im_end|>", **S),
    "chatml-generation": Layout(GENERATION, IM, "<|im_end|>"),
    "chatml-loopcontrols": Layout(BREAKS + CHATML_TURN + "{% endfor %}" + ASSISTANT, IM, "<|im_end|>"),
    "chatml-tojson": Layout(
        each(
            "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}",
            "{{ {'ö': '<>'} | tojson }}",
            ASSISTANT,
        ),
        IM,
        "<|im_end|>",
    ),
    "chatml-indented": Layout(
        "{% for m in messages %}\n    {% if m.content %}\n"
        + CHATML_TURN
        + "\n    {% endif %}\n{% endfor %}\n"
        + ASSISTANT,
        IM,
        "<|im_end|>",
    ),
}
