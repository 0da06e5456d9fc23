"""Files that are read with care and written whole.  It imports neither torch nor anything of ranks."""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import signal
import sys
import urllib.parse
import uuid
import warnings
from pathlib import Path

from common.cli import UserError, shown

if os.name == "nt":
    import msvcrt
else:
    import fcntl

# ---- reading: what a file says is checked once, here ----


def read_json(path, remedy):
    """Return the object in a JSON file.  Raises UserError, which ends in `remedy`: what the user can do."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=unique_names)
        if not isinstance(value, dict):
            raise ValueError(f"no object: {shown(value, 60)}")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({shorter(error)}); {remedy}") from None
    return value


def parse_lines(file):
    """Yield (number from 1, value) of the lines of a binary file of JSON lines; ValueError in place of a bad value.

    A line ends at \\n alone: other line separators may stand within a string.
    """
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            yield number, ValueError(shorter(error))


def unique_names(pairs):
    """Make an object of JSON.  Raises ValueError where a name stands twice: json takes the last in silence."""
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r} stands twice")
        found[name] = value
    return found


def shorter(error, width=120):
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= width else text[: width - 3] + "..."


# ---- telling files apart ----

SAMPLES, SAMPLE_BYTES = 64, 1 << 14


def sample_sha256(path, size):
    """Hex digest of a sample of the first `size` bytes of a file, by which other contents of equal size are told apart.

    SHA-256 over the size in decimal digits, then 64 blocks of 16 KiB, of which the first begins at 0, the last ends at
    `size`, and block i begins at i * (size - 16384) // 63; over all bytes where the file has no more than these.
    """
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(file.read(size))
            return digest.hexdigest()
        for i in range(SAMPLES):
            file.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


DATA_FORMAT = 1  # of a data set: of meta.json and of what it lists


def folder_name(domain):
    """The name of a domain's folder: the domain, with slashes and other unusual characters as %XX."""
    return urllib.parse.quote(domain, safe=" ()")


# ---- writing: a file or a folder appears whole or not at all ----


def hold(path):
    """Open and lock a file for as long as this process lives.  Return it, or None where another process holds it.

    Where a disk has no locks, as on some clusters, say so and go on.
    """
    file = open(path, "a")  # noqa: SIM115
    try:
        if os.name == "nt":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError as error:
        warnings.warn(f"{path}: this disk has no file locks ({error.strerror}); nothing else must write there",
                      stacklevel=2)
    return file


def write_atomically(path, content):
    """Write a file that appears whole or not at all.  content: a string, or a function that writes to a binary file.

    Raises UserError for what the system says of this file: a full disk, a quota, a missing right.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) or "PytorchStreamWriter" in str(error):  # as torch.save calls a full disk
            raise UserError(f"{path} could not be written ({shorter(error)}); free space or choose another place, "
                            "then run the same command again") from None
        raise


@contextlib.contextmanager
def staged(out_dir):
    """Make a folder that becomes out_dir when the block ends, and is removed if the block fails or is stopped.

    Raises UserError if out_dir exists, and for what the system says of it. Folders that others have left are not
    touched. Where the last step fails the folder stays: it may be the work of hours.
    """
    target = Path(os.path.abspath(out_dir))
    if os.path.lexists(target):
        raise UserError(f"{out_dir}: exists already; delete it, or choose another place")
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    for other in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        print(f"{other}: is of a run that was killed, or is still being written; in the first case, delete it")
    try:
        (staging / "inside").mkdir(parents=True)
        staging.rename(f"{staging}2").rename(staging)  # some disks cannot, which is better known before the work
        (staging / "inside").rmdir()
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(f"{out_dir}: cannot be made and renamed ({error.strerror}); choose another place") from None
    handlers = {}
    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            handlers[number] = signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        yield staging
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{error.filename or out_dir}: {error.strerror or error}; free space or choose another "
                            "place, then run the same command again") from None
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        staging.rename(target)
    except OSError as error:
        raise UserError(f"{staging}: is finished; rename it to {target} yourself ({error.strerror})") from None
