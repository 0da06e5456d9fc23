"""Runs the scripts in processes forked from one that has torch already: a run costs its steps, not its imports.

The ranks are real processes that meet over gloo, as under torchrun. What a process does differently from one started by
hand is asked for by `kill` (it dies at a chosen point) and `record` (it notes its batches and gradients).
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "pytest", "report", "cli", "checkpoint", "model", "sampler",
           "runtime", "forked"]


def context():
    """The server from which processes are forked; it starts on first use, with one thread per process."""
    ctx = multiprocessing.get_context("forkserver")
    ctx.set_forkserver_preload(PRELOAD)
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", PYTHONPATH=path):
        multiprocessing.forkserver.ensure_running()
    return ctx


class Job:
    """A script that is running as `ranks` processes."""

    def __init__(self, script, *flags, ranks=1, kill=None, record=None):
        ctx, self.log = context(), tempfile.NamedTemporaryFile("w+", prefix="forked")  # noqa: SIM115
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        flags = [str(flag) for flag in flags]
        self.processes = [ctx.Process(target=work, args=(script, flags, rank, ranks, port, self.log.name, kill, record))
                          for rank in range(ranks)]
        for process in self.processes:
            process.start()

    def wait(self, timeout=120):
        """The exit status of the first process that failed, else 0; the other ranks of a failed one are killed."""
        end = time.monotonic() + timeout
        while (left := [p for p in self.processes if p.exitcode is None]) and time.monotonic() < end:
            if any(p.exitcode for p in self.processes):
                break
            left[0].join(0.02)
        failed = [p.exitcode for p in self.processes if p.exitcode]
        self.kill()
        assert failed or not left, f"still running after {timeout} s: {self.output()}"
        return failed[0] if failed else 0

    def kill(self):
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
            process.join()

    def output(self):
        return Path(self.log.name).read_text()


def run_forked(script, *flags, ranks=1, kill=None, record=None, status=0):
    """Runs a script to its end, which must be `status` (-9: killed).  Returns its output.

    kill: (point, n), see `arm`; record: a path, to which rank r saves PATH.r, see `note`.
    """
    job = Job(script, *flags, ranks=ranks, kill=kill, record=record)
    found = job.wait()
    assert found == status, f"status {found}, expected {status}: {job.output()}"
    return job.output()


def work(script, flags, rank, ranks, port, log, kill, record):
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    import checkpoint
    import runtime

    tqdm.set_lock(threading.RLock())  # its default is a semaphore, which a killed process leaves behind
    runtime.matmul_peak = lambda *_: 1e12  # a second's measurement, which only the mfu needs
    if kill and rank == 0:
        arm(runtime, checkpoint, *kill)
    notes = note(runtime) if record else None
    sys.argv = [script, *flags]
    runpy.run_path(str(ROOT / script), run_name="__main__")
    if record:
        torch.save(notes, f"{record}.{rank}")


def on_call(owner, name, n, action):
    """Replaces owner.name by itself, but for `action(original, *arguments)` at the n-th call."""
    original, calls = getattr(owner, name), [0]

    def replacement(*args, **kwargs):
        calls[0] += 1
        return (action if calls[0] == n else lambda f, *a, **k: f(*a, **k))(original, *args, **kwargs)

    setattr(owner, name, replacement)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def arm(runtime, checkpoint, point, n):
    """Makes this process kill itself at the n-th passage of a point.

    step: gradients are there, the optimizer has not moved.   update: the optimizer has moved, nothing is written.
    line: half a line of metrics is written.                  bytes: half of a checkpoint or history is written.
    flushed: a file is written and flushed, not yet renamed.  renamed: a file has just been renamed into its place.
    ahead: training has gone on to the next save, or to the end, and the n-th checkpoint is not yet renamed.
    term: SIGTERM, once the n-th step is recorded.
    """
    if point == "step":
        on_call(runtime, "clip_gradients", n, die)
    elif point == "update":
        on_call(runtime.Run, "record", n, die)
    elif point == "line":
        def half_a_line(_, run, line):
            run.metrics.write('{"step": ' + str(line["step"]) + ', "lo')
            run.metrics.flush()
            die()
        on_call(runtime.Run, "write", n, half_a_line)
    elif point == "bytes":
        def half_a_file(save, state, file):
            whole = tempfile.TemporaryFile()  # noqa: SIM115
            save(state, whole)
            size = whole.tell()
            whole.seek(0)
            file.write(whole.read(size // 2))
            file.flush()
            die()
        on_call(torch, "save", n, half_a_file)
    elif point == "flushed":
        on_call(os, "replace", n, die)
    elif point == "renamed":
        on_call(os, "replace", n, lambda replace, *paths: (replace(*paths), die()))
    elif point == "ahead":
        def held(save, writer, *args, **kwargs):
            writer.wait()
            os.replace = lambda *_: time.sleep(600)
            save(writer, *args, **kwargs)
            checkpoint.CheckpointWriter.wait = die
        on_call(checkpoint.CheckpointWriter, "save", n, held)
    elif point == "term":
        on_call(runtime.Run, "record", n, lambda record, *a: (record(*a), os.kill(os.getpid(), signal.SIGTERM)))
    else:
        raise ValueError(point)


def note(runtime):
    """Notes of every step, as the product goes: this rank's "tokens" (b, T + 1) and "domain" (b,) as they are fed to
    the model, and the "gradients" {name: tensor} of the global batch before they are clipped."""
    notes = {"tokens": [], "domain": [], "gradients": []}
    to_device, clip = runtime.Machine.to_device, runtime.clip_gradients

    def noted_batches(self, batch, micro_batch_size):
        micro_batches = to_device(self, batch, micro_batch_size)
        assert all(len(tokens) == micro_batch_size for tokens, _ in micro_batches)
        notes["tokens"].append(torch.cat([tokens for tokens, _ in micro_batches]))
        notes["domain"].append(torch.cat([domain for _, domain in micro_batches]))
        return micro_batches

    def noted_gradients(model, *args):
        notes["gradients"].append({name: p.grad.clone() for name, p in model.named_parameters()})
        return clip(model, *args)

    runtime.Machine.to_device, runtime.clip_gradients = noted_batches, noted_gradients
    return notes


def distance(a, b):
    """The largest deviation of two tensors, or of two dictionaries of tensors."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max(distance(a[name], b[name]) for name in a)
    return float(np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).max())
