"""common/files.py: folders that appear whole or not at all, and the hash by which files are told apart."""

import hashlib
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from common import files


def test_sample_sha256(tmp_path):
    """Of a large file: its size, and 64 blocks of 16 KiB from its beginning to its end. What follows does not count."""
    size = 3_000_001
    data = np.random.default_rng(0).bytes(size)
    (tmp_path / "x").write_bytes(data + b"more")
    starts = [i * (size - 16384) // 63 for i in range(64)]
    expected = hashlib.sha256(b"3000001" + b"".join(data[start : start + 16384] for start in starts)).hexdigest()
    assert files.sample_sha256(tmp_path / "x", size) == expected and starts[-1] + 16384 == size
    assert files.sample_sha256(tmp_path / "x", size - 1) != expected


@pytest.fixture
def handlers():
    """Bring back the signals' handlers, which a stopped run leaves as it needed them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_staged(tmp_path, monkeypatch, handlers):
    """Two runs do not write one folder; a second Ctrl-C does not stop the cleaning; a full disk is named."""
    with files.staged(tmp_path / "x") as folder:
        (folder / "file").write_text("1")
        with pytest.raises(files.UserError, match="another run"), files.staged(tmp_path / "x"):
            pass
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["file"]
    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: (os.kill(os.getpid(), signal.SIGINT),
                                                                    remove(*args, **options)))
    with pytest.raises(SystemExit), files.staged(tmp_path / "y"):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(9)
    with pytest.raises(files.UserError, match="No space left"), files.staged(tmp_path / "y"):
        Path("/dev/full").write_text("x" * 99_999)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
