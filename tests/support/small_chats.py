"""Conversations in ShareGPT's form, and a chat format on a small tokenizer."""

import json

import numpy as np
import tokenizers
from small_tokenizer import write_tokenizer

from elo.text.chat_format import chat_format
from elo.text.tokenizer import load_tokenizer


def chatml(directory):
    """ChatML without a default system message, on a tokenizer of 402 tokens."""
    write_tokenizer(directory)
    path = str(directory / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(path)
    return chat_format(directory, load_tokenizer(directory), "chatml")


def chat(*texts, system=None):
    """Messages in turn the user's and the assistant's."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def sharegpt(messages, **fields):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[message["role"]], "value": message["content"]} for message in messages]
    return {"conversations": turns, **fields}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


CHATS = [
    chat("Hi", "Hello!", "And?", "And so."),
    chat("둘째로", "더 많은 글이 필요하다.", system="S"),
    chat("a\n\nb", "c"),
]


def tagengo(path, counts):
    """A file with so many conversations of each language, mixed."""
    records = [
        sharegpt(chat(f"{language} {number}", "답 " + "x " * (number % 9)), language=language)
        for language, count in counts.items()
        for number in range(count)
    ]
    np.random.RandomState(0).shuffle(records)
    return write_lines(path, records)


def texts_of(conversations, format):
    """The text of every conversation, special tokens left out."""
    return [format.tokenizer.decode(all_ids(conversations, index)) for index in range(len(conversations))]


def all_ids(conversations, index):
    row = conversations.table[index]
    return conversations.ids[int(row["offset"]) : int(row["offset"] + row["tokens"])].tolist()
