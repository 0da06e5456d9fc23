"""Files that appear whole or not at all.  It imports neither torch nor anything of ranks."""

import contextlib
import os
import shutil
import signal
import sys

from common.cli import UserError


def write_atomically(path, content):
    """Write a file that appears whole or not at all.  content: a string, or a function that writes to a binary file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode()) if isinstance(content, str) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError | RuntimeError):  # torch.save reports a full disk as the latter
            raise UserError(f"{path} could not be written ({error}); choose another --out_dir") from None
        raise

@contextlib.contextmanager
def staged(out_dir):
    """Make a folder that becomes out_dir when the block ends, and is removed if the block fails or is stopped."""
    staging = out_dir.with_name(f"{out_dir.name}.tmp")
    for path, remedy in (out_dir, "or choose another --out_dir"), (staging, "unless another run is writing it"):
        if path.exists():
            raise UserError(f"{path}: exists already; delete it, {remedy}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    staging.mkdir(parents=True)
    try:
        yield staging
        staging.rename(out_dir)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
