"""The frozen reference's token losses, kept beside the data: computed once, read in every later epoch, seed and run.

DATA_DIR/DOMAIN/reference_losses-KEY.bin is a header that says what the losses are of, and for each training window T
float16 in nats per token. It is sparse: it takes 2 bytes per token visited. KEY digests the header: the losses of
another reference, precision or data set have another name, and under a wrong name they are refused. A zero means "not
stored yet": where a kill cuts a write short, the window is computed again.

Used is always the loss rounded to float16, just computed or read, and the first that was stored stays: a run does not
depend on what it finds stored, as far as the forward pass gives a sequence the same losses in any batch.
Ranks and runs share a file: what they write is the same.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch

from cli import UserError

HEADER = 4096  # bytes
SMALLEST = 2.0**-24  # float16's smallest positive number: what a loss of zero is stored as


class LossCache:
    """origin: {name: JSON value}, what the losses depend on besides the data: the reference's parameters, shape and
    precision; device: where they are computed and used.  Raises UserError for files that cannot be used."""

    def __init__(self, dataset, origin, device):
        self.block_size, self.cuda = dataset.block_size, device.type == "cuda"
        self.paths, self.files, self.maps = [], [], []  # per domain; maps: (n, T) float16
        self.pending = None  # what was computed last and is on its way to the files
        for name, windows in zip(dataset.domains, dataset.train):
            header = describe(dataset, name, windows, origin)
            path = Path(dataset.directory) / name / f"reference_losses-{header[:16].decode()}.bin"
            shape = len(windows), self.block_size
            with explained(path):
                self.files.append(open_file(path, header, HEADER + 2 * shape[0] * shape[1]))
                self.maps.append(np.memmap(path, dtype="<f2", mode="r", offset=HEADER, shape=shape))
            self.paths.append(path)

    def read(self, domain, window):
        """What is stored of windows: losses (b, T) float16, and which rows are whole (b,) bool.  domain, window: (b,).
        The sampler calls it in its thread, as the companion of a batch."""
        losses = torch.empty(len(domain), self.block_size, dtype=torch.float16, pin_memory=self.cuda)
        rows = losses.numpy()
        for i in np.unique(domain):
            mine = np.flatnonzero(domain == i)
            rows[mine] = self.maps[i][window[mine]]
        return losses, rows.view(np.int16).all(axis=1)

    def losses(self, forward, tokens, batch, start):
        """The reference's losses (b, T) float32 of tokens (b, T + 1), the rows of `batch` from `start` on.

        forward: from tokens to losses (b, T); it is called where a row is not stored, for all rows: one shape.
        """
        rows = slice(start, start + len(tokens))
        losses, stored = (part[rows] for part in batch.companion)
        if not stored.all():
            self.flush()
            domain, window = batch.domain[rows].numpy(), batch.window[rows].numpy()
            losses, stored = self.read(domain, window)  # since the batch was gathered, the one before has been stored
        losses = losses.to(tokens.device, non_blocking=True)
        if not stored.all():
            computed = forward(tokens).clamp(min=SMALLEST).half()
            losses = torch.where((losses > 0).all(dim=1, keepdim=True), losses, computed)
            copy = losses.to("cpu", non_blocking=self.cuda)
            copied = torch.cuda.current_stream().record_event() if self.cuda else None
            self.pending = domain[~stored], window[~stored], copy, ~stored, copied
            if not self.cuda:  # a GPU is still at it: its losses are written before the next are looked for
                self.flush()
        return losses.float()

    def flush(self):
        """Writes what was computed last.  Raises UserError where it is not finite, or there is no space."""
        if self.pending is None:
            return
        (domain, window, copy, missing, copied), self.pending = self.pending, None
        if copied:
            copied.synchronize()
        rows = copy.numpy()[missing]
        for i, j, row, finite in zip(domain, window, rows, np.isfinite(rows).all(axis=1)):
            if not finite:
                raise UserError(f"{self.paths[i]}: a reference loss of window {j} is not finite in float16 (or above "
                                "65504 nats); it is not stored. Train the reference again.")
            with explained(self.paths[i]):  # pwrite, not the memory map: there a full disk would be a SIGBUS
                os.pwrite(self.files[i], row, HEADER + int(j) * row.nbytes)

    def close(self):
        self.flush()
        for file in self.files:
            os.close(file)


def describe(dataset, name, windows, origin):
    """The header of a domain's file: KEY (64 hex digits) of what follows, and as JSON what the losses are of."""
    sample = windows[np.linspace(0, len(windows) - 1, 64).astype(np.int64)]  # data may change and keep its size
    counts = {key: value for key, value in dataset.meta["domains"][name].items() if key.startswith("train_")}
    data = {"domain": name, "block_size": dataset.block_size, "tokenizer_sha256": dataset.meta["tokenizer_sha256"],
            **counts, "sample_sha256": hashlib.sha256(sample.tobytes()).hexdigest()}
    content = json.dumps({"reference": origin, "data": data}).encode() + b"\n"
    return (hashlib.sha256(content).hexdigest().encode() + b"\n" + content).ljust(HEADER, b"\0")


def open_file(path, header, size):
    """Descriptor of a file that begins with `header` and has `size` bytes; made, all zeros, where there is none."""
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(header)
                file.truncate(size)
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):  # another rank or run was faster: its file is the same
                os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    file = os.open(path, os.O_RDWR)
    found = os.fstat(file).st_size
    if found != size:
        raise UserError(f"{path} has {found:,} bytes, expected {size:,}: it is cut short or foreign; delete it.")
    found = os.pread(file, HEADER, 0)
    if found != header:
        raise UserError(f"{path} holds losses of another reference or other data: it begins with {found[:64]!r}, "
                        f"expected {header[:64]!r}; delete it, or give it back its name.")
    return file


@contextlib.contextmanager
def explained(path):
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --cache_reference_losses keeps 2 bytes per training token there: "
                        "make space, make it writable, or run without the flag.") from None
