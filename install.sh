#!/usr/bin/env bash
# Installs what a requirements file lists into .venv: ./install.sh requirements.txt
# PYTHON=/path/to/python3.12 ./install.sh ... takes another Python than python3. A .venv that is
# there is used as it is, by pip, or by uv where it has no pip.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
stop() { echo "error: $1" >&2; exit 2; }

if [ ! -e .venv ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
        || stop "'$python' is not Python 3.11 or later; name one: PYTHON=/path/to/python3.12 $0 $*"
    echo "+ $python -m venv .venv"
    "$python" -m venv .venv \
        || { rm -rf .venv; stop "'$python -m venv' failed; on Debian or Ubuntu: apt install python3-venv"; }
fi
if .venv/bin/python -m pip --version >/dev/null 2>&1; then
    pip=(.venv/bin/python -m pip)
elif .venv/bin/python --version >/dev/null 2>&1 && command -v uv >/dev/null; then
    pip=(uv pip)
else
    stop ".venv has no pip in it; remove the folder, and it is made anew"
fi
echo "+ ${pip[*]} install -r $1"
PIP_DISABLE_PIP_VERSION_CHECK=1 "${pip[@]}" install --quiet -r "$1"
