#!/usr/bin/env bash
# The tests: ./test.sh, or ./test.sh --slow for the longer proofs too; other words go to pytest (./test.sh -k sampler).
set -euo pipefail
cd "$(dirname "$0")"

# An environment of its own, made once and renewed when the requirements change
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
cat requirements*.txt | cmp -s - .venv/tested.txt || .venv/bin/pip install -q -r requirements-test.txt
cat requirements*.txt > .venv/tested.txt

exec .venv/bin/python -m pytest "$@"
