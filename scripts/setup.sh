# Sourced by train.sh and test.sh: make .venv and install the package into it, unless that has been done.
# Argument: the extras to install, e.g. "test", or "" for none (a missing one would be the caller's first).
# PYTHON names the interpreter (3.11 or later).

cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-}"

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or later is needed; name one, e.g. PYTHON=python3.12 bash $0" >&2
    exit 1
  }
  "${PYTHON:-python3}" -m venv .venv
fi
. .venv/bin/activate

# What is installed is remembered by what was asked for: changed pins or new extras install again.
wanted="$(cat pyproject.toml scripts/constraints.txt | cksum) ${extras}"
if ! grep -qxF "$wanted" .venv/installed 2>/dev/null; then
  if has_gpu; then
    python -m pip install -q "torch>=2.11,<2.16"
    grep -v '^triton==' scripts/constraints.txt >.venv/constraints.txt # torch for CUDA brings its own
  else
    python -m pip install -q torch==2.13.0
    cp scripts/constraints.txt .venv/constraints.txt
  fi
  python -m pip install -q -c .venv/constraints.txt -e ".${extras:+[$extras]}"
  echo "$wanted" >>.venv/installed
fi
