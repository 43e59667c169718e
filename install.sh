#!/usr/bin/env bash
# Installs what a requirements file lists into .venv: ./install.sh requirements.txt
# PYTHON=/path/to/python3.12 ./install.sh ... takes another Python than python3.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
stop() { echo "error: $1" >&2; exit 2; }

if [ ! -x .venv/bin/pip ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
        || stop "'$python' is not Python 3.11 or later; give one as PYTHON=/path/to/python3.12 $0 $*"
    echo "+ $python -m venv .venv"
    "$python" -m venv .venv \
        || { rm -rf .venv; stop "'$python -m venv' failed; on Debian or Ubuntu: apt install python3-venv"; }
fi
echo "+ .venv/bin/pip install -r $1"
.venv/bin/pip install --quiet --disable-pip-version-check -r "$1"
