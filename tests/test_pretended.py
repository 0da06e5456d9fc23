"""On pretended cards (pretend.py): tests of test_cuda.py, several ranks, other makes of cards, and Apple's."""
# ruff: noqa: F811

import functools

import pytest
import torch
from conftest import read_alpha
from forked import Job, distance, run_forked
from test_cuda import (  # noqa: F401
    test_checkpoint_needs_no_card,
    test_nothing_waits_between_log_lines,
    test_run_is_the_oracles,
    world,
)
from test_exactness import FLAGS, MODEL

from common import ranks
from common.run import read_config


@pytest.fixture(scope="module")
def launch():
    """forked.run_forked on pretended cards."""
    def run(script, *flags, cards=None, **options):
        seen = {"count": options.get("ranks", 1) // options.get("nodes", 1), **(cards or {})}
        run_forked(script, *flags, "--device=cuda", cards=seen, **options)

    return run


def proxy(launch, world, out, *flags, **options):
    """Six steps of a proxy, with a log line after every second one.  Return its last checkpoint."""
    launch("train_doremi.py", f"--reference={world('float64')}/reference", *FLAGS, "--max_steps=6", "--log_interval=2",
           "--save_interval=3", "--micro_batch_size=6", f"--out_dir={out}", *flags, **options)
    return torch.load(out / "ckpt.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(world, launch, tmp_path_factory):
    """A function from (ranks, nodes) to the last checkpoint of a proxy that waits for nothing between log lines."""
    return functools.cache(lambda ranks, nodes=1: proxy(
        launch, world, tmp_path_factory.mktemp("whole") / "run", ranks=ranks, nodes=nodes, may_wait=False))


def deviation(found, expected):
    return max(distance(found[name], expected[name]) for name in ("alpha_history", "model"))


def test_ranks_end_as_on_a_cpu(world, launch, whole, tmp_path):
    expected = proxy(run_forked, world, tmp_path / "cpu", "--device=cpu")
    own_card = proxy(launch, world, tmp_path / "own", ranks=2, cards={"count": 1})  # each sees its own only, as cuda:0
    for found in (whole(1), whole(2), whole(4, nodes=2), own_card):
        assert deviation(found, expected) < 1e-12


@pytest.mark.parametrize("ranks, kill", [(1, ("bytes", 2)), (2, ("step", 5))])
def test_killed_and_resumed_to_the_bit(world, launch, whole, tmp_path, ranks, kill):
    proxy(launch, world, tmp_path / "killed", ranks=ranks, kill=kill, status=-9)
    resumed = proxy(launch, world, tmp_path / "killed", "--resume", ranks=ranks)
    assert resumed["step"] == 6 and deviation(resumed, whole(ranks)) == 0


@pytest.mark.parametrize("cards, dtype", [
    ({}, "bfloat16"), ({"name": "Tesla T4", "capability": "7.5"}, "float32"),
    ({"name": "AMD Instinct MI300X", "hip": "7.0"}, "bfloat16")])
def test_the_dtype_is_the_cards(world, launch, tmp_path, cards, dtype):
    """bfloat16 where the card multiplies it."""
    launch("train_reference.py", *FLAGS, *MODEL, f"--data_dir={world('float32')}/data", f"--out_dir={tmp_path}/run",
           "--max_steps=2", "--warmup_steps=1", cards=cards)
    assert read_config(tmp_path / "run")["flags"]["dtype"] == dtype


def test_apples_card(world, tmp_path):
    flags = [f"--reference={world('float32')}/reference", *FLAGS, "--max_steps=4"]
    for device in ("mps", "cpu"):
        run_forked("train_doremi.py", *flags, f"--device={device}", f"--out_dir={tmp_path}/{device}",
                   cards={"type": "mps"})
    assert 0 < distance(read_alpha(tmp_path / "mps"), read_alpha(tmp_path / "cpu")) < 2e-6


@pytest.mark.parametrize("flags, cards", [
    (["--device=mps", "--dtype=float64"], {"type": "mps"}), (["--device=mps", "--dtype=bfloat16"], {"type": "mps"}),
    (["--device=cuda"], {"name": "Tesla V100-SXM2-16GB", "capability": "7.0"})])
def test_what_a_card_cannot_do_is_refused_in_a_line(world, tmp_path, flags, cards):
    """MPS has no float64, its bfloat16 attention is wrong, and PyTorch's wheels have no kernels for sm_70."""
    job = Job("train_reference.py", *FLAGS, *MODEL, f"--data_dir={world('float32')}/data", f"--out_dir={tmp_path}/run",
              "--max_steps=4", *flags, cards=cards)
    job.processes[0].join(60)
    assert job.processes[0].exitcode == 2 and "Traceback" not in job.output(), job.output()


def test_peak_of_a_card():
    assert ranks.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert ranks.peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is ranks.peak_flops("NVIDIA RTX A1000") is None
