"""Hostile checkpoint directories: config.json, safetensors headers and data, index files, links, notes."""

import json
import os
import struct

from artifacts import CONFIGS, LLAMA, tensors, write_chat_tokenizer, write_checkpoint, write_shards
from harness import case_directory, cases, result_or_user_error
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import INTEGERS, changed_bytes, changed_json, changed_json_file, dumped, values
from safetensors.torch import save

from elo.common.errors import UserError
from elo.model.checkpoint import Checkpoint
from elo.model.config import ModelConfig
from elo.model.decoder import build
from elo.slicing import detach, open_slice
from elo.text.tokenizer import load_tokenizer

WHOLE = save(tensors(), {"format": "pt"})
HEADER_SIZE = 8 + int.from_bytes(WHOLE[:8], "little")
HEADER = json.loads(WHOLE[8:HEADER_SIZE])
DATA = WHOLE[HEADER_SIZE:]


def read_everything(directory):
    """All that any stage reads of a checkpoint's weights."""
    checkpoint = Checkpoint(directory)
    for name in checkpoint.names():
        checkpoint.dtype(name)
        assert tuple(checkpoint.tensor(name).shape) == checkpoint.shape(name)
    return checkpoint


# ---- config.json

FIELD_VALUES = st.one_of(values, st.sampled_from(INTEGERS), st.sampled_from([2**10, 2**14, 2**20, 2**30]))


@st.composite
def configs(draw):
    config = CONFIGS[draw(st.sampled_from(sorted(CONFIGS)))]
    if draw(st.booleans()):
        return draw(changed_json(config))
    changed = dict(config)
    for name in draw(st.lists(st.sampled_from([*config, "head_dim", "hidden_activation"]), min_size=1, max_size=5)):
        changed[name] = draw(FIELD_VALUES)
    return changed


@cases(60, share=1.5)
@given(configs())
@example(LLAMA | {"num_hidden_layers": 2**14})
@example(LLAMA | {"num_attention_heads": 2**16, "num_key_value_heads": 2**16, "hidden_size": 2**30, "head_dim": 2**30})
def test_config_json(fields):
    def use():
        if not isinstance(fields, dict):
            raise UserError("not an object")
        config = ModelConfig.from_json(fields)
        if config.num_hidden_layers <= 64:
            build(config)
            detach(config, (1, config.num_hidden_layers) if config.num_hidden_layers > 1 else (1,))
        return config

    result_or_user_error(use)


@cases(30)
@given(changed_json_file(LLAMA))
def test_config_file(data):
    with case_directory() as directory:
        write_checkpoint(directory)
        (directory / "config.json").write_bytes(data)
        result_or_user_error(lambda: read_everything(directory))


# ---- safetensors


@st.composite
def safetensors_files(draw):
    """A file with another header, and a length that may not be the header's."""
    header = draw(changed_json(HEADER))
    if isinstance(header, dict) and draw(st.booleans()):
        name = draw(st.sampled_from(sorted(HEADER)[1:]))
        dtypes = ["F32", "F16", "BF16", "F64", "I8", "F8_E4M3", "BOOL", "f32", "", "X9"]
        entry = {
            "dtype": st.sampled_from(dtypes),
            "shape": st.lists(st.sampled_from(INTEGERS), max_size=4),
            "data_offsets": st.lists(st.sampled_from([0, 1, 64, 4096, len(DATA), *INTEGERS]), max_size=3),
        }
        header[name] = {**HEADER[name], **draw(st.fixed_dictionaries({}, optional=entry))}
    encoded = dumped(header)
    if draw(st.integers(0, 5)) == 0:  # a name twice, which no dict can hold
        encoded = encoded[:-1] + b"," + encoded[1:-1] + b"}"
    length = len(encoded)
    if draw(st.integers(0, 3)) == 0:
        length = draw(st.sampled_from([0, 1, 8, length - 1, length + 1, 10**8, 2**31, 2**32, 2**63, 2**64 - 1]))
    data = DATA[: len(DATA) - draw(st.sampled_from([0, 0, 0, 1, 4, len(DATA)]))]
    return struct.pack("<Q", length) + encoded + data + draw(st.sampled_from([b"", b"", b"\0", b"x" * 100]))


@cases(60, share=1.5)
@given(st.one_of(safetensors_files(), changed_bytes(WHOLE, head=HEADER_SIZE)))
def test_safetensors(data):
    with case_directory() as directory:
        write_checkpoint(directory)
        (directory / "model.safetensors").write_bytes(data)
        result_or_user_error(lambda: read_everything(directory))


@st.composite
def indices(draw, index):
    index = draw(changed_json(index, most=2))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if isinstance(weight_map, dict) and draw(st.booleans()):
        files = [
            "../x.safetensors",
            "/etc/passwd",
            "..",
            ".",
            "",
            "a/b",
            "a\0b",
            "y" * 300,
            "\ud800",
            "config.json",
            "x.bin",
        ]
        files += [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "MODEL.safetensors",
            "out",
            "loop",
        ]
        for name in draw(st.lists(st.sampled_from(sorted(weight_map) or ["x"]), min_size=1, max_size=3)):
            weight_map[name] = draw(st.sampled_from(files) | values)
    return index


@cases(50)
@given(st.data())
def test_index(data):
    with case_directory() as directory:
        index = write_shards(directory)
        (directory / "out").symlink_to("/etc/hostname")
        (directory / "loop").symlink_to("loop")
        content = data.draw(st.one_of(indices(index).map(dumped), changed_json_file(index)))
        (directory / "model.safetensors.index.json").write_bytes(content)
        result_or_user_error(lambda: read_everything(directory))


# ---- what a file may be instead of a file


def replace(path, kind):
    """Put something else in a file's place."""
    path.parent.mkdir(exist_ok=True)
    content = path.read_bytes() if path.is_file() else b""
    path.unlink(missing_ok=True)
    match kind:
        case "nothing":
            pass
        case "empty":
            path.touch()
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path.name)
        case "broken":
            path.symlink_to("absent")
        case "zero":
            path.symlink_to("/dev/zero")
        case "stdin":
            path.symlink_to("/dev/stdin")
        case "fifo link":
            os.mkfifo(path.with_name("pipe"))
            path.symlink_to("pipe")
        case "other text":
            path.symlink_to("/etc/passwd")
        case "hub":  # as in the Hugging Face cache: snapshots/<revision>/file -> ../../blobs/<hash>
            blobs = path.parent / "blobs"
            blobs.mkdir(exist_ok=True)
            (blobs / path.name).write_bytes(content)
            path.symlink_to(f"blobs/{path.name}")
        case "sparse":
            with open(path, "wb") as file:
                file.truncate(3 * 2**30)


KINDS = [
    "nothing",
    "empty",
    "directory",
    "fifo",
    "loop",
    "broken",
    "zero",
    "stdin",
    "fifo link",
    "other text",
    "hub",
    "sparse",
]
NAMES = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "original/tokenizer.model",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "elo.json",
]


@cases(60)
@given(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(KINDS)), min_size=1, max_size=3), st.booleans())
@example([("tokenizer.json", "fifo")], False)
@example([("tokenizer_config.json", "zero")], False)
def test_what_is_no_file(replacements, sharded):
    from elo.text.chat_format import chat_format

    with case_directory() as root:
        directory = root / "model"
        (write_shards if sharded else write_checkpoint)(directory)
        write_chat_tokenizer(directory)
        (directory / "elo.json").write_text('{"layers": [1, 3]}')
        base = write_checkpoint(root / "base")
        for name, kind in dict(replacements).items():
            (directory / "pipe").unlink(missing_ok=True)
            replace(directory / name, kind)
        result_or_user_error(lambda: read_everything(directory))
        result_or_user_error(lambda: chat_format(directory, load_tokenizer(directory)))
        result_or_user_error(lambda: open_slice(directory, Checkpoint(base)))
