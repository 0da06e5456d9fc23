"""The prediction of a run's memory, held against what the kernel says of real ranks.

Run as a script, under torchrun or not, this file trains with the flags that it is given and prints a rank's bytes.
"""

import ctypes
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_dataset

sys.path.append(str(ROOT / "experiments"))
import memory

COMMON = ["--block_size=64", "--batch_size=4", "--max_steps=3", "--eval_interval=3", "--eval_windows=1",
          "--save_interval=3", "--dtype=float32", "--device=cpu", "--no-compile"]
TINY = ["--n_layer=1", "--n_head=1", "--n_kv_head=1", "--n_embd=2", "--n_ffn=1"]
LARGE = ["--n_layer=8", "--n_head=8", "--n_kv_head=4", "--n_embd=512", "--n_ffn=1792"]  # 30.4M parameters
# Freed memory goes back to the kernel: the heap keeps it otherwise, and a small model looks like a large one
TRIM = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def resident(field):
    """Bytes of this process in memory: RssAnon now, VmHWM at most."""
    ctypes.CDLL(None).malloc_trim(0)
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def train_and_print(out, *flags):
    """Train, and write what this rank holds at the end of a backward pass (weights, moments, gradients), and at most
    in a step."""
    import runtime

    held, clip = [], runtime.clip_gradients

    def clip_noted(*args):
        held.append([resident("RssAnon"), resident("VmHWM")])
        norm = clip(*args)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again: that of the first step was of its making
        return norm

    runtime.clip_gradients, runtime.keep_freed_memory, runtime.matmul_peak = clip_noted, lambda: None, lambda *_: 1e12
    sys.argv, rank = ["train_reference.py", *flags], os.environ.get("RANK", "0")
    runpy.run_path(str(ROOT / "train_reference.py"), run_name="__main__")
    Path(f"{out}.{rank}").write_text(json.dumps(held[-1]))


def measured(tmp_path, ranks, data_dir, *flags):
    """[bytes held, bytes at most] of every rank: (ranks, 2)."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    out = tmp_path / f"bytes-{len(list(tmp_path.iterdir()))}"
    subprocess.run([sys.executable, *launcher, __file__, str(out), *COMMON, *flags, f"--data_dir={data_dir}",
                    f"--out_dir={out}-run"], env={**os.environ, **TRIM}, check=True, capture_output=True, timeout=300)
    return np.array([json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(ranks)])


def predicted(ranks, *flags):
    """{name: bytes of a rank}, as experiments/memory.py prints them."""
    out = subprocess.run([sys.executable, ROOT / "experiments/memory.py", *COMMON, *flags, f"--ranks={ranks}",
                          "--vocab_size=4096"], capture_output=True, text=True, check=True).stdout
    lines = re.finditer(r"^([a-z ]+?)\s+([\d.]+) ", out, re.MULTILINE)
    return {line[1].strip(): 1e9 * float(line[2]) for line in lines}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_prediction_against_a_run(tmp_path, ranks):
    """Weights, moments and gradients within 10%; the peak below the bound. A tiny model's run is taken off: libraries,
    gloo's buffers."""
    rng = np.random.default_rng(0)
    data = write_dataset(tmp_path / "data", {name: (rng.integers(4096, size=9000), rng.integers(4096, size=900))
                                             for name in "abcd"}, vocab_size=4096)
    rest = measured(tmp_path, ranks, data, *TINY)
    held, peak = np.median(measured(tmp_path, ranks, data, *LARGE) - rest, axis=0)
    bytes_of = predicted(ranks, *LARGE)
    expected = bytes_of["weights"] + bytes_of["moments"] + bytes_of["gradients"]
    print(f"\n{ranks} ranks: held {held / 1e6:.0f} MB, predicted {expected / 1e6:.0f}; at most {peak / 1e6:.0f}, "
          f"predicted {bytes_of['at most'] / 1e6:.0f}")
    assert held == pytest.approx(expected, rel=0.1)
    assert 0.95 * expected < peak < bytes_of["at most"]


def test_arithmetic(monkeypatch):
    """Eight ranks of a model whose sizes are worked out by hand: 2 blocks, width 8, 2 heads, hidden 24, 80 tokens."""
    shape = ["--vocab_size=80", "--n_layer=2", "--n_head=2", "--n_kv_head=1", "--n_embd=8", "--n_ffn=24",
             "--block_size=32", "--batch_size=16", "--micro_batch_size=2", "--dtype=float32"]
    monkeypatch.setattr(sys, "argv", ["memory.py", *shape, "--ranks=8"])
    args = memory.parse_args()
    found = memory.predict(args)
    # of 8 rows or more, each rank has an eighth: embedding 80 x 8; qkv (2 + 2) x 4 x 8, out 8 x 8, gate and up 48 x 8,
    # down 8 x 24; norms 2 x 8 in each block and 8 at the end
    numbers = (80 * 8 + 2 * (16 * 8 + 8 * 8 + 48 * 8 + 8 * 24 + 16) + 8) // 8
    assert [found[name] for name in ("weights", "moments", "gradients")] == [4 * numbers, 8 * numbers, 4 * numbers]
    args.activation_checkpointing = True
    kept, block_input = memory.predict(args)["activations"], 4 * 2 * 32 * 8  # float32, 2 sequences of 32, width 8
    one, two = memory.saved_for_backward(args, 1), memory.saved_for_backward(args, 2)
    assert kept == one + 2 * block_input
    # A block keeps for each token, in widths: of each norm its input, that divided by the root mean square, and the
    # output: 6; q 1, k 1/2, the product that v is a part of 2, attention's output 1; gate and up in one 6, silu(gate)
    # 3, their product 3. And 4 single numbers: two root mean squares, a log-sum-exp for each head
    assert two - one == block_input * (6 + 4.5 + 12) + 4 * 2 * 32 * 4
    one_batch, many = memory.at_most(found, False), memory.at_most(found, True)
    assert many - one_batch == found["gradients"]


if __name__ == "__main__":
    train_and_print(*sys.argv[1:])
