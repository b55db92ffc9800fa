# Sourced by demo.sh and test.sh:  . scripts/venv.sh EXTRAS
# Makes .venv in the top folder and installs the project with those extras; does nothing when that was done
# before for the same metadata, extras and place.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
extras=$1
stamp=.venv/installed-${extras//,/-}
current="$PWD $(cat setup.cfg pyproject.toml | cksum)"

if ! .venv/bin/python -c '' 2>/dev/null || [ "$(cat "$stamp" 2>/dev/null)" != "$current" ]; then
  found=
  for python in python3.11 python3 python3.14 python3.13 python3.12 python; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      found=$python
      break
    fi
  done
  if [ -z "$found" ]; then
    echo "streaming_polyak needs Python 3.11 or newer; none was found on PATH. Install it and run this again." >&2
    exit 1
  fi
  echo "Setting up .venv with $("$found" --version) and the extras $extras (about a minute, once) ..." >&2
  .venv/bin/python -c '' 2>/dev/null || "$found" -m venv --clear .venv || exit 1
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extras]" || exit 1
  echo "$current" >"$stamp"
fi
