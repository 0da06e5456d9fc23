"""The machinery: what a run's directory says, its identity, and wandb."""

import json
import math
import shlex
import signal
import time

import pytest
from conftest import read_metrics, run_here

from common.run import NOT_COMPARED, Run, identity, read_config

WORK = {"tokens_per_second", "mfu", "seconds"}  # what differs between two runs of the same
DOMAINS = ["counting", "simple", "rich", "small"]


def comparable(run):
    return [{key: value for key, value in line.items() if key not in WORK} for line in read_metrics(run)]


@pytest.mark.parametrize("name, own", [("reference", []), ("proxy", ["alpha", "excess"])])
def test_metrics(world, name, own):
    """Steps of 12 sequences of 16 tokens: 192. A line every 3 steps, an evaluation every 6."""
    lines = read_metrics(getattr(world, name))
    assert lines.pop()["ended"] == "finished"
    training, evaluations = ([line for line in lines if key in line] for key in ("loss", "val_loss"))
    assert [line["step"] for line in lines] == [3, 6, 6, 9, 12, 12] and len(training) == 4
    for line in training:
        assert min(line["tokens_per_second"], line["grad_norm"], line["lr"]) > 0
        assert line["mfu"] is None  # no card whose peak is known
        assert all(list(line[key]) == DOMAINS for key in ["epochs", *own])
        assert min(line["domain_loss"].values()) <= line["loss"] <= max(line["domain_loss"].values())
        if name == "reference":  # without a terminal, a line for each
            assert f"step {line['step']} of 12, loss {line['loss']:.3f}" in world.said
    for line in evaluations:
        assert line["tokens"] == 192 * line["step"]
        assert line["val_loss_mean"] == pytest.approx(sum(line["val_loss"].values()) / 4)
        assert line["val_loss_worst"] == max(line["val_loss"].values())
        for domain in DOMAINS:  # conftest says three bytes a token
            assert line["val_bpb"][domain] == pytest.approx(line["val_loss"][domain] / 3 / math.log(2))
    # The last epochs are the draws of 12 batches: windows are 374, 187, 124, 18
    assert sum(training[-1]["epochs"][d] * n for d, n in zip(DOMAINS, [374, 187, 124, 18])) == pytest.approx(144)


@pytest.mark.parametrize("script, name", [("train_reference.py", "reference"), ("train_doremi.py", "proxy"),
                                          ("train_large.py", "reference")])
def test_a_run_repeats_from_its_own_directory(world, tmp_path, script, name):
    first, again = getattr(world, name), tmp_path / "it's # again"
    run_here(script, f"@{first}/flags.txt", f"--out_dir={again}")
    assert comparable(again) == comparable(first)
    flags = [(path / "flags.txt").read_text().splitlines() for path in (first, again)]
    assert [shlex.split(line) for a, line in zip(*flags, strict=True) if a != line] == [[f"--out_dir={again}"]]


def test_identity_is_what_makes_a_run_this_experiment(world):
    """Every flag but those of places and machines; domains may be called as the config's own sections are."""
    config = read_config(world.proxy)
    found = identity(config)
    assert not {"batch_size", "dtype", "eval_windows", "seed"} & NOT_COMPARED
    for name in config["flags"]:
        changed = {**config, "flags": {**config["flags"], name: "another"}}
        assert (identity(changed) == found) == (name in NOT_COMPARED), name
    assert identity({**config, "versions": {}, "device": "cuda", "world_size": 8, "wandb_id": "other"}) == found
    for domain in ("reference", "data", "out_dir", "device"):
        assert identity({**config, "sampling_weights": {**config["sampling_weights"], domain: 5}}) != found, domain


def test_wandb_has_the_metrics_of_a_stopped_and_resumed_run(world, tmp_path, monkeypatch):
    """Under one id; its offline files hold every number as JSON."""
    pytest.importorskip("wandb")
    out, record = tmp_path / "logged", Run.record
    flags = [f"@{world.proxy}/flags.txt", f"--out_dir={out}", "--wandb=offline"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "record", lambda run, step, **tensors: (
            record(run, step, **tensors), step == 5 and signal.raise_signal(signal.SIGTERM)))
        run_here("train_doremi.py", *flags, status=143)
    run_here("train_doremi.py", *flags, "--resume")
    assert comparable(out) == comparable(world.proxy)
    files = list(out.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1
    words = ["train/loss", "train/lr", "alpha/rich", "excess/rich", "val_loss/rich", "val/loss_worst"]
    for line in read_metrics(out):
        values = [*line.get("alpha", {}).values(), *line.get("val_loss", {}).values()]
        words += [json.dumps(value) for value in values]
    end = time.monotonic() + 30  # wandb's own process may still write
    while missing := [word for word in words if word.encode() not in b"".join(file.read_bytes() for file in files)]:
        assert time.monotonic() < end, missing
