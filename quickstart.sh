#!/usr/bin/env bash
# Installs, and fine-tunes the zoo's Stable Diffusion on a prompt that it gets wrong.
set -euo pipefail
cd -- "$(dirname -- "$0")" >/dev/null
./install.sh requirements.txt
set -x
.venv/bin/python dpok.py zoo --prompt "A green colored rabbit" --num-iterations 20 "$@"
