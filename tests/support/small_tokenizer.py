"""Small tokenizers, trained in a moment: a directory with a byte-level BPE; SentencePiece, also as a tokenizer.json."""

import io
import json
from functools import cache

import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer
from transformers.tokenization_utils_base import generate_merges

TEXT = (
    "First of all, a tokenizer needs some text. Second, 둘째로 더 많은 글이 필요하다. And a third sentence, 그리고 끝."
)

TRAINING_TEXT = [
    "The quick brown fox doesn't jump over 1234 lazy dogs; they're   asleep.\n\n\tIndented = {code: 42}\r\n",
    "효율적인 언어 학습은 적은 비용으로 새로운 언어를 배웁니다. 한국어 문장을 2023년에 모았습니다!",
    "日本語の文章もあります。これは東京タワーです。١٢٣ ½ Ⅷ 😀👍🏽 naïve café",
    "<|im_start|>user\n[INST] hello [/INST]</s><|endoftext|> <tool_call>",
] * 3


def write_tokenizer(directory, text=TEXT, vocab_size=400):
    """Write tokenizer.json and tokenizer_config.json; documents end in <|endoftext|> and have no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return directory


def add_chat_tokens(directory):
    """Add <|im_start|> and <|im_end|> to the tokenizer of a directory; returns their ids."""
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    first = 1 + max(tokenizer["model"]["vocab"].values())
    for id, content in enumerate(("<|im_start|>", "<|im_end|>"), start=first):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        tokenizer["added_tokens"].append({"id": id, "content": content, **flags})
    path.write_text(json.dumps(tokenizer))
    return first, first + 1


@cache
def sentencepiece_model(**options):
    """A tokenizer.model in the style of Llama 2 and Mistral."""
    settings = {"vocab_size": 500, "byte_fallback": True, "model_type": "bpe", "character_coverage": 0.98}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING_TEXT), model_writer=model, **settings | options
    )
    return model.getvalue()


@cache
def llama_json(scheme="first", model=None):
    """The tokenizer.json that transformers makes of a tokenizer.model, with where it puts a space in front of texts, or
    "prepend" for the normalizer of transformers 4."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model or sentencepiece_model())
    vocab = {processor.id_to_piece(id): id for id in range(processor.get_piece_size())}
    options = {"legacy": scheme == "always", "add_prefix_space": scheme != "never"}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab), unk_token="<unk>", **options)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if scheme == "prepend":
        content["pre_tokenizer"] = None
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    return content
