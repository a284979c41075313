"""Log-likelihoods of single questions, against transformers."""

import families
import pytest
import torch
from small_tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM

from elo.model.checkpoint import load_model
from elo.text.tokenizer import load_tokenizer
from eval.likelihood.loglikelihood import Scorer, encode, make_batches


def test_a_context_that_is_too_long_loses_as_little_as_possible(tmp_path):
    """The model sees as many tokens as it has positions; the last one is predicted, and no input."""
    families.VARIANTS["small"] = lambda: families.llama(vocab_size=400, max_position_embeddings=40)
    families.write("small", tmp_path)
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    context, choice = "Second, some text. " * 20, " 끝이다"
    whole = tokenizer.encode(context.rstrip() + choice)
    scored = len(whole) - len(tokenizer.encode(context.rstrip()))
    (batch,) = make_batches(encode(tokenizer, [(context.rstrip(), [choice])], 40), 1000)
    ((_, _, value),) = Scorer(load_model(tmp_path, "cpu", torch.float32)).score(batch)

    seen = torch.tensor([whole[-41:]])
    logits = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(seen[:, :-1]).logits
    expected = logits.log_softmax(-1)[0, -scored:].gather(1, seen[0, -scored:, None]).sum()
    assert value == pytest.approx(expected.item(), abs=1e-4)
