#!/usr/bin/env bash
# Installs what a requirements file lists into .venv: ./install.sh requirements-test.txt
# PYTHON=/path/to/python3.12 ./install.sh ... takes another Python than python3. A .venv that is
# there is used as it is, by pip, or by uv where it has no pip.
set -euo pipefail
cd -- "$(dirname -- "$0")" >/dev/null
requirements=${1:-requirements.txt}
stop() { echo "error: $1" >&2; exit 2; }
check() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || stop "$2"
}

if [ ! -e .venv ]; then
    python=${PYTHON:-python3}
    check "$python" "'$python' is not Python 3.11 or later; name one with PYTHON=/path/to/python3.12"
    echo "+ $python -m venv .venv"
    "$python" -m venv .venv \
        || { rm -rf .venv; stop "'$python -m venv' failed; on Debian or Ubuntu: apt install python3-venv"; }
fi
check .venv/bin/python ".venv has no Python 3.11 or later in it; remove the folder, and it is made anew"
if .venv/bin/python -m pip --version >/dev/null 2>&1; then
    pip=(.venv/bin/python -m pip install)
elif command -v uv >/dev/null; then
    pip=(uv pip install --python .venv/bin/python)
else
    stop ".venv has no pip in it, and there is no uv; remove the folder, and it is made anew"
fi
echo "+ ${pip[*]} -r $requirements"
PIP_DISABLE_PIP_VERSION_CHECK=1 "${pip[@]}" --quiet -r "$requirements"
