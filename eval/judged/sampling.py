"""How an answer is sampled: as the options say, or else as transformers' `generate` has it."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from elo.common.errors import UserError
from elo.common.fields import Fields, read_json_object
from elo.common.terminal import note
from eval.judged.benchmarks import Benchmark

# Fields of generation_config.json that change no answer here: what is obeyed or asked for otherwise, how transformers
# computes and what it returns. Others do where they have a value; a value of 1 is none for some.
HARMLESS = """
top_k top_p min_p repetition_penalty temperature do_sample max_length max_new_tokens bos_token_id eos_token_id
pad_token_id decoder_start_token_id transformers_version _from_model_config use_cache cache_implementation
cache_config max_cache_len compile_config disable_compile prefill_chunk_size low_memory output_attentions
output_hidden_states output_scores output_logits return_dict_in_generate renormalize_logits remove_invalid_values
early_stopping is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit assistant_lookbehind target_lookbehind
"""
NEUTRAL_AT_1 = """
typical_p encoder_repetition_penalty length_penalty num_beams num_beam_groups num_return_sequences guidance_scale
"""


def sampling_options(benchmark: Benchmark, arguments: Namespace, model: Path) -> dict[str, Any]:
    """top_k, top_p, min_p and repetition_penalty: as told, or else as transformers' `generate` has them.

    That is in generation_config.json, of which is named on stderr what would change an answer there and does not here,
    or is not known; without it in config.json.
    """
    options = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    path = model / "generation_config.json"
    if benchmark.by_generation_config:
        is_there = path.is_file()
        path = path if is_there else model / "config.json"
        fields = Fields(read_json_object(path), str(path))
        options["top_k"] = fields.integer("top_k", default=50, minimum=0)
        for name in ("top_p", "repetition_penalty"):
            options[name] = fields.number(name, default=1.0)
        if fields.fields.get("min_p"):
            options["min_p"] = fields.number("min_p")
        if options["min_p"] > 1:
            raise UserError(f"{path}: min_p must be a number from 0 to 1, not {options['min_p']}")
        told = {name: value for name, value in fields.fields.items() if name not in HARMLESS.split() and value}
        ignored = [name for name, value in told.items() if value != 1 or name not in NEUTRAL_AT_1.split()]
        if ignored and is_there:
            note(f"{path}: {', '.join(ignored)}: not implemented, and without effect on these answers")
    told = {name: getattr(arguments, name) for name in options}
    return options | {name: value for name, value in told.items() if value is not None}
