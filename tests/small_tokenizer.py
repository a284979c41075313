"""A byte-level BPE tokenizer directory, trained in a moment."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXT = (
    "First of all, a tokenizer needs some text. Second, 둘째로 더 많은 글이 필요하다. And a third sentence, 그리고 끝."
)


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
