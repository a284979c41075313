"""How valid files become hostile ones: changes of their bytes, and of the structure of their JSON."""

import copy
import json
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy], Any]

HUGE = 10**30
INTEGERS = [0, 1, -1, 2, 3, 7, 255, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**31), HUGE]
FLOATS = [0.0, -0.0, 0.5, 1.0, 1e-300, 1e300, -1e9, float("nan"), float("inf"), float("-inf")]
TEXTS = [
    "",
    " ",
    "a",
    "\0",
    "\n",
    "\x1b[2J",
    "\u2028",
    "..",
    "../../x",
    "/etc/passwd",
    "a/b",
    "\ud800",
    "😀",
    "한국어",
    "1",
    "-1",
    "NaN",
    "null",
    "x" * 300,
    "<|endoftext|>",
    "%s {} {0} %n",
]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(INTEGERS),
    st.sampled_from(FLOATS),
    st.sampled_from(TEXTS),
    st.integers(-10, 1000),
    st.text(max_size=8),
)


def _deep(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


values = st.one_of(
    scalars,
    scalars,
    st.lists(scalars, max_size=4),
    st.dictionaries(st.sampled_from(["type", "id", "content", "a", ""]) | st.text(max_size=4), scalars, max_size=3),
    st.sampled_from([50, 70, 200]).map(_deep),
    st.just("y" * 100_000),
    st.builds(lambda: [0] * 10_000),
)


def _places(value: Any, path: tuple = (), most: int = 4000) -> list[tuple]:
    """The paths to all values inside of `value`."""
    found, pending = [], [(path, value)]
    while pending and len(found) < most:
        path, value = pending.pop()
        found.append(path)
        if isinstance(value, dict):
            pending += [((*path, key), inner) for key, inner in list(value.items())[:most]]
        elif isinstance(value, list):
            pending += [((*path, number), inner) for number, inner in enumerate(value[:most])]
    return found


@st.composite
def changed_json(draw: Draw, document: Any, most: int = 3) -> Any:
    """`document` with some values replaced, removed, renamed, doubled, or taken from another place in it."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        # By the depth first: the thousands of tokens in a vocabulary would leave nothing to the rest.
        places: dict[tuple, list] = {}
        for path in _places(document):
            places.setdefault(path[:-1], []).append(path)
        siblings = draw(st.sampled_from(sorted(places, key=repr)))
        path = draw(st.sampled_from(places[siblings]))
        if not path:
            if draw(st.integers(0, 20)) == 0:
                document = draw(values)
            continue
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        key = path[-1]
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "swap", "nudge", "double"])):
            case "replace":
                holder[key] = draw(values)
            case "remove":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[draw(st.sampled_from(TEXTS))] = holder.pop(key)
            case "double" if isinstance(holder, list):
                holder.insert(key, holder[key])
            case "nudge" if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
                holder[key] += draw(st.sampled_from([-1, 1, -holder[key], holder[key], 2**31]))
            case _:
                other = draw(st.sampled_from(sorted(places, key=repr)))
                value = document
                for part in other:
                    value = value[part]
                holder[key] = copy.deepcopy(value)
    return document


def dumped(value: Any) -> bytes:
    """As JSON, with lone surrogates as escapes."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")


@st.composite
def changed_bytes(draw: Draw, data: bytes, most: int = 4, head: int = 0) -> bytes:
    """`data` with some bytes changed, removed, inserted, moved, or cut off; half of the changes in the first `head`."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, most))):
        end = min(head, len(changed)) if head and draw(st.booleans()) else len(changed)
        at = draw(st.integers(0, max(0, end - 1)))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 16, 100, 5000]))
        match draw(st.sampled_from(["flip", "flip", "number", "random", "remove", "insert", "cut", "copy", "repeat"])):
            case "flip" if changed:
                changed[at] ^= 1 << draw(st.integers(0, 7))
            case "number":
                form = draw(st.sampled_from(["<I", "<Q", "<H", ">I"]))
                size = struct.calcsize(form)
                number = draw(st.sampled_from([0, 1, -1, 1 << 31, 1 << 40, 1 << 63, len(data)]))
                changed[at : at + size] = struct.pack(form, number % (1 << 8 * size))
            case "random":
                new = draw(st.binary(max_size=16))
                changed[at : at + len(new)] = new
            case "remove":
                del changed[at : at + length]
            case "insert":
                changed[at:at] = draw(
                    st.binary(max_size=8) | st.sampled_from([b"\0", b"\xff\xfe", b"\r\n", b'"', b"{"])
                )
            case "cut":
                del changed[at:]
            case "copy" if changed:
                source = draw(st.integers(0, len(changed) - 1))
                changed[at : at + length] = changed[source : source + length]
            case _:
                changed[at:at] = changed[at : at + length] * draw(st.integers(1, 3))
    return bytes(changed)


def changed_json_file(document: Any) -> st.SearchStrategy[bytes]:
    """A JSON file with another structure, or with other bytes, or both."""
    whole = dumped(document)
    return st.one_of(
        changed_json(document).map(dumped),
        changed_json(document).map(dumped),
        changed_bytes(whole),
        changed_json(document).map(dumped).flatmap(lambda data: changed_bytes(data, most=1)),
        st.sampled_from(
            [b"", b"{", b"null", b"[]", b"\0" * 64, b"\xef\xbb\xbf" + whole, whole.decode().encode("utf-16")]
        ),
        st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"1" * 100_000, b'"' + b"\\ud800" * 10 + b'"']),
    )


@st.composite
def changed_lines(draw, records):
    """JSON lines of which one or two have another structure, or other bytes."""
    lines = [dumped(record) for record in records]
    for _ in range(draw(st.integers(1, 2))):
        number = draw(st.integers(0, len(lines) - 1))
        hostile = [b"", b"{}", b"[" * 50_000, b'{"a":' * 500 + b"1" + b"}" * 500, b"9" * 5000, b"\0", b'"\\ud800"']
        changed = changed_json(records[number]).map(dumped)
        lines[number] = draw(
            st.one_of(changed, changed, changed, changed_bytes(lines[number]), st.sampled_from(hostile))
        )
    return draw(st.sampled_from([b"\n", b"\n", b"\n", b"\r\n", b"\n\n"])).join([*lines, b""])
