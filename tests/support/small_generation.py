"""Prompts for the small models."""

import families
import torch

VOCABULARY, CONTEXT = families.SMALL["vocab_size"], families.SMALL["max_position_embeddings"]
NO_STOPS = [()] * 20


def random_tokens(*lengths):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
