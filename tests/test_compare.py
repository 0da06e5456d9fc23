"""Stage 5: who is better where, by how much and how much sooner, and what is not comparable."""

import json
import math

import numpy as np
import pytest
from matplotlib.image import imread

import cli
import compare
from compare import passing, read_comparable, speed_up, spread

DOMAINS = ["books", "code", "web"]
STEPS = (100, 200, 300, 400)
BASELINE = [[4.0, 3.0, 5.0], [3.5, 2.5, 4.5], [3.0, 2.0, 4.0], [2.0, 1.5, 3.1]]  # means 4, 3.5, 3, 2.2
FASTER = [[3.9, 2.9, 4.9], [2.0, 1.5, 3.0], [2.0, 1.4, 2.9], [1.9, 1.5, 2.6]]  # means 3.9, 2.1667, 2.1, 2
SLOWER = [[4.0, 3.0, 5.0], [3.9, 3.0, 4.9], [3.8, 2.9, 4.8], [3.0, 1.0, 4.5]]  # means 4, 3.9333, 3.8333, 2.8333


def evaluation(step, losses, domains, tokens_per_step=32):
    named = dict(zip(domains, losses))
    return {"step": step, "tokens": step * tokens_per_step, "seconds": 1.0, "val_loss": named,
            "val_bpb": {name: loss / math.log(2) / 4 for name, loss in named.items()},
            "val_loss_mean": sum(losses) / len(losses), "val_loss_worst": max(losses)}


def large_run(path, losses, domains=DOMAINS, tokens_per_step=32, **changes):
    """A run's directory with an evaluation every 100 steps; changes replace parts of its config."""
    path.mkdir(parents=True)
    config = {
        "stage": "large",
        "model": {"vocab_size": 300, "block_size": 8},
        "n_params": 5000,
        "domains": domains,
        "sampling_weights": dict.fromkeys(domains, 1 / len(domains)),
        "data": {"data_dir": "data/toy", "tokenizer": "bytes", "tokenizer_sha256": "ab" * 32, "vocab_size": 300,
                 "train_tokens": dict.fromkeys(sorted(domains), 1000)},
        "flags": {"max_steps": 400, "batch_size": 4, "eval_windows": 0, "seed": 1},
        "versions": {"python": "3.12.0", "torch": "2.13.0", "numpy": "2.4.0"},
        "device": "cpu",
        "world_size": 1,
    }
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    with open(path / "metrics.jsonl", "w") as file:
        for step, row in zip(STEPS, losses):
            file.write(json.dumps({"step": step, "loss": 3.0, "mfu": None, "domain_loss": {}}) + "\n")
            file.write(json.dumps(evaluation(step, row, domains, tokens_per_step)) + "\n")
    return path


def run_compare(*args):
    compare.main([str(arg) for arg in args])


def refused(capsys, *args):
    """The single line on standard error of a run that must fail with status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: run_compare(*args))
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    return printed.err


@pytest.fixture
def runs(tmp_path):
    return [large_run(tmp_path / name, losses) for name, losses in
            (("baseline", BASELINE), ("faster", FASTER), ("slower", SLOWER))]


def test_table_and_summary(runs, capsys):
    run_compare(*runs)
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[: lines.index("")]}
    # weight, nats, bits per byte; then per run: weight, nats, change, bits per byte
    assert rows["books"] == ["0.3333", "2.0000", "0.7213", "0.3333", "1.9000", "-0.1000*", "0.6853",
                             "0.3333", "3.0000", "+1.0000", "1.0820"]
    assert rows["code"][5] == "+0.0000"  # equal is not better
    assert rows["mean"][2:4] == ["2.0000", "-0.2000*"]
    assert rows["worst"][2:4] == ["2.6000", "-0.5000*"]
    assert lines[-6:] == [
        "faster against baseline: better in 2 of 3 domains, mean -0.2000 nats per token",
        "  worst domain 2.6000 (web) against 3.1000 (web)",
        "  baseline's last mean loss, 2.2000: reached at step 200 of 400: 2x fewer tokens",
        "slower against baseline: better in 1 of 3 domains, mean +0.6333 nats per token",
        "  worst domain 4.5000 (web) against 3.1000 (web)",
        "  baseline's last mean loss, 2.2000: not reached in 400 steps; the nearest is 2.8333",
    ]


def test_speed_up(tmp_path, runs):
    baseline, faster, slower = read_comparable(runs)
    assert speed_up(faster, baseline) == (2.0, 1)  # 400 steps against 200
    assert speed_up(slower, baseline) == (None, None)
    tie = large_run(tmp_path / "tie", [BASELINE[0], BASELINE[3], BASELINE[2], BASELINE[3]])
    assert speed_up(read_comparable([runs[0], tie])[1], baseline) == (2.0, 1)  # at the very value counts as reached
    half_batch = large_run(tmp_path / "half", FASTER, tokens_per_step=16)
    assert speed_up(read_comparable([runs[0], half_batch])[1], baseline) == (4.0, 1)  # tokens count, not steps
    assert passing(np.array([3.0, 1.0, 2.0]), 2.0) == 1
    assert passing(np.array([3.0, 4.0]), 2.0) is None


def test_another_baseline(runs, capsys):
    run_compare(*runs[:2], f"--baseline={runs[2]}")
    said = capsys.readouterr().out
    assert "baseline against slower: better in 2 of 3 domains, mean -0.6333" in said
    assert (runs[1] / "compare.png").exists()


def test_domains_are_matched_by_name(tmp_path, runs, capsys):
    mirrored = large_run(tmp_path / "mirrored", [row[::-1] for row in FASTER], domains=DOMAINS[::-1])
    run_compare(runs[0], mirrored)
    assert "mirrored against baseline: better in 2 of 3 domains, mean -0.2000" in capsys.readouterr().out


def test_remarks(tmp_path, runs, capsys):
    flags = {"max_steps": 800, "batch_size": 4, "eval_windows": 0, "seed": 1}
    longer = large_run(tmp_path / "longer", FASTER, n_params=7000, flags=flags)
    run_compare(runs[0], longer)
    said = capsys.readouterr().out
    assert "note: longer is not like baseline: parameters 7,000 against 5,000, steps planned 800 against 400" in said
    assert "note: longer is evaluated up to step 400 of 800" in said
    overfitted = large_run(tmp_path / "overfitted", [BASELINE[0], BASELINE[3], BASELINE[2], BASELINE[2]])
    run_compare(overfitted, runs[1])
    assert "note: overfitted reached its last mean loss at step 200 already" in capsys.readouterr().out


@pytest.mark.parametrize("k", [1, 3, 22])
def test_picture_is_a_png_that_shows_something(tmp_path, k):
    domains = [f"a domain of number {i}" for i in range(k)]
    paths = [large_run(tmp_path / name, np.linspace(4, last, 4)[:, None].repeat(k, axis=1).tolist(), domains)
             for name, last in (("baseline", 2.0), ("uniform", 2.1), ("doremi", 1.9))]
    run_compare(*paths, f"--out={tmp_path / 'pictures' / 'here.png'}")
    pixels = imread(tmp_path / "pictures" / "here.png")[..., :3]
    assert pixels.shape[0] > 400 and pixels.shape[1] > 800
    assert 0.01 < (pixels < 0.9).any(axis=2).mean() < 0.5
    assert (pixels[:, -3:] == 1).all() and (pixels[-3:] == 1).all()  # nothing runs off the edge


def test_labels_are_spread():
    assert spread(np.array([0.5, 0.9, 0.5]), 0.1) == pytest.approx([0.45, 0.9, 0.55])
    assert np.diff(np.sort(spread(np.full(5, 0.3), 0.1))).min() == pytest.approx(0.1, abs=1e-3)


def test_runs_that_are_not_comparable_are_refused(tmp_path, runs, capsys):
    data = json.loads((runs[0] / "config.json").read_text())["data"]
    flags = {"max_steps": 400, "batch_size": 4, "eval_windows": 5, "seed": 1}
    for name, changes in {
        "domains": {"domains": ["books", "code", "news"]},
        "tokenizer_sha256": {"data": {**data, "tokenizer_sha256": "cd" * 32}},
        "train_tokens": {"data": {**data, "train_tokens": {**data["train_tokens"], "web": 999}}},
        "block_size": {"model": {"vocab_size": 300, "block_size": 16}},
        "eval_windows": {"flags": flags},
    }.items():
        other = large_run(tmp_path / name / "run", FASTER, **changes)
        assert f"run: {name} is" in refused(capsys, runs[0], other)
        assert not (other / "compare.png").exists()


def test_bad_input_is_refused(tmp_path, runs, capsys):
    assert "one run only" in refused(capsys, runs[0])
    assert "twice" in refused(capsys, runs[0], runs[0])
    assert "nowhere/config.json: no such file" in refused(capsys, runs[0], tmp_path / "nowhere")
    assert "--out" in refused(capsys, *runs, f"--out={tmp_path / 'picture.svg'}")
    metrics = runs[1] / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 500, "lo')
    assert f"{metrics}, line 9: invalid JSON" in refused(capsys, *runs)
    metrics.write_text(whole + json.dumps(evaluation(500, [1.0, math.nan, 1.0], DOMAINS)) + "\n")
    assert "line 9, val_loss: the value of 'code' is nan" in refused(capsys, *runs)
    metrics.write_text(whole + json.dumps(evaluation(500, [1.0, 1.0], ["books", "code"])) + "\n")
    assert "line 9, val_loss: web" in refused(capsys, *runs)
    metrics.write_text(whole + '{"step": 500, "val_loss": {}}\n')
    assert "has no tokens, val_bpb" in refused(capsys, *runs)
    metrics.write_text('{"step": 100, "loss": 3.0}\n')
    assert "holds no evaluation yet" in refused(capsys, *runs)
    metrics.unlink()
    assert "metrics.jsonl: no such file" in refused(capsys, *runs)
    assert not list(tmp_path.glob("*/compare.png"))
