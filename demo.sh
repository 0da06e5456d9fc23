#!/usr/bin/env bash
# DoReMi from text to profit, on a laptop: nothing to download but the Python packages, eight minutes on two
# cores. Every command can be pasted alone. What is done is not done again: to start over, rm -r data/demo checkpoints.
set -euo pipefail
cd "$(dirname "$0")"
trap 'exit 130' INT  # Ctrl-C: the stage that is running saves and ends well, so that without this the next would start

# An environment of its own, made once and renewed when requirements.txt changes
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
cmp -s requirements.txt .venv/installed.txt || .venv/bin/pip install -q -r requirements.txt
cp requirements.txt .venv/installed.txt
source .venv/bin/activate

# Stage 0. Text to tokens: ten uneven domains out of what the Python packages themselves contain
[ -f data/demo/meta.json ] || python prepare.py

# Stage 1. A small reference model, trained on the natural mixture: each domain by its number of tokens
python train_reference.py @configs/demo_small.txt --out_dir=checkpoints/reference --domain_weights=token_count --resume

# Stage 2. A proxy of the same shape. Domains on which it lags behind the reference gain weight, step by step. (The paper's
# step size is 1, from the first of 200,000 steps on. In a run of 1,000 that would remember little but which domain is
# learnt first, so that here the weights move by little, and in the second half only: docs/results.md.)
python train_doremi.py --reference=checkpoints/reference --out_dir=checkpoints/proxy --step_size=0.04 --update_after=500 --resume

# Stage 3. The answer: the average of the proxy's domain weights over its steps
python average_weights.py checkpoints/proxy

# Stage 4. A model ten times larger, trained on that answer; beside it its baselines, alike in all but the weights
for name in baseline:token_count uniform:uniform doremi:checkpoints/proxy/weights.json; do
    python train_large.py @configs/demo_large.txt --out_dir=checkpoints/large-${name%%:*} --domain_weights=${name#*:} --resume
done

# Stage 5. The profit: held-out loss, domain by domain
python compare.py checkpoints/large-baseline checkpoints/large-uniform checkpoints/large-doremi
