"""Bad input to the training scripts: exit status 2, one line that names the file or flag, nothing half-written."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, read_metrics, run_here, write_dataset

import runtime

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


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} if directory.exists() else {}


def assert_one_line(script, result, mentions, late=False):
    """late: a progress bar may come before the line."""
    *bars, line = result.stderr.splitlines()
    assert f"{script}: error: " in line and "Traceback" not in result.stderr and (late or not bars), result.stderr
    assert all(mention in line for mention in mentions), (mentions, line)


def refused(script, out, *flags, mentions, late=False):
    """A run is refused in one line, and leaves OUT as it was.  late: it had begun; what is written is whole and finite.
    Return the names of its files."""
    before = contents(out)
    assert_one_line(script, run_here(script, *flags, f"--out_dir={out}", status=2), mentions, late)
    after = contents(out)
    assert late or (after == before and (before or not out.exists()))
    assert not [path for path in after if path.name.endswith(".tmp")]
    if late:
        model = torch.load(out / "ckpt.pt", weights_only=True)["model"] if out / "ckpt.pt" in after else {}
        assert all(value.isfinite().all() for value in model.values())
    return {path.name for path in after}


def reference_refused(tmp_path, data, *flags, **expected):
    return refused("train_reference.py", tmp_path / "out", *TINY, f"--data_dir={data}", *flags, **expected)


def proxy_refused(tmp_path, reference, *flags, **expected):
    return refused("train_doremi.py", tmp_path / "out", *TRAINING, f"--reference={reference}", *flags, **expected)


def edit(path, change):
    """Apply `change` to the object in a JSON file, in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_checkpoint(run, change):
    change(checkpoint := torch.load(run / "ckpt.pt", weights_only=True))
    torch.save(checkpoint, run / "ckpt.pt")


# ---- data ----


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b""),
                                   lambda path: path.write_bytes(path.read_bytes()[:-7]),
                                   lambda path: path.write_bytes(path.read_bytes() + b"xx")])
def test_bin_that_is_not_what_meta_json_promises(tmp_path, data, split, spoil):
    spoil(data / "rich" / f"{split}.bin")
    reference_refused(tmp_path, data, mentions=[str(data / "rich" / f"{split}.bin")])


@pytest.mark.parametrize("train, val", [(16, 17), (17, 16)])
def test_domain_smaller_than_one_window(tmp_path, train, val):
    data = write_dataset(tmp_path / "data", {"big": ([1] * 99, [1] * 99), "tiny": ([1] * train, [1] * val)})
    reference_refused(tmp_path, data, mentions=["'tiny'", "16 tokens", "train.bin" if train < val else "val.bin"])


@pytest.mark.parametrize("change", [
    None, b"{", b"\xff\xfe", b"[]", lambda meta: meta.pop("dtype"), lambda meta: meta.update(dtype="uint12"),
    lambda meta: meta["domains"]["rich"].pop("val_tokens"), lambda meta: meta.update(domains={}),
    lambda meta: meta.update(vocab_size=70_000), lambda meta: meta.update(vocab_size="many")])
def test_meta_json(tmp_path, data, change):
    path = data / "meta.json"
    if callable(change):
        edit(path, change)
    else:
        path.unlink() if change is None else path.write_bytes(change)
    reference_refused(tmp_path, data, mentions=[str(path)])


@pytest.mark.parametrize("split, left", [("train", BEGUN), ("val", BEGUN | {"ckpt.pt"})])
def test_token_past_the_vocabulary(tmp_path, data, split, left):
    """The first batch with such a token is refused; none is in a checkpoint (the first is of step 4, before it)."""
    path = data / "counting" / f"{split}.bin"
    np.full_like(np.fromfile(path, dtype="<u2"), 64).tofile(path)
    assert reference_refused(tmp_path, data, mentions=["counting", f"{split}.bin", "64"], late=True) == left


# ---- weights ----


@pytest.mark.parametrize("spec, mentions", [
    ("0.5,0.5,-0.1,0.1", ["'rich'", "-0.1"]), ("nan,1,1,1", ["'counting'", "nan"]), ("1,inf,1,1", ["'simple'", "inf"]),
    ("0,0,0,0", ["zero"]), ("0.5,0.5", ["2 weights", "4 domains"]), ("1,1,1,1,1", ["5 weights", "4 domains"]),
    ("1,1,1,some", ["'some'"]), ("unifrom", ["'unifrom'"]), ("temperature:warm", ["'warm'"]),
    ("temperature:", ["temperature:"]), ("unimax:0", ["unimax:0"]), ("unimax:-1", ["unimax:-1"]),
    ("uniform+", ["''"]), ("uniform+1,1", ["2 weights"]), ("nowhere.json", ["nowhere.json"])])
def test_weights_on_the_command_line(tmp_path, world, spec, mentions):
    reference_refused(tmp_path, world.data, f"--sampling_weights={spec}", mentions=mentions)


EVEN = {"counting": 1, "simple": 1, "rich": 1, "small": 1}


@pytest.mark.parametrize("content, mentions", [
    ({**EVEN, "arxiv": 1}, ["arxiv"]), ({"counting": 1, "simple": 1}, ["rich", "small"]),
    ({"domain_weights": {**EVEN, "rich": -1}}, ["'rich'", "-1"]), ({**EVEN, "rich": float("nan")}, ["'rich'", "nan"]),
    ({"train_domain_weights": {**EVEN, "rich": None}}, ["'rich'"]), ({**EVEN, "rich": "1"}, ["'rich'"]),
    ({**EVEN, "rich": True}, ["'rich'"]), (dict.fromkeys(EVEN, 0), ["zero"]), ([0.25] * 4, []), ("{,", []), ("", [])])
def test_weights_in_a_file(tmp_path, world, content, mentions):
    (path := tmp_path / "my_weights.json").write_text(content if isinstance(content, str) else json.dumps(content))
    for refusal, run in [(reference_refused, world.data), (proxy_refused, world.reference)]:
        refusal(tmp_path, run, f"--sampling_weights={path}", mentions=[str(path), *mentions])


# ---- flags ----


@pytest.mark.parametrize("flag", [
    "--batch_size=0", "--max_steps=ten", "--micro_batch_size=5", "--warmup_steps=13", "--min_lr=1", "--learning_rate=0",
    "--learning_rate=nan", "--beta1=1", "--weight_decay=-1", "--grad_clip=-1", "--seed=-1", "--eval_windows=-1",
    "--n_head=5", "--n_kv_head=3", "--n_layer=0", "--device=abacus", "--dtype=float16", "--wandb=yes", "--timeout=0",
    "--lr_schedule=linear", "--max_step=3", "@nowhere.txt", "stray"])
def test_flags(tmp_path, world, flag):
    reference_refused(tmp_path, world.data, flag, mentions=[flag.split("=")[0].lstrip("-@")])


def test_flags_of_the_proxy(tmp_path, world):
    for flag in ("--smoothing=1.5", "--smoothing=nan", "--step_size=-1", "--n_layer=2"):
        proxy_refused(tmp_path, world.reference, flag, mentions=[flag.split("=")[0]])


@pytest.mark.parametrize("ranks, flags, flag", [
    (5, [], "--batch_size=12"), (24, [], "--batch_size=12"), (3, ["--micro_batch_size=3"], "--micro_batch_size=3")])
def test_batch_that_the_ranks_do_not_divide(tmp_path, world, monkeypatch, ranks, flags, flag):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    reference_refused(tmp_path, world.data, *flags, mentions=[flag, f"{ranks} ranks"])


# ---- the reference ----


@pytest.mark.parametrize("change, mentions", [
    (lambda meta: meta.update(tokenizer_sha256="other"), ["tokenizer", "other"]),
    (lambda meta: meta.update(vocab_size=65), ["vocab_size", "65"]),
    (lambda meta: meta["domains"].pop("small"), ["small"])])
def test_reference_of_other_data(tmp_path, data, world, change, mentions):
    edit(data / "meta.json", change)
    proxy_refused(tmp_path, world.reference, f"--data_dir={data}", mentions=[str(world.reference), *mentions])


@pytest.mark.parametrize("spoil, mentions", [
    (shutil.rmtree, ["config.json"]), (lambda run: (run / "config.json").write_text("{"), ["config.json"]),
    (lambda run: edit(run / "config.json", lambda config: config["model"].update(n_layer=2)), ["n_layer"]),
    (lambda run: (run / "ckpt.pt").unlink(), ["0 of 12"]),
    (lambda run: edit_checkpoint(run, lambda checkpoint: checkpoint.update(step=8)), ["8 of 12", "--resume"]),
    (lambda run: (run / "ckpt.pt").write_bytes((run / "ckpt.pt").read_bytes()[:3000]), ["ckpt.pt"]),
    (lambda run: (run / "ckpt.pt").write_bytes(b""), ["ckpt.pt"])])
def test_broken_reference(tmp_path, world, spoil, mentions):
    reference = shutil.copytree(world.reference, tmp_path / "reference")
    spoil(reference)
    proxy_refused(tmp_path, reference, mentions=[str(tmp_path) if "n_layer" not in mentions else "", *mentions])


# ---- a run's directory ----


def test_existing_run_is_not_overwritten(tmp_path, world):
    shutil.copytree(world.reference, tmp_path / "out")
    reference_refused(tmp_path, world.data, "--seed=2", mentions=[str(tmp_path / "out"), "--resume"])


@pytest.mark.parametrize("flag", ["--seed=2", "--batch_size=24", "--max_steps=24", "--learning_rate=0.1", "--n_layer=2",
                                  "--sampling_weights=uniform", "--dtype=float64", "--block_size=8", "--beta2=0.9"])
def test_resumption_with_other_flags(tmp_path, world, flag):
    shutil.copytree(world.reference, tmp_path / "out")
    reference_refused(tmp_path, world.data, "--resume", flag, mentions=["ckpt.pt", flag[2:].split("=")[0]])


def test_resumption_with_other_data_or_reference(tmp_path, data, world):
    """The same flags, data and shape of the reference: its parameters tell it apart."""
    out = shutil.copytree(world.reference, tmp_path / "out")
    edit(data / "meta.json", lambda meta: meta.update(tokenizer_sha256="other"))
    reference_refused(tmp_path, data, "--resume", mentions=["ckpt.pt", "tokenizer_sha256", "other"])
    edit(data / "meta.json", lambda meta: meta.update(
        tokenizer_sha256="synthetic" * 4, domains=dict(reversed(meta["domains"].items()))))
    reference_refused(tmp_path, data, "--resume", mentions=["ckpt.pt", "domains"])
    shutil.rmtree(out)
    shutil.copytree(world.proxy, out)
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


# ---- losses that are not finite ----


@pytest.mark.parametrize("rate, what, log_interval", [("1e30", "step 2: the gradient", 1), ("1e300", "step 4: ", 12)])
def test_too_large_a_learning_rate(tmp_path, world, rate, what, log_interval):
    """Found at the next line or checkpoint; no checkpoint has it (see `refused`)."""
    flags = [f"--learning_rate={rate}", "--grad_clip=0", "--warmup_steps=0", f"--log_interval={log_interval}"]
    left = reference_refused(tmp_path, world.data, *flags, mentions=[what, "not finite"], late=True)
    assert "ckpt.pt" not in left and len(read_metrics(tmp_path / "out")) == (1 if log_interval == 1 else 0)


def test_checkpoint_before_the_bad_step_stays(tmp_path, world, monkeypatch):
    """Step 6 has a gradient that is not finite: step 4's checkpoint is kept, and resumes."""
    calls, clip = [0], runtime.clip_gradients

    def spoilt(model, grad_clip):
        calls[0] += 1
        if calls[0] == 6:
            next(model.parameters()).grad[3, 5] = float("inf")
        return clip(model, grad_clip)

    monkeypatch.setattr(runtime, "clip_gradients", spoilt)
    proxy_refused(tmp_path, world.reference, mentions=["step 6", "gradient"], late=True)
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] == 4
    run_here("train_doremi.py", *TRAINING, f"--reference={world.reference}", f"--out_dir={tmp_path}/out", "--resume")
    losses = [[line.get("loss") for line in read_metrics(run)] for run in (tmp_path / "out", world.proxy)]
    assert losses[0] == losses[1]


# ---- disks ----


def test_directory_that_is_a_file(tmp_path, world):
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        result = run_here("train_reference.py", *TINY, f"--data_dir={world.data}", f"--out_dir={out}", status=2)
        assert_one_line("train_reference.py", result, [str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == "precious"
