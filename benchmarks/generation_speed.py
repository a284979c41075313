"""New tokens a second of `elo.generation` beside transformers.generate, greedy, with the same model and prompts.

    python -m benchmarks.generation_speed --model models/SmolLM2-135M-Instruct

Both continue the same prompts by the same number of tokens, whatever stop tokens they meet, and take turns, so that the
machine's moods hit both alike. The prompts' own computation counts too. Whether both wrote the same tokens is shown:
in bf16 they may part where two tokens are almost equally likely.
"""

from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec

import torch

from benchmarks.sides import Side, compared_options, take_turns
from elo.common.errors import UserError, exit_status
from elo.common.fields import write_json
from elo.common.options import Parser, positive_int
from elo.generation.engine import generate
from elo.model.checkpoint import load_model
from elo.model.packed import pack_weights
from elo.runs.devices import DTYPES, inference_device

Generate = Callable[[list[list[int]]], list[list[int]]]


def arguments() -> Namespace:
    parser = Parser(prog="python -m benchmarks.generation_speed", description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, help="(default: both)")
    parser.add_argument("--batch", type=positive_int, nargs="+", default=[1, 8], help="prompts at a time (1 8)")
    parser.add_argument("--prompt-tokens", type=positive_int, default=64, help="of the longest prompt (%(default)s)")
    parser.add_argument("--new-tokens", type=positive_int, default=64, help="(%(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=5, help="of each (%(default)s)")
    return compared_options(parser)


def main() -> None:
    options = arguments()
    if find_spec("transformers") is None:
        raise UserError("pip install transformers")
    rows = []
    print(f"{'dtype':<6} {'batch':>5} {'ours/s':>8} {'transformers/s':>14} {'ratio':>6}  same tokens")
    for dtype in [options.dtype] if options.dtype else DTYPES:
        sides = {"ours": Side(ours_of, options, dtype), "transformers": Side(transformers_of, options, dtype)}
        for batch in options.batch:
            prompts = make_prompts(batch, options.prompt_tokens)
            take_turns(sides, prompts, 1)  # the warm-up
            seconds, written = take_turns(sides, prompts, options.rounds)
            speeds = {name: batch * options.new_tokens / taken for name, taken in seconds.items()}
            rows.append(
                {"dtype": dtype, "batch": batch, **speeds, "ratio": speeds["ours"] / speeds["transformers"]}
                | {"same": sum(a == b for a, b in zip(*written.values(), strict=True))}
            )
            line = "{dtype:<6} {batch:5} {ours:8.1f} {transformers:14.1f} {ratio:6.2f}  {same} of {batch}"
            print(line.format(**rows[-1]), flush=True)
    if options.json:
        write_json(options.json, {"rows": rows})


def make_prompts(batch: int, longest: int) -> list[list[int]]:
    """Random ids, each prompt a token shorter than the one before."""
    generator = torch.Generator().manual_seed(0)
    lengths = [max(1, longest - row) for row in range(batch)]
    return [torch.randint(300, 10_000, (length,), generator=generator).tolist() for length in lengths]


def ours_of(options: Namespace, dtype: str) -> Generate:
    model = pack_weights(load_model(options.model, inference_device(), DTYPES[dtype]))
    return lambda prompts: generate(model, prompts, [()] * len(prompts), options.new_tokens)


def transformers_of(options: Namespace, dtype: str) -> Generate:
    from transformers import AutoModelForCausalLM, GenerationConfig

    device = inference_device()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPES[dtype]).to(device).eval()
    new = options.new_tokens
    greedy = GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    model.generation_config = greedy

    def run(prompts: list[list[int]]) -> list[list[int]]:
        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]  # transformers pads in front
        tokens = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)], device=device)
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding], device=device)
        with torch.inference_mode():
            return model.generate(tokens, attention_mask=mask, generation_config=greedy)[:, width:].tolist()

    return run


if __name__ == "__main__":
    exit_status(main)
