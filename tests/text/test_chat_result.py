"""What travels with a result: other programs read the format that it was tuned in from the folder alone."""

import json
import random
import shutil

import pytest
from chat_checkpoints import checkpoint, random_chat, specials_of
from transformers import PreTrainedTokenizerFast

from elo.text.built_in_formats import FORMATS
from elo.text.chat_format import chat_format
from elo.text.chat_result import write_chat_files
from elo.text.tokenizer import load_tokenizer


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_in_transformers(tmp_path, name):
    """The same ids, and read again it is the same format."""
    directory = checkpoint(tmp_path / "model", specials_of(name), "{{ 'another' }}")
    tokenizer = load_tokenizer(directory)
    format = chat_format(directory, tokenizer, name)
    write_chat_files(format, directory)
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    again = chat_format(directory, load_tokenizer(directory))
    assert (again.name, again.stop_ids, again.end_of_turn) == (name, format.stop_ids, theirs.eos_token)
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == format.ordered_stops()
    rng = random.Random(name)
    contents = ["Hi", " a ", "\n\nb\n", "둘째\n\n\nc", "", "  ", "d  "]
    for messages in (random_chat(rng, contents) for _ in range(12)):
        expected = theirs.apply_chat_template(messages, return_dict=False)
        assert format.conversation(messages) == again.conversation(messages)
        assert format.conversation(messages)[0] == expected, messages
        if messages[-1]["role"] == "user":
            expected = theirs.apply_chat_template(messages, return_dict=False, add_generation_prompt=True)
            assert format.prompt(messages) == expected


def test_a_second_time_nothing_changes(tmp_path):
    directory = checkpoint(
        tmp_path / "a", specials_of("llama3"), generation_config={"eos_token_id": [1, 2], "top_p": 0.9}
    )
    format = chat_format(directory, load_tokenizer(directory), "llama3")
    write_chat_files(format, directory)
    shutil.copytree(directory, tmp_path / "b")
    write_chat_files(chat_format(directory, load_tokenizer(directory)), directory)
    for path in directory.iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    written = json.loads((directory / "generation_config.json").read_text())
    assert written["top_p"] == 0.9
    assert written["eos_token_id"][0] == load_tokenizer(directory).special_tokens["<|eot_id|>"]
    assert {1, 2} < set(written["eos_token_id"])
