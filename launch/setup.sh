# Sourced by quickstart.sh and test.sh: a .venv in the repository with blpipe and the given extras in it.
#   source launch/setup.sh EXTRAS      EXTRAS: "" or "[test]"; PYTHON names another interpreter
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
        echo "blpipe needs Python 3.11, 3.12 or 3.13; set PYTHON to one" >&2
        exit 2
    }
    "${PYTHON:-python3}" -m venv .venv || {
        rm -rf .venv
        exit 1
    }
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$1"
export PATH="$PWD/.venv/bin:$PATH"
