"""Bad input to the training scripts: exit status 2, one line with value and mend, nothing half-written."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, read_metrics, run_script, write_dataset
from test_runtime import run_here

import runtime
import sampler
from sampler import domain_sums

REFERENCE = ["--block_size=16", "--n_layer=1", "--n_head=2", "--n_kv_head=1", "--n_embd=16", "--n_ffn=32"]
TRAINING = [flag for flag in TINY if flag not in REFERENCE]


@pytest.fixture(scope="module")
def world(tmp_path_factory, data_dir):
    """A data set and a finished reference and proxy of it, which the tests copy before they break them."""
    directory = tmp_path_factory.mktemp("bad input")
    reference, proxy = directory / "reference", directory / "proxy"
    for script, *flags in [("train_reference.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={reference}"),
                           ("train_doremi.py", *TRAINING, f"--reference={reference}", f"--out_dir={proxy}")]:
        result = run_here(script, *flags)
        assert result.returncode == 0, result.stderr
    return SimpleNamespace(data=data_dir, reference=reference, proxy=proxy)


@pytest.fixture
def data(world, tmp_path):
    """A copy of the data set to break."""
    return shutil.copytree(world.data, tmp_path / "data")


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} if directory.exists() else {}


def refused(script, out, *flags, mentions, late=False):
    """Asserts that a run is refused in one line that mentions all of `mentions`, and leaves OUT as it was.

    late: it had begun, so that a progress bar comes before the line, and what is written by then is whole.
    """
    before = contents(out)
    result = run_here(script, *flags, f"--out_dir={out}")
    assert_refused(script, result, mentions, late)
    after = contents(out)
    if not late:
        assert after == before and (before or not out.exists())
    assert not [path for path in after if path.suffix == ".tmp"]
    for path in after:
        if path.name == "ckpt.pt":
            checkpoint = torch.load(path, weights_only=True)
            assert all(value.isfinite().all() for value in checkpoint["model"].values())
        elif path.name == "metrics.jsonl":
            assert all(np.isfinite(line.get("loss", 0)) for line in read_metrics(path.parent))
        elif path.name == "config.json":
            json.loads(path.read_text())
    return after


def assert_refused(script, result, mentions, late=False):
    assert result.returncode == 2, result.stderr
    *bars, line = result.stderr.splitlines()
    assert f"{script}: error: " in line and "Traceback" not in result.stderr, result.stderr
    assert late or not bars, bars
    assert result.stderr.endswith("\n")
    for mention in mentions:
        assert mention in line, f"{mention!r} is not in: {line}"
    assert len(line) < 900


def reference_refused(tmp_path, data, *flags, mentions, late=False):
    return refused("train_reference.py", tmp_path / "out", *TINY, f"--data_dir={data}", *flags, mentions=mentions,
                   late=late)


def proxy_refused(tmp_path, reference, *flags, mentions, late=False):
    return refused("train_doremi.py", tmp_path / "out", *TRAINING, f"--reference={reference}", *flags,
                   mentions=mentions, late=late)


def edit(path, change):
    """Applies `change` to the object in a JSON file, in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ---------------------------------------------------------------------------------------------------------------------
# Data


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("spoil, mentions", [
    (lambda path: path.unlink(), ["is missing", "prepare"]),
    (lambda path: path.write_bytes(path.read_bytes()[:-7]), ["bytes where meta.json promises", "truncated"]),
    (lambda path: path.write_bytes(path.read_bytes() + b"xx"), ["bytes where meta.json promises", "foreign"]),
    (lambda path: path.write_bytes(b""), [" 0 bytes where"])])
def test_bin_that_is_not_what_meta_json_promises(tmp_path, data, split, spoil, mentions):
    path = data / "rich" / f"{split}.bin"
    spoil(path)
    reference_refused(tmp_path, data, mentions=[str(path), *mentions])


@pytest.mark.parametrize("split", ["train", "val"])
def test_domain_smaller_than_one_window(tmp_path, split):
    streams = {"big": ([1] * 100, [1] * 100), "tiny": ([1] * 17, [1] * 17)}
    streams["tiny"] = ([1] * 16, [1] * 17) if split == "train" else ([1] * 17, [1] * 16)
    data = write_dataset(tmp_path / "data", streams)
    reference_refused(tmp_path, data, mentions=["'tiny'", f"16 tokens in {split}.bin", "window of 17", "--block_size"])


@pytest.mark.parametrize("change, mentions", [
    (None, ["is no data set", "prepare.py"]),
    ("{", ["meta.json is not valid JSON", "line 1"]),
    (b"\xff\xfe", ["meta.json is not valid JSON"]),
    ("[]", ["meta.json", "prepare"]),
    (lambda meta: meta.pop("dtype"), ["'dtype'"]),
    (lambda meta: meta.update(dtype="uint12"), ["uint12"]),
    (lambda meta: meta["domains"]["rich"].pop("val_tokens"), ["'val_tokens'"]),
    (lambda meta: meta.update(domains={}), ["no domain"]),
    (lambda meta: meta.update(vocab_size=70_000), ["70000", "uint16"]),
    (lambda meta: meta.update(vocab_size="many"), ["many"])])
def test_meta_json(tmp_path, data, change, mentions):
    path = data / "meta.json"
    if change is None:
        path.unlink()
    elif callable(change):
        edit(path, change)
    else:
        path.write_bytes(change if isinstance(change, bytes) else change.encode())
    reference_refused(tmp_path, data, mentions=[str(data), *mentions])


@pytest.mark.parametrize("split", ["train", "val"])
def test_token_past_the_vocabulary(tmp_path, data, split):
    """The first batch with such a token is refused; none is in a checkpoint."""
    path = data / "counting" / f"{split}.bin"
    ids = np.fromfile(path, dtype="<u2")
    ids[:] = 64
    ids.tofile(path)
    after = reference_refused(tmp_path, data, mentions=["counting", f"{split}.bin", "token id 64", "vocab_size 64",
                                                        "prepare"], late=True)
    if split == "train":
        assert {p.name for p in after} == {"flags.txt", "config.json", "metrics.jsonl"}
        assert not read_metrics(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize("spec, mentions", [
    ("0.5,0.5,-0.1,0.1", ["'rich' is -0.1", ">= 0"]),
    ("nan,1,1,1", ["'counting' is nan", "finite"]),
    ("1,inf,1,1", ["'simple' is inf"]),
    ("0,0,0,0", ["all weights are zero"]),
    ("0.5,0.5", ["2 weights", "4 domains", "counting, simple, rich, small"]),
    ("1,1,1,1,1", ["5 weights", "4 domains"]),
    ("1,1,1,some", ["'some'", "uniform, token_count"]),
    ("unifrom", ["'unifrom'", "uniform"]),
    ("temperature:warm", ["'warm'", "temperature:"]), ("temperature:", ["temperature:"]),
    ("unimax:0", ["all weights are zero"]), ("unimax:-1", [">= 0"]),
    ("nowhere.json", ["nowhere.json", "No such file"])])
def test_weights_on_the_command_line(tmp_path, world, spec, mentions):
    reference_refused(tmp_path, world.data, f"--sampling_weights={spec}", mentions=mentions)


EVEN = {"counting": 1, "simple": 1, "rich": 1, "small": 1}


@pytest.mark.parametrize("content, mentions", [
    ({**EVEN, "arxiv": 1}, ["unknown", "'arxiv'", "without a weight: []"]),
    ({"counting": 1, "simple": 1}, ["without a weight: ['rich', 'small']", "weight 0"]),
    ({"domain_weights": {**EVEN, "rich": -1}}, ["'rich' is -1", ">= 0"]),
    ({"train_domain_weights": {**EVEN, "rich": None}}, ["'rich' is None"]),
    ({**EVEN, "rich": "1"}, ["'rich' is '1'"]), ({**EVEN, "rich": True}, ["'rich' is True"]),
    ({**EVEN, "rich": float("nan")}, ["'rich' is nan"]),
    (dict.fromkeys(EVEN, 0), ["all weights are zero"]),
    ([0.25, 0.25, 0.25, 0.25], ["holds a list", "{DOMAIN: weight}"]),
    ('{"counting": 1,\n "simple": }', ["not valid JSON", "line 2"]), (b"\xff", ["not valid JSON"]), ("", ["JSON"])])
def test_weights_in_a_file(tmp_path, world, content, mentions):
    path = tmp_path / "my_weights.json"
    content = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    reference_refused(tmp_path, world.data, f"--sampling_weights={path}", mentions=[str(path), *mentions])
    if "'arxiv'" in mentions:
        proxy_refused(tmp_path, world.reference, f"--sampling_weights={path}", mentions=[str(path), *mentions])


# ---------------------------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize("flags, mentions", [
    (["--batch_size=0"], ["--batch_size", "0 is not a positive"]),
    (["--max_steps=ten"], ["--max_steps", "'ten'"]),
    (["--micro_batch_size=5"], ["--micro_batch_size=5", "12 sequences"]),
    (["--warmup_steps=13"], ["--warmup_steps=13", "--max_steps=12"]),
    (["--min_lr=1"], ["--min_lr=1.0", "--learning_rate=0.003"]),
    (["--learning_rate=0"], ["--learning_rate=0.0"]), (["--learning_rate=nan"], ["--learning_rate", "nan"]),
    (["--beta1=1"], ["--beta1", "[0, 1)"]), (["--weight_decay=-1"], ["--weight_decay", ">= 0"]),
    (["--grad_clip=-1"], ["--grad_clip", ">= 0"]), (["--seed=-1"], ["--seed", "-1"]),
    (["--eval_windows=-1"], ["--eval_windows", "-1"]),
    (["--n_head=5"], ["n_embd 16", "n_head (5)"]), (["--n_kv_head=3"], ["n_kv_head (3)"]),
    (["--n_head=16"], ["even head size"]), (["--n_layer=0"], ["--n_layer", "0 is not a positive"]),
    (["--device=abacus"], ["--device=abacus", "--device=cpu"]), (["--dtype=float16"], ["--dtype", "'float16'"]),
    (["--wandb=yes"], ["--wandb", "'yes'"]), (["--lr_schedule=linear"], ["'linear'"]),
    (["--max_step=3"], ["--max_step=3"]), (["@nowhere.txt"], ["nowhere.txt"]), (["stray"], ["stray"])])
def test_flags(tmp_path, world, flags, mentions):
    reference_refused(tmp_path, world.data, *flags, mentions=mentions)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(tmp_path, world):
    reference_refused(tmp_path, world.data, "--device=cuda", mentions=["--device=cuda", "--device=cpu"])


@pytest.mark.parametrize("flags, mentions", [
    (["--smoothing=1.5"], ["--smoothing", "1.5"]), (["--smoothing=nan"], ["--smoothing"]),
    (["--step_size=-1"], ["--step_size", "-1"]), (["--n_layer=2"], ["--n_layer=2"])])
def test_flags_of_the_proxy(tmp_path, world, flags, mentions):
    proxy_refused(tmp_path, world.reference, *flags, mentions=mentions)


@pytest.mark.parametrize("ranks, flags, mentions", [
    (5, [], ["--batch_size=12", "5 ranks"]), (24, [], ["--batch_size=12", "24 ranks"]),
    (3, ["--micro_batch_size=3"], ["--micro_batch_size=3", "4 sequences", "3 ranks"])])
def test_batch_that_the_ranks_do_not_divide(tmp_path, world, monkeypatch, ranks, flags, mentions):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    reference_refused(tmp_path, world.data, *flags, mentions=mentions)


def test_by_hand(tmp_path, world):
    """As a person sees it: a process of its own."""
    out = tmp_path / "out"
    result = run_script("train_reference.py", *TINY, f"--data_dir={world.data}", "--sampling_weights=1,1,nan,1",
                        f"--out_dir={out}", check=False)
    assert_refused("train_reference.py", result, ["'rich' is nan"])
    assert not result.stdout and not out.exists()


# ---------------------------------------------------------------------------------------------------------------------
# The reference


@pytest.mark.parametrize("change, mentions", [
    (lambda meta: meta.update(tokenizer_sha256="other"), ["tokenizer", "other", "train a reference"]),
    (lambda meta: meta.update(vocab_size=65), ["vocab_size 64", "65"]),
    (lambda meta: meta.update(domains={"renamed" if name == "rich" else name: counts
                                       for name, counts in meta["domains"].items()}), ["'renamed'", "'rich'"])])
def test_reference_of_other_data(tmp_path, data, world, change, mentions):
    edit(data / "meta.json", change)
    if "'renamed'" in mentions:
        (data / "rich").rename(data / "renamed")
    proxy_refused(tmp_path, world.reference, f"--data_dir={data}", mentions=[str(world.reference), *mentions])


def test_reference_with_fewer_domains(tmp_path, data, world):
    edit(data / "meta.json", lambda meta: meta["domains"].pop("small"))
    proxy_refused(tmp_path, world.reference, f"--data_dir={data}", mentions=[str(world.reference), "small"])


def test_reference_whose_data_is_gone(tmp_path, world):
    reference = shutil.copytree(world.reference, tmp_path / "reference")
    edit(reference / "config.json", lambda config: config["flags"].update(data_dir=str(tmp_path / "gone")))
    proxy_refused(tmp_path, reference, mentions=[str(tmp_path / "gone"), "prepare"])


def spoil_shape(reference):
    edit(reference / "config.json", lambda config: config["model"].update(n_layer=2))


def unfinish(reference):
    checkpoint = torch.load(reference / "ckpt.pt", weights_only=True)
    torch.save({**checkpoint, "step": 8}, reference / "ckpt.pt")


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("spoil, mentions", [
    (shutil.rmtree, ["config.json", "--reference"]),
    (lambda reference: (reference / "config.json").unlink(), ["config.json", "--reference"]),
    (lambda reference: (reference / "config.json").write_text("{"), ["config.json", "--reference"]),
    (lambda reference: (reference / "ckpt.pt").unlink(), ["unfinished (0 of 12 steps)", "--resume"]),
    (unfinish, ["unfinished (8 of 12 steps)", "train_reference.py @", "--resume"]),
    (spoil_shape, ["shape", "'n_layer': 2"]),
    (lambda reference: cut(reference / "ckpt.pt", 3000), ["ckpt.pt", "corrupt"]),
    (lambda reference: cut(reference / "ckpt.pt", 0), ["ckpt.pt", "corrupt"])])
def test_broken_reference(tmp_path, world, spoil, mentions):
    reference = shutil.copytree(world.reference, tmp_path / "reference")
    spoil(reference)
    proxy_refused(tmp_path, reference, mentions=[str(reference), *mentions])


def test_proxy_as_reference(tmp_path, world):
    proxy_refused(tmp_path, world.proxy, mentions=[str(world.proxy), "proxy run", "train_reference.py"])


# ---------------------------------------------------------------------------------------------------------------------
# A run's directory


def test_existing_run_is_not_overwritten(tmp_path, world):
    reference = shutil.copytree(world.reference, tmp_path / "out")
    for flags in ([], ["--seed=2"]):
        reference_refused(tmp_path, world.data, *flags, mentions=[str(reference), "--resume", "--out_dir"])


@pytest.mark.parametrize("flag, mentions", [
    ("--seed=2", ["seed 1", "2"]), ("--batch_size=24", ["batch_size 12", "24"]), ("--max_steps=24", ["max_steps 12"]),
    ("--learning_rate=0.1", ["learning_rate 0.003", "0.1"]), ("--n_layer=2", ["n_layer 1", "2"]),
    ("--sampling_weights=token_count", ["sampling_weights"]), ("--dtype=float64", ["dtype", "float64"]),
    ("--block_size=8", ["block_size 16", "8"])])
def test_resumption_with_other_flags(tmp_path, world, flag, mentions):
    shutil.copytree(world.reference, tmp_path / "out")
    reference_refused(tmp_path, world.data, "--resume", flag, mentions=["ckpt.pt", "same flags", *mentions])


def test_resumption_with_other_data(tmp_path, data, world):
    shutil.copytree(world.reference, tmp_path / "out")
    edit(data / "meta.json", lambda meta: meta.update(tokenizer_sha256="other"))
    reference_refused(tmp_path, data, "--resume", mentions=["ckpt.pt", "data", "other"])


def test_resumption_with_another_reference(tmp_path, world):
    """The same flags, data and shape; the parameters tell it apart."""
    shutil.copytree(world.proxy, tmp_path / "out")
    reference = shutil.copytree(world.reference, tmp_path / "reference")
    checkpoint = torch.load(reference / "ckpt.pt", weights_only=True)
    checkpoint["model"]["norm.weight"][0] += 0.5
    torch.save(checkpoint, reference / "ckpt.pt")
    proxy_refused(tmp_path, reference, "--resume", mentions=["ckpt.pt", "fingerprint"])


class Exploit:
    def __reduce__(self):
        return print, ("code in a checkpoint was run",)


@pytest.mark.parametrize("spoil", [
    lambda path: cut(path, 0), lambda path: cut(path, path.stat().st_size // 2), lambda path: path.write_bytes(b"junk"),
    lambda path: torch.save([1, 2], path), lambda path: torch.save({"stage": Exploit()}, path)])
def test_corrupt_checkpoint(tmp_path, world, spoil, capsys):
    spoil(shutil.copytree(world.reference, tmp_path / "out") / "ckpt.pt")
    before = contents(tmp_path / "out")
    result = run_here("train_reference.py", *TINY, f"--data_dir={world.data}", f"--out_dir={tmp_path}/out", "--resume")
    assert_refused("train_reference.py", result, [f"{tmp_path}/out/ckpt.pt", "corrupt", "delete it"])
    assert contents(tmp_path / "out") == before
    assert "was run" not in result.stdout + capsys.readouterr().out


def test_checkpoint_of_another_kind(tmp_path, world):
    shutil.copytree(world.proxy, tmp_path / "out")
    reference_refused(tmp_path, world.data, "--resume", mentions=["ckpt.pt", "proxy run", "reference run"])


def test_directory_that_is_a_file(tmp_path, world):
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        result = run_here("train_reference.py", *TINY, f"--data_dir={world.data}", f"--out_dir={out}")
        assert_refused("train_reference.py", result, [str(tmp_path / "file"), "--out_dir"])
    assert (tmp_path / "file").read_text() == "precious"


# ---------------------------------------------------------------------------------------------------------------------
# Losses that are not finite


@pytest.mark.parametrize("log_interval", [1, 3, 12])
@pytest.mark.parametrize("rate, what", [("1e30", "gradient"), ("1e300", "loss of counting, simple, rich, small")])
def test_too_large_a_learning_rate(tmp_path, world, log_interval, rate, what):
    """Found at the next line or checkpoint, and named by its own step; no checkpoint has it (see `refused`)."""
    flags = [f"--learning_rate={rate}", "--grad_clip=0", "--warmup_steps=0", f"--log_interval={log_interval}"]
    mentions = ["step 2", f"the {what} is not finite", "--learning_rate"]
    after = reference_refused(tmp_path, world.data, *flags, mentions=mentions, late=True)
    assert not [path for path in after if path.name == "ckpt.pt"]
    assert len(read_metrics(tmp_path / "out")) == (1 if log_interval == 1 else 0)


def test_loss_of_one_domain_that_is_not_finite(tmp_path, world, monkeypatch):
    """From step 5 on: it is that step that is named, though it is found at step 6; step 4 is the last checkpoint."""
    calls = [0]

    def spoilt_sums(*args):
        calls[0] += 1
        sums = domain_sums(*args)
        if calls[0] >= 5:
            sums[0, 2] = torch.inf
        return sums

    monkeypatch.setattr(sampler, "domain_sums", spoilt_sums)
    reference_refused(tmp_path, world.data, mentions=["step 5", "loss of rich is not finite"], late=True)
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] == 4


def test_checkpoint_before_the_bad_step_stays(tmp_path, world):
    """Losses of steps 1 to 5 are finite, step 6 has a gradient that is not; step 4's checkpoint is kept and resumes."""
    calls, clip = [0], runtime.clip_gradients

    def spoilt(model, grad_clip):
        calls[0] += 1
        if calls[0] == 6:
            next(model.parameters()).grad[3, 5] = float("inf")
        return clip(model, grad_clip)

    runtime.clip_gradients = spoilt
    try:
        proxy_refused(tmp_path, world.reference, mentions=["step 6", "gradient is not finite"], late=True)
    finally:
        runtime.clip_gradients = clip
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] == 4
    flags = [*TRAINING, f"--reference={world.reference}", f"--out_dir={tmp_path}/out"]
    result = run_here("train_doremi.py", *flags, "--resume")
    assert result.returncode == 0, result.stderr
    assert [line["loss"] for line in read_metrics(tmp_path / "out") if "loss" in line] == \
        [line["loss"] for line in read_metrics(world.proxy) if "loss" in line]


# ---------------------------------------------------------------------------------------------------------------------
# A full disk


@pytest.mark.parametrize("script, file", [
    ("train_reference.py", "flags.txt"), ("train_reference.py", "config.json"), ("train_reference.py", "ckpt.pt"),
    ("train_doremi.py", "ckpt.pt"), ("train_doremi.py", "doremi_domain_weights_4.pt")])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux's")
def test_full_disk(tmp_path, world, script, file):
    """What a file is written to before it is renamed is led to /dev/full, where the kernel refuses every byte."""
    out = tmp_path / "out"
    out.mkdir()
    (out / f".{file}.tmp").symlink_to("/dev/full")
    proxy, reference = [*TRAINING, f"--reference={world.reference}"], [*TINY, f"--data_dir={world.data}"]
    flags = [*(proxy if script == "train_doremi.py" else reference), f"--out_dir={out}"]
    result = run_here(script, *flags)
    assert_refused(script, result, [str(out / file), "No space left", "--out_dir"], late=file.endswith(".pt"))
    assert not (out / file).exists() and not list(out.glob(".*"))
    again = run_here(script, *flags, "--resume")  # there is space again
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("script", ["train_reference.py", "train_doremi.py"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux's")
def test_full_disk_at_the_last_checkpoint(tmp_path, world, script):
    """No step comes after it: the run is not done before the file is."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".ckpt.pt.tmp").symlink_to("/dev/full")
    flags = [*TRAINING, f"--reference={world.reference}"] if script == "train_doremi.py" else \
        [*TINY, f"--data_dir={world.data}"]
    result = run_here(script, *flags, f"--out_dir={out}", "--save_interval=100")
    assert_refused(script, result, [str(out / "ckpt.pt"), "No space left", "--out_dir"], late=True)
    assert "done" not in result.stdout
    assert {path.name for path in out.iterdir()} == {"flags.txt", "config.json", "metrics.jsonl"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux's")
def test_full_disk_and_another_error(tmp_path, world):
    """Step 2 is not finite before anybody asks for the checkpoint of step 1: the process ends with both lines."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".ckpt.pt.tmp").symlink_to("/dev/full")
    result = run_script("train_reference.py", *TINY, f"--data_dir={world.data}", f"--out_dir={out}", "--grad_clip=0",
                        "--learning_rate=1e30", "--warmup_steps=0", "--save_interval=1", check=False)
    first, second = result.stderr.splitlines()[-2:]
    assert result.returncode == 2 and "Traceback" not in result.stderr and "ignored" not in result.stderr
    assert "train_reference.py: error: step 2" in first and "not finite" in first
    assert "train_reference.py: error: " in second and f"{out}/ckpt.pt: No space left on device" in second
    assert {path.name for path in out.iterdir()} == {"flags.txt", "config.json", "metrics.jsonl"}


def test_full_disk_while_metrics_are_written(tmp_path, world):
    """A file limit of 4 KB stands in for the full disk, as `ulimit -f` sets it."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "train_reference.py"), *TINY, f"--data_dir={world.data}", f"--out_dir={out}",
               "--log_interval=1", "--save_interval=1000", "--max_steps=100"]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit,
                            env={**os.environ, "OMP_NUM_THREADS": "1",
                                 "PYTHONDONTWRITEBYTECODE": "1"})  # it would be cut short too
    assert_refused("train_reference.py", result, [f"{out}/metrics.jsonl: File too large", "--out_dir"], late=True)
    assert {path.name for path in out.iterdir()} == {"flags.txt", "config.json", "metrics.jsonl"}


def test_directory_that_cannot_be_written(tmp_path, world, monkeypatch):
    def denied(*_):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / "out"))

    monkeypatch.setattr(runtime, "write_atomically", denied)
    result = run_here("train_reference.py", *TINY, f"--data_dir={world.data}", f"--out_dir={tmp_path}/out")
    assert_refused("train_reference.py", result, [f"{tmp_path}/out", "Read-only", "--out_dir"])
