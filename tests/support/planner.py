"""The planner's command, on the public models' configurations."""

import json

import families
from commands import status_of

from benchmarks import planning_paper
from elo.model.config import ModelConfig
from elo.planning import plan

SEQ_LEN = 32


def write_config(directory, model="Llama-3.1-8B"):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(planning_paper.PUBLIC[model][0]))
    return ["--model", str(directory / "config.json")]


def run(monkeypatch, capsys, *options):
    """(status, stdout, stderr)"""
    return status_of(monkeypatch, plan.main, "planning", *options), *capsys.readouterr()


def family(variant, **changes):
    architecture, config = families.VARIANTS[variant]()
    return ModelConfig.from_json({**config.to_dict(), "architectures": [architecture.__name__], **changes})
