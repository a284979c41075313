"""Stage 3a: add a chat vector to a model: theta + scale * (theta_instruct - theta_base), without training.

    python merge_chat_vector.py --model runs/aligned --base models/Llama-3.1-8B \\
        --instruct models/Llama-3.1-8B-Instruct --scale 1.0 --out runs/chat

Several vectors: give --instruct with its --base again for each, and --scale once for all or once for each.

Without --layers and --skip-embeddings the vector is added to every tensor: embedding, layers, final norm and head. The
result is stored in the model's dtypes. It has the model's config.json with the token ids of the first instruct model,
and that one's tokenizer, chat template and generation_config.json; chat_vector.json tells how it was made.
"""

import math
import platform
import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from elo.chat_vector import ChatVector, Merge, check, moved_tensors, parse_ranges
from elo.common.errors import UserError, exit_status
from elo.common.options import Parser
from elo.common.terminal import note, say
from elo.model.checkpoint import Checkpoint
from elo.model.saving import save
from elo.runs.progress import next_of_untrained
from elo.runs.replacing import check_inputs, in_the_way, read_written, replacing


def main() -> None:
    arguments = parse_arguments()
    pairs = pair_up(arguments)
    check_inputs(arguments)
    written = read_written(arguments.out)
    if written.is_run:
        raise UserError(f"--out {arguments.out}: a training run is there; give another directory")
    others = in_the_way(arguments, written)
    model = Checkpoint(arguments.model)
    vectors = tuple(ChatVector(Checkpoint(instruct), Checkpoint(base), scale) for instruct, base, scale in pairs)
    layers = arguments.layers and parse_ranges(arguments.layers, model.config.num_hidden_layers)
    merge = Merge(model, vectors, moved_tensors(model.names(), layers, arguments.skip_embeddings))
    merge, remarks = check(merge, arguments.shared_vocabulary_rows)
    for remark in remarks:
        note(f"note: {remark}")

    with replacing(written, others), tqdm(total=len(model.names()), unit="tensor", disable=None) as progress:

        def tensor(name: str) -> Tensor:
            merged = merge.tensor(name)
            progress.update()
            return merged

        notes = {"chat_vector.json": describe(merge, layers, arguments)}
        save(arguments.out, merge.config(), tensor, model.dtype, vectors[0].instruct.directory, notes)
    say(f"{len(merge.moved)} tensors of {len(model.names())} were moved; the model is in {arguments.out}.")
    say(next_of_untrained(arguments.out, merge.config().vocab_size, may_chat=True))


def parse_arguments() -> Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint to add the vector to")
    parser.add_argument("--instruct", type=Path, required=True, action="append", metavar="DIR", help="tuned checkpoint")
    parser.add_argument("--base", type=Path, required=True, action="append", metavar="DIR", help="before that tuning")
    parser.add_argument("--scale", type=float, action="append", metavar="X", help="factor of the vector (default: 1)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the result goes")
    parser.add_argument("--layers", metavar="LIST", help=(
        "move these only, like 1-8,30 (from 1; -1 is the last), and no embedding, final norm and head"))  # fmt: skip
    parser.add_argument("--skip-embeddings", action="store_true", help="leave embedding and head as in the model")
    parser.add_argument("--shared-vocabulary-rows", action="store_true", help=(
        "where vocabularies differ in size, add the vector to the rows that all have"))  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a model in --out")
    return parser.parse_args()


def pair_up(arguments: Namespace) -> list[tuple[Path, Path, float]]:
    """Each --instruct with its --base and its --scale, in the order of the command line."""
    instructs, bases, scales = arguments.instruct, arguments.base, arguments.scale or [1.0]
    if len(bases) != len(instructs):
        raise UserError(f"--instruct is given {len(instructs)} and --base {len(bases)} times; each needs the other")
    if len(scales) not in (1, len(instructs)):
        raise UserError(
            f"--scale is given {len(scales)} times for {len(instructs)} vectors; give one for all, or one for each"
        )
    for scale in scales:
        if not math.isfinite(scale):
            raise UserError(f"--scale {scale}: not a finite number")
    return list(zip(instructs, bases, scales * len(instructs), strict=False))


def describe(merge: Merge, layers: tuple[int, ...] | None, arguments: Namespace) -> dict[str, object]:
    """The content of chat_vector.json."""

    def resolved(checkpoint: Checkpoint) -> str:
        return str(checkpoint.directory.resolve())

    return {
        "model": resolved(merge.model),
        "vectors": [
            {"instruct": resolved(vector.instruct), "base": resolved(vector.base), "scale": vector.scale}
            for vector in merge.vectors
        ],
        "layers": layers,
        "skip_embeddings": arguments.skip_embeddings,
        "shared_vocabulary_rows": arguments.shared_vocabulary_rows,
        "tensors_moved": len(merge.moved),
        "command": sys.argv,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


if __name__ == "__main__":
    exit_status(main)
