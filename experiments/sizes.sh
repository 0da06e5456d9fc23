#!/usr/bin/env bash
# How the tilt moves with size: references and proxies of three sizes at 60 tokens per parameter, on natural weights (two
# seeds), and the two references that measure b. Finished runs are skipped, cut-off runs resume.
#
#   experiments/sizes.sh DATA_DIR OUT_DIR
#   for size in 41120 162240 326304; do python -m experiments.theory measure DATA_DIR OUT_DIR/$size RESULTS; done
set -euo pipefail
data=$1 out=$2 code=${CODE:-.} python=${PYTHON:-python}

"$python" -m experiments.theory weights "$data" "$out"
for shape in "41120 2 32 96 1600" "162240 3 64 160 6400" "326304 3 96 224 12800"; do
    read -r size layers width ffn steps <<< "$shape"
    for of in natural-10 natural-20 up-10 down-10; do
        run=$out/$size/$steps-$of reference=${of%-*} seed=${of#*-}
        [ ! -f "$run/proxy/doremi_domain_weights_$steps.pt" ] || continue
        common="--max_steps=$steps --eval_interval=$steps --eval_windows=128 --save_interval=$steps --resume --compile"
        "$python" "$code/train_reference.py" --data_dir="$data" --sampling_weights="$out/weights/$reference.json" \
            --block_size=64 --batch_size=24 --n_layer="$layers" --n_head=2 --n_kv_head=1 --n_embd="$width" \
            --n_ffn="$ffn" --dtype=float32 --seed="$seed" --out_dir="$run/reference" $common
        case $reference in up | down) continue ;; esac
        "$python" "$code/train_doremi.py" --reference="$run/reference" --step_size=1 --seed=$((seed + 1)) \
            --out_dir="$run/proxy" $common
    done
done
