"""Small tokenizers in the styles of the families, the texts where their rules meet, and published files."""

import gzip
import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import mistral_common
import pytest
import sentencepiece
import tokenizers
from hypothesis import strategies as st
from small_tokenizer import TRAINING_TEXT, sentencepiece_model
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from elo.text.byte_level_bpe import _NOT_SPECIAL, LLAMA3_PATTERN, QWEN2_PATTERN

SHARED = Path(__file__).parents[2] / "../shared/data"
MISTRAL_V3 = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
LLAMA3 = Path(find_spec("llama_models").submodule_search_locations[0], "llama3")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real tokenizers of ../shared/data are not here")

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# Pieces where the rules of the families meet: digits after spaces, contractions, marks, bytes without a token.
PIECES = [
    *"ab1 2\n\t'\r=한각日é😀٣½Ⅷſ\x00\x04\x1d\x85\xa0\u0301\u1100\u1161\u2028\u3000\ufeff\U00041000\U0010ffff",
    *("  ", "   ", "'s", "'LL", "don't", " the", "\r\n", "\n\n ", "한국어", "</s>", "[/INST]", "<0x0A>", "▁"),
    *SPECIALS,
    *_NOT_SPECIAL,
]
texts = st.one_of(st.lists(st.sampled_from(PIECES), max_size=25).map("".join), st.text(st.characters(codec="utf-8")))


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def digits(individual: bool, use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
    by_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=individual), by_words])


def begin_of_text(id: int, token: str = "<|begin_of_text|>") -> processors.PostProcessor:
    template = processors.TemplateProcessing(f"{token} $A", special_tokens=[(token, id)])
    return processors.Sequence([processors.ByteLevel(trim_offsets=False), template])


TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
STYLES = {
    "qwen2": split(QWEN2_PATTERN),
    "llama3": split(LLAMA3_PATTERN),
    "tekken": split(TEKKEN_PATTERN),
    "smollm2": digits(individual=True),
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digit-runs": digits(individual=False),
    "digits-only": digits(individual=True, use_regex=False),
    "uncut": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    "words-and-gaps": split(r"\p{L}+"),  # what a Split pattern does not match is a piece as well
}


@cache
def trained(style: str) -> str:
    """A tokenizer.json of the style."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = STYLES[style]
    if style == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    # SmolLM2 has no token for a byte that its training data lacked.
    alphabet = [] if style == "smollm2" else pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|begin_of_text|>", "<|end_of_text|>"] if style == "llama3" else SPECIALS
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    if style == "llama3":
        tokenizer.model.ignore_merges = True
        tokenizer.post_processor = begin_of_text(0)
    return tokenizer.to_str()


def without_added_tokens(tokenizer_json: str) -> tokenizers.Tokenizer:
    """The reference: Hugging Face's tokenizer as it would be if it knew no added tokens."""
    content = json.loads(tokenizer_json) | {"added_tokens": [], "post_processor": None}
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def write(directory: Path, **files: object) -> Path:
    """Files in a directory, their dots written as __; what is not text or bytes becomes JSON."""
    directory.mkdir(exist_ok=True, parents=True)
    for name, content in files.items():
        content = content if isinstance(content, str | bytes) else json.dumps(content)
        path = directory / name.replace("__", ".")
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return directory


def train_sentencepiece(directory: Path, **options: object) -> Path:
    return write(directory, tokenizer__model=sentencepiece_model(**options))


def processor_of(directory: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


@cache
def corpus() -> list[str]:
    """Real texts, where they are."""
    documents = []
    for path in sorted((SHARED / "corpus").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            documents += [json.loads(line)["text"] for line in lines]
    return documents


def published(name: str, directory: Path) -> Path:
    for path in (SHARED / "tokenizers" / name).iterdir():
        data = path.read_bytes()
        (directory / path.name.removesuffix(".gz")).write_bytes(gzip.decompress(data) if path.suffix == ".gz" else data)
    return directory
