# Sourced by train.sh and test.sh: make a virtual environment and install the package into it, unless that has been done.
# Argument: the extras to install, e.g. "test", or "" for none (a missing one would be the caller's first).
#
#   PYTHON   the interpreter (3.11 or later)
#   TORCH    a version of torch (default: 2.13.0, or what stands in the environment and sees the GPUs)
#   VENV     the environment (default: .venv, or .venv-$TORCH)

cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-}"
venv="${VENV:-.venv${TORCH:+-$TORCH}}"

has_gpu() {
  [ -n "${CUDA_VISIBLE_DEVICES-all}" ] && command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU
}

# The version of torch to install. The default builds of all that are supported are for CUDA 13.0.
choose_torch() {
  local driver
  if [ -n "${TORCH:-}" ] || ! has_gpu; then
    echo "${TORCH:-2.13.0}"
  elif python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    python -c 'from importlib.metadata import version; print(version("torch"))'
  else
    driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | sed -n 1p)"
    if ! [ "${driver%%.*}" -ge 580 ]; then
      echo "The driver is $driver, and CUDA 13.0, which torch 2.13.0 is built for, needs 580 or later: update it, or" \
        "install a build of torch 2.11 to 2.15 for CUDA 12 into $venv and run this again, or set" \
        "CUDA_VISIBLE_DEVICES= to run on CPU." >&2
      return 1
    fi
    echo 2.13.0
  fi
}

if [ ! -x "$venv/bin/python" ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or later is needed; name one, e.g. PYTHON=python3.12 bash $0" >&2
    exit 1
  }
  "${PYTHON:-python3}" -m venv "$venv"
fi
. "$venv/bin/activate"

# What is installed is remembered by what was asked for: changed pins or new extras install again.
wanted="$(cat pyproject.toml scripts/constraints.txt | cksum) ${extras}${TORCH:+ torch $TORCH}"
if ! grep -qxF "$wanted" "$venv/installed" 2>/dev/null; then
  torch="$(choose_torch)"
  python -m pip install -q "torch==$torch"
  pinned='^$'
  if python -c 'from importlib.metadata import requires; exit(not any(r.startswith("triton") for r in requires("torch")))'
  then
    pinned='^triton==' # builds for CUDA bring their own
  fi
  grep -v "$pinned" scripts/constraints.txt >"$venv/constraints.txt"
  python -m pip install -q -c "$venv/constraints.txt" -e ".${extras:+[$extras]}"
  echo "$wanted" >>"$venv/installed"
fi
