"""Names, data and answers at the terminal: shown, never obeyed."""

import json
import unicodedata

import pytest
from bench_files import write_jsonl
from commands import status_of
from small_runs import make_project, run_here

from elo.common.errors import EarlyExit, UserError, exit_status
from elo.common.terminal import note, printable, say, show
from eval import __main__ as evaluation

# Colours, a title, a bell, the cursor, C1's own ESC [, DEL, the order of letters, nothing to see, lines.
EVIL = "\x1b[31m\x1b]0;owned\x07\r\b\x9b2J\x7f\u202egnp\u2066\u200b\ufeff\u2028\xad\U000e0041"


def obeyed(text):
    """What of a text is no character to look at."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")} - {"\n", "\t"}


def test_everything_that_is_obeyed_or_invisible_is_escaped():
    assert printable(EVIL).startswith(r"\x1b[31m\x1b]0;owned\x07\r\x08\x9b2J\x7f\u202egnp\u2066\u200b\ufeff\u2028\xad")
    assert not obeyed(printable(EVIL))
    for control in (*map(chr, range(32)), *map(chr, range(0x7F, 0xA0)), *"\u200e\u202a\u2069\u2060\ud800"):
        assert printable(control).isascii()
        assert printable(control).isprintable()
    assert printable("a\nb\tc\r\n", keep="\n\t") == "a\nb\tc\\r\n"
    for text in ("가나다", "全角\u3000空白", "👩\u200d💻 👍🏽", "می\u200cخواهم", "e\u0301", "a\xa0b", "\\x1b"):
        assert printable(text) == text


def test_lines_tables_and_errors(capsys, monkeypatch):
    say(f"a\nb{EVIL}")
    show(f"a\tb\n{EVIL}")
    note(f"a\nb{EVIL}")
    for error in (UserError(EVIL), EarlyExit(EVIL)):
        with pytest.raises(SystemExit):
            exit_status(lambda error=error: (_ for _ in ()).throw(error))
    shown = capsys.readouterr()
    assert not obeyed(shown.out + shown.err)
    assert [len(text.splitlines()) for text in shown] == [4, 2]


def test_scores_of_evil_names(tmp_path, monkeypatch, capsys):
    fields = {"model": f"m{EVIL}\n0.0", "judge": [EVIL, "x"], "category": EVIL, "score": -1, "bench": "mt_bench"}
    records = [{"question_id": n, "turn": 1, **fields, "judge": [f"{EVIL}{n}"]} for n in (1, 2)]
    directory = tmp_path / EVIL
    status_of(monkeypatch, evaluation.main, "eval", "score", str(write_jsonl(directory / "a.jsonl", records)))
    shown = capsys.readouterr()
    assert not obeyed(shown.out + shown.err)
    assert len(shown.out.splitlines()) == 7  # three a model
    assert r"m\x1b[31m" in shown.out
    assert r"m\x1b[31m" in shown.err


def test_conversations_of_evil_languages_in_evil_files(tmp_path, monkeypatch, capfd):
    make_project(tmp_path, documents=2)
    monkeypatch.chdir(tmp_path)
    chats = json.loads((tmp_path / "chats.json").read_text())
    chats = [{**chat, "language": f"l{EVIL}\nerror: no"} for chat in chats]
    evil = f"chats{EVIL}".replace("\u2028", "")
    (tmp_path / f"{evil}.json").write_text(json.dumps([*chats, {"conversations": 1}]))
    options = f"--model base --data {evil}.json --chat-format chatml --seq-len 64 --skip-malformed --max-steps 1"
    monkeypatch.setattr("small_runs.words", lambda command, out: ["sft", *options.split(" "), "--out", out])
    capfd.readouterr()
    assert run_here("sft") == 0
    shown = capfd.readouterr()
    assert not obeyed(shown.out + shown.err)
    assert r"of 20 L\x1b[31M" in shown.out
    assert r"first at chats\x1b[31m" in shown.out
    assert not [line for line in shown.out.splitlines() if line.startswith("error")]
