"""common/files.py: folders that appear whole or not at all, and the hash by which files are told apart."""

import errno
import hashlib
import os
import signal
import time
from pathlib import Path
from unittest import mock

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


def test_staged(tmp_path, capsys):
    """It appears whole, or not at all after Ctrl-C or on a full disk; folders of others are as they were."""
    (tmp_path / ".x.tmp").mkdir()
    (tmp_path / ".x.tmp/notes").write_text("precious")
    (tmp_path / ".x.0123abcd.tmp").mkdir()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as stopped, files.staged(tmp_path / "x") as folder:
        (folder / "file").write_text("1")
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(9)
    with pytest.raises(files.UserError, match="No space left"), files.staged(tmp_path / "x"):
        Path("/dev/full").write_text("x" * 99_999)
    assert stopped.value.code == 130 and {number: signal.getsignal(number) for number in before} == before
    with mock.patch.object(signal, "getsignal", lambda number: signal.SIG_IGN), files.staged(tmp_path / "x") as folder:
        assert signal.signal(signal.SIGINT, before[signal.SIGINT]) == before[signal.SIGINT]  # what nohup set stays
        (folder / "file").write_text("2")
    assert (tmp_path / "x/file").read_text() == "2" and (tmp_path / ".x.tmp/notes").read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"x", ".x.tmp", ".x.0123abcd.tmp"}
    assert ".x.0123abcd.tmp" in capsys.readouterr().out


def test_a_folder_that_cannot_be_renamed(tmp_path, monkeypatch):
    """Found before the work; and what fails at the end removes nothing."""
    rename, done = Path.rename, []

    def refuse(path, target):
        if done:
            raise OSError(errno.EXDEV, "cross-device link")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(files.UserError, match="is finished") as error, files.staged(tmp_path / "x") as folder:
        (folder / "file").write_text("hours of work")
        done.append(True)
    assert str(folder) in str(error.value) and (folder / "file").read_text() == "hours of work"
    with pytest.raises(files.UserError, match="renamed"), files.staged(tmp_path / "y"):
        done.append("never")
    assert done == [True] and list(tmp_path.iterdir()) == [folder]
