"""Bad input to the training scripts: exit status 2, one line that names the file or flag, nothing half-written."""

import contextlib
import json
import resource
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, edit, read_metrics, refused, rehash, run_here, write_dataset
from forked import Job

from common import ranks
from common.files import hold, write_atomically

TRAINING = [flag for flag in TINY if not flag.startswith(("--block_size", "--n_"))]
BEGUN = {"flags.txt", "config.json", "metrics.jsonl"}


@pytest.fixture(scope="module")
def world(tmp_path_factory, data_dir):
    """A data set and a finished reference and proxy of it, which the tests copy before they break them."""
    directory = tmp_path_factory.mktemp("bad input")
    reference, proxy = directory / "reference", directory / "proxy"
    run_here("train_reference.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={reference}")
    run_here("train_doremi.py", *TRAINING, f"--reference={reference}", f"--out_dir={proxy}")
    return SimpleNamespace(data=data_dir, reference=reference, proxy=proxy)


@pytest.fixture
def data(world, tmp_path):
    """A copy of the data set to break."""
    return shutil.copytree(world.data, tmp_path / "data")


def reference_refused(tmp_path, data, *flags, mentions, **options):
    return refused(tmp_path, mentions, "train_reference.py", *TINY, f"--data_dir={data}", f"--out_dir={tmp_path}/out",
                   *flags, **options)


def proxy_refused(tmp_path, reference, *flags, mentions, **options):
    return refused(tmp_path, mentions, "train_doremi.py", *TRAINING, f"--reference={reference}",
                   f"--out_dir={tmp_path}/out", *flags, **options)


def edit_checkpoint(run, change):
    change(checkpoint := torch.load(run / "ckpt.pt", weights_only=True))
    torch.save(checkpoint, run / "ckpt.pt")


@pytest.mark.parametrize("file, spoil", [
    *((f"rich/{split}.bin", spoil) for split in ("train", "val") for spoil in (
        lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-7]),
        lambda path: path.write_bytes(path.read_bytes() + b"xx"),
        lambda path: path.write_bytes(path.read_bytes()[::-1]))),  # as long, and other text
    ("meta.json", lambda path: path.unlink()), ("meta.json", lambda path: path.write_text("{")),
    ("meta.json", lambda path: edit(path, lambda meta: meta.update(format=2))),
    ("meta.json", lambda path: edit(path, lambda meta: meta.pop("format"))),
    ("rich/train.bin", lambda path: edit(path.parent.parent / "meta.json", lambda meta: meta["domains"]["rich"].update(
        train_tokens=4000, train_file_bytes=4000)))])  # 8,000 bytes are needed
def test_data_that_is_not_what_meta_json_promises(tmp_path, data, file, spoil):
    spoil(data / file)
    reference_refused(tmp_path, data, mentions=[f"{data}/{file}"])


@pytest.mark.parametrize("train, val", [(16, 17), (17, 16)])
def test_domain_smaller_than_one_window(tmp_path, train, val):
    data = write_dataset(tmp_path / "data", {"big": ([1] * 99, [1] * 99), "tiny": ([1] * train, [1] * val)})
    reference_refused(tmp_path, data, mentions=["'tiny'", "train.bin" if train < val else "val.bin"])


@pytest.mark.parametrize("split, left", [("train", BEGUN), ("val", BEGUN | {"ckpt.pt"})])
def test_token_past_the_vocabulary(tmp_path, data, split, left):
    """The first batch with such a token is refused; none is in a checkpoint (the first is of step 4, before it)."""
    path = data / "counting" / f"{split}.bin"
    np.full_like(np.fromfile(path, dtype="<u2"), 64).tofile(path)
    rehash(data)
    assert reference_refused(tmp_path, data, mentions=["counting", f"{split}.bin", "64"], begun=True) == left


EVEN = {"counting": 1, "simple": 1, "rich": 1, "small": 1}


@pytest.mark.parametrize("spec, mentions", [
    ("0.5,0.5,-0.1,0.1", ["'rich'", "-0.1"]), ("nan,1,1,1", ["'counting'", "nan"]), ("1,inf,1,1", ["'simple'", "inf"]),
    ("0,0,0,0", ["sum to 0"]), ("1e308,1e308,0,0", ["counting"]),
    ("0.5,0.5", ["2 weights", "4 domains"]), ("1,1,1,some", ["some"]), ("unifrom", []),
    ("temperature:warm", []), ("temperature:nan", []), ("unimax:0", []), ("unimax:nan", []),
    ("unimax:-1", []), ("uniform+unimax:nan", []), ("uniform+", []), ("uniform+1,1", ["2 weights"]),
    ("nowhere.json", []),
    ({**EVEN, "arxiv": 1}, ["arxiv"]), ({"counting": 1, "simple": 1}, ["rich", "small"]),
    ({"domain_weights": {**EVEN, "rich": -1}}, ["rich", "-1"]), ({**EVEN, "rich": float("nan")}, ["rich", "NaN"]),
    ({**EVEN, "rich": 10**400}, ["rich"]),
    ({"train_domain_weights": {**EVEN, "rich": None}}, ["rich"]), ({**EVEN, "rich": "1"}, ["rich"]), ([0.25] * 4, [])])
def test_weights(tmp_path, world, spec, mentions):
    """On the command line, or in a file."""
    if not isinstance(spec, str):
        (tmp_path / "my_weights.json").write_text(json.dumps(spec))
        spec = tmp_path / "my_weights.json"
    flag = f"--sampling_weights={spec}"
    reference_refused(tmp_path, world.data, flag, mentions=[str(spec).removeprefix("uniform+"), *mentions])
    proxy_refused(tmp_path, world.reference, flag, mentions=mentions)


@pytest.mark.parametrize("flag, ranks", [
    *((flag, 1) for flag in (
        "--batch_size=0", "--max_steps=ten", "--micro_batch_size=5", "--warmup_steps=13", "--min_lr=1", "--beta1=1",
        "--learning_rate=0", "--learning_rate=nan", "--weight_decay=-1", "--seed=-1", "--n_head=5", "--n_kv_head=3",
        "--n_layer=0", "--device=abacus", "--dtype=float16", "--lr_schedule=linear", "--max_step=3", "@nowhere.txt",
        "stray")), ("--batch_size=12", 5), ("--batch_size=12", 24), ("--micro_batch_size=3", 3)])
def test_flags(tmp_path, world, monkeypatch, flag, ranks):
    for name, value in {"RANK": 0, "WORLD_SIZE": ranks, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": ranks}.items():
        monkeypatch.setenv(name, str(value))
    reference_refused(tmp_path, world.data, flag, mentions=[flag.split("=")[0].lstrip("-@")])


@pytest.mark.parametrize("flag", ["--smoothing=1.5", "--smoothing=nan", "--step_size=-1", "--n_layer=2"])
def test_flags_of_the_proxy(tmp_path, world, flag):
    proxy_refused(tmp_path, world.reference, flag, mentions=[flag.split("=")[0]])


@pytest.mark.parametrize("spoil, mentions", [
    (lambda run, data: shutil.rmtree(run), ["config.json"]),
    (lambda run, data: (run / "config.json").write_text("{"), ["config.json"]),
    (lambda run, data: (run / "config.json").write_text('{"flags": 3}'), ["config.json"]),
    (lambda run, data: edit(run / "config.json", lambda config: config["model"].update(n_layer=2)), ["n_layer"]),
    (lambda run, data: edit(run / "config.json", lambda config: config.update(stage="large")), ["large"]),
    (lambda run, data: (run / "ckpt.pt").unlink(), ["ckpt.pt"]),
    (lambda run, data: edit_checkpoint(run, lambda checkpoint: checkpoint.update(step=8)), ["8 of 12", "--resume"]),
    (lambda run, data: (run / "ckpt.pt").write_bytes((run / "ckpt.pt").read_bytes()[:3000]), ["ckpt.pt"]),
    (lambda run, data: edit(data / "meta.json", lambda meta: meta.update(tokenizer_sha256="other")), ["tokenizer"]),
    (lambda run, data: edit(data / "meta.json", lambda meta: meta.update(vocab_size=65)), ["vocab_size"]),
    (lambda run, data: edit(data / "meta.json", lambda meta: meta["domains"].pop("small")), ["small"])])
def test_reference_that_is_broken_or_of_other_data(tmp_path, data, world, spoil, mentions):
    reference = shutil.copytree(world.reference, tmp_path / "reference")
    spoil(reference, data)
    proxy_refused(tmp_path, reference, f"--data_dir={data}", mentions=mentions)


def test_run_is_not_overwritten(tmp_path, world):
    shutil.copytree(world.reference, tmp_path / "out")
    reference_refused(tmp_path, world.data, "--seed=2", mentions=[f"{tmp_path}/out", "--resume"])
    (tmp_path / "file").write_text("precious")
    reference_refused(tmp_path, world.data, f"--out_dir={tmp_path}/file", mentions=[f"{tmp_path}/file"])


@pytest.mark.parametrize("flag", ["--seed=2", "--batch_size=24", "--max_steps=24", "--learning_rate=0.1", "--n_layer=2",
                                  "--sampling_weights=uniform", "--dtype=float64", "--block_size=8", "--beta2=0.9"])
def test_resumption_with_other_flags(tmp_path, world, flag):
    shutil.copytree(world.reference, tmp_path / "out")
    reference_refused(tmp_path, world.data, "--resume", flag, mentions=["ckpt.pt", flag[2:].split("=")[0]])


def test_resumption_with_other_data_or_reference(tmp_path, data, world):
    """The same flags, data and shape of the reference: its parameters tell it apart."""
    shutil.copytree(world.reference, tmp_path / "out")
    edit(data / "meta.json", lambda meta: meta.update(domains=dict(reversed(meta["domains"].items()))))
    reference_refused(tmp_path, data, "--resume", mentions=["ckpt.pt", "domains"])
    edit(data / "meta.json", lambda meta: meta.update(domains=dict(reversed(meta["domains"].items()))))
    (np.arange(2000, dtype="<u2") % 64).tofile(data / "rich/train.bin")  # as many tokens, of other text
    rehash(data)
    reference_refused(tmp_path, data, "--resume", mentions=["ckpt.pt", "sample_sha256"])
    shutil.copytree(world.proxy, tmp_path / "out", dirs_exist_ok=True)
    reference_refused(tmp_path, world.data, "--resume", mentions=["ckpt.pt", "proxy"])
    reference = shutil.copytree(world.reference, tmp_path / "reference")
    edit_checkpoint(reference, lambda checkpoint: checkpoint["model"]["norm.weight"].add_(0.5))
    proxy_refused(tmp_path, reference, "--resume", mentions=["ckpt.pt", "fingerprint"])


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:4000]),
    lambda path: torch.save([1, 2], path), lambda path: torch.save({"stage": print}, path)])
def test_corrupt_checkpoint(tmp_path, world, spoil):
    """Or one that holds code, which weights_only does not run."""
    spoil(shutil.copytree(world.reference, tmp_path / "out") / "ckpt.pt")
    reference_refused(tmp_path, world.data, "--resume", mentions=[f"{tmp_path}/out/ckpt.pt"])


@pytest.mark.parametrize("rate, what, log_interval, step", [("1e30", "gradient", 1, 2), ("1e300", "loss", 12, 4)])
def test_too_large_a_learning_rate(tmp_path, world, rate, what, log_interval, step):
    """Found at the next line or checkpoint; no checkpoint has it."""
    flags = [f"--learning_rate={rate}", "--grad_clip=0", "--warmup_steps=0", f"--log_interval={log_interval}"]
    left = reference_refused(tmp_path, world.data, *flags, mentions=[f"step {step}", what, "not finite"], begun=True)
    assert left == BEGUN and len(read_metrics(tmp_path / "out")) == (1 if log_interval == 1 else 0)


def test_checkpoint_before_the_bad_step_stays(tmp_path, world, monkeypatch):
    """Step 6 has a gradient that is not finite: step 4's checkpoint is kept, and resumes."""
    calls, clip = [0], ranks.clip_gradients

    def spoilt(model, grad_clip):
        calls[0] += 1
        if calls[0] == 6:
            next(model.parameters()).grad[3, 5] = float("inf")
        return clip(model, grad_clip)

    monkeypatch.setattr(ranks, "clip_gradients", spoilt)
    proxy_refused(tmp_path, world.reference, mentions=["step 6", "gradient"], begun=True)
    checkpoint = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert checkpoint["step"] == 4 and all(value.isfinite().all() for value in checkpoint["model"].values())
    run_here("train_doremi.py", *TRAINING, f"--reference={world.reference}", f"--out_dir={tmp_path}/out", "--resume")
    losses = [[line.get("loss") for line in read_metrics(run)] for run in (tmp_path / "out", world.proxy)]
    assert losses[0] == losses[1]


@contextlib.contextmanager
def limited(size):
    """No file may grow past this many bytes, as `ulimit -f` has it: it stands in for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("file, size", [("config.json", 1000), ("ckpt.pt", 8000)])
def test_full_disk(tmp_path, world, file, size):
    """The line names the file; nothing half-written is left; with space again, the same command continues."""
    flags = [*TRAINING, f"--reference={world.reference}", f"--out_dir={tmp_path}/out", "--resume"]
    with limited(size):
        result = run_here("train_doremi.py", *flags, status=2)
    assert f"{tmp_path}/out/{file}" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert not (tmp_path / "out" / file).exists() and not list((tmp_path / "out").glob(".*.tmp"))
    run_here("train_doremi.py", *flags)


def test_what_is_not_about_the_file_keeps_its_own_words(tmp_path):
    """A CUDA error surfaces where a tensor is first read, which may be while a checkpoint is written."""
    def content(file):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        write_atomically(tmp_path / "ckpt.pt", content)
    assert not list(tmp_path.iterdir())


def test_one_directory_one_run(tmp_path, world):
    """While a run lives, no second one writes there; a kill frees the directory."""
    out = tmp_path / "out"
    flags = [*TRAINING, f"--reference={world.reference}", f"--out_dir={out}"]
    job = Job("train_doremi.py", *flags, "--max_steps=100000", "--log_interval=1")
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        time.sleep(0.05)
    said = run_here("train_doremi.py", *flags, "--seed=77", "--resume", status=2).stderr
    assert "another process is training there" in said and said.count("\n") == 1
    job.kill()
    hold(out / ".lock").close()


@pytest.mark.parametrize("edit_it", [
    lambda out: edit(out / "config.json", lambda config: config["model"].update(n_head=4)),
    lambda out: edit(out / "config.json", lambda config: config["flags"].update(seed=9)),
    lambda out: edit_checkpoint(out, lambda checkpoint: checkpoint["identity"].update(eval_windows=9))])
def test_config_and_checkpoint_of_two_runs(tmp_path, world, edit_it):
    edit_it(shutil.copytree(world.reference, tmp_path / "reference"))
    proxy_refused(tmp_path, tmp_path / "reference", mentions=["config.json", "ckpt.pt"])


def test_wandb_without_a_key(tmp_path, world, monkeypatch):
    """One line, before anything is written."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    reference_refused(tmp_path / "none", world.data, "--wandb=online", mentions=["--wandb=online", "wandb login"])


def test_full_disk_while_metrics_are_written(tmp_path, world):
    with limited(4096):
        left = reference_refused(tmp_path, world.data, "--log_interval=1", "--save_interval=100", "--max_steps=100",
                                 mentions=[f"{tmp_path}/out/metrics.jsonl"], begun=True)
    assert left == BEGUN
