#!/usr/bin/env bash
# Lint, type-check and test. On a fresh machine this installs everything into .venv first.
#
#   bash scripts/test.sh                     everything: on CPU and, where there are GPUs, what is for them, apart
#   bash scripts/test.sh tests/test_x.py     pytest arguments: only these tests
#   WORKERS=8 bash scripts/test.sh           on more than the two cores that it is made for
#   TORCH=2.11.0 bash scripts/test.sh        the tests under another torch, in an environment of its own, .venv-2.11.0
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test

[ $# -eq 0 ] || exec python -m pytest "$@"
if [ -z "${TORCH:-}" ]; then # lint and types are those of the pinned one
  ruff format --check .
  ruff check .
  mypy
fi
status=0
python -m pytest -n "${WORKERS:-2}" --dist loadfile || status=$? # a file's tests share what they make once
if has_gpu; then
  python -m pytest -m cuda || status=$?
fi
exit $status
