#!/usr/bin/env bash
# Llama-3.1-8B learns Korean on one node: the pipeline of README.md, planned first, and measured on held-out text.
#
#     bash examples/llama31_korean.sh
#
# After an interruption, run it again: it resumes where it stopped. It needs Korean texts in data/target, English ones
# in data/source, a held-out text of each that is not among them (data/heldout.ko.jsonl, data/heldout.en.jsonl), and
# conversations (data/tagengo.parquet). Set anything in capitals from outside: GPUS=4 SAMPLES=31000 bash examples/...
set -euo pipefail
cd "$(dirname "$0")/.."

: "${GPUS:=8}" "${GPU:=H100}" "${MODELS:=models}" "${DATA:=data}" "${RUNS:=runs/llama31-korean}"
: "${GB:=9}" "${ALIGNMENT_GB:=1}" "${SEQ_LEN:=4096}" "${SAMPLES:=}" "${EPOCHS:=10}" "${OPTIONS:=}"
BASE=$MODELS/Llama-3.1-8B
INSTRUCT=$MODELS/Llama-3.1-8B-Instruct
TEXTS="--target $DATA/target --source $DATA/source"
STAGE="--save-every 15m --resume $OPTIONS" # --resume: a finished stage is skipped

run() { # print a command, then run it
    printf '\n$ %s\n' "$*"
    "$@"
}

for model in Llama-3.1-8B Llama-3.1-8B-Instruct; do
    [ -e "$MODELS/$model/config.json" ] || run hf download "meta-llama/$model" --local-dir "$MODELS/$model"
done

best() { # a stage's command with the fastest settings that fit; if none do, the planner's error ends the script
    python -m elo.planning --model "$BASE" --gpu "$GPU" --gpus "$GPUS" --best --stage "$@" | tee /dev/stderr | tail -n 1
}

# Plan all stages before the first begins.
elo=$(best train --layers 1,32 --seq-len "$SEQ_LEN" -- --gb "$GB" $TEXTS --out "$RUNS/elo")
alignment=$(best align --seq-len "$SEQ_LEN" -- --elo "$RUNS/elo" --gb "$ALIGNMENT_GB" $TEXTS --out "$RUNS/aligned")
tuning=$(best sft -- --model "$RUNS/chat" --data "$DATA/tagengo.parquet" --languages ko,en --epochs "$EPOCHS" \
    ${SAMPLES:+--samples "$SAMPLES"} --out "$RUNS/sft")

stage() { # print a planned command, then run it
    eval "run ${1/#torchrun/torchrun --standalone} $STAGE"
}

stage "$elo"
stage "$alignment"

# Has it helped? Bits per byte of the held-out texts, before and after.
for model in "$BASE" "$RUNS/aligned"; do
    json=$RUNS/$(basename "$model").perplexity.json
    [ -e "$json" ] || run python -m eval perplexity --model "$model" --seq-len "$SEQ_LEN" \
        --data "$DATA/heldout.ko.jsonl" "$DATA/heldout.en.jsonl" --json "$json"
done
python - "$RUNS/Llama-3.1-8B.perplexity.json" "$RUNS/aligned.perplexity.json" <<'END'
import json, sys
before, after = ([file["bits_per_byte"] for file in json.load(open(path))["files"]] for path in sys.argv[1:])
for language, old, new in zip(("Korean", "English"), before, after, strict=True):
    print(f"{language}: {old:.3f} bits a byte before, {new:.3f} after")
if after[0] >= before[0]:
    sys.exit("the alignment has not made the model better in Korean: more text, or another --lr, before it is tuned")
END

[ -e "$RUNS/chat/config.json" ] || run python merge_chat_vector.py --model "$RUNS/aligned" --base "$BASE" \
    --instruct "$INSTRUCT" --out "$RUNS/chat"
stage "$tuning"
run python -m elo.generation --model "$RUNS/sft" --prompt "안녕하세요? 자기소개를 해 주세요."
