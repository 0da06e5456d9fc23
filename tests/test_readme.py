"""The README's commands work as they are printed, and the demo runs the same ones."""

import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY
from forked import run_forked

README = (ROOT / "README.md").read_text()
COMMANDS = [re.sub(r" +", " ", line.strip()) for line in re.findall(r"^    python (.*)$", README, re.MULTILINE)]
PIPELINE = COMMANDS[: [command.startswith("-m tools.export_hf") for command in COMMANDS].index(True) + 1]


def test_commands_run_on_a_small_data_set(tmp_path):
    """Nothing is changed but where they read and write, the size of the models, and the share of the few documents."""
    texts = tmp_path / "data/demo-text"
    texts.mkdir(parents=True)
    for name, modules in {"short": "argparse inspect pickle typing", "middle": "doctest pdb pydoc subprocess tarfile",
                          "long": "ast calendar configparser difflib mailbox optparse statistics zipfile"}.items():
        sources = [inspect.getsource(__import__(module)) for module in modules.split()]
        (texts / f"{name}.txt").write_text("\n\n".join(sources))
    assert PIPELINE[0] == "demo/corpus.py data/demo-text"  # the slow test below runs it
    small = {"prepare.py": ["--val_fraction=0.2"], "train_reference.py": TINY, "train_large.py": TINY,
             "train_doremi.py": [flag for flag in TINY if flag.startswith(("--eval", "--log", "--save", "--no-"))]}
    other = ["--out_dir=data/other", "--tokenizer=data/demo/tokenizer.tiktoken"]  # the reader's own text
    commands = PIPELINE[1:]
    evaluate = [command.startswith("evaluate.py") for command in commands].index(True)
    commands.insert(evaluate, " ".join(["prepare.py data/demo-text", *other]))
    for command in commands:
        if command.startswith("-m "):
            pytest.importorskip("transformers")
        command = re.sub(r"^-m tools\.(\w+)", r"tools/\1.py", command)
        script, *flags = re.sub(r"\b(data|checkpoints|hf)/", rf"{tmp_path}/\1/", command).split()
        run_forked(script, *flags, *small.get(script, []))
    answer = json.loads((tmp_path / "checkpoints/proxy/weights.json").read_text())["domain_weights"]
    large = json.loads((tmp_path / "checkpoints/large-doremi/config.json").read_text())
    assert large["sampling_weights"] == pytest.approx(answer) and set(answer) == {"short", "middle", "long"}
    assert (tmp_path / "checkpoints/large-doremi/compare.png").stat().st_size > 10_000
    assert (tmp_path / "hf/large-doremi/model.safetensors").exists()


def test_demo_runs_the_commands(tmp_path):
    """Run demo.sh with a python that only writes down what it is asked to run."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("demo.sh", "requirements.txt", ".venv/installed.txt"):
        shutil.copy(ROOT / name.replace(".venv/installed", "requirements"), tmp_path / name)
    (tmp_path / ".venv/bin/activate").write_text(f"PATH={tmp_path}/.venv/bin:$PATH\n")
    (python := tmp_path / ".venv/bin/python").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/ran\n')
    python.chmod(0o755)
    subprocess.run(["./demo.sh"], cwd=tmp_path, check=True, env={**os.environ, "PYTHON": "false"})
    ran = [line.removesuffix(" --resume") for line in (tmp_path / "ran").read_text().splitlines()]
    for command in PIPELINE:
        assert command in ran or command.startswith(("compare.py", "evaluate.py", "-m "))
    (compared,) = [line for line in ran if line.startswith("compare.py")]
    assert all(f"--out_dir={run}" in " ".join(ran) for run in compared.split()[1:])


def test_lines_that_the_readme_names():
    rows = re.findall(r"\| `(\w+\.py):(\d+)` \| `([^`]+)` \|", README)
    assert len(rows) == 8
    for name, number, code in rows:
        assert code in (ROOT / name).read_text().splitlines()[int(number) - 1], f"{name}:{number} is not {code}"


@pytest.mark.slow
def test_corpus_is_the_same_everywhere(tmp_path):
    """A second run has another place, locale, time zone and hash seed."""
    env = os.environ | {"PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Tokyo", "PYTHONUTF8": "0"}
    hashes = []
    for out_dir, options in ((tmp_path / "a", {}), (tmp_path / "elsewhere/b", {"env": env, "cwd": "/"})):
        subprocess.run([sys.executable, ROOT / "demo/corpus.py", out_dir], check=True, **options)
        hashes.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out_dir.iterdir()})
    sizes = sorted(path.stat().st_size for path in (tmp_path / "a").iterdir())
    assert hashes[0] == hashes[1] and len(sizes) == 10 and 25e6 < sum(sizes) < 40e6
    assert 0.015 < sizes[0] / sum(sizes) < 0.04 and 0.25 < sizes[-1] / sum(sizes) < 0.4
