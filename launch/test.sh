#!/usr/bin/env bash
# Install blpipe with its test extra into .venv, then lint, types and tests (but the slow ones). Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "[test]"
ruff check --config launch/ruff.toml .
mypy
python -m pytest -n 4 --dist loadfile --no-loadscope-reorder "$@"
