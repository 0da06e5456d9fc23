"""On a GPU: the losses of a CPU, the oracle's alpha, checkpoints that need no card, resumption, and nothing that waits.

Skipped without a card. Every script is a process of its own that sees the card, which conftest.py hides from others.
"""

import functools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, WITH_CARD, read_alpha, read_metrics
from forked import distance
from test_exactness import FLAGS, MODEL, SHAPE, make_world, run_oracle, run_proxy

from common.ranks import Machine
from common.run import load_finished
from model import Transformer
from sampler import load_dataset
from train_reference import held_out_loss


def python(code, status=0):
    """Run code in a process that sees the card; return what it prints."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), WITH_CARD.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env={**WITH_CARD, "PYTHONPATH": path}, cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, timeout=300)
    assert done.returncode == status
    return done.stdout.strip()


@pytest.fixture(scope="module")
def launch():
    """A function that runs a script on the card, to an expected exit status, as forked.run_forked does on a CPU."""
    if not torch.version.cuda or python("import torch; print(torch.cuda.is_available())") != "True":
        pytest.skip("no GPU here")

    def run(script, *flags, status=0, ranks=1, nodes=1, **options):
        flags = [*map(str, flags), "--device=cuda"]
        python(f"import forked; forked.work({script!r}, {flags!r}, 0, 1, 1, 1, '/dev/stderr', **{options!r})", status)

    return run


@pytest.fixture(scope="module")
def world(tmp_path_factory, launch):
    """A function from dtype to a directory with data and a reference that was trained on the card."""
    return functools.cache(lambda dtype: make_world(tmp_path_factory.mktemp(dtype), "skewed", dtype, launch))


@pytest.mark.parametrize("dtype, micro_batch_size, bound", [("float32", 24, 2e-6), ("float64", 12, 1e-12)])
def test_run_is_the_oracles(world, launch, dtype, micro_batch_size, bound):
    """Twenty steps of a proxy against the oracle on the CPU: the bounds of two CPU ranks."""
    directory = world(dtype)
    found = run_proxy(directory, "skewed", 1, micro_batch_size, launch=launch)
    expected = run_oracle(directory, "skewed", dtype)
    deviation = {name: distance(found[name], expected[name]) for name in ("alpha", "alpha_bar", "excess")}
    assert max(deviation["alpha"], deviation["alpha_bar"], 0.1 * deviation["excess"]) < bound
    assert np.abs(found["alpha"][-1] - found["alpha"][0]).max() > 0.02


def test_checkpoint_needs_no_card(world):
    """Its tensors are on the CPU. Losses that the card logged in float32 are those of the CPU in float64."""
    directory = world("float32")
    config, checkpoint = load_finished(directory / "reference", ("reference",))
    plain = torch.load(directory / "reference/ckpt.pt", weights_only=True)
    moments = [value for state in plain["optimizer"]["state"].values() for value in state.values()]
    assert len(moments) == 3 * len(plain["model"]) > 0
    assert {str(value.device) for value in [*plain["model"].values(), *moments]} == {"cpu"}
    double = {name: value.double() for name, value in checkpoint["model"].items()}
    machine = Machine(torch.device("cpu"), torch.float64, torch.float64, micro_batch_size=4)
    dataset = load_dataset(directory / "data", SHAPE["block_size"])
    expected = held_out_loss(Transformer.load(config, double, torch.float64), dataset, 2, machine)
    logged = [line["val_loss"] for line in read_metrics(directory / "reference") if "val_loss" in line][-1]
    assert list(logged.values()) == pytest.approx(expected.tolist(), abs=2e-6)


@pytest.mark.parametrize("kill", [("step", 15), ("bytes", 2)])
def test_killed_and_resumed(world, launch, tmp_path, kill):
    """To rounding: some of a card's sums depend on the order in which its threads come."""
    flags = [f"--reference={world('float64')}/reference", "--max_steps=20", "--save_interval=5", *FLAGS]
    launch("train_doremi.py", *flags, f"--out_dir={tmp_path}/whole")
    launch("train_doremi.py", *flags, f"--out_dir={tmp_path}/killed", kill=kill, status=-9)
    launch("train_doremi.py", *flags, f"--out_dir={tmp_path}/killed", "--resume")
    assert distance(read_alpha(tmp_path / "whole"), read_alpha(tmp_path / "killed")) < 1e-12


@pytest.mark.parametrize("compiled, micro_batch_size", [("--compile", 24), ("--no-compile", 12)])
def test_nothing_waits_between_log_lines(world, launch, tmp_path, compiled, micro_batch_size):
    """Of either script: CUDA itself raises where it would."""
    flags = [*FLAGS, compiled, f"--micro_batch_size={micro_batch_size}", "--log_interval=3", "--max_steps=12",
             "--eval_interval=6", "--save_interval=6", "--dtype=bfloat16", f"--data_dir={world('float32')}/data"]
    launch("train_reference.py", *flags, *MODEL, f"--out_dir={tmp_path}/run", may_wait=False)
    launch("train_doremi.py", *flags, f"--reference={world('float32')}/reference", f"--out_dir={tmp_path}/proxy",
           may_wait=False)
