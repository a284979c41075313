"""The recipe: what the scripts train equals transformers' model under torch's plain AdamW, step by step.

Schedule, clipping, decay, accumulation and masks are written out here once more, by their formulas. The settings let
each of them show: some steps are clipped and some are not, the warmup takes several steps, the floor of the cosine is
not 0, decay moves the matrices by percents, and a batch is several micro-batches of unequally many labels.
"""

import json
import math
from itertools import combinations
from pathlib import Path

import families
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from small_runs import lines, run_here
from small_tokenizer import TEXT, add_chat_tokens, write_tokenizer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

IGNORE = -100
PAGE = " ".join(" ".join(TEXT.split()[first:]) for first in range(5))
COPIES, SEQ_LEN, WINDOWS = 20, 32, 5  # of the page; tokens in a window; windows in a step
GB = COPIES * len(PAGE.encode()) / 1e9
LR, WARMUP, FLOOR, DECAY = 2e-3, 0.25, 0.2, 6.0
RECIPE = f"--lr {LR} --warmup {WARMUP} --min-lr-ratio {FLOOR} --weight-decay {DECAY} --seed 3"
PRETRAINING = (
    f"--target text.jsonl --target-fraction 1 --micro-batch 2 --gb {GB} --batch-tokens {SEQ_LEN * WINDOWS} {RECIPE}"
)
TUNING = f"--batch-conversations 9 --epochs 16 --micro-batch-tokens 120 --seq-len 96 --validation-fraction 0 {RECIPE}"


@pytest.fixture(params=["qwen2", "smollm2"])
def base(request, tmp_path, monkeypatch):
    """A model in fp32, so that nothing is rounded away; with biases, or tied. Many copies of a text need no order."""
    architecture, config = families.VARIANTS[request.param]()
    config.vocab_size, config.pad_token_id = 450, 0  # which ends documents, and is read at the start of the next
    monkeypatch.setitem(families.VARIANTS, "small", lambda: (architecture, config))
    families.write("small", tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    add_chat_tokens(tmp_path / "base")
    (tmp_path / "text.jsonl").write_text((json.dumps({"text": PAGE}) + "\n") * 2 * COPIES)
    chats = [
        [{"from": "human", "value": "What? " * (number % 3 + 1)}, {"from": "gpt", "value": TEXT[: 9 + number**2]}]
        for number in range(9)
    ]
    chats[3] += [{"from": "human", "value": "Again."}, {"from": "gpt", "value": "some text"}]
    (tmp_path / "chats.json").write_text(json.dumps([{"conversations": chat} for chat in chats]))
    monkeypatch.chdir(tmp_path)
    return Path("base")


def tokenizer():
    return Tokenizer.from_file("base/tokenizer.json")


def text_steps():
    """Each step's windows as (tokens, the token after each of them), of the copies that --gb asks for."""
    stream = (tokenizer().encode(PAGE).ids + [tokenizer().token_to_id("<|endoftext|>")]) * COPIES
    windows = [
        (stream[:-1][start : start + SEQ_LEN], stream[1:][start : start + SEQ_LEN])
        for start in range(0, len(stream) - 1, SEQ_LEN)
    ]
    return [windows[start : start + WINDOWS] for start in range(0, len(windows), WINDOWS)]


def chat_steps():
    """All conversations in every step; the answers and the tokens that end them are labels."""
    special, examples = tokenizer().token_to_id, []

    def encode(text):
        return tokenizer().encode(text).ids

    for record in json.loads(Path("chats.json").read_text()):
        ids, trained = [], []
        for turn in record["conversations"]:
            role, answers = ("user", False) if turn["from"] == "human" else ("assistant", True)
            head = [special("<|im_start|>"), *encode(f"{role}\n")]
            said = encode(f"{role}\n{turn['value']}")[len(head) - 1 :] + [special("<|im_end|>")]
            ids += head + said + encode("\n")
            trained += [False] * len(head) + [answers] * len(said) + [False]
        labels = [token if counts else IGNORE for token, counts in zip(ids, trained, strict=True)]
        examples.append((ids[:-1], labels[1:]))
    return [examples] * 16


def learning_rate(step, steps):
    """Linear to the peak over the first quarter, then half a cosine to a fifth of it at the last step; from 0."""
    rising = math.ceil(WARMUP * steps)
    if step < rising:
        return LR * (step + 1) / rising
    angle = math.pi * (step - rising) / (steps - 1 - rising)
    return LR * (FLOOR + (1 - FLOOR) * (1 + math.cos(angle)) / 2)


def train_by_hand(model, steps, clip):
    """What metrics.jsonl should say of each step: (loss, gradient norm, learning rate, labels so far)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, vectors = ([p for p in trained if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), eps=1e-8)
    said, labels_so_far = [], 0
    for step, rows in enumerate(steps):
        count = sum(label != IGNORE for _, labels in rows for label in labels)
        labels_so_far += count
        loss = sum(
            F.cross_entropy(
                model(torch.tensor([ids]), use_cache=False).logits[0], torch.tensor(labels), reduction="sum"
            )
            for ids, labels in rows
        )
        (loss / count).backward()
        norm = math.sqrt(sum(parameter.grad.double().square().sum().item() for parameter in trained))
        for parameter in trained:
            if clip:
                parameter.grad *= min(1.0, clip / norm)
        lr = learning_rate(step, len(steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        said.append((loss.item() / count, norm, lr, labels_so_far))
    return said


def their_model(directory="base"):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


def their_full():
    return their_model()


def their_elo():
    """The first and the last layer between the embedding and the norm, and nothing trained but those two."""
    model = their_model()
    model.requires_grad_(False).model.layers = torch.nn.ModuleList([model.model.layers[0], model.model.layers[3]])
    model.config.num_hidden_layers = 2
    model.model.layers.requires_grad_(True)
    return model


def their_selective():
    """The same layers where they are, nothing detached."""
    model = their_model()
    model.requires_grad_(False)
    for layer in (0, 3):
        model.model.layers[layer].requires_grad_(True)
    return model


def active_ids():
    return sorted({token for rows in text_steps() for ids, labels in rows for token in (*ids[:1], *labels)})


def their_active():
    """The same, with a head of its own that has the rows of tokens in the texts only."""
    model, ids = their_elo(), active_ids()
    head = torch.nn.Linear(model.config.hidden_size, len(ids), bias=False).requires_grad_(False)
    head.weight.data = model.lm_head.weight.data[ids]
    model.lm_head = head
    return model


def active_steps():
    row = {id: row for row, id in enumerate(active_ids())}
    return [[(ids, [row[label] for label in labels]) for ids, labels in rows] for rows in text_steps()]


def their_lora():
    """Adapters begin with random numbers, which the project writes in peft's own format."""
    assert run_here(f"train {PRETRAINING} --method lora --max-steps 0", "initial") == 0
    return PeftModel.from_pretrained(their_model(), "initial", is_trainable=True)


def their_aligned():
    """Layers 1 and 4 are those that stage 1 trained."""
    assert run_here(f"train {PRETRAINING} --max-steps 3", "elo") == 0
    model, trained = their_model(), load_file("elo/model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.0." in name or "layers.3." in name:
                parameter.copy_(trained[name.replace("layers.3.", "layers.1.")])
    return model


CASES = {
    "full": (f"train {PRETRAINING} --method full", their_full, text_steps, 3.5),
    "full, in backward": (f"train {PRETRAINING} --method full --optimizer-in-backward", their_full, text_steps, 0),
    "full, unclipped": (f"train {PRETRAINING} --method full", their_full, text_steps, 0),
    "elo": (f"train {PRETRAINING} --layers 1,4", their_elo, text_steps, 2.5),
    "selective": (f"train {PRETRAINING} --method selective --layers 1,4", their_selective, text_steps, 2.5),
    "active vocabulary": (f"train {PRETRAINING} --active-vocabulary", their_active, active_steps, 2.5),
    "lora": (f"train {PRETRAINING} --method lora", their_lora, text_steps, 1.7),
    "align": (f"align {PRETRAINING} --elo elo", their_aligned, text_steps, 3.0),
    "sft": (f"sft {TUNING}", their_full, chat_steps, 3.5),
}


@pytest.mark.parametrize("case", CASES)
def test_training_equals_transformers_with_plain_adamw(base, case):
    command, reference, batches, clip = CASES[case]
    theirs, steps = reference(), batches()
    before = {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
    expected = train_by_hand(theirs, steps, clip)
    _, norms, *_ = zip(*expected, strict=True)
    assert not clip or min(norms) < clip < max(norms)

    assert run_here(f"{command} --clip {clip}") == 0
    found = [[line[name] for name in ("loss", "grad_norm", "lr", "tokens")] for line in lines(Path("out"))]
    assert len(found) == len(expected)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=3e-6, atol=0)
    trained = load_file(next(Path("out").glob("*model.safetensors")))
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            mine = trained[name.replace(".default", "")]
            change = (parameter - before[name]).norm()
            # A bias of keys moves all scores of a query nearly alike: its gradient is little more than rounding.
            assert (mine - parameter).norm() < (1e-2 if "k_proj.bias" in name else 2e-5) * change, name


def test_the_held_out_loss_is_the_mean_over_all_labels(base):
    """Of two batches of unequally many; which conversations are held out is for the seed to say."""
    options = "--validation-fraction 0.45 --epochs 1 --batch-conversations 3 --keep every"
    assert run_here(f"sft {TUNING} {options}") == 0
    model, counts = their_model("out"), []
    for ids, labels in chat_steps()[0]:
        logits = model(torch.tensor([ids])).logits[0]
        loss = F.cross_entropy(logits, torch.tensor(labels), reduction="sum").item()
        counts.append((loss, sum(label != IGNORE for label in labels)))
    means = [sum(loss for loss, _ in held) / sum(n for _, n in held) for held in combinations(counts, 4)]
    found = lines(Path("out"))[-1]["validation_loss"]
    assert min(abs(mean / found - 1) for mean in means) < 1e-6
    trained = sum(n for _, n in counts) - lines(Path("out"))[-1]["tokens"]
    assert trained in {sum(n for _, n in held) for held in combinations(counts, 4)}
