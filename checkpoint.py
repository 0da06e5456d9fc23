"""Files that survive a kill at any moment: checkpoints written in the background, all others whole or not at all.

Loading never runs code from a file (weights_only), and says in a line what is wrong with one that cannot be used.
"""

import atexit
import contextlib
import copy
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import cli
from cli import UserError, shown


class CheckpointWriter:
    """Writes a state to a file in a thread, from a copy of it: the caller stands still for the copy alone.

    The copy takes as much host memory again as the state has bytes (on CUDA it is page-locked, for which torch rounds a
    tensor's bytes up to a power of two). The first save allocates it and takes longer, later ones fill it anew.
    """

    def __init__(self):
        self.buffers = {}  # host tensors by their place in the state, e.g. ("optimizer", "state", 0, "exp_avg")
        self.writing = None  # the future of the last save

    @torch.no_grad()
    def save(self, path, state, first=lambda: None, then=lambda saved: None):
        """Returns as soon as `state` (dicts, lists, plain values, tensors on the host or on the current device) may
        change. Raises what went wrong in the last save: see `wait`.

        In the thread: first(), the file by write_atomically, then(copy of the state), each only after the one before.
        """
        self.wait()  # the last save reads the buffers
        saved, copied = self.snapshot(state), None
        if torch.cuda.is_initialized():
            device, copied = torch.cuda.current_device(), torch.cuda.Event(blocking=True)
            copied.record()  # on the current stream, behind the copies

        def write():
            if copied:
                with torch.cuda.device(device):  # a new thread is on device 0, and would make itself a context there
                    copied.synchronize()
            first()
            write_atomically(path, lambda file: torch.save(saved, file))
            then(saved)

        executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing = executor.submit(write)
        executor.shutdown(wait=False)  # its thread ends after this file, and the process after its thread
        atexit.register(self.report)

    def snapshot(self, value, *place):
        if isinstance(value, dict):
            return {key: self.snapshot(item, *place, key) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([self.snapshot(item, *place, i) for i, item in enumerate(value)])
        if not isinstance(value, torch.Tensor):
            return copy.deepcopy(value)
        buffer = self.buffers.get(place)
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            buffer = self.buffers[place] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return buffer.copy_(value, non_blocking=value.is_cuda)  # CUDA: by the stream, before the next step's work

    def wait(self):
        """Returns once the last save is on the disk; raises what kept it from there, an OSError or UserError."""
        writing, self.writing = self.writing, None
        atexit.unregister(self.report)
        if writing:
            writing.result()

    def report(self):
        """Where something else has ended the process, says so if the last save failed, too."""
        with contextlib.suppress(SystemExit):
            cli.run(self.wait)


def load_checkpoint(out_dir, stage, identity=None):
    """The checkpoint of a run, on the CPU, or None where there is none yet.

    Raises UserError where it cannot be read, is of another stage, or differs from `identity` (None: not compared).
    """
    path = Path(out_dir) / "ckpt.pt"
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = checkpoint["stage"]
    except Exception as error:  # torch.load raises whatever the broken bytes lead it to
        raise UserError(f"{path} cannot be read ({type(error).__name__}): it is corrupt or no checkpoint of this "
                        "project; delete it to start again.") from None
    if found != stage:
        raise UserError(f"{path} is the checkpoint of a {found} run, expected a {stage} run; check the directory.")
    for name, value in (identity or {}).items():
        before = checkpoint["identity"].get(name)
        if before != value:
            raise UserError(f"{path}: the run was started with {name} {shown(before)}, now it is {shown(value)}; "
                            "resume with the same flags and data, or choose another --out_dir.")
    return checkpoint


def write_atomically(path, content):
    """content: a string, or a function that writes to a binary file. The file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            file.write(content.encode()) if isinstance(content, str) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, RuntimeError):  # torch.save reports a full disk as one
            raise UserError(f"{path} could not be written ({error}); is the disk full?") from None
        raise


@contextlib.contextmanager
def naming(path):
    """Puts the path into an OSError of a write, which does not know where it goes."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def open_metrics(path, step):
    """Opens metrics.jsonl for appending behind `step`: later lines, and one cut short by a kill, are dropped."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            with contextlib.suppress(ValueError):
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
    write_atomically(path, "".join(kept))
    return open(path, "a")
