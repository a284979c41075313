"""Text from a model, token by token.

With a terminal this is a chat: an empty line is ignored, Ctrl-C stops an answer, and Ctrl-D, or Ctrl-C where a message
is expected, ends the chat. Messages may also come through a pipe, one a line. With --prompt there is one answer; with
--raw the text is continued as it stands, without a chat format, as base models need it. Of generation_config.json only
the ends of an answer count, eos_token_id; how tokens are drawn is told here.
"""

import sys
from collections.abc import Collection, Iterator

from elo.common.errors import UserError
from elo.common.options import Parser, positive_int
from elo.common.terminal import note, show
from elo.generation.engine import stream
from elo.generation.sampling import Sampling
from elo.model.cache import KVCache
from elo.model.checkpoint import load_model
from elo.model.decoder import CausalLM
from elo.model.packed import pack_weights
from elo.runs.devices import DTYPES, inference_device
from elo.text.chat_format import ChatFormat, Messages, chat_format, generation_stops
from elo.text.tokenizer import Tokenizer, load_tokenizer
from elo.text.tokenizer_files import TokenizerFiles
from elo.variants.adapted import open_checkpoint


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
        agreed = min(next(agreeing, len(self.ids)), len(prompt) - 1)
        rope = self.model.config.rope
        # Beyond the original length the keys of a shorter sequence are rotated otherwise, and of no use.
        is_rotated_anew = rope.varies and len(prompt) > rope.original_max_position_embeddings
        self.cache.truncate(0 if is_rotated_anew else agreed)
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
                if token not in stops:  # which may be text, if it is an added token that is not special
                    show(decoder.push(token), end="")
        except KeyboardInterrupt:
            interrupted = True
        show(decoder.flush())
        if not interrupted and not self.full and token not in stops:
            note(f"[cut off after {self.max_new_tokens} tokens: --max-new-tokens]")
        return self.tokenizer.decode([id for id in self.ids[len(prompt) :] if id not in stops])

    @property
    def full(self) -> bool:
        return len(self.ids) >= self.model.config.context


def chat(writer: Writer, format: ChatFormat, system: Messages) -> None:
    """Answer messages until they end or the context is full. `system`: what stands before them, if anything."""
    messages = [*system]
    context = writer.model.config.context
    for text in read_messages():
        messages.append({"role": "user", "content": text})
        prompt = format.prompt(messages)
        if len(prompt) < context:
            answer = writer.answer(prompt, format.stop_ids)
            messages.append({"role": "assistant", "content": answer})
        if len(prompt) >= context or writer.full:
            return note(f"[the conversation has filled the model's context of {context} tokens; start a new one]")
    return None


def read_messages() -> Iterator[str]:
    """The lines of stdin that are not empty."""
    sys.stdin.reconfigure(errors="replace")
    terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            return show("") if terminal else None
        if line.strip():
            yield line


def main() -> None:
    parser = Parser(prog="python -m elo.generation", description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint")
    parser.add_argument("--prompt", metavar="TEXT", help="one message to answer (default: a chat)")
    parser.add_argument("--raw", action="store_true", help="continue the text of --prompt, without a chat format")
    parser.add_argument("--system", type=str, metavar="TEXT", help="the system message (default: the chat format's)")
    parser.add_argument("--chat-format", metavar="NAME", help="instead of the checkpoint's")
    parser.add_argument("--max-new-tokens", type=positive_int, default=1024, metavar="N", help=(
        "in an answer (%(default)s)"))  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of computation (%(default)s)")
    Sampling.add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.raw and (arguments.prompt is None or arguments.system is not None or arguments.chat_format):
        parser.error("--raw needs --prompt and takes neither --system nor --chat-format")

    checkpoint = open_checkpoint(arguments.model)
    tokenizer = load_tokenizer(checkpoint.directory, checkpoint.config.vocab_size)
    format = None if arguments.raw else chat_format(checkpoint.directory, tokenizer, arguments.chat_format)
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    question = [{"role": "user", "content": arguments.prompt or "Hi"}]
    if format and arguments.system and format.prompt([*system, *question]) == format.prompt(question):
        raise UserError(f"--system: the chat format of {arguments.model} has no system message; leave it out")
    model = pack_weights(load_model(checkpoint, inference_device(), DTYPES[arguments.dtype]))
    writer = Writer(model, tokenizer, arguments.max_new_tokens, Sampling.from_arguments(arguments))
    if format and arguments.prompt is None:
        try:
            return chat(writer, format, system)
        except KeyboardInterrupt:  # where a message was expected; the writer sees to its own
            return show("")
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompt = format.prompt([*system, *question]) if format else [*bos, *tokenizer.encode(arguments.prompt)]
    stops = format.stop_ids if format else {tokenizer.eos_id} | generation_stops(TokenizerFiles(checkpoint.directory))
    writer.answer(prompt, stops)
    if writer.full:
        note(f"[the model's context of {checkpoint.config.context} tokens is full]")
    return None
