#!/usr/bin/env bash
# Iterated DoReMi: the next round's reference is trained on the last round's answer. Finished rounds are skipped.
# Each round's move is printed: total variation, and the largest of a weight; the paper stops where that is below 0.001.
#
#   experiments/rounds.sh DATA_DIR OUT_DIR [START [STEP_SIZE [ROUNDS [STEPS]]]]
set -euo pipefail
data=$1 out=$2 weights=${3:-uniform} step_size=${4:-1} rounds=${5:-4} steps=${6:-400}
code=${CODE:-.} python=${PYTHON:-python}

for ((round = 1; round <= rounds; round++)); do
    run=$out/$round
    if [ ! -f "$run/proxy/weights.json" ]; then
        common="--max_steps=$steps --eval_interval=$steps --save_interval=$steps --resume"
        "$python" "$code/train_reference.py" --data_dir="$data" --sampling_weights="$weights" \
            --block_size=64 --batch_size=24 --n_layer=2 --n_head=2 --n_kv_head=1 --n_embd=32 --n_ffn=96 \
            --dtype=float32 --seed=10 --out_dir="$run/reference" $common
        "$python" "$code/train_doremi.py" --reference="$run/reference" --step_size="$step_size" \
            --out_dir="$run/proxy" $common
        "$python" "$code/average_weights.py" "$run/proxy"
    fi
    weights=$run/proxy/weights.json
    "$python" -c '
import json, sys
answer = json.load(open(sys.argv[2] + "/proxy/weights.json"))["domain_weights"]
before = json.load(open(sys.argv[2] + "/reference/config.json"))["sampling_weights"]
moves = [abs(answer[name] - before[name]) for name in answer]
print("round", sys.argv[1], "move", round(sum(moves) / 2, 3), "largest", round(max(moves), 4))' $round "$run"
done
