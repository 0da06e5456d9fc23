"""The machinery: schedule, a run's directory, its identity, what is logged, and two ranks under torchrun."""

import json
import math
import re
import runpy
import shlex
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, read_metrics, run_here, run_script
from forked import run_forked

import runtime
from cli import UserError

WORK = {"tokens_per_second", "mfu", "seconds"}  # what differs between two runs of the same
DOMAINS = ["counting", "simple", "rich", "small"]


def comparable(lines):
    return [{key: value for key, value in line.items() if key not in WORK} for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir):
    """A finished reference and a finished proxy, in float64."""
    directory = tmp_path_factory.mktemp("runs")
    reference, proxy = directory / "reference", directory / "proxy"
    run_here("train_reference.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={reference}", "--dtype=float64",
             "--sampling_weights=0.1,0.2,0.3,0.4")
    flags = [flag for flag in TINY if re.match("--(log|eval|save)_|--no-compile", flag)]
    run_here("train_doremi.py", *flags, f"--reference={reference}", f"--out_dir={proxy}")
    return SimpleNamespace(reference=reference, proxy=proxy, data=data_dir, directory=directory)


# ---- schedule and gradients ----


def learning_rates(**changes):
    args = Namespace(**{"lr_schedule": "cosine", "max_steps": 150, "warmup_steps": 50, "learning_rate": 0.01,
                        "min_lr": 0.001, **changes})
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


# ---- a run's directory ----

TRAINING = {"step", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "domain_loss", "epochs"}


@pytest.mark.parametrize("name, keys", [("reference", TRAINING), ("proxy", TRAINING | {"alpha", "excess"})])
def test_metrics(runs, name, keys):
    """Steps of 12 sequences of 16 tokens: 192. A line every 3 steps, an evaluation every 6."""
    lines = read_metrics(getattr(runs, name))
    training, evaluations = ([line for line in lines if key in line] for key in ("loss", "val_loss"))
    assert [line["step"] for line in lines] == [3, 6, 6, 9, 12, 12] and len(training) == 4
    for line in training:
        assert set(line) == keys and min(line["mfu"], line["tokens_per_second"], line["grad_norm"]) > 0
        assert set(line["domain_loss"]) <= set(DOMAINS) and list(line["epochs"]) == DOMAINS
        assert min(line["domain_loss"].values()) <= line["loss"] <= max(line["domain_loss"].values())
        cosine = (1 + math.cos(math.pi * (line["step"] - 4) / 8)) / 2  # over 8 steps, after 12 // 3 = 4 of warm-up
        assert line["lr"] == pytest.approx(3e-3 * line["step"] / 4 if line["step"] < 4 else 3e-4 + 27e-4 * cosine)
    for line in evaluations:
        assert set(line) == {"step", "tokens", "seconds", "val_loss", "val_bpb", "val_loss_mean", "val_loss_worst"}
        assert line["tokens"] == 192 * line["step"]
        assert line["val_loss_mean"] == pytest.approx(sum(line["val_loss"].values()) / 4)
        assert line["val_loss_worst"] == max(line["val_loss"].values())
        for domain in DOMAINS:  # conftest says three bytes a token
            assert line["val_bpb"][domain] == pytest.approx(line["val_loss"][domain] / 3 / math.log(2))
    if name == "reference":  # the last epochs are the draws of 12 batches: windows are 374, 187, 124, 18
        drawn = [training[-1]["epochs"][d] * n for d, n in zip(DOMAINS, [374, 187, 124, 18])]
        assert drawn == pytest.approx([round(d) for d in drawn]) and sum(drawn) == pytest.approx(144)
        assert all(abs(d - 144 * w) < 12 for d, w in zip(drawn, [0.1, 0.2, 0.3, 0.4]))
        return
    history = torch.load(runs.proxy / "doremi_domain_weights_12.pt", weights_only=True)
    for line in training:
        entry = history[line["step"] - 1]
        assert entry["step"] == line["step"] and entry["domain_weights"].tolist() == list(line["alpha"].values())
        assert sum(line["alpha"].values()) == pytest.approx(1) and min(line["excess"].values()) >= 0


def test_config(runs):
    shape = {"vocab_size": 64, "block_size": 16, "n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "n_ffn": 32}
    reference, proxy = map(runtime.read_config, (runs.reference, runs.proxy))
    assert reference["stage"] == "reference" and proxy["stage"] == "proxy"
    weights = dict(zip(DOMAINS, [0.1, 0.2, 0.3, 0.4]))
    for config in (reference, proxy):
        assert config["model"] == shape and config["domains"] == DOMAINS
        assert config["data"] == {"data_dir": str(runs.data), "tokenizer": "synthetic",
                                  "tokenizer_sha256": "synthetic" * 4, "vocab_size": 64,
                                  "train_tokens": {"counting": 6000, "simple": 3000, "rich": 2000, "small": 300}}
        assert config["versions"]["torch"] == torch.__version__
        assert (config["device"], config["world_size"], config["flags"]["dtype"]) == ("cpu", 1, "float64")
        # embedding; qkv, out, gate and up, down; three norms
        assert config["n_params"] == 64 * 16 + 16 * 32 + 16 * 16 + 16 * 64 + 32 * 16 + 3 * 16
    assert reference["sampling_weights"] == pytest.approx(weights)
    assert proxy["sampling_weights"] == dict.fromkeys(DOMAINS, 0.25)
    assert proxy["flags"]["seed"] == 2
    assert proxy["reference"].pop("sampling_weights") == pytest.approx(weights)
    assert len(proxy["reference"].pop("fingerprint")) == 64
    assert proxy["reference"] == {"out_dir": str(runs.reference), "seed": 1, "max_steps": 12, "batch_size": 12}
    names = {path.name for path in runs.reference.iterdir()}
    assert names == {"flags.txt", "config.json", "ckpt.pt", "metrics.jsonl"}
    assert {path.name for path in runs.proxy.iterdir()} == names | {"doremi_domain_weights_12.pt"}


@pytest.mark.parametrize("name", ["reference", "proxy"])
def test_a_run_repeats_from_its_own_directory(runs, name):
    first, again = getattr(runs, name), runs.directory / f"{name} again"  # a space, too
    run_here("train_reference.py" if name == "reference" else "train_doremi.py", f"@{first}/flags.txt",
             f"--out_dir={again}")
    assert comparable(read_metrics(again)) == comparable(read_metrics(first))
    models = [torch.load(path / "ckpt.pt", weights_only=True)["model"] for path in (first, again)]
    assert all(torch.equal(value, models[1][parameter]) for parameter, value in models[0].items())
    flags = [(path / "flags.txt").read_text().splitlines() for path in (first, again)]
    assert [shlex.split(line) for a, line in zip(*flags, strict=True) if a != line] == [[f"--out_dir={again}"]]


def test_large_is_the_reference_with_other_defaults(runs):
    """The same flags make the same run; the file's own defaults make a larger model."""
    out = runs.directory / "large"
    run_here("train_large.py", f"@{runs.reference}/flags.txt", f"--out_dir={out}")
    assert comparable(read_metrics(out)) == comparable(read_metrics(runs.reference))
    assert runtime.read_config(out)["stage"] == "large"
    small, large = (runpy.run_path(str(ROOT / f"train_{name}.py"))["DEFAULTS"] for name in ("reference", "large"))
    assert all(large[name] > small[name] for name in ("n_layer", "n_embd", "n_ffn"))


@pytest.mark.parametrize("script, name", [("train_reference.py", "reference"), ("train_doremi.py", "proxy")])
def test_two_ranks_compute_what_one_does(runs, script, name):
    """Every line of metrics: the same numbers but for the order of summation."""
    single, out = getattr(runs, name), runs.directory / f"two ranks {script}"
    run_forked(script, f"@{single}/flags.txt", f"--out_dir={out}", "--micro_batch_size=3", ranks=2)
    assert runtime.read_config(out)["world_size"] == 2
    for ours, theirs in zip(read_metrics(out), read_metrics(single), strict=True):
        for key in theirs.keys() - WORK:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-9, abs=1e-12), (theirs["step"], key)


# ---- identity, and what later stages read ----


def test_identity_is_what_makes_a_run_this_experiment(runs):
    """Every flag but those of places and machines; two domains may be called as the config's own sections are."""
    config = runtime.read_config(runs.proxy)
    found = runtime.identity(config)
    same = {"resume", "device", "compile", "micro_batch_size", "activation_checkpointing", "log_interval", "wandb",
            "eval_interval", "eval_windows", "save_interval", "timeout", "out_dir", "data_dir", "reference"}
    for name, value in config["flags"].items():
        changed = {**config, "flags": {**config["flags"], name: "another"}}
        kept = name in same or name == "sampling_weights"  # of these, what they lead to is compared
        assert (runtime.identity(changed) == found) == kept, name
        assert kept or found[name] == value
    assert runtime.identity({**config, "versions": {}, "device": "cuda", "world_size": 8}) == found
    for domain in ("reference", "data", "out_dir", "device"):
        for name, section in [("sampling_weights", config), ("train_tokens", config["data"])]:
            marked = json.loads(json.dumps(config))
            (marked if section is config else marked["data"])[name][domain] = 5
            assert runtime.identity(marked) != found, (domain, name)
    for name in ("fingerprint", "seed", "max_steps", "batch_size"):
        assert found[f"reference.{name}"] == config["reference"][name]
    assert found["data.tokenizer_sha256"] == "synthetic" * 4 and found["sampling_weights"]["rich"] == 0.25


def test_load_finished(runs, tmp_path):
    config, checkpoint = runtime.load_finished(runs.reference, ("large", "reference"))
    assert config["stage"] == checkpoint["stage"] == "reference" and checkpoint["step"] == 12
    with pytest.raises(UserError, match="proxy"):
        runtime.load_finished(runs.proxy, ("reference", "large"))
    (tmp_path / "config.json").write_text((runs.reference / "config.json").read_text())
    for step in (None, 11):
        if step:
            torch.save({**checkpoint, "step": step}, tmp_path / "ckpt.pt")
        with pytest.raises(UserError, match=f"{step or 0} of 12 steps.*--resume"):
            runtime.load_finished(tmp_path, ("reference",))
    torch.save({**checkpoint, "stage": "proxy"}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="proxy"):
        runtime.load_finished(tmp_path, ("reference",))


@pytest.mark.parametrize("content", [None, "{", "[]", "null", "{}", '{"stage": "reference"}', '{"flags": 3}'])
def test_config_that_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        runtime.read_config(tmp_path)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    runtime.write_atomically(path, "first")

    def fails_half_way(file):
        file.write(b"half of the sec")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runtime.write_atomically(path, fails_half_way)
    assert path.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["file"]
    with open(path) as reader:
        runtime.write_atomically(path, lambda file: file.write(b"second"))
        assert reader.read() == "first"  # renamed over it: at no moment is there half a file
    assert path.read_text() == "second"


def test_metrics_behind_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 2, "lo')
    with runtime.open_metrics(path, 2) as file:
        file.write('{"step": 3, "again": 1}\n')
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": 1}\n'
    runtime.open_metrics(path, 0).close()
    assert path.read_text() == ""


# ---- wandb ----


def test_slashed():
    assert runtime.slashed({"step": 3, "loss": 1.5, "alpha": {"web": 0.25, "a/b": 0.75}}) == {
        "train/loss": 1.5, "alpha/web": 0.25, "alpha/a/b": 0.75}
    assert runtime.slashed({"step": 3, "tokens": 9, "val_loss": {"web": 2.0}, "val_loss_mean": 2.0}) == {
        "val/tokens": 9, "val_loss/web": 2.0, "val/loss_mean": 2.0}


def test_wandb_gets_the_metrics_under_one_id(runs, monkeypatch):
    """Of a run that is stopped at step 5 and resumed."""
    started, rows = [], {}

    class Recorder:
        def __init__(self, **options):
            self.id = options["id"] or "one-and-only"
            started.append({**options, "id": self.id})

        def log(self, values, step):
            rows.setdefault(step, {}).update(values)

        def finish(self):
            pass

    out = runs.directory / "logged"
    flags = [f"@{runs.proxy}/flags.txt", f"--out_dir={out}", "--wandb=offline"]
    monkeypatch.setenv("WANDB_PROJECT", "mixtures")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: Recorder(**options)))
    record = runtime.Run.record
    with monkeypatch.context() as patch:
        patch.setattr(runtime.Run, "record", lambda run, step, **t: (
            record(run, step, **t), step == 5 and run.request_stop(15, None)))
        run_here("train_doremi.py", *flags, status=143)
    run_here("train_doremi.py", *flags, "--resume")
    assert [run["id"] for run in started] == ["one-and-only"] * 2
    assert started[0]["project"] == "mixtures" and started[0]["mode"] == "offline" and started[0]["name"] == "logged"
    expected = {}
    for line in read_metrics(out):
        expected.setdefault(line["step"], {}).update(runtime.slashed(line))
    assert rows == expected and list(rows) == [3, 6, 9, 12]
    assert rows[6].keys() >= {"train/loss", "train/lr", "alpha/rich", "excess/rich", "val_loss/rich", "val/loss_worst"}


def test_wandb_offline_runs(runs, monkeypatch):
    pytest.importorskip("wandb")
    out = runs.directory / "offline"
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    run_here("train_doremi.py", f"@{runs.proxy}/flags.txt", f"--out_dir={out}", "--wandb=offline")
    assert comparable(read_metrics(out)) == comparable(read_metrics(runs.proxy))
    trained, = out.glob("wandb/offline-run-*/*.wandb")
    run_script("average_weights.py", out)  # as one does: in one process, wandb may lose a run that has an id again
    averaged, = set(out.glob("wandb/offline-run-*/*.wandb")) - {trained}
    assert averaged.name == trained.name  # run-ID.wandb
    assert b"answer/rich" in averaged.read_bytes() and list(averaged.parent.glob("files/media/images/weights_*.png"))
