#!/usr/bin/env bash
# Everything that CI checks. Arguments go to pytest: bash scripts/test.sh -m "not tensorflow and not slow"
# One test process for each core, four at most, as each starts TensorFlow; -n 0 for the debugger.
set -euo pipefail
. "$(dirname "$0")/venv.sh" demo,test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal "$@"
