"""What an experiment is given: checked, told apart by content, and in part held out."""

import hashlib
import json
import random
import zlib
from argparse import Namespace
from contextlib import nullcontext, suppress
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import Any

from elo.common.errors import UserError
from elo.common.files import samples
from elo.data.documents import read_documents
from elo.data.finding import find_files
from elo.held_out_texts import digest
from experiments.rows import BENCHMARKS, LIKELIHOOD
from experiments.runs import option

AMONG = 5000  # documents, from the beginning
SIZES = range(200, 20_001)  # bytes of one that is held out
PARTS = {"validation": 0.5, "heldout": 1.0}  # times --held-out
SETTINGS = ("model", "instruct", "target", "source", "conversations", "gb", "training", "sft", "held_out")
LATER = ("judge_model", *BENCHMARKS)  # may be added to those that have none


def check(options: Namespace) -> None:
    """Before hours of work. Raises UserError for what is wanted only after them."""
    if options.benchmarks and not options.benches:
        benchmarks = BENCHMARKS if options.judge_model else LIKELIHOOD
        raise UserError(f"--benchmarks {options.benchmarks}: none of {', '.join(benchmarks)} is a folder there")
    try:
        (options.out / "texts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {options.out}: {error.strerror}") from None
    import_module("eval.figures.charts")  # or that matplotlib is missing


def contents(options: Namespace) -> dict[str, str]:
    """Of models, conversations and benchmarks a hash each: runs are told apart by what is in them, not by their names.

    Raises UserError for what is missing, but in a dry run.
    """
    folder, chats = options.benchmarks or "", options.conversations or []
    given = {"model": [options.model], "instruct": [options.instruct], "conversations": chats, "benchmarks": [folder]}
    for name, path in ((name, path) for name, paths in given.items() for path in paths):
        if path and not (options.dry_run or Path(path).exists()):
            raise UserError(f"--{name} {path}: not found")
    benches = {name: f"{folder}/{name}" for name in options.benches}
    paths = [options.model, options.instruct, *chats, *benches.values()]
    found = {path: named(path, files_in(path)) for path in paths if path}
    return found | {folder: "".join(found[path] for name, path in benches.items() if name in LIKELIHOOD)}


def files_in(path: str) -> list[Path]:
    """Those of a directory, without hidden ones, or the one file."""
    place = Path(path)
    files = [file for file in (place, *sorted(place.rglob("*"))) if file.is_file()]
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(place).parts)]


def named(path: str, files: list[Path]) -> str:
    """Of a directory the names in it count, too."""
    return f"{hashed(files)} {zlib.crc32(str([str(file.relative_to(path)) for file in files]).encode())}"


def hashed(files: list[Path]) -> str:
    """Of weights samples are read."""
    parts = [samples(file) if file.suffix == ".safetensors" else [digest(file)] for file in files]
    return hashlib.sha256(b"".join(chain(*parts))).hexdigest()


def field(options: Namespace, language: str = "text") -> str:
    """Where the text of a language is, and that of what is held out."""
    return option(options.training, f"--{language}-field") or option(options.training, "--text-field") or "text"


def hold_out(options: Namespace) -> dict[str, str]:
    """Files for --validation, yet to be written, on which no run trains; the first is for choosing.

    Sets `options.held_out`, their names, and adds to `options.contents` hashes of them and of the texts that they are
    from. Raises UserError for too few documents, but in a dry run.
    """
    languages = [name for name in ("target", "source") if getattr(options, name)]
    number, parts = options.held_out, dict[str, str]()
    options.held_out = [f"{options.out}/texts/{name}.{part}.jsonl" for part in PARTS for name in languages]
    options.validation_mb = max(4.0, len(options.held_out) * number * SIZES[-1] / 1e6)  # equal parts, each a whole file
    for name in languages:
        with suppress(UserError) if options.dry_run else nullcontext():
            parts |= hold_out_of(name, number, options)
    options.contents |= {path: hashlib.sha256(lines.encode()).hexdigest() for path, lines in parts.items()}
    return parts


def hold_out_of(name: str, number: int, options: Namespace) -> dict[str, str]:
    files = find_files(getattr(options, name))
    options.contents |= dict.fromkeys(getattr(options, name), hashed(files))
    every = islice(read_documents(files, field(options, name), "--skip-malformed" in options.training), AMONG)
    documents = list(dict.fromkeys(text for text in every if len(text.encode()) in SIZES))
    if len(documents) < 3 * number:
        raise UserError(f"--{name}: {len(documents)} documents of {SIZES[0]} to {SIZES[-1]} bytes; "
                        f"of {3 * number} and more --held-out {number} leaves enough")  # fmt: skip
    random.Random(0).shuffle(documents)
    chosen = {part: [documents.pop() for _ in range(round(times * number) or 1)] for part, times in PARTS.items()}
    return {
        f"{options.out}/texts/{name}.{part}.jsonl": "".join(
            json.dumps({field(options): text}, ensure_ascii=False) + "\n" for text in texts
        )
        for part, texts in chosen.items()
    }


def settings(options: Namespace) -> dict[str, Any]:
    """What all records of an experiment have in common, inputs by their hashes."""
    found = {}
    for name in (*SETTINGS, "judge_model"):
        value = getattr(options, name)
        found[name] = [options.contents.get(word, word) for word in (value if isinstance(value, list) else [value])]
    return found | {name: options.contents[f"{options.benchmarks}/{name}"] for name in options.benches}
