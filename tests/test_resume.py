"""A run that dies at any moment and is resumed is the run that was never disturbed, to the last bit.

The short form kills at chosen points of the code (forked.arm), the long form at random times.
"""

import functools
import os
import random
import subprocess
import sys
import time

import pytest
import torch
from conftest import EXTRA, ROOT, TINY, TRAINING, read_metrics
from forked import Job, distance, run_forked

TIMINGS = ("tokens_per_second", "mfu", "seconds")
pytestmark = pytest.mark.filterwarnings("ignore:domain .* has been repeated")


def script_flags(script, world, dtype):
    """The flags of each script but --out_dir; `world` holds the data set and a reference."""
    common = [f"--data_dir={world}/data", "--seed=2", "--log_interval=2"]
    if script == "train_doremi.py":  # skewed: the lambda of an absent domain has to survive
        return [*TRAINING, *EXTRA, *common, f"--reference={world}/reference-{dtype}",
                "--sampling_weights=0.6,0.36,0.02,0.02"]
    return [*TINY, *common, f"--dtype={dtype}", "--sampling_weights=0.4,0.3,0.2,0.1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, data_dir):
    directory = tmp_path_factory.mktemp("resume")
    (directory / "data").symlink_to(data_dir)
    for dtype in ("float32", "float64"):
        run_forked("train_reference.py", f"--data_dir={data_dir}", f"--out_dir={directory}/reference-{dtype}", *TINY,
                   f"--dtype={dtype}", "--max_steps=30")
    return directory


@pytest.fixture(scope="module")
def undisturbed(world):
    """A function that runs a script from start to end without a stop, once per set of flags; returns what it left."""
    @functools.cache
    def make(script, *flags, dtype="float32", ranks=1):
        out = world / f"undisturbed{len(list(world.iterdir()))}"
        run_forked(script, *script_flags(script, world, dtype), *flags, f"--out_dir={out}", ranks=ranks)
        return left_by(out)

    return make


def left_by(out):
    """What a run leaves, without its timings: files, metrics, and {name: content} of its .pt files."""
    tensors = {path.name: torch.load(path, weights_only=True) for path in out.glob("*.pt")}
    del tensors["ckpt.pt"]["seconds"], tensors["ckpt.pt"]["identity"]
    metrics = [{name: value for name, value in line.items() if name not in TIMINGS} for line in read_metrics(out)]
    return {"files": sorted(path.name for path in out.iterdir()), "metrics": metrics, **tensors}


def same(a, b):
    """Equality of nested values, of tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same(found, expected):
    assert found["metrics"] == expected["metrics"]  # no gap, no duplicate
    assert same(found, expected)


# The lives of a run, each with the point where it is killed: see forked.arm. A run renames config.json, flags.txt and
# metrics.jsonl into place, then ckpt.pt at steps 4, 8 and 12; a proxy saves its history after that.
LIVES = [
    ("train_reference.py", 1, [("flushed", 5),  # the second checkpoint is whole on the disk, but not in its place
                               ("step", 3), ("line", 4)]),  # half a line of metrics is written, behind a checkpoint
    ("train_large.py", 1, [("renamed", 3)]),  # only an empty metrics.jsonl is there
    ("train_doremi.py", 1, [("renamed", 1), ("update", 3),  # both before the first checkpoint
                            ("bytes", 2),  # half of the second checkpoint is written
                            ("step", 1),  # killed again before it gets anywhere
                            ("renamed", 4),  # the second checkpoint has just been put into its place
                            ("flushed", 4),  # the last checkpoint is not in its place
                            ("renamed", 4),  # the last checkpoint is in its place, the history is not there
                            ("bytes", 1)]),  # half of the history is written
    ("train_doremi.py", 2, [("step", 7)]),  # two ranks: the moments of each come back to its shard
    ("train_doremi.py", 3, [("bytes", 2)]),
    *(pytest.param(script, 1, [(point, n)], marks=pytest.mark.slow) for script, files in [
        ("train_reference.py", {"flushed": 6, "renamed": 6, "bytes": 3}),
        ("train_doremi.py", {"flushed": 7, "renamed": 7, "bytes": 4})]
      for point, last in files.items() for n in range(1, last + 1))]


@pytest.mark.parametrize("script, ranks, lives", LIVES)
def test_killed_and_resumed(world, undisturbed, tmp_path, script, ranks, lives):
    flags = [*script_flags(script, world, "float32"), f"--out_dir={tmp_path}/run", "--resume"]
    for kill in lives:
        run_forked(script, *flags, ranks=ranks, kill=kill, status=-9)
    run_forked(script, *flags, ranks=ranks)
    assert_same(left_by(tmp_path / "run"), undisturbed(script, ranks=ranks))


@pytest.mark.parametrize("script, ranks, stops_at, name, status", [
    ("train_doremi.py", 1, 5, "SIGTERM", 143), ("train_reference.py", 1, 5, "SIGINT", 130),
    ("train_doremi.py", 2, 7, "SIGTERM", 143), ("train_large.py", 1, 5, "SIGHUP", 129)])
def test_stopped_and_resumed(world, undisturbed, tmp_path, script, ranks, stops_at, name, status):
    """A signal at step 5 finishes the step (several ranks agree on it in the next step, and know it after one more),
    saves, and exits with 128 + signal.  Resuming the finished run changes nothing."""
    flags = [*script_flags(script, world, "float32"), f"--out_dir={tmp_path}/run"]
    run_forked(script, *flags, ranks=ranks, kill=(name, 5), status=status)
    assert torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"] == stops_at
    for _ in range(2 if ranks == 1 else 1):
        run_forked(script, *flags, "--resume", ranks=ranks)
        assert_same(left_by(tmp_path / "run"), undisturbed(script, ranks=ranks))


@pytest.mark.parametrize("dtype, bound, ranks", [
    ("float64", 1e-10, (1, 2, 3)), ("float64", 1e-10, (2, 4, 1)), ("float32", 1e-5, (4, 2, 3))])
def test_resumed_with_other_ranks(world, undisturbed, tmp_path, dtype, bound, ranks):
    """Killed in the sixth step of each life but the last; an even number of ranks takes micro-batches of 3."""
    flags = [*script_flags("train_doremi.py", world, dtype), f"--out_dir={tmp_path}/run", "--resume"]
    for life, n in enumerate(ranks, start=1):
        end = {} if life == len(ranks) else {"kill": ("step", 6), "status": -9}
        run_forked("train_doremi.py", *flags, *(["--micro_batch_size=3"] if n % 2 == 0 else []), ranks=n, **end)
    found, expected = left_by(tmp_path / "run"), undisturbed("train_doremi.py", dtype=dtype)
    deviation = distance(found["ckpt.pt"]["alpha_history"], expected["ckpt.pt"]["alpha_history"])
    assert deviation < bound
    assert found["ckpt.pt"]["sampler"] == expected["ckpt.pt"]["sampler"]
    assert [line["step"] for line in found["metrics"]] == [line["step"] for line in expected["metrics"]]


@pytest.mark.slow
@pytest.mark.parametrize("script, ranks", [("train_large.py", 1), ("train_doremi.py", 1), ("train_doremi.py", 2)])
def test_random_kills(world, undisturbed, tmp_path, script, ranks):
    """Twelve kills at random times, with a checkpoint at every step, so many fall into the writing of one."""
    steps = ["--max_steps=150", "--save_interval=1", "--eval_interval=10"]
    flags = [*script_flags(script, world, "float32"), *steps, f"--out_dir={tmp_path}/run", "--resume"]
    for _ in range(12):
        job = Job(script, *flags, ranks=ranks)
        time.sleep(random.uniform(0.1, 0.6 * ranks))
        job.kill()
    run_forked(script, *flags, ranks=ranks)
    assert_same(left_by(tmp_path / "run"), undisturbed(script, *steps, ranks=ranks))


@pytest.mark.slow
def test_compiled_runs_on_several_threads_repeat_to_the_bit(world, tmp_path):
    """Threads of compiled code would otherwise add the embedding's gradient up in the order in which they come."""
    flags = [*script_flags("train_reference.py", world, "float32"), "--compile", "--batch_size=96", "--max_steps=60"]
    for name in "ab":
        command = [sys.executable, ROOT / "train_reference.py", *flags, f"--out_dir={tmp_path}/{name}"]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert_same(left_by(tmp_path / "a"), left_by(tmp_path / "b"))
