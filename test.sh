#!/usr/bin/env bash
# The tests: ./test.sh, or ./test.sh --slow for the longer proofs too; other words go to pytest (./test.sh -k sampler).
set -euo pipefail
cd "$(dirname "$0")"

# An environment of its own, made once and renewed when requirements.txt changes
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
cmp -s requirements.txt .venv/installed.txt || .venv/bin/pip install -q -r requirements.txt
cp requirements.txt .venv/installed.txt

exec .venv/bin/python -m pytest "$@"
