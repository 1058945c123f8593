#!/usr/bin/env bash
# Lint, type-check and test. On a fresh machine this installs everything into .venv first.
#
#   bash scripts/test.sh                     everything
#   bash scripts/test.sh tests/test_x.py     pytest arguments: only these tests
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test

if [ $# -eq 0 ]; then
  ruff format --check .
  ruff check .
  mypy
fi
exec python -m pytest "$@"
