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

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")]
COMMON = ["--block_size=64", "--batch_size=4", "--max_steps=3", "--eval_interval=3", "--eval_windows=1",
          "--save_interval=3", "--dtype=float32", "--device=cpu", "--no-compile"]
TINY = ["--n_layer=1", "--n_head=1", "--n_kv_head=1", "--n_embd=2", "--n_ffn=1"]
LARGE = ["--n_layer=8", "--n_head=8", "--n_kv_head=4", "--n_embd=512", "--n_ffn=1792"]  # 30.4M parameters
# Freed memory goes back to the kernel: the heap keeps it otherwise, and a small model looks like a large one
TRIM = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def train_and_print(out, *flags):
    """Train, and write what this rank holds at the end of a backward pass (weights, moments, gradients), and at most
    in a step."""
    import runtime

    held, clip = [], runtime.clip_gradients

    def clip_noted(*args):
        ctypes.CDLL(None).malloc_trim(0)
        status = Path("/proc/self/status").read_text()
        held[:] = [1024 * int(re.search(rf"{field}:\s+(\d+)", status)[1]) for field in ("RssAnon", "VmHWM")]
        norm = clip(*args)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again: that of the first step was of its making
        return norm

    runtime.clip_gradients, runtime.keep_freed_memory, runtime.matmul_peak = clip_noted, lambda: None, lambda *_: 1e12
    sys.argv = ["train_reference.py", *flags]
    runpy.run_path(str(ROOT / "train_reference.py"), run_name="__main__")
    Path(f"{out}.{os.environ.get('RANK', 0)}").write_text(json.dumps(held))


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


if __name__ == "__main__":
    train_and_print(*sys.argv[1:])
