"""What tuning in a chat format changes beside the weights: the template, and which tokens end an answer.

Other programs read it from four files: chat_template.jinja, tokenizer_config.json, generation_config.json, config.json.
"""

from pathlib import Path
from typing import Any

from elo.common.fields import read_json_object, write_json
from elo.model.config import ModelConfig
from elo.text.chat_format import ChatFormat
from elo.text.tokenizer_files import token_text


def tuned_config(config: ModelConfig, format: ChatFormat) -> ModelConfig:
    """The configuration of a model that was tuned in a format: what ends its turn is among eos_token_id."""
    stops = format.ordered_stops()
    eos = config.json.get("eos_token_id")
    if stops[0] in (eos if isinstance(eos, list) else [eos]):
        return config
    return ModelConfig.from_json(config.json | {"eos_token_id": stops})


def write_chat_files(format: ChatFormat, directory: Path) -> None:
    """Make the files that came from the base, in the folder of the result, those of a model tuned in a format.

    Those that say so already stay as they are, byte for byte. A template that is not the format's goes.
    """
    stops = format.ordered_stops()
    path = directory / "generation_config.json"
    generation = _read(path)
    eos = generation.get("eos_token_id")
    if set(eos if isinstance(eos, list) else [eos]) != set(stops):
        write_json(path, generation | {"eos_token_id": stops})

    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = directory / name
        if name == "special_tokens_map.json" and not path.exists():
            continue
        before = _read(path)
        after = dict(before)
        if token_text(before.get("eos_token")) != format.end_of_turn:
            after["eos_token"] = format.end_of_turn
        if not format.is_own:
            after.pop("chat_template", None)
        if after != before:
            write_json(path, after)
    if not format.is_own:
        (directory / "chat_template.json").unlink(missing_ok=True)
        (directory / "chat_template.jinja").write_text(format.template.text, encoding="utf-8", newline="")


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}
