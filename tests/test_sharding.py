"""Several ranks: FSDP2 changes where numbers are kept, not what they are.

Alpha and the gradients of whole runs are compared with the oracle in test_exactness.py; here is what it cannot see.
"""

import functools
import multiprocessing
import os
from argparse import Namespace

import pytest
import torch
from conftest import TINY, read_metrics
from forked import Job, distance, free_port, run_forked

from common import ranks

WIDE = ["--block_size=16", "--n_layer=3", "--n_head=2", "--n_kv_head=1", "--n_embd=32", "--n_ffn=96", "--batch_size=12",
        "--max_steps=6", "--log_interval=3", "--eval_interval=3", "--eval_windows=2", "--save_interval=6",
        "--no-compile", "--seed=5", "--learning_rate=0.01", "--warmup_steps=0", "--sampling_weights=uniform"]


@pytest.fixture(scope="module")
def train(tmp_path_factory, data_dir):
    """A function that runs the reference on some ranks; returns its directory and each rank's notes."""
    @functools.cache
    def make(*flags, ranks=1, nodes=1):
        out = tmp_path_factory.mktemp("sharding") / "run"
        run_forked("train_reference.py", *WIDE, f"--data_dir={data_dir}", f"--out_dir={out}", *flags, ranks=ranks,
                   nodes=nodes, record=f"{out}-notes")
        return out, [torch.load(f"{out}-notes.{rank}", weights_only=True) for rank in range(ranks)]

    return make


def model_of(out):
    return torch.load(out / "ckpt.pt", weights_only=True)["model"]


@pytest.mark.parametrize("ranks, nodes, micro_batch_size", [(2, 1, 6), (3, 1, 1), (4, 2, 3)])
def test_gradients_are_summed_and_parameters_are_shared_out(train, ranks, nodes, micro_batch_size):
    """In every block and in the root: AdamW would hide it. Each rank holds 1 / N of its node's parameters.

    Evaluation has 8 windows, and its last round two of them for three ranks, which all have to pass as many.
    """
    out, notes = train("--dtype=float64", f"--micro_batch_size={micro_batch_size}", ranks=ranks, nodes=nodes)
    alone, expected = train("--dtype=float64")
    for found, gradients in zip(notes[0]["gradients"], expected[0]["gradients"], strict=True):
        assert found.keys() == gradients.keys() and len(found) == 2 + 3 * 6
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 1e-5, name
            assert distance(found[name], gradient) < 1e-12, name
    assert distance(model_of(out), model_of(alone)) < 1e-12
    for ours, theirs in zip(read_metrics(out), read_metrics(alone), strict=True):
        for name in theirs.keys() - {"tokens_per_second", "mfu", "seconds", "ended"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-11, abs=1e-12), name
    assert {type(value) for value in model_of(out).values()} == {torch.Tensor}  # a checkpoint needs no ranks to be read
    held, total = [own["held"] for own in notes], expected[0]["held"]
    assert sum(held) == nodes * total and max(held) <= 1.1 * total * nodes / ranks  # rows do not always divide


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("bfloat16", 3e-3)])
def test_losses_in_lower_precision_are_those_of_one_rank(train, dtype, bound):
    """Blocks are gathered in the compute dtype; the rotary table, the root and the sums are not rounded to it."""
    flags = f"--dtype={dtype}", "--learning_rate=0.003"  # larger steps amplify the rounding of the first
    (out, notes), (alone, expected) = (train(*flags, ranks=ranks) for ranks in (2, 1))
    for ours, theirs in zip(read_metrics(out), read_metrics(alone), strict=True):
        for name in {"loss", "val_loss"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], abs=bound), name
    for name, gradient in expected[0]["gradients"][0].items():  # the same parameters still: no step was taken
        found = notes[0]["gradients"][0][name]
        assert found.dtype == gradient.dtype == torch.float32
        assert distance(found, gradient) < 3 * bound * gradient.abs().max(), name


def test_one_large_step_in_bfloat16(train):
    """A rounded rotary table would show in the loss; the embedding's gradient, a sum over 24,576 tokens, would be wrong
    by 5% if it were added up in bfloat16."""
    flags = "--dtype=bfloat16", "--log_interval=1", "--max_steps=1", "--batch_size=1536", "--micro_batch_size=768"
    (alone, expected), (out, notes) = (train(*flags, ranks=ranks) for ranks in (1, 2))
    assert read_metrics(out)[0]["loss"] == pytest.approx(read_metrics(alone)[0]["loss"], abs=1e-12)
    found, gradient = (own[0]["gradients"][0]["embedding.weight"] for own in (notes, expected))
    assert distance(found, gradient) < 0.01 * gradient.abs().max()


def test_recomputed_activations_change_nothing(train):
    """To the bit: the same products in the same order."""
    (plain, _), (recomputed, _) = train(ranks=2), train("--activation_checkpointing", ranks=2)
    assert distance(model_of(plain), model_of(recomputed)) == 0


def test_rank_0_alone_needs_the_checkpoint(tmp_path, data_dir):
    """Two nodes without a shared disk: rank 0 has the checkpoint of step 4, rank 1 has nothing."""
    flags = [*TINY, f"--data_dir={data_dir}"]
    run_forked("train_reference.py", *flags, f"--out_dir={tmp_path}/whole", ranks=2)
    run_forked("train_reference.py", *flags, f"--out_dir={tmp_path}/run0", ranks=2, kill=("renamed", 4), status=-9)
    assert torch.load(tmp_path / "run0/ckpt.pt", weights_only=True)["step"] == 4
    run_forked("train_reference.py", *flags, f"--out_dir={tmp_path}/run{{rank}}", "--resume", ranks=2)
    assert distance(model_of(tmp_path / "run0"), model_of(tmp_path / "whole")) == 0
    assert not (tmp_path / "run1").exists()


@pytest.mark.parametrize("flag, named", [
    ("--seed=1{rank}", "seed is 11, but 10"), ("--sampling_weights=1,1,1,{rank}", "sampling_weights is ")])
def test_ranks_that_differ_refuse(tmp_path, data_dir, flag, named):
    """In one line, before anything is written."""
    job = Job("train_reference.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={tmp_path}/run", flag, ranks=2)
    for process in job.processes:
        process.join(60)
    assert [process.exitcode for process in job.processes] == [2, 2]
    assert "Traceback" not in job.output() and f"error: rank 1: {named}" in job.output()
    assert not (tmp_path / "run").exists()


def test_timeout_holds_in_every_group_of_two_nodes():
    """Groups that a mesh makes by itself wait ten minutes, whatever the flag says."""
    def check(rank, port=free_port()):  # noqa: B008
        os.environ.update(RANK=str(rank), WORLD_SIZE="4", LOCAL_WORLD_SIZE="2", LOCAL_RANK=str(rank % 2),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        machine = ranks.setup(Namespace(device="cpu", dtype="float32", batch_size=4, micro_batch_size=1, timeout=77))
        mesh = ranks.device_mesh(machine)
        waits = [mesh.get_group(name)._get_backend(machine.device).options._timeout.total_seconds()
                 for name in mesh.mesh_dim_names]
        machine.wait_for_all()
        assert mesh.shape == (2, 2) and waits == [77, 77]

    workers = [multiprocessing.get_context("fork").Process(target=check, args=(rank,)) for rank in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
