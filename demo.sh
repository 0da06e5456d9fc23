#!/usr/bin/env bash
# DoReMi from text to profit on a laptop: nothing to download but the Python packages. Every command can be pasted alone.
# Finished stages are skipped; to start over: rm -r data/demo-text data/demo checkpoints
set -euo pipefail
cd "$(dirname "$0")"

# The packages of the training scripts, and those whose files are the demo's text
source environment.sh requirements.txt torch numpy tiktoken rustbpe wandb matplotlib tqdm \
    jinja2 fsspec pydantic PIL setuptools fontTools networkx sympy mpmath contourpy google.protobuf google.api google.type

# Stage 0. Text to tokens: ten uneven domains, taken from what the Python packages themselves contain
[ -d data/demo-text ] || python demo/corpus.py data/demo-text
[ -d data/demo ] || python prepare.py data/demo-text --out_dir=data/demo

# Stage 1. A small reference model, trained on the natural mixture: each domain in proportion to its tokens
python train_reference.py --data_dir=data/demo --out_dir=checkpoints/reference --resume

# Stage 2. A proxy of the same shape. A domain on which it lags behind the reference gains weight, step by step
python train_doremi.py --reference=checkpoints/reference --out_dir=checkpoints/proxy --resume

# Stage 3. The answer: the average of the proxy's domain weights over its steps
python average_weights.py checkpoints/proxy

# Stage 4. A larger model trained on the answer, and its baselines, which differ in their sampling weights only
for run in baseline:token_count uniform:uniform temperature:temperature:0.7 \
    doremi:checkpoints/proxy/weights.json; do
    python train_large.py --data_dir=data/demo --out_dir=checkpoints/large-${run%%:*} --sampling_weights=${run#*:} --resume
done

# Stage 5. The profit: held-out loss, domain by domain
python compare.py checkpoints/large-baseline checkpoints/large-uniform checkpoints/large-temperature \
    checkpoints/large-doremi
