#!/usr/bin/env bash
# Builds .venv from requirements.lock and sees to LaTeX. Called by every make target; costs nothing when all is there.
# PYTHON=... picks another interpreter. pip's own settings (pip.conf, PIP_* variables) are honoured.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.11}
latex_packages="texlive-latex-recommended latexmk lmodern"

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }
as_root_on_debian() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
install_by_apt() { # packages...
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
} >&2
latex_is_there() {
  command -v latexmk >/dev/null && command -v pdflatex >/dev/null && command -v kpsewhich >/dev/null &&
    kpsewhich lmodern.sty booktabs.sty natbib.sty microtype.sty hyperref.sty >/dev/null
}
identity() { # of the environment wanted: the lock, the package's own metadata, where it lies
  { cat requirements.lock pyproject.toml scripts/setup.sh; pwd; } | cksum
}

latex() {
  latex_is_there && return
  if as_root_on_debian; then
    say "LaTeX is missing; installing $latex_packages by apt: 86 MB to download, 300 MB on disk, about a minute"
    # shellcheck disable=SC2086
    install_by_apt $latex_packages && latex_is_there && return
  fi
  say "LaTeX is missing, so the PDF cannot be built; all else works. Install TeX Live, on Debian:" \
      "apt-get install --no-install-recommends $latex_packages"
}

new_venv() {
  command -v "$python" >/dev/null || fail "$python is not on the PATH. Install Python 3.11 (on Debian 12:" \
    "apt-get install python3.11 python3.11-venv) or name another one: make setup PYTHON=/path/to/python3.11"
  "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null ||
    fail "$python does not run as Python 3.11, for which requirements.lock is made: $("$python" --version 2>&1)"
  if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    as_root_on_debian && say "installing python3.11-venv by apt (6 MB)" && install_by_apt python3.11-venv ||
      fail "$python has no ensurepip module. On Debian 12: apt-get install python3.11-venv"
  fi
  "$python" -m venv --clear .venv
}

packages() {
  say "installing $(grep -c == requirements.lock) packages into .venv: 0.8 GB to download with a CPU build of torch" \
      "(the CUDA build, which pip takes on Linux unless its settings say otherwise, is several GB more);" \
      "2.8 GB on disk; 3 to 10 minutes"
  .venv/bin/python -c 'import pip' 2>/dev/null || new_venv
  .venv/bin/python -m pip install --disable-pip-version-check ${quiet:+-q} -r requirements.lock >&2 ||
    fail "pip could not install requirements.lock (see above); the next call goes on from here"
  .venv/bin/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e . >&2 ||
    fail "pip could not install this checkout into .venv (see above)"
}

main() {
  if [ "$(cat .venv/setup-stamp 2>/dev/null)" != "$(identity)" ]; then
    [ -t 2 ] || quiet=1
    packages
    identity >.venv/setup-stamp
    say "done; .venv is ready"
  fi
  latex
}

mkdir -p build
if command -v flock >/dev/null; then
  exec 9>build/setup.lock
  flock -n 9 || { say "waiting for another make that is setting up (it holds build/setup.lock)"; flock 9; }
fi
main
