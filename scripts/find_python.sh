#!/bin/sh
# Prints the path of a Python >= 3.12 that can make virtual environments, or fails with one line.
#
# Every candidate is executed: a pyenv shim lies on PATH for each installed version and answers only
# for the one that is set, so a name proves nothing. Tried in turn: $PYTHON alone when it is set, else
# PATH, pyenv's own versions, what uv knows.
set -u

probe='
import sys, sysconfig
import ensurepip, venv  # Debian ships python3 without them
free_threaded = sysconfig.get_config_var("Py_GIL_DISABLED")
sys.exit(not (sys.version_info >= (3, 12) and sys.maxsize > 2**32 and not free_threaded))
'
tried=""

accept() { # prints the candidate's own path and ends the search when it fits
  command -v "$1" >/dev/null 2>&1 || return 0
  tried="$tried $1"
  if "$1" -c "$probe" </dev/null >/dev/null 2>&1; then
    "$1" -c 'import sys; print(sys.executable)' </dev/null
    exit 0
  fi
}

if [ -n "${PYTHON:-}" ]; then
  accept "$PYTHON"
  echo "error: PYTHON=$PYTHON is not a 64-bit Python >= 3.12 with venv and ensurepip" >&2
  exit 1
fi

for name in python3.12 python3.13 python3.14 python3 python; do
  accept "$name"
done

pyenv_roots="${PYENV_ROOT:-} ${HOME:-}/.pyenv"
if command -v pyenv >/dev/null 2>&1; then
  pyenv_roots="$pyenv_roots $(pyenv root 2>/dev/null)"
fi
for root in $pyenv_roots; do
  for minor in 12 13 14; do
    for python in "$root"/versions/3."$minor"*/bin/python; do
      accept "$python"
    done
  done
done

if command -v uv >/dev/null 2>&1; then
  found=$(uv python find '>=3.12' 2>/dev/null </dev/null) && [ -n "$found" ] && accept "$found"
fi

echo "error: no Python >= 3.12 (64-bit, with venv and ensurepip) found; tried:${tried:- nothing on PATH};" \
  "install one (apt install python3.12-venv, pyenv install 3.12, uv python install 3.12)" \
  "or name it: make PYTHON=/path/to/python" >&2
exit 1
