"""What an experiment is given: checked, told apart by content, and in part held out."""

import hashlib
import json
import random
from argparse import Namespace
from contextlib import suppress
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
LANGUAGES = ("target", "source")
SETTINGS = ("model", "instruct", "target", "source", "conversations", "gb", "training", "sft", "held_out")


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
    """Of inputs a hash each, by their paths: runs are told apart by what is in files, not by their names.

    Raises UserError for what is missing, but in a dry run.
    """
    folder, found = options.benchmarks or "", dict[str, str]()
    given = {"model": [options.model], "instruct": [options.instruct], "conversations": options.conversations}
    given |= {"target": options.target, "source": options.source}
    given |= {"benchmarks": [f"{folder}/{name}" for name in options.benches]}
    for name, path in ((name, path) for name, paths in given.items() for path in paths or () if path):
        with suppress(UserError if options.dry_run else ()):
            found[path] = hashed(name, path)
    texts = [found.get(path, path) for path in (*options.target, *(options.source or ()))]
    texts += [field(options, "target"), field(options, "source"), str(options.held_out)]
    found |= {path: str([Path(path).name, *texts]) for path in options.held_out_files}
    return found | {folder: " ".join(found.get(f"{folder}/{name}", "") for name in LIKELIHOOD)}  # of `eval choice`


def hashed(name: str, path: str) -> str:
    """Of files, and in directories of their names; of weights samples are read."""
    if name in LANGUAGES:
        files, names = find_files([path]), ""
    elif Path(path).exists():
        files = [file for file in (Path(path), *sorted(Path(path).rglob("*"))) if file.is_file()]
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        names = str([str(file.relative_to(path)) for file in files])
    else:
        raise UserError(f"--{name} {path}: not found")
    parts = [samples(file) if file.suffix == ".safetensors" else [digest(file)] for file in files]
    return hashlib.sha256(b"".join(chain([names.encode()], *parts))).hexdigest()


def field(options: Namespace, language: str = "text") -> str:
    """Where the text of a language is, and that of what is held out."""
    return option(options.training, f"--{language}-field") or option(options.training, "--text-field") or "text"


def hold_out(options: Namespace) -> None:
    """Write the files for --validation, on which no run trains; the first is for choosing.

    Raises UserError for too few documents.
    """
    number = options.held_out
    for name in (name for name in LANGUAGES if getattr(options, name)):
        files = find_files(getattr(options, name))
        every = islice(read_documents(files, field(options, name), "--skip-malformed" in options.training), AMONG)
        documents = list(dict.fromkeys(text for text in every if len(text.encode()) in SIZES))
        if len(documents) < 3 * number:
            raise UserError(f"--{name}: {len(documents)} documents of {SIZES[0]} to {SIZES[-1]} bytes; "
                            f"of {3 * number} and more --held-out {number} leaves enough")  # fmt: skip
        random.Random(0).shuffle(documents)
        for part, times in PARTS.items():
            chosen = [{field(options): documents.pop()} for _ in range(round(times * number) or 1)]
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in chosen]
            Path(options.out, "texts", f"{name}.{part}.jsonl").write_text("".join(lines))


def settings(options: Namespace) -> dict[str, Any]:
    """What all records of an experiment have in common, inputs by their hashes; a judge and benchmarks may be added."""
    found = {}
    for name in (*SETTINGS, *(["judge_model"] if options.judge_model else [])):
        value = getattr(options, name)
        found[name] = [options.contents.get(word, word) for word in (value if isinstance(value, list) else [value])]
    return found | {name: options.contents[f"{options.benchmarks}/{name}"] for name in options.benches}
