#!/usr/bin/env bash
# The tests: ./test.sh, or ./test.sh --slow for the longer proofs too; other words go to pytest (./test.sh -k sampler).
set -euo pipefail
cd "$(dirname "$0")"

source environment.sh requirements-test.txt torch numpy tiktoken rustbpe wandb matplotlib tqdm \
    pytest hypothesis ruff transformers tokenizers safetensors pyarrow datasets zstandard

python -m pytest "$@"
