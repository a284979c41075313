"""Loss, perplexity and bits per UTF-8 byte of a model on text files.

Documents are taken one by one and cut into windows; every token that has a predecessor in its window counts. The
family's BOS stands in front of a document, and no other special token anywhere. Bits per byte, which compare models
with different tokenizers, are the bits of the counted tokens over all bytes of the text.
"""

import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from elo.common.errors import UserError
from elo.common.fields import check_output, write_json
from elo.common.options import Parser, positive_int
from elo.common.terminal import say
from elo.data.documents import SUPPORTED, Document, read_documents
from elo.data.finding import find_files
from elo.model.checkpoint import load_model
from elo.model.config import ModelConfig
from elo.model.decoder import CausalLM
from elo.model.loss import IGNORE
from elo.runs.devices import DTYPES, inference_device
from elo.text.tokenizer import Tokenizer, load_tokenizer

BATCH_TOKENS = 8192
SORTED_TOGETHER = 512  # windows, so that those of a batch are of about one length


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint, whole or a slice")
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="FILE", help=f"files, directories or globs of {SUPPORTED}"
    )
    parser.add_argument("--text-field", default="text", metavar="NAME", help="of JSON and Parquet (%(default)s)")
    parser.add_argument(
        "--seq-len", type=positive_int, default=2048, metavar="N", help="tokens in a window (%(default)s)"
    )


def main(arguments: Namespace) -> None:
    if arguments.seq_len < 2:
        raise UserError(f"--seq-len {arguments.seq_len}: a window needs at least 2 tokens")
    files = find_files(arguments.data)
    check_output("--json", arguments.json, files)
    tokenizer = load_tokenizer(arguments.model, ModelConfig.load(arguments.model).vocab_size)
    model = load_model(arguments.model, inference_device(), DTYPES[arguments.dtype])
    say(f"{'bits/byte':>9} {'loss':>8} {'perplexity':>11} {'tokens':>9} {'documents':>9}  file")
    results = []
    for file in files:
        score = score_file(model, tokenizer, read_documents([file], arguments.text_field), arguments.seq_len)
        if score.tokens == 0:
            raise UserError(f"{file}: no token has a predecessor in its window")
        results.append({"file": str(file), **score.figures()})
        figures = "{bits_per_byte:9.4f} {loss:8.4f} {perplexity:11.5g} {tokens:9,} {documents:9,}  {file}"
        say(figures.format(**results[-1]))
    if arguments.json:
        write_json(Path(arguments.json), {"files": results})


@dataclass
class Score:
    """Sums over the documents of a file; `nats` is their summed cross-entropy."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    nats: float = 0.0

    def figures(self) -> dict[str, float]:
        loss = self.nats / self.tokens
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
        }


@torch.inference_mode()
def score_file(model: CausalLM, tokenizer: Tokenizer, documents: Iterator[Document], seq_len: int) -> Score:
    """The model's score on documents, in windows of `seq_len` tokens, in bounded memory."""
    score = Score()
    device = model.lm_head.weight.device

    def windows() -> Iterator[Tensor]:
        for document in documents:
            score.documents += 1
            score.bytes += len(document.text.encode("utf-8"))
            ids = tokenizer.encode(document.text)
            ids = torch.tensor(ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids])
            # A window of one token predicts nothing.
            yield from (window for window in ids.split(seq_len) if len(window) > 1)

    stream = windows()
    while group := sorted(islice(stream, SORTED_TOGETHER), key=len):
        while group:
            size = max(1, BATCH_TOKENS // len(group[-1]))
            batch, group = group[-size:], group[:-size]
            # Right padding needs no mask under causal attention: no real token looks at it.
            tokens = pad_sequence([window[:-1] for window in batch], batch_first=True)
            labels = pad_sequence([window[1:] for window in batch], batch_first=True, padding_value=IGNORE)
            score.tokens += int((labels != IGNORE).sum())
            score.nats += model(tokens.to(device), labels.to(device)).item()
    return score
