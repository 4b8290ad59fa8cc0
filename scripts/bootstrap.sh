#!/bin/sh
# Makes the virtual environment $VENV (default .venv) and installs the project with the named extras.
#
# Usage: scripts/bootstrap.sh [extra ...]        e.g. scripts/bootstrap.sh cuda13
#        scripts/bootstrap.sh --requirements     what the project needs, without the project
#
# Installing the project writes into the checkout, so two set-ups must not do that side by side; --requirements
# leaves the checkout alone, and takes nearly all of the time.
#
# A second run costs a file comparison: after an install, $VENV/.installed-* holds the requirements
# that were met, and equal text means nothing to do. $VENV/.busy stands there while pip works; finding
# it at the start means an earlier run was killed, and the environment is made anew. $CONSTRAINTS may
# name a pip constraints file.
set -eu
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
constraints=${CONSTRAINTS:-}
trap 'exit 130' HUP INT TERM

wanted() { # the text an install has to match: where, which Python, what
  pwd
  sed -n 's/^version *= *//p' "$venv/pyvenv.cfg"
  cat requirements.txt pyproject.toml
  if [ -n "$constraints" ]; then cat "$constraints"; fi
}

install() { # install NAME [--editable|--requirement] TARGET: brings TARGET up to date, its stamp being .installed-NAME
  stamp="$venv/.installed-$1"
  if wanted | cmp -s - "$stamp"; then return 0; fi
  echo "setting up $venv: installing $3 (a minute or two the first time)" >&2
  : >"$venv/.busy"
  status=0
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
    ${constraints:+--constraint "$constraints"} "$2" "$3" || status=$?
  # Below 128 pip itself gave up (no network, no such version) before it changed anything, so the
  # environment is whole; above, a signal ended it anywhere.
  if [ "$status" -lt 128 ]; then rm -f "$venv/.busy"; fi
  if [ "$status" -ne 0 ]; then
    echo "error: could not install $3 into $venv (pip: exit $status, its message is above);" \
      "run the same command again" >&2
    exit 1
  fi
  wanted >"$stamp.new"
  mv "$stamp.new" "$stamp"
}

requirements=false
if [ "${1:-}" = --requirements ]; then
  requirements=true
  shift
fi
extras=$(printf '%s' "$*" | tr ',' ' ')
for extra in $extras; do
  if ! grep -q "^$extra = \[" pyproject.toml; then
    known=$(sed -n '/^\[project.optional-dependencies\]/,/^\[project.scripts\]/s/^\([a-z0-9-]*\) = \[.*/\1/p' pyproject.toml | tr '\n' ' ')
    echo "error: EXTRA: got '$extra', wanted one of: $known" >&2
    exit 2
  fi
done

# An environment that was killed half-way, copied from elsewhere, or whose Python is gone cannot be mended.
location=$(cat "$venv/.location" 2>/dev/null || true)
if [ -e "$venv/.busy" ] || [ "$location" != "$(pwd)" ] ||
  ! "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; then
  python=$(scripts/find_python.sh)
  echo "setting up $venv with $python" >&2
  "$python" -m venv --clear "$venv"
  pwd >"$venv/.location"
fi

if $requirements; then
  install requirements --requirement requirements.txt
  exit
fi
install base --editable .
for extra in $extras; do
  install "$extra" --editable ".[$extra]"
done
