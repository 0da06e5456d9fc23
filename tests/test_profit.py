"""The experiments on profit: real runs of the stages' scripts, and tables that hold what the runs' own files say."""

import json
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, read_metrics
from forked import Job

from cli import UserError

sys.path.insert(0, str(ROOT / "experiments"))
import profit
import study


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """The scripts run in forked processes instead of new ones: the same code without seconds of imports each."""
    def run(command, stdout, **_):
        job = Job(str(command[1].name), *command[2:])
        status = job.wait()
        stdout.write(job.output())
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(profit.subprocess, "run", run)


def call(script, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
    script.main()


def flags(data_dir, out_dir, *more):
    tiny = shlex.join(TINY)
    return [f"--data_dir={data_dir}", f"--out_dir={out_dir}", f"--small={tiny}", "--proxy=--step_size=1 --no-compile",
            f"--large={tiny} --n_embd=24", *more]


def test_profit_tells_what_the_runs_did_and_does_nothing_twice(tmp_path, data_dir, monkeypatch, capsys):
    asked = flags(data_dir, tmp_path / "out", "--seeds=1,2", "--rounds=2")
    call(profit, monkeypatch, *asked)
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())

    def final(seed, name):
        return read_metrics(tmp_path / f"out/seed-{seed}/large/{name}")[-1]["val_loss"]

    names = {"temperature:0.5": "temperature-0.5", "DoReMi, natural": "natural", "DoReMi, uniform": "round-1",
             "DoReMi, rounds": "round-2", "uniform": "uniform"}
    for mixture, name in names.items():
        change = np.array([[final(seed, name)[d] - final(seed, "token_count")[d] for d in results["domains"]]
                           for seed in (1, 2)])
        row = next(line for line in printed.splitlines() if line.startswith(f"| {mixture} |")).split(" | ")
        assert row[1] == ", ".join(str(n) for n in (change < 0).sum(axis=1))
        assert row[3] == f"{change.mean():+.3f} ± {change.mean(axis=1).std(ddof=1):.3f}"
    weights = {s: json.loads((tmp_path / f"out/seed-{s}/round-1/answer/weights.json").read_text()) for s in (1, 2)}
    answers = np.array([list(weights[s]["domain_weights"].values()) for s in (1, 2)])
    assert f"| DoReMi, uniform | {abs(answers[0] - answers[1]).sum() / 2:.3f} |" in printed
    # Round 2 begins where round 1 ended, and the second table of moves is that of the files
    config = json.loads((tmp_path / "out/seed-1/round-2/reference/config.json").read_text())
    assert list(config["sampling_weights"].values()) == pytest.approx(answers[0], abs=1e-12)
    assert f"| 1 | {weights[1]['provenance']['largest_move']:.4f}, " in printed
    # The line on a domain's own share is the least-squares line through all changes of the domains table
    mixtures, base = results["mixtures"], results["mixtures"]["token_count"]
    x, y = (np.ravel([f(of) for name, of in mixtures.items() if name != "token_count"]) for f in (
        lambda of: np.log(np.mean(of["weights"], axis=0) / base["weights"][0]),
        lambda of: np.mean(of["loss"], axis=0) - np.mean(base["loss"], axis=0)))
    (a, b), *_ = np.linalg.lstsq(np.stack([np.ones_like(x), x], axis=1), y)
    explained = 1 - np.var(y - a - b * x) / np.var(y)
    assert f"loss = {a:+.3f} {b:+.3f} ln(" in printed and f"explains {100 * explained:.0f}% of" in printed
    # Nothing is repeated four times, so that unimax:4 is uniform and has no run of its own
    assert results["mixtures"]["unimax:4"] == results["mixtures"]["uniform"]
    assert not (tmp_path / "out/seed-1/large/unimax-4").exists()

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("done.txt")}
    call(profit, monkeypatch, *asked)
    assert capsys.readouterr().out == printed
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("done.txt")}
    # Other flags are noticed, also those that a file holds
    (tmp_path / "proxy.txt").write_text("--step_size=2\n--no-compile\n")
    with pytest.raises(UserError, match="step_size=2"):
        call(profit, monkeypatch, *asked, f"--proxy=@{tmp_path}/proxy.txt")


def test_a_failed_run_is_named_and_not_done(tmp_path, data_dir, monkeypatch):
    with pytest.raises(UserError, match=r"status 2: .*n_embd 15"):
        call(profit, monkeypatch, *flags(data_dir, tmp_path / "out", f"--small={shlex.join(TINY)} --n_embd=15"))
    assert not list(tmp_path.rglob("done.txt"))


def test_study_describes_the_weight_histories(tmp_path, data_dir, monkeypatch, capsys):
    variants = "step size 0.01;updates from the start;reference on uniform weights"
    asked = flags(data_dir, tmp_path / "out", "--seeds=1,2", f"--only={variants}", "--train=standard",
                  "--proxy=--step_size=1 --update_after=3 --no-compile")
    call(study, monkeypatch, *asked)
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out/study.json").read_text())
    assert list(found) == ["standard", *variants.split(";")]
    standard, small, early, uniform = (found[name][0] for name in found)
    # Updates that begin late leave alpha uniform until then: 4 domains, and 4 only then
    assert standard["number"][:3] == pytest.approx([4.0] * 3, abs=1e-9) and standard["number"][3] < 4 - 1e-6
    assert early["number"][0] < 4 - 1e-6
    # A step size of nearly nothing leaves the answer at uniform weights
    assert small["answer"] == pytest.approx([0.25] * 4, abs=0.01)
    far = abs(np.array(small["answer"]) - standard["answer"]).sum() / 2
    assert f"| step size 0.01 | {far:.3f} |" in printed and far > 0.02
    config = json.loads((tmp_path / "out/standard/seed-1/reference/config.json").read_text())
    assert config["sampling_weights"]["counting"] == pytest.approx(6000 / 11300)
    config = json.loads((tmp_path / "out/reference-on-uniform-weights/seed-1/reference/config.json").read_text())
    assert config["sampling_weights"]["counting"] == 0.25 and uniform["answer"] != standard["answer"]
    change = np.array([
        [read_metrics(tmp_path / f"out/standard/seed-{s}/large-half")[-1]["val_loss"][d] - base for d, base in
         read_metrics(tmp_path / f"out/baseline/seed-{s}")[-1]["val_loss"].items()] for s in (1, 2)])
    row = next(line for line in printed.splitlines() if line.startswith("| standard |"))
    sd = change.mean(axis=1).std(ddof=1)
    better = ", ".join(str(n) for n in (change < 0).sum(axis=1))
    assert row.endswith(f"| {better}; {change.mean():+.3f} ± {sd:.3f} |")
    alpha = np.stack([[entry["domain_weights"].numpy() for entry in torch.load(
        tmp_path / f"out/standard/seed-{s}/proxy/doremi_domain_weights_12.pt")] for s in (1, 2)])
    answers, last = alpha.mean(axis=1), alpha[:, 9:].mean(axis=1)
    assert f", {np.mean(abs(answers - last).sum(axis=1)) / 2:.3f} | " in row
