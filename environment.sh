# source environment.sh REQUIREMENTS MODULE...: let `python` be one that imports all MODULEs.
# An environment that does is used as it is: .venv, or else the active one. Otherwise .venv is made, or completed if it
# is there, with pip or uv. So a command that was interrupted, even while it made .venv, is simply repeated.

requirements=$1
modules=$(IFS=,; echo "${*:2}")
interpreter=.venv/bin/python
imports() { "$1" -c "import $modules" > /dev/null 2>&1; }
has_pip() { "$interpreter" -m pip --version > /dev/null 2>&1; }

if ! imports "$interpreter" && imports "${PYTHON:-python3}"; then
    interpreter=${PYTHON:-python3}
elif ! imports "$interpreter"; then
    [ -x "$interpreter" ] || "${PYTHON:-python3}" -m venv --clear .venv
    if ! has_pip && command -v uv > /dev/null; then
        uv pip install -q --python "$interpreter" -r "$requirements"
    else
        has_pip || "$interpreter" -m ensurepip > /dev/null
        "$interpreter" -m pip install -q -r "$requirements"
    fi
fi
python() { "$interpreter" "$@"; }
