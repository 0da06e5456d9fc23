"""The machinery: flags and their files, schedule, a run's directory, ranks, wandb."""

import argparse
import contextlib
import copy
import io
import json
import math
import platform
import re
import runpy
import shlex
import signal
import struct
import subprocess
import sys
import threading
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, read_metrics, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import cli
import runtime

WORK = {"tokens_per_second", "mfu", "seconds"}  # what differs between two runs of the same
SCRIPTS = ["train_reference.py", "train_doremi.py", "train_large.py"]


def run_here(script, *flags):
    """Runs a script in this process, as `python script flags` would: a run costs its steps, not seconds of imports.
    Returns its returncode, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, torch.get_num_threads(), runtime.matmul_peak
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    sys.argv, runtime.matmul_peak = [str(script), *map(str, flags)], lambda *_: 1e12  # a second's measurement
    torch.set_num_threads(1)
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as error:
        status = error.code or 0
    finally:
        sys.argv, _, runtime.matmul_peak = before
        for thread in threading.enumerate():
            if thread.name.startswith("checkpoint"):
                thread.join()  # as the end of a process does
        torch.set_num_threads(before[1])
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def succeed(script, *flags):
    result = run_here(script, *flags)
    assert result.returncode == 0, result.stderr
    return result


def comparable(lines):
    return [{key: value for key, value in line.items() if key not in WORK} for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir):
    """A finished reference and a finished proxy, in float64."""
    directory = tmp_path_factory.mktemp("runs")
    reference, proxy = directory / "reference", directory / "proxy"
    succeed("train_reference.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={reference}", "--dtype=float64",
            "--sampling_weights=0.1,0.2,0.3,0.4")
    flags = [flag for flag in TINY if re.match("--(log|eval|save)_|--no-compile", flag)]
    succeed("train_doremi.py", *flags, f"--reference={reference}", f"--out_dir={proxy}")
    return SimpleNamespace(reference=reference, proxy=proxy, data=data_dir, directory=directory)


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def parser():
    p = cli.ArgumentParser("a test")
    p.add_argument("--name", default="nobody")
    p.add_argument("--steps", type=cli.positive, default=1)
    p.add_argument("--rate", type=float)
    p.add_argument("--resume", action="store_true")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction)
    return p


def test_flags_from_a_file(tmp_path):
    file = tmp_path / "flags.txt"
    file.write_text("# a comment that isn't closed\n\n--steps=3 --rate 0.5   # two on a line, one with a space\n"
                    "--name='two words # no comment'\n   --no-compile\n")
    args = parser().parse_args([f"@{file}"])
    assert vars(args) == {"steps": 3, "rate": 0.5, "name": "two words # no comment", "compile": False, "resume": False}
    assert parser().parse_args([f"@{file}", "--steps=4"]).steps == 4  # later flags win,
    assert parser().parse_args(["--steps=4", f"@{file}"]).steps == 3  # wherever they stand
    outer = tmp_path / "outer.txt"
    outer.write_text(f"@{file}\n--rate=0.25")
    assert parser().parse_args([f"@{outer}"]).rate == 0.25


@pytest.mark.parametrize("content, message", [
    ("--stepz=3", "--stepz=3"), ("--steps=0", "--steps: 0 is not a positive"), ("--steps=many", "'many'"),
    ("--rate=fast", "'fast'"), ("--step=3", "--step=3"), ("stray", "stray"), ("--name='open", "quotation")])
def test_errors_in_a_file_name_the_file(tmp_path, content, message, capsys):
    file = tmp_path / "some_flags.txt"
    file.write_text(f"--name=somebody\n{content}\n")
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args([f"@{file}"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and str(file) in err and err.count("\n") == 1, err


def test_missing_flag_file(capsys):
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(["@nowhere.txt"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "nowhere.txt" in err and err.count("\n") == 1


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"])), st.integers(1, 10**9),
       st.none() | st.floats(allow_nan=False), st.booleans(), st.booleans() | st.none())
def test_flag_lines_read_back(tmp_path_factory, name, steps, rate, resume, compiled):
    args = Namespace(name=name, steps=steps, rate=rate, resume=resume, compile=compiled)
    file = tmp_path_factory.getbasetemp() / "round_trip.txt"
    file.write_text(cli.flag_lines(args), encoding="utf-8")
    assert vars(parser().parse_args([f"@{file}"])) == {**vars(args), "resume": False}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    result = run_here(script, "--help")
    assert result.returncode == 0 and not result.stderr
    assert "reads " in result.stdout and "writes " in result.stdout and "next " in result.stdout
    options = re.split(r"\n  (?=--)", result.stdout)[1:]
    assert len(options) > 20
    for option in options:
        if not option.startswith("--resume"):
            assert "default" in option, option
    for name, unit in {"--max_steps": "steps", "--batch_size": "sequences", "--save_interval": "steps",
                       "--warmup_steps": "steps", "--eval_windows": "windows per domain"}.items():
        assert unit in next(" ".join(option.split()) for option in options if option.startswith(name))


OTHERS = {path.name for path in ROOT.glob("*.py") if "__main__" in path.read_text()} - {*SCRIPTS}


@pytest.mark.parametrize("script", sorted(OTHERS))
def test_help_of_the_other_scripts(script):
    result = run_here(script, "--help")
    assert result.returncode == 0 and not result.stderr and result.stdout.startswith(f"usage: {script}")


def test_help_of_a_script_by_hand():
    result = run_script("train_doremi.py", "--help")
    assert "--reference" in result.stdout and "--step_size" in result.stdout


def resolved(**changes):
    args = Namespace(learning_rate=0.01, min_lr=None, warmup_steps=None, max_steps=150, device="cpu", dtype="float32",
                     lr_schedule="cosine", wandb="disabled")
    vars(args).update(changes)
    runtime.resolve_flags(args)
    return args


def test_defaults_that_depend_on_others():
    args = resolved()
    assert args.min_lr == 0.001  # a tenth
    assert {steps: resolved(max_steps=steps).warmup_steps for steps in (2, 150, 900, 3000, 200_000)} == {
        2: 0, 150: 50, 900: 300, 3000: 300, 200_000: 12_000}  # a third, at most 300; 6% where that is more
    assert resolved(device="auto").device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolved(dtype="auto").dtype in ("float32", "bfloat16")


def learning_rates(**changes):
    args = resolved(**changes)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    rates = [runtime.set_learning_rate(optimizer, step, args) for step in range(1, args.max_steps + 1)]
    assert optimizer.param_groups[0]["lr"] == rates[-1]
    return rates


def test_cosine_schedule():
    """Warm-up over 4 steps to 0.8, then from 0.8 to 0.2 over 6: half-way 0.5; a third: 0.2 + 0.6 (1 + cos 60) / 2."""
    rates = learning_rates(learning_rate=0.8, min_lr=0.2, warmup_steps=4, max_steps=10)
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.2 + 0.3 * (1 + math.sqrt(3) / 2), 0.65, 0.5, 0.35,
                                   0.2 + 0.3 * (1 - math.sqrt(3) / 2), 0.2])


def test_exponential_schedule():
    """From 0.8 to 0.1 in three steps: a half each."""
    rates = learning_rates(learning_rate=0.8, min_lr=0.1, warmup_steps=2, max_steps=5, lr_schedule="exponential")
    assert rates == pytest.approx([0.4, 0.8, 0.4, 0.2, 0.1])


@pytest.mark.parametrize("schedule", ["cosine", "exponential"])
def test_schedule_without_and_with_nothing_but_warm_up(schedule):
    assert learning_rates(warmup_steps=0, lr_schedule=schedule)[-1] == pytest.approx(0.001)
    assert learning_rates(warmup_steps=150, lr_schedule=schedule)[-1] == pytest.approx(0.01)


def test_clip_gradients():
    """Gradient (3, 4) has norm 5: clipped to 1 it is (0.6, 0.8); 0 leaves it alone."""
    model = torch.nn.Linear(2, 1, bias=False)
    for grad_clip, expected in [(1.0, [0.6, 0.8]), (10.0, [3, 4]), (0.0, [3, 4])]:
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        assert runtime.clip_gradients(model, grad_clip).item() == 5
        assert model.weight.grad[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_compile_is_decided_by_the_length_of_the_run(monkeypatch):
    monkeypatch.setattr(runtime.shutil, "which", lambda name: "/usr/bin/" + name)

    def decide(flops, **flags):
        return runtime.decide_compile(Namespace(**flags), flops)

    cpu = {"device": "cpu", "dtype": "float32", "compile": None}
    assert decide(1e15, **cpu) and not decide(1e12, **cpu)
    assert decide(1e12, **{**cpu, "device": "cuda"})
    assert decide(1e12, **{**cpu, "compile": True}) and not decide(1e15, **{**cpu, "compile": False})
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    assert not decide(1e15, **cpu)  # no compiler


# ---------------------------------------------------------------------------------------------------------------------
# A run's directory


DOMAINS = ["counting", "simple", "rich", "small"]
EVALUATION = {"step", "tokens", "seconds", "val_loss", "val_bpb", "val_loss_mean", "val_loss_worst"}
TRAINING = {"step", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "domain_loss", "epochs"}


@pytest.mark.parametrize("name, keys", [("reference", TRAINING), ("proxy", TRAINING | {"alpha", "excess"})])
def test_metrics(runs, name, keys):
    """Steps of 12 sequences of 16 tokens: 192. A line every 3 steps, an evaluation every 6."""
    lines = read_metrics(getattr(runs, name))
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in lines] == [3, 6, 6, 9, 12, 12] and len(training) == 4
    for line in training:
        assert set(line) == keys
        assert line["mfu"] > 0 and line["tokens_per_second"] > 0 and line["grad_norm"] > 0
        assert set(line["domain_loss"]) <= set(DOMAINS) and list(line["epochs"]) == DOMAINS
        assert min(line["domain_loss"].values()) <= line["loss"] <= max(line["domain_loss"].values())
    for line in evaluations:
        assert set(line) == EVALUATION and line["tokens"] == 192 * line["step"]
        assert line["val_loss_mean"] == pytest.approx(sum(line["val_loss"].values()) / 4)
        assert line["val_loss_worst"] == max(line["val_loss"].values())
        for domain in DOMAINS:  # conftest says three bytes a token
            assert line["val_bpb"][domain] == pytest.approx(line["val_loss"][domain] / 3 / math.log(2))
    if name == "reference":  # the last epochs are the draws of 12 batches: windows are 374, 187, 124, 18
        drawn = [training[-1]["epochs"][d] * n for d, n in zip(DOMAINS, [374, 187, 124, 18])]
        assert drawn == pytest.approx([round(d) for d in drawn]) and sum(drawn) == pytest.approx(144)
        assert all(abs(d - 144 * w) < 12 for d, w in zip(drawn, [0.1, 0.2, 0.3, 0.4]))
    else:
        history = torch.load(runs.proxy / "doremi_domain_weights_12.pt", weights_only=True)
        for line in training:
            entry = history[line["step"] - 1]
            assert entry["step"] == line["step"] and entry["domain_weights"].tolist() == list(line["alpha"].values())
            assert sum(line["alpha"].values()) == pytest.approx(1) and min(line["excess"].values()) >= 0
    # warm-up of 12 // 3 = 4 steps, then cosine over 8
    for line in training:
        cosine = (1 + math.cos(math.pi * (line["step"] - 4) / 8)) / 2
        assert line["lr"] == pytest.approx(3e-3 * line["step"] / 4 if line["step"] < 4 else 3e-4 + 27e-4 * cosine)


def test_config(runs):
    shape = {"vocab_size": 64, "block_size": 16, "n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "n_ffn": 32}
    reference, proxy = (json.loads((path / "config.json").read_text()) for path in (runs.reference, runs.proxy))
    assert reference["stage"] == "reference" and proxy["stage"] == "proxy"
    weights = dict(zip(DOMAINS, [0.1, 0.2, 0.3, 0.4]))
    for config in (reference, proxy):
        assert config["model"] == shape and config["domains"] == DOMAINS
        assert config["data"] == {"data_dir": str(runs.data), "tokenizer": "synthetic",
                                  "tokenizer_sha256": "synthetic" * 4, "vocab_size": 64,
                                  "train_tokens": {"counting": 6000, "simple": 3000, "rich": 2000, "small": 300}}
        assert config["versions"]["torch"] == torch.__version__ and config["device"] == "cpu"
        assert config["world_size"] == 1 and config["flags"]["batch_size"] == 12
        assert config["flags"]["dtype"] == "float64"  # the proxy takes it over
        # embedding; qkv, out, gate and up, down; three norms
        assert config["n_params"] == 64 * 16 + 16 * 32 + 16 * 16 + 16 * 64 + 32 * 16 + 3 * 16
    assert reference["sampling_weights"] == pytest.approx(weights)
    assert proxy["sampling_weights"] == dict.fromkeys(DOMAINS, 0.25)
    assert proxy["reference"]["sampling_weights"] == pytest.approx(weights)
    assert len(proxy["reference"]["fingerprint"]) == 64
    names = {path.name for path in runs.reference.iterdir()}
    assert names == {"flags.txt", "config.json", "ckpt.pt", "metrics.jsonl"}
    assert {path.name for path in runs.proxy.iterdir()} == names | {"doremi_domain_weights_12.pt"}


@pytest.mark.parametrize("name", ["reference", "proxy"])
def test_a_run_repeats_from_its_own_directory(runs, name):
    first, again = getattr(runs, name), runs.directory / f"{name} again"  # a space, too
    script = "train_reference.py" if name == "reference" else "train_doremi.py"
    succeed(script, f"@{first}/flags.txt", f"--out_dir={again}")
    assert comparable(read_metrics(again)) == comparable(read_metrics(first))
    checkpoints = [torch.load(path / "ckpt.pt", weights_only=True) for path in (first, again)]
    for parameter, value in checkpoints[0]["model"].items():
        assert torch.equal(value, checkpoints[1]["model"][parameter])
    flags = [(path / "flags.txt").read_text().splitlines() for path in (first, again)]
    assert [a for a, b in zip(*flags, strict=True) if a != b] == [f"--out_dir={first}"]
    assert shlex.split(next(line for line in flags[1] if "out_dir" in line)) == [f"--out_dir={again}"]


def test_large_is_the_reference_with_other_defaults(runs):
    """The same flags make the same run; the file's own defaults make a larger model."""
    out = runs.directory / "large"
    succeed("train_large.py", f"@{runs.reference}/flags.txt", f"--out_dir={out}")
    assert comparable(read_metrics(out)) == comparable(read_metrics(runs.reference))
    assert json.loads((out / "config.json").read_text())["stage"] == "large"
    small, large = (runpy.run_path(str(ROOT / f"train_{name}.py"))["DEFAULTS"] for name in ("reference", "large"))
    assert small.keys() < large.keys()
    assert large.keys() - small.keys() == {"max_steps", "learning_rate", "eval_interval"}
    assert all(large[name] > small[name] for name in ("n_layer", "n_embd", "n_ffn"))


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    checkpoint.write_atomically(path, "first")

    def fails_half_way(file):
        file.write(b"half of the sec")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomically(path, fails_half_way)
    assert path.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["file"]
    with open(path) as reader:
        checkpoint.write_atomically(path, lambda file: file.write(b"second"))
        assert reader.read() == "first"  # renamed over it: at no moment is there half a file
    assert path.read_text() == "second"


def trained(device, steps):
    """A model and its optimizer after some steps, and a function that trains them by one more."""
    model = torch.nn.Linear(3, 2).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step():
        model(torch.ones(4, 3, device=device)).square().sum().backward()
        optimizer.step()

    for _ in range(steps):
        step()
    return model, optimizer, step


def leaves(value):
    """What is nested in dictionaries and lists, tensors as bytes."""
    if isinstance(value, dict):
        return {name: leaves(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(leaves(item) for item in value)
    return value.cpu().numpy().tobytes() if isinstance(value, torch.Tensor) else value


CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_checkpoint_is_the_state_of_its_own_step(tmp_path, monkeypatch, device):
    """Training goes on while the file is held up; two checkpoints, the second in the first one's memory."""
    release, written = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *args: (release.wait(), written(*args)))
    model, optimizer, step = trained(device, steps=2)
    writer, path, history = checkpoint.CheckpointWriter(), tmp_path / "ckpt.pt", torch.zeros(9, 2, device=device)
    sampler = {"step": 2, "drawn": [3, 4]}
    for n in (3, 4):
        release.clear()
        history[:n] += n
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sampler": sampler,
                 "alpha_history": history[:n], "identity": {"seed": n, "weights": [0.5, None, "text"]}}
        expected = leaves(copy.deepcopy(state))
        writer.save(path, state)
        step()
        optimizer.param_groups[0]["lr"] /= 2
        sampler["drawn"][0] += 1
        history.zero_()
        assert leaves(state) != expected
        release.set()
        writer.wait()
        found = torch.load(path, weights_only=True)
        assert leaves(found) == expected
        assert found["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert len(set(writer.buffers)) == 2 + 2 * 3 + 1  # weight and bias; step and two moments of each; alpha's history
    assert all(buffer.is_pinned() == (device == "cuda") for buffer in writer.buffers.values())


def test_checkpoints_in_quick_succession_keep_their_order(tmp_path, monkeypatch):
    """Each is written whole, with what comes before and after it, before the next one touches its memory."""
    release, written = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *args: (release.wait(), written(*args)))
    writer, path, parameter, seen = checkpoint.CheckpointWriter(), tmp_path / "ckpt.pt", torch.zeros(1000), []

    def on_disk():
        file = torch.load(path, weights_only=True) if path.exists() else {"step": 0, "parameter": torch.zeros(1000)}
        return file["step"], *file["parameter"].unique().tolist()

    threading.Timer(0.2, release.set).start()
    for step in range(1, 6):
        parameter.fill_(step)
        writer.save(path, {"step": step, "parameter": parameter}, first=lambda: seen.append(("before", *on_disk())),
                    then=lambda saved: seen.append((saved["step"], *on_disk())))
    writer.wait()
    assert seen == [entry for n in range(1, 6) for entry in (("before", n - 1, n - 1), (n, n, n))]
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_an_error_of_the_writer_comes_with_the_next_call(tmp_path):
    writer, path, after = checkpoint.CheckpointWriter(), tmp_path / "ckpt.pt", []
    for call in (writer.wait, lambda: writer.save(path, {"step": 2})):
        (tmp_path / ".ckpt.pt.tmp").mkdir()
        writer.save(path, {"step": 1}, then=after.append)  # itself, it raises nothing
        with pytest.raises(IsADirectoryError, match=r"ckpt\.pt"):
            call()
        (tmp_path / ".ckpt.pt.tmp").rmdir()
        assert not path.exists() and not after
    writer.save(path, {"step": 3})
    writer.wait()
    writer.wait()
    assert torch.load(path, weights_only=True) == {"step": 3}


def test_metrics_behind_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 2, "lo')
    with checkpoint.open_metrics(path, 2) as file:
        file.write('{"step": 3, "again": 1}\n')
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": 1}\n'
    checkpoint.open_metrics(path, 0).close()
    assert path.read_text() == ""


# ---------------------------------------------------------------------------------------------------------------------
# Ranks and wandb


@pytest.fixture(scope="module")
def without_wandb(tmp_path_factory):
    """An environment in which wandb cannot be imported."""
    shim = tmp_path_factory.mktemp("shim")
    (shim / "wandb.py").write_text("raise ImportError('no wandb here')")
    return {"PYTHONPATH": str(shim)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_ranks_compute_what_one_does(runs, script, without_wandb):
    """Under torchrun, with float64 sums: the same numbers but for the order of summation. (Nothing needs wandb.)"""
    name = {"train_reference.py": "reference", "train_doremi.py": "proxy", "train_large.py": "reference"}[script]
    single, out = getattr(runs, name), runs.directory / f"two ranks {script}"
    run_script(script, f"@{single}/flags.txt", f"--out_dir={out}", "--micro_batch_size=3", ranks=2, env=without_wandb)
    assert json.loads((out / "config.json").read_text())["world_size"] == 2
    for ours, theirs in zip(read_metrics(out), read_metrics(single), strict=True):
        for key in theirs.keys() - WORK:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-9, abs=1e-12), (theirs["step"], key)


def test_wandb_that_is_not_installed(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    out = runs.directory / "unlogged"
    result = run_here("train_reference.py", *TINY, f"--data_dir={runs.data}", f"--out_dir={out}", "--wandb=offline")
    assert result.returncode == 2 and "pip install wandb" in result.stderr and "--wandb=disabled" in result.stderr
    assert result.stderr.count("\n") == 1 and not out.exists()


def wandb_history(path):
    """The rows of a .wandb file, {step: {name: value}}: a log of 32 KiB blocks (LevelDB's), protocol buffers in it."""
    from wandb.proto import wandb_internal_pb2

    data, at, record, rows = path.read_bytes(), 7, b"", {}
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is too short for a header
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            message, record = wandb_internal_pb2.Record.FromString(record), b""
            items = message.history.item
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            if row:
                rows.setdefault(row["_step"], {}).update({k: v for k, v in row.items() if k[0] != "_"})
    return rows


def test_wandb_gets_what_the_metrics_have(runs):
    pytest.importorskip("wandb")
    out = runs.directory / "logged"
    run_script("train_doremi.py", f"@{runs.proxy}/flags.txt", f"--out_dir={out}", "--wandb=offline")
    (path,) = Path(out).glob("wandb/offline-run-*/*.wandb")
    expected = {}
    for line in read_metrics(out):
        row = expected.setdefault(line["step"], {})
        for key, value in line.items():
            row.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    assert wandb_history(path) == expected
    assert len(expected) == 4 and "alpha.rich" in expected[3] and "val_loss.rich" in expected[6]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is nothing to keep")
def test_freed_memory_is_kept():
    """Blocks of 40 MB, freed and taken again, are not faulted in anew (10,000 pages each, or 20 large ones)."""
    code = """
import resource, sys, torch, runtime
if sys.argv[1] == "keep":
    runtime.keep_freed_memory()
def faults(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        torch.zeros(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(10)
print(faults(5))
"""
    found = {what: int(subprocess.run([sys.executable, "-c", code, what], capture_output=True, text=True, check=True,
                                      cwd=ROOT).stdout) for what in ("keep", "leave")}
    assert found["leave"] > 5 * 40_000_000 // 2**21 - 5 and found["keep"] * 10 < found["leave"], found
