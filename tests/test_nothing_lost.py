"""Nothing that a run has made is lost: not by a start, the console, a moved directory, or a disk that fails."""

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT, TINY, TRAINING, read_alpha, run_here
from forked import Job, run_forked, wait_for_metrics
from test_bad_input import EVEN, proxy_refused

from common.cli import UserError
from common.run import load_checkpoint, load_finished

pytestmark = pytest.mark.filterwarnings("ignore:domain .* has been repeated")


@pytest.mark.parametrize("resume", [[], ["--resume"]])
@pytest.mark.parametrize("leave", [
    lambda out: (out / "ckpt.pt").unlink(),  # to save disk: the history and the metrics are the run's results
    lambda out: [path.unlink() for path in out.iterdir() if path.name != "config.json"] and None,
    lambda out: ((out / "ckpt.pt").unlink(), (out / "ckpt.pt").symlink_to("/not/mounted/ckpt.pt")),
    lambda out: [path.unlink() for path in out.iterdir()] and (out / "weights.json").write_text(json.dumps(EVEN))])
def test_a_start_removes_nothing(tmp_path, world, leave, resume):
    """Not results of a run without a checkpoint, nor files of the user."""
    out = shutil.copytree(world.proxy, tmp_path / "out")
    leave(out)
    weights = [f"--sampling_weights={out}/weights.json"] if (out / "weights.json").exists() else ["--seed=77"]
    proxy_refused(tmp_path, world.reference, *resume, *weights, mentions=[str(out)])


def test_the_printed_command_continues_a_run_that_was_moved(tmp_path, world):
    flags = [*TRAINING, f"--reference={world.reference}", f"--out_dir={tmp_path}/old"]
    run_forked("train_doremi.py", *flags, kill=("SIGTERM", 5), status=143)
    (tmp_path / "old").rename(tmp_path / "new place")
    said = run_here("average_weights.py", tmp_path / "new place", status=2).stderr
    script, *words = shlex.split(said.partition("continue it with: python ")[2])
    run_here(script, *words)
    assert not (tmp_path / "old").exists()
    assert read_alpha(tmp_path / "new place").tolist() == read_alpha(world.proxy).tolist()


def test_a_run_does_not_save_over_another_ones_directory(tmp_path, world):
    """Its own was removed while it lived, and used again."""
    out = tmp_path / "out"
    flags = [*TRAINING, f"--reference={world.reference}", f"--out_dir={out}"]
    job = Job("train_doremi.py", *flags, "--max_steps=100000", "--save_interval=100000")
    wait_for_metrics(out)
    shutil.rmtree(out)
    run_here("train_doremi.py", *flags)
    before = (out / "ckpt.pt").read_bytes()
    os.kill(job.processes[0].pid, signal.SIGTERM)
    job.processes[0].join(60)
    assert job.processes[0].exitcode == 2 and "another run has begun there" in job.output()
    assert (out / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("end", ["> /dev/full 2>&1", ">&- 2>&-", "2>&1 | true; exit ${PIPESTATUS[0]}"])
def test_the_console_cannot_end_a_run(tmp_path, data_dir, end):
    """A full disk, a closed stream, and a pipe like that of `| head`."""
    flags = [*TINY, f"--data_dir={data_dir}", f"--out_dir={tmp_path}/out"]
    command = shlex.join(map(str, [sys.executable, ROOT / "train_reference.py", *flags]))
    subprocess.run(["bash", "-c", f"{command} {end}"], timeout=120, check=True)
    assert torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["step"] == 12


def test_a_checkpoint_that_cannot_be_read_is_not_called_corrupt(world, monkeypatch):
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(UserError, match="Input/output error"):
        load_checkpoint(world.reference, mapped=True)


def test_a_resumed_run_lets_go_of_its_checkpoint(tmp_path, world):
    """Else each save needs the disk for two, and fails on Windows."""
    out = shutil.copytree(world.proxy, tmp_path / "out")
    mapped = load_finished(out, ("proxy",))
    assert str(out) in Path("/proc/self/maps").read_text()  # what is mapped is seen there
    del mapped
    checkpoint = load_checkpoint(out)  # as Run reads it
    assert checkpoint["step"] == 12 and str(out) not in Path("/proc/self/maps").read_text()
