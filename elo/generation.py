"""Text from a model, token by token.

With a terminal this is a chat: an empty line is ignored, Ctrl-C stops an answer, and Ctrl-D, or Ctrl-C where a message
is expected, ends the chat. Messages may also come through a pipe, one a line. With --prompt there is one answer; with
--raw the text is continued as it stands, without a chat format, as base models need it.
"""

import sys
from collections.abc import Collection, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from elo.chat import ChatFormat, chat_format
from elo.checkpoint import load_model
from elo.distributed import DTYPES, inference_device, keep_freed_memory
from elo.errors import UserError, exit_status
from elo.linear import MKLDNN
from elo.model import MLP, Attention, CausalLM, KVCache
from elo.options import Parser, not_negative, not_negative_int, positive, positive_int, share
from elo.rotary import rotate
from elo.sampling import GREEDY, Sampler, Sampling
from elo.tokenizer import Tokenizer, load_tokenizer

# ---- the engine: token ids in, token ids out


class PackedLinear(nn.Module):
    """Linear layers of the same input as one, whose weight lies as oneDNN's kernels for this CPU want it.

    On a few rows that takes half the time of `F.linear`, which finds the weight in rows and, for fp32, calls MKL. These
    are the operators to which torch.compile lowers linear layers when it freezes a model for inference on a CPU.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        weight = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 8)
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PackedAttention(Attention):
    """Queries, keys and values are one product, and queries and keys are rotated together: fewer, larger operations."""

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)  # not Attention's, which makes layers
        self.head_dim = attention.head_dim
        layers = attention.q_proj, attention.k_proj, attention.v_proj
        self.heads = [layer.out_features // self.head_dim for layer in layers]
        self.qkv_proj, self.o_proj = PackedLinear(*layers), PackedLinear(attention.o_proj)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.heads
        qk, values = self.qkv_proj(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2).split((q + k, v), 1)
        queries, keys = rotate(qk, cos, sin).split((q, k), 1)
        return queries, keys, values


class PackedMLP(nn.Module):
    """The gate and what passes through it are one product."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = PackedLinear(mlp.gate_proj, mlp.up_proj), PackedLinear(mlp.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def pack_weights(model: CausalLM) -> CausalLM:
    """Make a model on a CPU faster, in place, and the whole process: see `distributed.keep_freed_memory`.

    The weights can then be neither trained nor saved.
    """
    weight = model.lm_head.weight
    if weight.device.type == "cpu":
        keep_freed_memory()
    if not (MKLDNN and weight.device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")):
        return model
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return model
    for block in model.model.layers:
        block.self_attn, block.mlp = PackedAttention(block.self_attn), PackedMLP(block.mlp)
    model.lm_head = PackedLinear(model.lm_head)
    return model


@torch.inference_mode()
def stream(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[Collection[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    names: Sequence[int] | None = None,
    cache: KVCache | None = None,
) -> Iterator[list[int | None]]:
    """Continue prompts together. Each step yields the new token of every row, None for rows that have ended.

    A row ends with the first token that is in its `stops`, which is yielded too, after `max_new_tokens`, or when it
    fills the model's context. No row's result depends on the others. names: tell the random numbers of rows apart
    (default: their indices). cache: already holds the first `cache.lengths[row]` tokens of each prompt, not all.
    """
    context = model.config.max_position_embeddings
    for prompt in prompts:
        if not 0 < len(prompt) < context:
            raise UserError(f"a prompt of {len(prompt)} tokens; the model's context is {context} and has to hold more")
    embedding = model.model.embed_tokens.weight
    cache = cache or KVCache(model.config, len(prompts), embedding.device, embedding.dtype)
    sampler = Sampler(sampling, prompts, names or range(len(prompts)))
    left = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    rows = list(range(len(prompts))) if max_new_tokens > 0 else []  # those that go on
    new = [torch.tensor(prompt[held:]) for prompt, held in zip(prompts, cache.lengths, strict=True)]
    while rows:
        # Right padding: the real tokens are where they would be without it, and none of them looks at it.
        tokens = pad_sequence(new, batch_first=True).to(embedding.device)
        drawn = sampler.draw(model(tokens, cache=cache, lengths=[len(ids) for ids in new])).cpu()
        step: list[int | None] = [None] * len(prompts)
        for row, token in zip(rows, drawn.tolist(), strict=True):
            step[row] = token
            left[row] -= 1
        yield step
        going = [index for index, row in enumerate(rows) if left[row] > 0 and step[row] not in stops[row]]
        if 0 < len(going) < len(rows):
            cache.keep(going)
            sampler.keep(going)
            drawn = drawn[going]
        rows = [rows[index] for index in going]
        new = list(drawn[:, None])


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[Collection[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    names: Sequence[int] | None = None,
) -> list[list[int]]:
    """The new tokens of each row, a stop token included; the arguments are those of `stream`."""
    answers: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, stops, max_new_tokens, sampling, names):
        for answer, token in zip(answers, step, strict=True):
            if token is not None:
                answer.append(token)
    return answers


# ---- the command line


class Writer:
    """Prompts' ids to answers on the terminal; the cache of one answer serves the next as far as the ids agree."""

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, max_new_tokens: int, sampling: Sampling) -> None:
        self.model, self.tokenizer, self.max_new_tokens, self.sampling = model, tokenizer, max_new_tokens, sampling
        embedding = model.model.embed_tokens.weight
        self.cache = KVCache(model.config, 1, embedding.device, embedding.dtype)
        self.ids: list[int] = []  # their beginning, or all of them, is in the cache
        self.answers = 0

    def answer(self, prompt: list[int], stops: Collection[int]) -> str:
        """Write what the model says and return it. Ctrl-C stops it."""
        agreeing = (number for number, (a, b) in enumerate(zip(self.ids, prompt, strict=False)) if a != b)
        self.cache.truncate(min(next(agreeing, len(self.ids)), len(prompt) - 1))
        self.ids = list(prompt)
        decoder = self.tokenizer.stream_decoder()
        steps = stream(
            self.model, [prompt], [stops], self.max_new_tokens, self.sampling, names=[self.answers], cache=self.cache
        )
        self.answers += 1
        token, interrupted = None, False
        try:
            for (token,) in steps:
                self.ids.append(token)
                print(decoder.push(token), end="", flush=True)
        except KeyboardInterrupt:
            interrupted = True
        print(decoder.flush())
        if not interrupted and not self.full and token not in stops:
            note(f"cut off after {self.max_new_tokens} tokens: --max-new-tokens")
        return self.tokenizer.decode(self.ids[len(prompt) :])

    @property
    def full(self) -> bool:
        return len(self.ids) >= self.model.config.max_position_embeddings


def chat(writer: Writer, format: ChatFormat, system: str | None) -> None:
    """Answer messages until they end or the context is full."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    context = writer.model.config.max_position_embeddings
    for text in read_messages():
        messages.append({"role": "user", "content": text})
        prompt = format.prompt(messages)
        if len(prompt) < context:
            answer = writer.answer(prompt, format.stop_ids)
            messages.append({"role": "assistant", "content": answer})
        if len(prompt) >= context or writer.full:
            return note(f"the conversation has filled the model's context of {context} tokens; start a new one")
    return None


def read_messages() -> Iterator[str]:
    """The lines of stdin that are not empty."""
    sys.stdin.reconfigure(errors="replace")
    terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            return print() if terminal else None
        if line.strip():
            yield line


def note(message: str) -> None:
    print(f"[{message}]", file=sys.stderr, flush=True)


def main() -> None:
    parser = Parser(prog="python -m elo.generation", description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint")
    parser.add_argument("--prompt", metavar="TEXT", help="one message to answer (default: a chat)")
    parser.add_argument("--raw", action="store_true", help="continue the text of --prompt, without a chat format")
    parser.add_argument("--system", metavar="TEXT", help="the system message (default: the chat format's)")
    parser.add_argument("--chat-format", metavar="NAME", help="instead of the checkpoint's")
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=not_negative, default=GREEDY.temperature, help="0: greedy (%(default)s)")
    group.add_argument(
        "--top-k",
        type=not_negative_int,
        default=GREEDY.top_k,
        metavar="K",
        help="likeliest tokens; 0: all (%(default)s)",
    )
    group.add_argument(
        "--top-p",
        type=share,
        default=GREEDY.top_p,
        metavar="P",
        help="likeliest tokens of this probability (%(default)s)",
    )
    group.add_argument(
        "--repetition-penalty", type=positive, default=1.0, metavar="R", help="above 1: less (%(default)s)"
    )
    group.add_argument(
        "--max-new-tokens", type=positive_int, default=1024, metavar="N", help="in an answer (%(default)s)"
    )
    group.add_argument("--seed", type=not_negative_int, default=0, help="of the random numbers (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of computation (%(default)s)")
    arguments = parser.parse_args()
    if arguments.raw and (arguments.prompt is None or arguments.system is not None or arguments.chat_format):
        parser.error("--raw needs --prompt and takes neither --system nor --chat-format")

    tokenizer = load_tokenizer(arguments.model)
    format = None if arguments.raw else chat_format(arguments.model, tokenizer, arguments.chat_format)
    model = pack_weights(load_model(arguments.model, inference_device(), DTYPES[arguments.dtype]))
    sampling = Sampling(**{name: getattr(arguments, name) for name in Sampling.__dataclass_fields__})
    writer = Writer(model, tokenizer, arguments.max_new_tokens, sampling)
    if format is None:
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        writer.answer([*bos, *tokenizer.encode(arguments.prompt)], {tokenizer.eos_id})
    elif arguments.prompt is None:
        try:
            chat(writer, format, arguments.system)
        except KeyboardInterrupt:  # where a message was expected; the writer sees to its own
            print()
    else:
        system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
        writer.answer(format.prompt([*system, {"role": "user", "content": arguments.prompt}]), format.stop_ids)


if __name__ == "__main__":
    exit_status(main)
