"""Loss, perplexity and bits per UTF-8 byte of a model on text files.

Documents are taken one by one and cut into windows; every token that has a predecessor in its window counts. The
family's BOS stands in front of a document, and no other special token anywhere. Bits per byte, which compare models
with different tokenizers, are the bits of the counted tokens over all bytes of the text. So are those of --validation
while a model is trained (`elo.validation`).
"""

import math
from argparse import Namespace
from pathlib import Path

from elo.common.errors import UserError
from elo.common.fields import check_output, write_json
from elo.common.options import Parser, positive_int
from elo.common.terminal import say
from elo.data.documents import SUPPORTED, read_documents
from elo.data.finding import find_files
from elo.model.checkpoint import load_model
from elo.runs.devices import DTYPES, inference_device
from elo.text.tokenizer import load_tokenizer
from elo.validation import check_seq_len, score_file
from elo.variants.adapted import open_checkpoint

WINDOW = 2048


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint, whole or a slice")
    parser.add_argument(
        "--data", required=True, nargs="+", metavar="FILE", help=f"files, directories or globs of {SUPPORTED}"
    )
    parser.add_argument("--text-field", default="text", metavar="NAME", help="of JSON and Parquet (%(default)s)")
    parser.add_argument("--seq-len", type=positive_int, metavar="N", help=(
        f"tokens in a window (default: {WINDOW}, or the model's positions)"))  # fmt: skip


def main(arguments: Namespace) -> None:
    files = find_files(arguments.data)
    check_output("--json", arguments.json, files)
    checkpoint = open_checkpoint(arguments.model)
    seq_len = arguments.seq_len or min(WINDOW, checkpoint.config.context)
    check_seq_len(seq_len)
    checkpoint.config.check_seq_len(seq_len)
    tokenizer = load_tokenizer(checkpoint.directory, checkpoint.config.vocab_size)
    model = load_model(checkpoint, inference_device(), DTYPES[arguments.dtype])
    say(f"{'bits/byte':>9} {'loss':>8} {'perplexity':>11} {'tokens':>9} {'documents':>9}  file")
    results = []
    for file in files:
        score = score_file(model, tokenizer, read_documents([file], arguments.text_field), seq_len)
        if score.tokens == 0:
            raise UserError(f"{file}: no token has a predecessor in its window")
        if not math.isfinite(score.nats):
            raise UserError(f"{file}: the model's logits are not finite numbers")
        results.append({"file": str(file), **score.figures()})
        figures = "{bits_per_byte:9.4f} {loss:8.4f} {perplexity:11.5g} {tokens:9,} {documents:9,}  {file}"
        say(figures.format(**results[-1]))
    if arguments.json:
        write_json(Path(arguments.json), {"files": results})
