"""Run the scripts as real processes that meet over gloo, forked from one that has torch already."""

import io
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
import pretend
import torch
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
PRELOAD = ["torch", "torch.distributed.fsdp", "torch._dynamo", "pytest", "common.ranks", "common.run", "model",
           "sampler", "forked"]


def context():
    """The server from which processes are forked; it starts on first use, with one thread per process."""
    ctx = multiprocessing.get_context("forkserver")
    ctx.set_forkserver_preload(PRELOAD)
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", PYTHONPATH=path):
        multiprocessing.forkserver.ensure_running()
    return ctx


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Job:
    """A script that is running as `ranks` processes on `nodes` nodes.  In flags, {rank} becomes the rank's number."""

    def __init__(self, script, *flags, ranks=1, nodes=1, **options):
        ctx, self.log = context(), tempfile.NamedTemporaryFile("w+", prefix="forked")  # noqa: SIM115
        port = free_port()
        self.processes = [
            ctx.Process(target=work, args=(script, [str(flag).replace("{rank}", str(rank)) for flag in flags], rank,
                                           ranks, ranks // nodes, port, self.log.name), kwargs=options)
            for rank in range(ranks)]
        for process in self.processes:
            process.start()

    def kill(self):
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
            process.join()

    def output(self):
        return Path(self.log.name).read_text()


def wait_for_metrics(out):
    """Until a run that has been started logs its first line, for a minute."""
    metrics, end = Path(out) / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < end and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)


def run_forked(script, *flags, status=0, timeout=120, **options):
    """Run a script to its end, or that of the first rank that fails, with `status` (-9: killed).  options: of Job."""
    job, end = Job(script, *flags, **options), time.monotonic() + timeout
    while (left := [p for p in job.processes if p.exitcode is None]) and time.monotonic() < end:
        if any(p.exitcode and (p.exitcode != status or status < 0) for p in job.processes):
            break  # the other ranks wait for one that was killed; those that are asked to stop all stop by themselves
        left[0].join(0.02)
    codes = [p.exitcode for p in job.processes]
    job.kill()
    found = next((code for code in codes if code), None if left else 0)
    assert found == status, f"status {found}, expected {status}: {job.output()}"


def work(script, flags, rank, ranks, local_ranks, port, log, kill=None, record=None, cards=None, may_wait=True):
    """Be one rank of a script.  kill: (point, n), of rank 0, see `arm`;  record: a path, to which rank r saves PATH.r,
    see `note`;  cards: settings of pretend.Cards, if any are pretended;  may_wait: else see `forbid_waits`."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % local_ranks), WORLD_SIZE=str(ranks),
                      LOCAL_WORLD_SIZE=str(local_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    tqdm.set_lock(threading.RLock())  # its default is a semaphore, which a killed process leaves behind
    if cards is not None:
        pretend.install(**cards)
    if kill and rank == 0:
        arm(*kill)
    if record:
        note(f"{record}.{rank}")
    if not may_wait:
        forbid_waits()
    sys.argv = [script, *flags]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def arm(point, n):
    """Make this process kill itself at the n-th passage of a point.

    step: gradients are there, the optimizer has not moved.   update: the optimizer has moved, nothing is written.
    line: half a line of metrics is written.                  bytes: half of a checkpoint or history is written.
    flushed: a file is written and flushed, not yet renamed.  renamed: a file has just been renamed into its place.
    SIGTERM, SIGINT: no kill but this signal, once the n-th step is recorded.
    """
    from common import ranks
    from common.run import Run

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def half_a_line(_, run, line):
        run.metrics.write('{"step": ' + str(line["step"]) + ', "lo')
        run.metrics.flush()
        die()

    def half_a_file(save, state, file):
        save(state, whole := io.BytesIO())
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        die()

    def then(action):
        return lambda original, *args, **kwargs: (original(*args, **kwargs), action())

    owner, name, action = {
        "step": (ranks, "clip_gradients", die), "update": (Run, "record", die),
        "line": (Run, "write", half_a_line), "bytes": (torch, "save", half_a_file),
        "flushed": (os, "replace", die), "renamed": (os, "replace", then(die)),
    }.get(point) or (Run, "record", then(lambda: os.kill(os.getpid(), signal.Signals[point])))
    original, calls = getattr(owner, name), [0]

    def replacement(*args, **kwargs):
        calls[0] += 1
        return action(original, *args, **kwargs) if calls[0] == n else original(*args, **kwargs)

    setattr(owner, name, replacement)


def note(path):
    """Save to `path` the gradients {name: tensor} of every step, of the global batch, before they are clipped, and how
    many bytes of parameters this rank held."""
    from common import ranks
    from common.run import Run

    notes = {"gradients": [], "held": 0}
    clip, close = ranks.clip_gradients, Run.close

    def noted_gradients(model, *args):
        notes["gradients"].append({name: getattr(p.grad, "full_tensor", p.grad.clone)()
                                   for name, p in model.named_parameters()})
        parts = [getattr(p, "to_local", p.detach)() for p in model.parameters()]
        notes["held"] = sum(part.numel() * part.element_size() for part in parts)
        return clip(model, *args)

    def noted_close(*args):
        torch.save(notes, path)
        close(*args)

    ranks.clip_gradients, Run.close = noted_gradients, noted_close


def forbid_waits():
    """Make CUDA raise where a step waits for the card between two lines, evaluations or checkpoints, from the second
    line on: until then memory is found and code is compiled."""
    from common import ranks
    from common.run import Run

    micro_batches, record, settled = ranks.Machine.micro_batches, Run.record, []

    def guarded_batches(machine, batch):
        if settled:
            torch.cuda.set_sync_debug_mode("error")
        return micro_batches(machine, batch)

    def guarded_record(run, step, **tensors):
        record(run, step, **tensors)
        if step == 2 * run.args.log_interval:
            settled.append(step)
        if any(run.is_due(step, n) for n in (run.args.log_interval, run.args.eval_interval, run.args.save_interval)):
            torch.cuda.set_sync_debug_mode("default")

    ranks.Machine.micro_batches, Run.record = guarded_batches, guarded_record


def distance(a, b):
    """The largest deviation of two tensors, or of two dictionaries of tensors."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max(distance(a[name], b[name]) for name in a)
    return float(np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).max())
