"""Compiled, in bfloat16, on several ranks: what a run on GPUs does unless it is told otherwise.

A first compilation takes 20 to 60 seconds; Inductor's cache shortens the next ones of the same shapes.
"""

import functools
import shutil

import pytest
import torch
from conftest import TINY, TRAINING, read_alpha, read_metrics
from forked import distance, run_forked
from test_resume import assert_same, left_by

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")

SHAPE = [flag for flag in TINY if flag not in TRAINING]


@pytest.fixture(scope="module")
def flags(tmp_path_factory, data_dir):
    """{script: its flags}; the proxy's reference is trained here."""
    reference = tmp_path_factory.mktemp("compiled") / "reference"
    common = [*SHAPE, f"--data_dir={data_dir}", "--dtype=bfloat16", "--sampling_weights=uniform"]
    run_forked("train_reference.py", *common, *TRAINING, f"--out_dir={reference}", "--max_steps=40")
    return {"train_reference.py": [*common, *TRAINING, "--seed=5"],
            "train_doremi.py": [f"--reference={reference}", *TRAINING, "--seed=5"]}


@pytest.fixture(scope="module")
def train(tmp_path_factory, flags):
    """A function that runs a script; returns its directory and the gradients of its first step."""
    @functools.cache
    def make(script, *more, ranks):
        out = tmp_path_factory.mktemp("runs") / "run"
        run_forked(script, *flags[script], *more, f"--out_dir={out}", ranks=ranks, record=f"{out}-notes", timeout=500)
        return out, torch.load(f"{out}-notes.0", weights_only=True)["gradients"][0]

    return make


def assert_close(ours, theirs):
    """Losses in nats, alpha, and first gradients over the largest of each: eager, compiled, one rank or two, pairs of
    them differ by 1.2e-3, 3e-4 and 0.02 at most."""
    losses, others = ([line["loss"] for line in read_metrics(out) if "loss" in line] for out, _ in (ours, theirs))
    assert distance(losses, others) < 3e-3
    assert max(distance(ours[1][name], g) / float(g.abs().max()) for name, g in theirs[1].items()) < 0.03
    if list(ours[0].glob("doremi_domain_weights_*.pt")):
        assert distance(read_alpha(ours[0]), read_alpha(theirs[0])) < 1e-3


@pytest.mark.parametrize("script, more, ranks", [
    ("train_reference.py", [], 2),
    pytest.param("train_doremi.py", ["--micro_batch_size=3", "--activation_checkpointing"], 1, marks=pytest.mark.slow)])
def test_two_compiled_ranks_are_eager_ranks(train, script, more, ranks):
    """Compiled code rounds fewer intermediate values to bfloat16, nothing else."""
    assert_close(train(script, "--compile", *more, ranks=2), train(script, "--no-compile", *more, ranks=ranks))


@pytest.mark.slow
def test_compiled_ranks_resume_to_the_bit(train, flags, tmp_path):
    more = [*flags["train_doremi.py"], "--compile", f"--out_dir={tmp_path}/run"]
    run_forked("train_doremi.py", *more, ranks=2, kill=("step", 7), status=-9, timeout=500)
    run_forked("train_doremi.py", *more, "--resume", ranks=2, timeout=500)
    assert torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"] == 12
    assert_same(left_by(tmp_path / "run"), left_by(train("train_doremi.py", "--compile", ranks=2)[0]))
