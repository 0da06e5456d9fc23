#!/usr/bin/env bash
# What DoReMi converges to: references and proxies over lengths, reference weights and seeds, with the paper's settings
# (step size 1, alpha moves from step 1). Finished runs are skipped, cut-off runs resume. theory.py reads the runs.
# PROXY_FLAGS="..." adds the flags of a rule of yours to train_doremi.py.
#
#   experiments/theory.sh DATA_DIR OUT_DIR [LENGTHS [REFERENCES [SEEDS]]]
#
# "up" and "down" are references alone: they measure how a domain's loss follows its own share.
set -euo pipefail
data=$1 out=$2 lengths=${3:-"200 400 1600 6400"} references=${4:-"natural uniform reversed up down"} seeds=${5:-"10 20 30 40 50"}
code=${CODE:-.} python=${PYTHON:-python}

"$python" -m experiments.theory weights "$data" "$out"  # OUT_DIR/weights/{natural,uniform,reversed,up,down,sharp,mild,half}.json
for steps in $lengths; do
    compile=--compile
    [ "$steps" -gt 1000 ] || compile=--no-compile
    for seed in $seeds; do
        for reference in $references; do
            run=$out/$steps-$reference-$seed
            [ ! -f "$run/proxy/doremi_domain_weights_$steps.pt" ] || continue
            common="--max_steps=$steps --eval_interval=$steps --eval_windows=128 --save_interval=$steps --resume $compile"
            "$python" "$code/train_reference.py" --data_dir="$data" --sampling_weights="$out/weights/$reference.json" \
                --block_size=64 --batch_size=24 --n_layer=2 --n_head=2 --n_kv_head=1 --n_embd=32 --n_ffn=96 \
                --dtype=float32 --seed="$seed" --out_dir="$run/reference" $common
            case $reference in up | down) continue ;; esac
            "$python" "$code/train_doremi.py" --reference="$run/reference" --step_size=1 --seed=$((seed + 1)) \
                --out_dir="$run/proxy" $common ${PROXY_FLAGS:-}
            "$python" "$code/average_weights.py" "$run/proxy"
        done
    done
done
