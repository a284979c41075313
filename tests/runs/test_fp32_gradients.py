"""What is trained outside of the blocks, computed in bf16, has gradients as exact as sums in fp32: beside fp64."""

import families
import pytest
import torch
import torch.nn.functional as F

from elo.model.config import ModelConfig
from elo.model.decoder import build
from elo.runs import sharding
from elo.runs.processes import process_group
from elo.runs.sharding import ParallelOptions, parallelize

LLAMA = {**families.SMALL, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "pad_token_id": 3}


@pytest.mark.parametrize("form", ["cpu", "plain"])
@pytest.mark.parametrize("tied", [False, True])
def test_beside_fp64(tied, form, monkeypatch):
    """Of two micro-batches, from the inputs and outputs' gradients that the modules had in bf16."""
    if form == "plain":
        monkeypatch.setattr(sharding, "use_faster_operators", lambda model: None)
    seen = {"embedding": [], "norm": []}  # a micro-batch's (input, gradient of the output); of the norm the output too
    with process_group() as world:
        config = ModelConfig.from_json({**LLAMA, "tie_word_embeddings": tied})
        model = parallelize(build(config), world, ParallelOptions("bf16", compile=False))
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        modules = {"embedding": model.model.embed_tokens, "norm": model.model.norm, "head": model.lm_head}
        for name, found in seen.items():

            def watch(module, inputs, output, found=found):
                output.register_hook(lambda grad: found.append((inputs[0].detach(), grad, output.detach())))

            modules[name].register_forward_hook(watch)
        batches = [torch.randint(0, 20, (4, 32), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
        for tokens in batches:
            model(tokens, tokens).backward()
        gradients = {name: module.weight.grad.full_tensor() for name, module in modules.items()}
        weights = {name: module.weight.full_tensor().detach() for name, module in modules.items()}

    # fully_shard gives the head, and not the norm, its weight in bf16.
    exact = {name: (w.bfloat16() if name == "head" else w).double().requires_grad_() for name, w in weights.items()}
    for tokens, (ids, its_grad, _), (x, grad, hidden) in zip(batches, *seen.values(), strict=True):
        F.embedding(ids, exact["embedding"], config.padding_idx).backward(its_grad.double())
        F.rms_norm(x.double(), (x.shape[-1],), exact["norm"], config.rms_norm_eps).backward(grad.double())
        logits = hidden.double() @ exact["head"].T
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum").backward()
    if tied:
        exact["head"].grad += exact["embedding"].grad
        exact["embedding"].grad = exact["head"].grad
    for name, gradient in gradients.items():
        # The gradient at the logits, a factor of the head's, is rounded to bf16.
        within = 0.002 if name == "head" or tied and name == "embedding" else 1e-6
        assert (gradient - exact[name].grad).norm() < within * exact[name].grad.norm()
        assert (gradient != gradient.bfloat16().float())[gradient != 0].float().mean() > 0.9
