"""Several nodes, and ranks that die or hang: real processes under torchrun. All of it is slow."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, run_here
from forked import distance, free_port

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TWO_RANKS = [*TORCHRUN, "--standalone", "--nproc_per_node=2"]
LONG = ["--max_steps=120", "--warmup_steps=4", "--save_interval=20", "--eval_interval=120"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, data_dir):
    """A finished reference in float64."""
    out = tmp_path_factory.mktemp("nodes") / "reference"
    run_here("train_reference.py", f"--data_dir={data_dir}", f"--out_dir={out}", *TINY, "--dtype=float64")
    return out


@pytest.fixture
def start(reference):
    """A function that starts a proxy under a launcher; what is left of its processes at the end is killed."""
    started = []

    def make(launcher, out, *flags, **env):
        command = [*map(str, launcher), str(ROOT / "train_doremi.py"), f"--reference={reference}", f"--out_dir={out}",
                   "--log_interval=3", "--eval_windows=4", "--no-compile", *flags]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                        env={**os.environ, "OMP_NUM_THREADS": "1", **env}))
        return started[-1]

    yield make
    for process in started:
        process.terminate()  # torchrun ends its ranks


def finish(process, status=0):
    """Wait for the end.  Return the output."""
    output = process.communicate(timeout=300)[0]
    assert process.returncode == status, output
    return output


def ranks_of(process):
    """{rank: pid} of the training processes below a launcher."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        rank = re.search(r"\0RANK=(\d+)", Path(f"/proc/{pid}/environ").read_text())
        if rank:
            found[int(rank[1])] = int(pid)
    return found


def wait_for_checkpoint(process, run):
    while process.poll() is None and not (run / "ckpt.pt").exists():
        time.sleep(0.01)


def test_killed_rank_comes_back(tmp_path, start):
    """SIGKILL of one rank: torchrun starts all ranks again, and they end with the bits of an undisturbed run."""
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "run"
    finish(start(TWO_RANKS, undisturbed, *LONG))
    process = start([*TWO_RANKS, "--max-restarts=3"], out, *LONG, "--resume",
                    TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    wait_for_checkpoint(process, out)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    output = finish(process)
    assert "after step" in output and output.count("parameters,") == 2, output  # it started twice
    found, expected = (torch.load(run / "ckpt.pt", weights_only=True) for run in (out, undisturbed))
    assert found["step"] == 120 and torch.equal(found["alpha_history"], expected["alpha_history"])
    assert all(torch.equal(found["model"][name], value) for name, value in expected["model"].items())


def test_hanging_rank_ends_the_job(tmp_path, start):
    """SIGSTOP of one rank: the others give up after --timeout, torchrun kills it half a minute later, and says so."""
    process = start(TWO_RANKS, tmp_path / "run", *LONG, "--timeout=20", "--max_steps=9999")
    wait_for_checkpoint(process, tmp_path / "run")
    os.kill(ranks_of(process)[1], signal.SIGSTOP)
    begin = time.monotonic()
    output = finish(process, status=1)
    assert time.monotonic() - begin < 20 + 30 + 60, output  # 20 of ours, 30 of torchrun, and a slow machine
    status = dict(re.findall(r"rank +: (\d) .*\n +exitcode +: (-?\d+)", output))
    assert status == {"0": "1", "1": "-9"}, output  # rank 1 had to be killed


def test_two_nodes(tmp_path, start):
    """Two nodes of two ranks each: the same alpha as one node of four, and one rank, to rounding."""
    flags = ["--max_steps=12", "--micro_batch_size=3"]
    node = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d",
            f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--local_addr=127.0.0.1"]
    nodes = [start([*node, f"--rdzv_conf=is_host={int(i == 0)}"], tmp_path / "two", *flags) for i in range(2)]
    for process in nodes:
        finish(process)
    finish(start([*TORCHRUN, "--standalone", "--nproc_per_node=4"], tmp_path / "one", *flags))
    finish(start([sys.executable], tmp_path / "alone", *flags))
    two, one, alone = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["alpha_history"]
                       for name in ("two", "one", "alone"))
    assert distance(two, one) < 1e-10 and distance(two, alone) < 1e-10
