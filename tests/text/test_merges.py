"""Which lists of merges say the same as tiktoken's ranks: those are exact, all others are refused."""

import itertools
import json
import random
from pathlib import Path

import pytest
import tokenizers
from small_tokenizer import TRAINING_TEXT
from tokenizer_styles import trained, without_added_tokens, write
from tokenizers import models

from elo.common.errors import UserError
from elo.text.byte_level_bpe import BYTE_ALPHABET, ByteLevelBPE
from elo.text.merges import mergeable_ranks
from elo.text.tokenizer import load_tokenizer


def test_a_tokenizer_json_converted_from_tiktoken(llama3_directory, tmp_path):
    """As Llama 3's: every pair that makes a token is listed, also from parts that come after it."""
    _, ranks = llama3_directory
    last = len(ranks)
    ranks = ranks | {b"ZQX": last, b"ZQ": last + 1}
    character = {byte: character for character, byte in BYTE_ALPHABET.items()}
    token_of = {spelled: "".join(character[byte] for byte in spelled) for spelled in ranks}
    cuts = [(t[:i], t[i:], t) for t in ranks for i in range(1, len(t)) if t[:i] in ranks and t[i:] in ranks]
    cuts.sort(key=lambda cut: (ranks[cut[2]], ranks[cut[0]], ranks[cut[1]]))
    content = json.loads(trained("llama3")) | {"post_processor": None}
    content["model"]["vocab"] = {token_of[spelled]: rank for spelled, rank in ranks.items()}
    content["model"]["merges"] = [f"{token_of[left]} {token_of[right]}" for left, right, _ in cuts]
    content["added_tokens"] = [
        {"id": last + 2 + i, "content": token, "special": True}
        for i, token in enumerate(["<|begin_of_text|>", "<|end_of_text|>"])
    ]
    ours = load_tokenizer(write(tmp_path, tokenizer__json=content))
    reference = without_added_tokens(json.dumps(content))
    for text in [*TRAINING_TEXT, " olmayan", "x olmayan", "ZQX", "ZQXa", "aZQX", "ZQZQXQX"]:
        assert ours.encode(text) == reference.encode(text).ids


def merged(ranks, texts):
    """The ids of texts that are not cut into pieces."""
    bpe = ByteLevelBPE(ranks, r"[\s\S]+", Path("tokenizer.json"))
    return [bpe.encode_part(text).tolist() for text in texts]


def test_accepted_merges_are_exact_and_nothing_else_is_accepted():
    """Random vocabularies over two letters, on every text of up to eight letters."""
    rnd = random.Random(0)
    short_texts = ["".join(letters) for n in range(1, 9) for letters in itertools.product("ab", repeat=n)]
    accepted = 0
    for _ in range(300):
        vocab, merges = {"a": 0, "b": 1}, []
        for _ in range(rnd.randint(1, 9)):
            left, right = rnd.choice(list(vocab)), rnd.choice(list(vocab))
            if len(left + right) < 7:
                vocab.setdefault(left + right, len(vocab))
                merges.append((left, right))
        vocab.setdefault("".join(rnd.choices("ab", k=4)), len(vocab))
        merges = sorted(dict.fromkeys(merges), key=lambda merge: vocab["".join(merge)])
        ignore_merges = rnd.random() < 0.5
        reference = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
        wanted = [reference.encode(text).ids for text in short_texts]
        try:
            ranks = mergeable_ranks(vocab, merges, Path("tokenizer.json"), ignore_merges)
        except UserError:
            ranks = {token.encode(): id for token, id in vocab.items()}
            assert merged(ranks, short_texts) != wanted, "refused, although tiktoken gives the same ids"
        else:
            accepted += 1
            assert merged(ranks, short_texts) == wanted
    assert 100 < accepted < 300


def test_a_merge_by_one_rule_only(tmp_path):
    """`ignore_merges` lets [PAD] be a whole piece; tiktoken would also merge `[` and `PAD]` in other pieces."""
    content = json.loads(trained("llama3"))
    vocab, size = content["model"]["vocab"], len(content["model"]["vocab"])
    vocab |= {"PA": size, "D]": size + 1, "PAD]": size + 2, "[PAD]": size + 3}
    content["model"]["merges"] += [["P", "A"], ["D", "]"], ["PA", "D]"]]
    with pytest.raises(UserError, match=r"\[PAD\].*not a listed pair"):
        load_tokenizer(write(tmp_path, tokenizer__json=content))
