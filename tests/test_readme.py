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
# A python that writes down what it is asked to run. It imports if there is a file NAME.ready, has pip if NAME.pip
echo "NAME $@" >> ROOT/asked
case "$*" in
    "-c import"*) [ -e ROOT/NAME.ready ];;
    "-m pip --version") [ -e ROOT/NAME.pip ];;
    "-m venv"*) mkdir -p ROOT/.venv/bin; cp ROOT/fake ROOT/.venv/bin/python; touch ROOT/venv.pip;;
    "-m ensurepip") touch ROOT/venv.pip;;
esac
"""


def run_demo(folder, *ready):
    """Run demo.sh with pythons that only write it down.  Return what was asked of them, imports apart."""
    for name in ("demo.sh", "requirements.txt", "environment.sh"):
        shutil.copy(ROOT / name, folder / name)
    for name, file in ("base", "bin/python3"), ("venv", ".venv/bin/python"), ("uv", "bin/uv"), ("venv", "fake"):
        if name in ready or name == "base" or file == "fake":
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(FAKE.replace("ROOT", str(folder)).replace("NAME", name))
            (folder / file).chmod(0o755)
    for name in ready:
        (folder / name).touch()
    env = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    subprocess.run(["./demo.sh"], cwd=folder, check=True, env={**env, "PATH": f"{folder}/bin:/usr/bin:/bin"})
    asked = (folder / "asked").read_text().splitlines()
    return [line for line in asked if " -c " not in line and not line.endswith("--version")]


INSTALL = "-m pip install -q -r requirements.txt"


@pytest.mark.parametrize("ready, asked", [
    (["venv", "venv.ready"], []),  # made by uv: no pip in it, nothing to install
    (["venv", "venv.pip", "base.ready"], []),  # the active environment
    (["venv", "uv"], ["uv pip install -q --python .venv/bin/python -r requirements.txt"]),
    (["venv"], ["venv -m ensurepip", f"venv {INSTALL}"]),  # killed while it was made
    ([], ["base -m venv --clear .venv", f"venv {INSTALL}"])])
def test_demo_runs_the_commands_in_the_environment_that_is_there(tmp_path, ready, asked):
    found = run_demo(tmp_path, *ready)
    assert found[: len(asked)] == asked
    python = "base" if "base.ready" in ready else "venv"
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
