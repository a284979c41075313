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
