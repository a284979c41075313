"""Packed files: gzip and zstd as all tools write them, damaged, and larger than the memory."""

import gzip
import sys
import tracemalloc

import pytest
import zstandard
from document_files import TEXTS, error_of, json_lines, texts_of, write_all_formats


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_packed_text_files(tmp_path, packing):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packing]
    (tmp_path / f"a.txt{packing}").write_bytes(pack(b"\xef\xbb\xbfone\r\ntwo\n"))
    assert texts_of(tmp_path / f"a.txt{packing}") == ["one\ntwo\n"]


def test_gzip_of_several_members(tmp_path):
    """As of `cat a.gz b.gz`; and cut short in its second one."""
    packed = b"".join(gzip.compress(json_lines([text])) for text in TEXTS)
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    assert texts_of(tmp_path / "a.jsonl.gz") == TEXTS
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:-12])
    assert error_of(tmp_path / "a.jsonl.gz").startswith(": damaged or incomplete: ")


def zstd_long(data, window_log):
    """As `zstd --long` from a pipe, which does not say the size."""
    options = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=options).compressobj()
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize("window_log", [28, 31])
def test_zst_with_a_long_window(tmp_path, window_log):
    packed = zstd_long(json_lines(TEXTS), window_log)
    assert zstandard.get_frame_parameters(packed).window_size == 2**window_log
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert texts_of(tmp_path / "a.jsonl.zst") == TEXTS
    (tmp_path / "a.jsonl.zst").write_bytes(packed[:-5])
    assert error_of(tmp_path / "a.jsonl.zst") == ": damaged or incomplete: the file ends within a frame"


def test_zst_that_cannot_be_unpacked_is_not_called_damaged(tmp_path, monkeypatch):
    header = zstd_long(b"x", 31)
    (tmp_path / "a.json.zst").write_bytes(header[:5] + b"\xb0" + header[6:])  # a window of 4 GiB
    advice = "; pack it again without a dictionary and with `--long=31` at most, which needs 2 GiB"
    too_much = ": zstd decompressor error: Frame requires too much memory for decoding"
    assert error_of(tmp_path / "a.json.zst") == too_much + advice
    dictionary = zstandard.train_dictionary(2**12, [json_lines([f"{number}" * 9]) for number in range(2**12)])
    packed = zstandard.ZstdCompressor(dict_data=dictionary).compress(json_lines(TEXTS))
    (tmp_path / "b.json.zst").write_bytes(packed)
    assert error_of(tmp_path / "b.json.zst") == ": zstd decompressor error: Dictionary mismatch" + advice

    class NoMemory:
        def __init__(self, **_):
            raise MemoryError

    monkeypatch.setattr(zstandard, "ZstdDecompressor", NoMemory)
    assert error_of(tmp_path / "a.json.zst") == ": not enough memory" + advice


def test_zst_of_several_frames(tmp_path):
    """As `zstd` appends and `pzstd` writes, with a skippable frame between."""
    skippable = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    frames = [zstandard.compress(json_lines([text])) for text in TEXTS]
    (tmp_path / "a.jsonl.zst").write_bytes(skippable.join(frames))
    assert texts_of(tmp_path / "a.jsonl.zst") == TEXTS


@pytest.mark.parametrize("name", ["b.jsonl.gz", "c.jsonl.zst", "d.parquet"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9])
def test_a_file_that_was_cut_short(tmp_path, name, kept):
    write_all_formats(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * kept)])
    assert error_of(tmp_path / name).startswith(": damaged or incomplete: ")


@pytest.mark.parametrize("name", ["b.jsonl.gz", "c.jsonl.zst", "d.parquet"])
def test_a_file_that_is_something_else(tmp_path, name):
    (tmp_path / name).write_bytes(json_lines(TEXTS))
    assert error_of(tmp_path / name).startswith(": damaged or incomplete: ")


@pytest.mark.parametrize(("name", "package"), [("c.jsonl.zst", "zstandard"), ("d.parquet", "pyarrow")])
def test_the_package_to_install_is_named(tmp_path, monkeypatch, name, package):
    write_all_formats(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    assert error_of(tmp_path / name).endswith(f"needs `pip install {package}`")


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_line_of_a_gigabyte_stays_out_of_memory(tmp_path, pack):
    """A few kilobytes on disk that unpack to one endless line."""
    name = "a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst"
    (tmp_path / name).write_bytes(pack(bytes(1 << 27)) * 2 + pack(b'\n{"text": "one"}\n'))
    tracemalloc.start()
    texts = texts_of(tmp_path / name, skip_malformed=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["one"]
    assert peak < 120e6
