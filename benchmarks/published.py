"""What the paper (arXiv 2601.03648) measured on 8 H100, and what decides on costs in published config.json files."""

LLAMA = {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 8, "vocab_size": 128256}
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
LLAMA_SIZES = {  # 3.2 and 3.1, of which the two smallest have tied embeddings
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"tie_word_embeddings": True},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    | {"tie_word_embeddings": True},
    "8B": LLAMA_8B,
    "70B": LLAMA_70B,
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}

# Table 1: what was run, by which method here, 10^9 tokens, hours. FFT is of 10 GB, ELO of 9 and then 1 of alignment.
TABLE_1 = {
    "Llama-3.1-8B": (
        ("FFT, 10 GB", "full", 2.8, 19.8),
        ("ELO, 9 GB", "elo", 2.5, 1.5),
        ("alignment", "full", 0.3, 2.0),
    ),
    "Mistral-7B-v0.3": (
        ("FFT, 10 GB", "full", 4.7, 31.0),
        ("ELO, 9 GB", "elo", 4.2, 1.7),
        ("alignment", "full", 0.6, 3.1),
    ),
    "Qwen2-7B": (
        ("FFT, 10 GB", "full", 3.1, 20.5),
        ("ELO, 9 GB", "elo", 2.8, 1.8),
        ("alignment", "full", 0.3, 2.1),
    ),
}
FIGURE_3 = {"lora": {50: 5.29, 200: 10.72}, "full": {50: 6.04, 200: 12.23}}  # ELO is so many times faster, by GB
# What a row of `python -m experiments` is in the paper: table 3 and figure 2 have LogicKor's scores.
TABLES = {
    "table1": {
        model: {"FFT": {"hours": full[-1]}, "ELO + alignment": {"hours": stage_1[-1] + stage_2[-1]}}
        for model, (full, stage_1, stage_2) in TABLE_1.items()
    },
    "table3": {"Llama-3.1-8B": {"layers 1,32": {"logickor": 7.76}, "layers 8,24": {"logickor": 5.0}}},
    "figure2": {
        "Llama-3.1-8B": {
            f"ELO + {units}": {"logickor": score} for units, score in (("0", 4.5), ("1", 7.76), ("1.5", 7.78))
        }
    },
}
