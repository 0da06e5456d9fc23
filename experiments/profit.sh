#!/usr/bin/env bash
# What DoReMi gains: large models on its answers and on the controls, with equal tokens and equal everything else.
# The answers are those of theory.sh's proxies. Finished runs are skipped, cut-off runs resume. profit.py reads the runs.
# LARGE_FLAGS="..." adds flags of yours to train_large.py.
#
#   experiments/profit.sh DATA_DIR THEORY_DIR OUT_DIR [MIXTURES [SEEDS [PROXY_STEPS]]]
set -euo pipefail
data=$1 theory=$2 out=$3
mixtures=${4:-"natural uniform temperature-0.3 temperature-0.5 temperature-0.7 uniform+natural doremi doremi-uniform doremi-reversed
doremi-reversed-tilt doremi-shuffled-tilt doremi-last-half doremi-1600"} seeds=${5:-"10 20 30 40 50"} proxy_steps=${6:-6400}
code=${CODE:-.} python=${PYTHON:-python}

for seed in $seeds; do
    for mixture in $mixtures; do
        run=$out/$mixture-$seed
        [ ! -f "$run/done" ] || continue
        "$python" -m experiments.profit weights "$mixture" "$data" "$theory/$proxy_steps" "$seed" "$run.json"
        "$python" "$code/train_large.py" --data_dir="$data" --sampling_weights="$run.json" --out_dir="$run" --resume \
            --block_size=64 --batch_size=32 --n_layer=3 --n_head=2 --n_kv_head=1 --n_embd=64 --n_ffn=160 \
            --learning_rate=3e-3 --max_steps=1600 --eval_interval=100 --eval_windows=128 --save_interval=1600 \
            --dtype=float32 --compile --seed="$seed" ${LARGE_FLAGS:-}
        touch "$run/done"
    done
done
