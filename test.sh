#!/usr/bin/env bash
# Installs, and passes the tests; words are pytest's: ./test.sh tests/test_scheduler.py
set -euo pipefail
cd -- "$(dirname -- "$0")" >/dev/null
./install.sh requirements-test.txt
export HF_HUB_OFFLINE=1
set -x
.venv/bin/python -m pytest -n auto "$@"
