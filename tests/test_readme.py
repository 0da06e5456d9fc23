"""The README's commands work as they are printed, and the demo runs the same ones."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, write_texts
from forked import run_forked

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    python (.*?)(?: +#.*)?$", README, re.MULTILINE)
COMMANDS = [re.sub(r" +", " ", command) for command in COMMANDS]
PIPELINE = COMMANDS[: [command.startswith("-m tools.export_hf") for command in COMMANDS].index(True) + 1]


def test_commands_run_on_a_small_data_set(tmp_path):
    """Nothing is changed but where they read and write, the size of the models, and the share of the few documents."""
    for name, modules in {"short": "argparse inspect pickle typing", "middle": "doctest pdb pydoc subprocess tarfile",
                          "long": "ast calendar configparser difflib mailbox optparse statistics zipfile"}.items():
        sources = [inspect.getsource(__import__(module)) for module in modules.split()]
        write_texts(tmp_path / f"data/demo-text/{name}.jsonl", sources)
    assert PIPELINE[0] == "demo/corpus.py data/demo-text"  # the slow test below runs it
    small = {"prepare.py": ["--val_fraction=0.2"], "train_reference.py": TINY, "train_large.py": TINY}
    for command in PIPELINE[1:]:
        if command.startswith("-m "):
            pytest.importorskip("transformers")
        command = re.sub(r"^-m tools\.(\w+)", r"tools/\1.py", command)
        script, *flags = re.sub(r"\b(data|checkpoints|hf)/", rf"{tmp_path}/\1/", command).split()
        run_forked(script, *flags, *small.get(script, []))
    answer = json.loads((tmp_path / "checkpoints/proxy/weights.json").read_text())["domain_weights"]
    large = json.loads((tmp_path / "checkpoints/large-doremi/config.json").read_text())
    assert large["sampling_weights"] == pytest.approx(answer) and set(answer) == {"short", "middle", "long"}
    assert (tmp_path / "checkpoints/large-doremi/compare.png").exists()
    assert (tmp_path / "hf/large-doremi/model.safetensors").exists()


FAKE = """#!/bin/sh
# A python that writes down what it is asked to run. It imports if there is a file $0.ready, has pip if $0.pip
echo "${0##*/} $@" >> asked
case "$*" in
    "-c import"*) [ -e $0.ready ];;
    "-m pip --version") [ -e $0.pip ];;
    "-m venv"*) mkdir -p .venv/bin; cp $0 .venv/bin/python; touch .venv/bin/python.pip;;
    "-m ensurepip") touch $0.pip;;
esac
"""


def run_demo(folder, *files):
    """Run demo.sh with pythons that only write it down.  Return what was asked of them, imports apart."""
    for name in ("demo.sh", "requirements.txt", "environment.sh"):
        shutil.copy(ROOT / name, folder / name)
    for file in ("bin/python3", *files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(FAKE)
        (folder / file).chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    subprocess.run(["./demo.sh"], cwd=folder, check=True, env={**env, "PATH": f"{folder}/bin:/usr/bin:/bin"})
    asked = (folder / "asked").read_text().splitlines()
    return [line for line in asked if " -c " not in line and not line.endswith("--version")]


VENV, INSTALL = ".venv/bin/python", "-m pip install -q -r requirements.txt"


@pytest.mark.parametrize("files, python, asked", [
    ([VENV, f"{VENV}.ready"], "python", []),  # made by uv: no pip in it, nothing to install
    ([VENV, "bin/python3.ready"], "python3", []),  # the active environment
    ([VENV, "bin/uv"], "python", ["uv pip install -q --python .venv/bin/python -r requirements.txt"]),
    ([VENV], "python", ["python -m ensurepip", f"python {INSTALL}"]),  # killed while it was made
    ([], "python", ["python3 -m venv --clear .venv", f"python {INSTALL}"])])
def test_demo_runs_the_commands_in_the_environment_that_is_there(tmp_path, files, python, asked):
    found = run_demo(tmp_path, *files)
    assert found[: len(asked)] == asked
    ran = [line.removeprefix(f"{python} ").removesuffix(" --resume") for line in found[len(asked) :]]
    for command in PIPELINE:
        assert command in ran or command.startswith(("compare.py", "evaluate.py", "-m "))
    (compared,) = [line for line in ran if line.startswith("compare.py")]
    assert all(f"--out_dir={run}" in " ".join(ran) for run in compared.split()[1:])


def test_code_that_the_readme_quotes():
    """The table of Algorithm 1: a file, and a piece of it, which may be anywhere in the file."""
    rows = re.findall(r"\| `(\w+\.py)`[^|]* \| `([^`]+)` \|", README)
    assert len(rows) == 8
    for name, code in rows:
        assert code in (ROOT / name).read_text(), f"{name} has no {code}"


@pytest.mark.slow
def test_corpus_is_the_same_everywhere(tmp_path):
    """A second run has another place, locale, time zone and hash seed."""
    other = os.environ | {"PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Tokyo", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, ROOT / "demo/corpus.py", tmp_path / "a"], check=True)
    subprocess.run([sys.executable, ROOT / "demo/corpus.py", tmp_path / "b"], check=True, env=other, cwd="/")
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab")
    assert first == second and len(first) == 10 and 25e6 < sum(map(len, first.values())) < 40e6
