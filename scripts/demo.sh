#!/usr/bin/env bash
# The main job: trains on two data sets with streaming averages and shows what they are worth.
# Arguments go to `streaming-polyak demo`; see `bash scripts/demo.sh --help`.
set -euo pipefail
. "$(dirname "$0")/venv.sh" demo
exec .venv/bin/streaming-polyak demo "$@"
