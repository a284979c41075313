"""A LoRA adapter's directory as a checkpoint: the base with the adapter's products added to its weights."""

import hashlib
import math
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from elo.common.errors import UserError
from elo.common.fields import Fields, read_json_object, shown
from elo.common.files import is_file
from elo.common.terminal import note
from elo.model.checkpoint import CONFIG, INDEX, SINGLE, Checkpoint
from elo.model.saving import ADAPTER, ADAPTER_CONFIG, ADAPTER_WEIGHTS, save
from elo.text.chat_template import find_template
from elo.text.tokenizer_files import TokenizerFiles
from elo.variants.lora import PREFIX, THIN

# Fields of peft's adapter_config.json that change what is computed: those that must be off, and the values of others.
OFF = """
fan_in_fan_out lora_bias modules_to_save rank_pattern alpha_pattern layer_replication trainable_token_indices
target_parameters use_dora use_qalora use_bdlora alora_invocation_tokens arrow_config kasa_config monteclora_config
velora_config
"""
UNDERSTOOD: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(OFF.split(), (None, False, [], {})),
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    # With any other peft takes what the adapter began with out of the base, whenever it loads the adapter.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal", "mica"),
}


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """A checkpoint for inference; `directory` may also be that of a LoRA adapter, of peft or of this project."""
    adapter, config, *weights = (is_file(Path(directory, name)) for name in (ADAPTER_CONFIG, CONFIG, SINGLE, INDEX))
    # Some trainers put the base's config.json beside an adapter.
    return Adapted(Path(directory)) if adapter and not (config and any(weights)) else Checkpoint(directory)


class Adapted(Checkpoint):
    """Each weight W + scaling * B A, in fp32 and then rounded once to the base's dtype, as `merge` writes it.

    Tokenizer and chat template are the base's. Raises UserError as `Checkpoint` does, and for an adapter that is more
    than thin matrices beside the base's weights.
    """

    def __init__(self, adapter: Path, base: Checkpoint | None = None) -> None:
        """base: in place of the one that the adapter names."""
        path = adapter / ADAPTER_CONFIG
        fields = Fields(read_json_object(path), str(path))
        for name, values in UNDERSTOOD.items():
            if (value := fields.fields.get(name)) not in values:
                raise UserError(f"{path}: {name} = {shown(value)} is not implemented")
        named = base.directory if base else fields.fields.get("base_model_name_or_path")
        if not isinstance(named, str | Path) or not Path(named).is_dir():
            raise UserError(
                f"{path}: base_model_name_or_path is {shown(named)}, which is no directory here; write there where the "
                "adapter's base model is"
            )
        self._pairs: dict[str, list[Tensor]] = {}  # while the base is opened, which compares matrices that it ties
        super().__init__(named)
        rank = fields.integer("r")
        alpha = fields.number("lora_alpha")
        self.scaling = alpha / (math.sqrt(rank) if fields.boolean("use_rslora", default=False) else rank)
        self._pairs = self._read(adapter / ADAPTER_WEIGHTS, rank)
        template = find_template(TokenizerFiles(adapter))
        if template is not None and template != find_template(TokenizerFiles(self.directory)):
            note(f"{adapter}: its own chat template is not read, but that of its base, {self.directory}")
        self._print = hashlib.sha256(path.read_bytes() + (adapter / ADAPTER_WEIGHTS).read_bytes()).hexdigest()[:32]

    def _read(self, path: Path, rank: int) -> dict[str, list[Tensor]]:
        """A and B of each weight that has them, in fp32."""
        if not is_file(path):
            raise UserError(f"{path}: not found; the adapter's weights belong there")
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a complete safetensors file: {error}") from None
        pairs: dict[str, list[Tensor]] = {}
        matrices = [name for name in self.names() if len(self.shape(name)) == 2]  # a tied head is none of its own
        for stored in tensors:
            name = stored.removeprefix(PREFIX)
            layer = name.removesuffix(THIN[0]).removesuffix(THIN[1])
            weight = f"{layer}.weight"
            names = [PREFIX + layer + thin for thin in THIN]
            if stored not in names or weight not in matrices or not all(other in tensors for other in names):
                raise UserError(f"{path}: tensor {stored} is no half of a product beside a matrix of {self.directory}")
            a, b = (tensors[other].float() for other in names)
            out, into = self.shape(weight)
            if a.shape != (rank, into) or b.shape != (out, rank):
                found = f"{tuple(b.shape)} and {tuple(a.shape)}"
                raise UserError(f"{path}: {layer}: {found} do not multiply to its ({out}, {into}) at rank {rank}")
            pairs[weight] = [a, b]
        return pairs

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        weight = super().rows(name, start, stop)
        if name not in self._pairs:
            return weight
        a, b = self._pairs[name]
        return (weight.float() + self.scaling * (b[start:stop] @ a)).to(weight.dtype)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{super().fingerprint()} {self._print}".encode()).hexdigest()[:32]


def merge(out: Path, base: Checkpoint, options: dict[str, Any]) -> None:
    """--merge: the whole model to `out`, where a run has left its adapter, and the adapter to its folder `adapter`.

    For one process. The adapter is where it was until the model is complete. Then it cannot stay: beside a config.json
    transformers would add it to the merged weights. options: of the command, for elo.json.
    """
    adapted = Adapted(out, base)
    notes = {"elo.json": read_json_object(out / "elo.json") | {"options": options}}
    files = ADAPTER_CONFIG, ADAPTER_WEIGHTS

    def copy_adapter(aside: Path) -> None:
        (aside / ADAPTER).mkdir()
        for name in files:
            shutil.copyfile(out / name, aside / ADAPTER / name)

    stay = *files, *notes
    save(out, base.config, adapted.tensor, base.dtype, base.directory, notes, copy_adapter, until_then=stay)
