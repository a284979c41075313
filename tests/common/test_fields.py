"""Where a result may be written."""

import json
import os

import pytest

from elo.common.errors import UserError
from elo.common.fields import check_output


def test_a_result_may_replace_a_result_but_no_input(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name, content in (("config.json", {"model_type": "llama"}), ("mmlu.json", {"results": {}}), ("notes", [])):
        (model / name).write_text(json.dumps(content))
    (model / "loss.png").write_bytes(b"")
    for name in ("mmlu.json", "new.json", "loss.png"):
        check_output("--json", model / name, [model])
    for name in ("config.json", "notes"):
        with pytest.raises(UserError, match=f"--json .*{name}: this is an input, of .*model; give another file"):
            check_output("--json", model / name, [model])
    os.link(model / "mmlu.json", tmp_path / "same.json")
    (tmp_path / "link.json").symlink_to("planned.json")
    for name, source in (("same.json", model / "mmlu.json"), ("link.json", tmp_path / "planned.json")):
        with pytest.raises(UserError, match="this is an input; give another file"):
            check_output("--json", tmp_path / name, [source])
    for name in ("/dev/stdout", "/dev/null", None):
        check_output("--json", name, [model])
    (tmp_path / "loop").symlink_to("loop")
    problems = {".": "directory", "": "directory", f"{tmp_path}/a/": "directory"}
    for name, problem in (problems | {tmp_path / "loop": "symbolic links"}).items():
        with pytest.raises(UserError, match=problem):
            check_output("--json", name)
