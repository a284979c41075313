"""`eval choice` on a random model and the sample questions."""

import families
from commands import status_of
from small_tokenizer import write_tokenizer

from eval import __main__ as evaluation
from examples import questions


def make_root(root):
    """A random model and the sample questions."""
    families.VARIANTS["small"] = lambda: families.llama(vocab_size=400, max_position_embeddings=1024)
    families.write("small", root / "model")
    write_tokenizer(root / "model")
    questions.write(root / "data")
    return root


def run(monkeypatch, root, *words):
    """The exit status of `eval choice` with that model."""
    words = ["--model", root / "model", "--dtype", "fp32", "--batch-tokens", 600, *words]
    return status_of(monkeypatch, evaluation.main, "eval", "choice", *words)
