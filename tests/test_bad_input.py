"""Bad input to the training scripts: exit status 2, one line that names the file or flag, nothing half-written."""

import json
import math
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, TRAINING, edit, read_metrics, refused, rehash, run_here, write_dataset
from forked import Job, wait_for_metrics

from common.files import hold

BEGUN = {"flags.txt", "config.json", "metrics.jsonl"}


@pytest.fixture
def data(data_dir, tmp_path):
    """A copy of the data set to break."""
    return shutil.copytree(data_dir, tmp_path / "data")


def reference_refused(tmp_path, data, *flags, mentions, **options):
    return refused(tmp_path, mentions, "train_reference.py", *TINY, f"--data_dir={data}", f"--out_dir={tmp_path}/out",
                   *flags, **options)


def proxy_refused(tmp_path, reference, *flags, mentions, **options):
    return refused(tmp_path, mentions, "train_doremi.py", *TRAINING, f"--reference={reference}",
                   f"--out_dir={tmp_path}/out", *flags, **options)


def edit_checkpoint(run, change):
    change(checkpoint := torch.load(run / "ckpt.pt", weights_only=True))
    torch.save(checkpoint, run / "ckpt.pt")


def shortened(path):
    path.write_bytes(path.read_bytes()[:-7])


def backwards(path):
    path.write_bytes(path.read_bytes()[::-1])  # as long, and other text


@pytest.mark.parametrize("file, spoil", [
    ("rich/train.bin", Path.unlink), ("rich/train.bin", shortened), ("rich/val.bin", backwards),
    ("rich/train.bin", lambda path: path.write_bytes(path.read_bytes() + b"xx")),
    ("meta.json", Path.unlink), ("meta.json", shortened),
    ("meta.json", lambda path: edit(path, lambda meta: meta.update(format=2)))])
def test_data_that_is_not_what_meta_json_promises(tmp_path, data, file, spoil):
    spoil(data / file)
    reference_refused(tmp_path, data, mentions=[f"{data}/{file}"])


@pytest.mark.parametrize("train, val", [(16, 17), (17, 16)])
def test_domain_smaller_than_one_window(tmp_path, train, val):
    data = write_dataset(tmp_path / "data", {"big": ([1] * 99, [1] * 99), "tiny": ([1] * train, [1] * val)})
    reference_refused(tmp_path, data, mentions=["'tiny'", "train.bin" if train < val else "val.bin"])


@pytest.mark.parametrize("split, left", [("train", BEGUN), ("val", BEGUN | {"ckpt.pt"})])
def test_token_past_the_vocabulary(tmp_path, data, split, left):
    """The first batch with such a token is refused; the checkpoint of step 4 is from before the evaluation."""
    path = data / "counting" / f"{split}.bin"
    np.full_like(np.fromfile(path, dtype="<u2"), 64).tofile(path)
    rehash(data)
    assert reference_refused(tmp_path, data, mentions=["counting", f"{split}.bin", "64"], begun=True) == left


EVEN = {"counting": 1, "simple": 1, "rich": 1, "small": 1}


@pytest.mark.parametrize("spec, mentions", [
    ("0.5,0.5,-0.1,0.1", ["'rich'", "-0.1"]), ("nan,1,1,1", ["'counting'", "nan"]), ("1e308,1e308,0,0", ["counting"]),
    ("0,0,0,0", ["sum to 0"]), ("0.5,0.5", ["2 weights", "4 domains"]), ("1,1,1,some", ["some"]), ("unifrom", []),
    ("temperature:nan", []), ("uniform+unimax:0", []), ("uniform+", []), ("uniform+1,1", ["2 weights"]),
    ("nowhere.json", []), ({**EVEN, "arxiv": 1}, ["arxiv"]), ({"counting": 1, "simple": 1}, ["rich", "small"]),
    ({"domain_weights": {**EVEN, "rich": -1}}, ["rich", "-1"]), ([0.25] * 4, []),
    *(({**EVEN, "rich": weight}, ["rich"]) for weight in (math.nan, 10**400, "1"))])
def test_weights(tmp_path, data_dir, spec, mentions):
    """On the command line, or in a file."""
    if not isinstance(spec, str):
        (tmp_path / "my_weights.json").write_text(json.dumps(spec))
        spec = tmp_path / "my_weights.json"
    reference_refused(tmp_path, data_dir, f"--sampling_weights={spec}",
                      mentions=[str(spec).removeprefix("uniform+"), *mentions])


@pytest.mark.parametrize("flag, ranks", [
    *((flag, 1) for flag in (
        "--batch_size=0", "--max_steps=ten", "--micro_batch_size=5", "--warmup_steps=13", "--min_lr=1", "--beta1=1",
        "--learning_rate=nan", "--weight_decay=-1", "--n_head=5", "--n_kv_head=3", "--device=abacus", "--dtype=float16",
        "--max_step=3", "@nowhere.txt", "stray", "--wandb=online", f"--seed={2**63}")),
    ("--batch_size=12", 5), ("--micro_batch_size=3", 3)])
def test_flags(tmp_path, data_dir, monkeypatch, flag, ranks):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", "/nowhere")  # nor a key there
    for name, value in {"RANK": 0, "WORLD_SIZE": ranks, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": ranks}.items():
        monkeypatch.setenv(name, str(value))
    reference_refused(tmp_path, data_dir, flag, mentions=[flag.split("=")[0].lstrip("-@")])


@pytest.mark.parametrize("flag", ["--smoothing=1.5", "--step_size=-1", "--n_layer=2", "--sampling_weights=1,1,0,1"])
def test_flags_of_the_proxy(tmp_path, world, flag):
    proxy_refused(tmp_path, world.reference, flag, mentions=[flag.split("=")[0]])


@pytest.mark.parametrize("spoil, mentions", [
    (lambda run, data: shutil.rmtree(run), ["config.json"]),
    (lambda run, data: shortened(run / "config.json"), ["config.json"]),
    (lambda run, data: edit(run / "config.json", lambda config: config["flags"].update(seed=9)), ["ckpt.pt", "seed"]),
    (lambda run, data: edit(run / "config.json", lambda config: config["model"].update(n_layer=2)), ["n_layer"]),
    (lambda run, data: edit(run / "config.json", lambda config: config.update(stage="large")), ["large"]),
    (lambda run, data: (run / "ckpt.pt").unlink(), ["ckpt.pt"]),
    (lambda run, data: edit_checkpoint(run, lambda checkpoint: checkpoint.update(step=8)), ["8 of 12", "--resume"]),
    (lambda run, data: shortened(run / "ckpt.pt"), ["ckpt.pt"]),
    (lambda run, data: edit(data / "meta.json", lambda meta: meta.update(tokenizer_sha256="other")), ["tokenizer"]),
    (lambda run, data: edit(data / "meta.json", lambda meta: meta["domains"].pop("small")), ["small"])])
def test_reference_that_is_broken_or_of_other_data(tmp_path, data, world, spoil, mentions):
    reference = shutil.copytree(world.reference, tmp_path / "reference")
    spoil(reference, data)
    proxy_refused(tmp_path, reference, f"--data_dir={data}", mentions=mentions)


def test_run_is_not_overwritten_or_resumed_with_other_flags(tmp_path, data_dir, world):
    shutil.copytree(world.reference, tmp_path / "out")
    reference_refused(tmp_path, data_dir, "--seed=2", mentions=[f"{tmp_path}/out", "--resume"])
    for flag in ("--seed=2", "--max_steps=24", "--n_layer=2", "--sampling_weights=uniform", "--dtype=float64"):
        reference_refused(tmp_path, data_dir, "--resume", flag, mentions=["ckpt.pt", flag[2:].split("=")[0]])
    torch.save({"stage": print}, tmp_path / "out/ckpt.pt")  # code, which weights_only does not run
    reference_refused(tmp_path, data_dir, "--resume", mentions=[f"{tmp_path}/out/ckpt.pt"])
    (tmp_path / "file").write_text("precious")
    reference_refused(tmp_path, data_dir, f"--out_dir={tmp_path}/file", mentions=[f"{tmp_path}/file"])


def test_resumption_with_other_data_or_reference(tmp_path, data_dir, data, world):
    """The same flags, data and shape of the reference: its parameters tell it apart."""
    shutil.copytree(world.reference, tmp_path / "out")
    other = shutil.copytree(data, tmp_path / "other")
    edit(other / "meta.json", lambda meta: meta.update(domains=dict(reversed(meta["domains"].items()))))
    reference_refused(tmp_path, other, "--resume", mentions=["ckpt.pt", "domains"])
    (np.arange(2000, dtype="<u2") % 64).tofile(data / "rich/train.bin")  # as many tokens, of other text
    rehash(data)
    reference_refused(tmp_path, data, "--resume", mentions=["ckpt.pt", "sample_sha256"])
    shutil.copytree(world.proxy, tmp_path / "out", dirs_exist_ok=True)
    reference_refused(tmp_path, data_dir, "--resume", mentions=["ckpt.pt", "proxy"])
    reference = shutil.copytree(world.reference, tmp_path / "reference")
    edit_checkpoint(reference, lambda checkpoint: checkpoint["model"]["norm.weight"].add_(0.5))
    proxy_refused(tmp_path, reference, "--resume", mentions=["ckpt.pt", "fingerprint"])


@pytest.mark.parametrize("rate, what, log_interval, step", [("1e30", "gradient", 1, 2), ("1e300", "loss", 12, 4)])
def test_too_large_a_learning_rate(tmp_path, data_dir, rate, what, log_interval, step):
    """Found at the next line or checkpoint; no checkpoint has it."""
    flags = [f"--learning_rate={rate}", "--grad_clip=0", "--warmup_steps=0", f"--log_interval={log_interval}"]
    left = reference_refused(tmp_path, data_dir, *flags, mentions=[f"step {step}", what, "not finite"], begun=True)
    assert left == BEGUN and len(read_metrics(tmp_path / "out")) == (1 if log_interval == 1 else 0)


@pytest.mark.parametrize("file, size", [("config.json", 1000), ("metrics.jsonl", 4096), ("ckpt.pt", 8000)])
def test_full_disk(tmp_path, world, file, size):
    """The line names the file; nothing half-written is left; with space again, the same command continues."""
    flags = [*TRAINING, f"--reference={world.reference}", f"--out_dir={tmp_path}/out", "--resume", "--log_interval=1",
             *(["--save_interval=100", "--max_steps=100"] if file == "metrics.jsonl" else [])]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # no file may grow past it
    try:
        said = run_here("train_doremi.py", *flags, status=2).stderr
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"{tmp_path}/out/{file}" in said.splitlines()[-1] and "Traceback" not in said
    assert not (tmp_path / "out/ckpt.pt").exists() and not list((tmp_path / "out").glob(".*.tmp"))
    run_here("train_doremi.py", *flags)


def test_one_directory_one_run(tmp_path, world):
    """While a run lives, no second one writes there; a kill frees the directory."""
    out = tmp_path / "out"
    flags = [*TRAINING, f"--reference={world.reference}", f"--out_dir={out}"]
    job = Job("train_doremi.py", *flags, "--max_steps=100000", "--log_interval=1")
    wait_for_metrics(out)
    refused(tmp_path / "nothing", ["another process is training there"], "train_doremi.py", *flags, "--resume")
    job.kill()
    hold(out / ".lock").close()
