"""What a directory is that is no checkpoint, and what makes one of it: the ends of messages."""

import os
import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"  # peft's, of a LoRA adapter
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
WRAPPED = rf"\b({'|'.join(WRAPPERS)})\."
PICKLED = r"((pytorch_)?model|consolidated).*\.(bin|pt|pth|ckpt)"
OTHERS = (".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz")


def instead_of_a_model(directory: Path) -> str:
    """; and what is in the directory instead, if that is known."""
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return ""
    if ADAPTER_CONFIG in names:
        return (
            "; this is a LoRA adapter, no model: train.py --method lora --merge writes the whole model, and of a "
            f"finished adapter `python align.py --model {shlex.quote(str(directory))} --gb 0 --out MERGED` does"
        )
    if pickled := [name for name in names if re.fullmatch(PICKLED, name)]:
        return (
            f"; {pickled[0]} is pickled, and nothing is unpickled here. transformers converts it: "
            f'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained({str(directory)!r}, dtype='auto').save_pretrained({str(directory)!r})\""
        )
    if others := [name for name in names if name.endswith(OTHERS)]:
        return f"; {others[0]} has the weights in another format: download or save them as safetensors"
    if "run.json" in names:
        return "; this is a run that has not finished: the command in its run.json goes on with it"
    if inner := sorted(directory.glob("*/config.json")) or sorted(directory.glob("snapshots/*/config.json")):
        return f"; there is one in {inner[0].parent}"
    return ""


def names_instead(found: Mapping[str, Path], expected: Collection[str]) -> str:
    """; and which tensors are there in place of those that are expected, and how to rename those of wrapped modules.

    found: the file of each tensor.
    """
    strange = [name for name in found if name not in expected]
    if not strange:
        return ""
    if not set(expected) <= {re.sub(WRAPPED, "", name) for name in found}:
        return f"; what is there instead: {', '.join(strange[:3])}{', ...' if len(strange) > 3 else ''}"
    return (
        f"; the names are those of a wrapped module, such as {strange[0]}, as torch.compile, DDP and FSDP make them. "
        'This renames them: python -c "import re; from pathlib import Path; from safetensors.torch import load_file, '
        f"save_file; d = Path({str(found[strange[0]].parent)!r}); p = r'{WRAPPED}'; "
        "[save_file({re.sub(p, '', n): t for n, t in load_file(f).items()}, f, {'format': 'pt'}) "
        "for f in d.glob('*.safetensors')]; "
        "[f.write_text(re.sub(p, '', f.read_text())) for f in d.glob('*.index.json')]\""
    )
