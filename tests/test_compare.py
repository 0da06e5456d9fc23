"""Stage 5: who is better where, by how much and how much sooner, over seeds, and what cannot be compared."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import finished_run, printed, refused

from common import figures
from compare import read_groups, tokens_to_reach

DOMAINS = ["books", "code", "web"]
BASELINE = [[4.0, 3.0, 5.0], [3.5, 2.5, 4.5], [3.0, 2.0, 4.0], [2.0, 1.5, 3.1]]  # means 4, 3.5, 3, 2.2
FASTER = [[3.9, 2.9, 4.9], [2.0, 1.5, 3.0], [2.0, 1.4, 2.9], [1.9, 1.5, 2.6]]  # means 3.9, 2.1667, 2.1, 2
SLOWER = [[4.0, 3.0, 5.0], [3.9, 3.0, 4.9], [3.8, 2.9, 4.8], [3.0, 1.0, 4.5]]  # means 4, 3.9333, 3.8333, 2.8333
UNIFORM, OTHER = [1 / 3, 1 / 3, 1 / 3], [0.5, 0.25, 0.25]  # sampling weights


def large_run(path, losses, weights=OTHER, domains=DOMAINS, seed=1, tokens_per_step=32, flags=None, data=None,
              **changes):
    """A run's directory with an evaluation every 100 steps; changes replace parts of its config."""
    config = {
        "stage": "large", "n_params": 5000, "domains": domains, "sampling_weights": dict(zip(domains, weights)),
        "model": {"block_size": 8}, "data": {
            "data_dir": "data/toy", "tokenizer": "bytes", "tokenizer_sha256": "ab",
            "train_tokens": {name: 100 * len(name) for name in domains}, **(data or {})},  # 500, 400, 300
        "flags": {"max_steps": 400, "batch_size": tokens_per_step // 8, "seed": seed, "sampling_weights": "1,2,3",
                  **(flags or {})}}
    finished_run(path, {**config, **changes}, 400, {"weight": torch.full((3,), float(seed))})
    lines = [{"eval_windows": 0, "step": step, "val_loss": dict(zip(domains, row))}
             for step, row in zip((100, 200, 300, 400), losses)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"step": 1, "loss": 3.0}, *lines]))
    return path


@pytest.fixture
def runs(tmp_path):
    return [large_run(tmp_path / name, losses, weights) for name, losses, weights in
            (("baseline", BASELINE, UNIFORM), ("faster", FASTER, OTHER), ("slower", SLOWER, OTHER[::-1]))]


compared = functools.partial(printed, "compare.py")


def test_table(runs):
    said, rows = compared(*runs)
    assert rows["books"] == ["2.0000", "-0.1000*", "+1.0000"]
    assert rows["code"] == ["1.5000", "+0.0000", "-0.5000*"]  # equal is not better
    assert rows["mean"] == ["2.2000", "-0.2000*", "+0.6333"]
    # shares 5/12, 4/12, 3/12: 25/12 in the baseline; -0.1 * 5/12 - 0.5 * 3/12; (5 * 1 - 4 * 0.5 + 3 * 1.4) / 12
    assert rows["token-weighted"] == ["mean", "2.1083", "-0.1667*", "+0.6000"]
    assert rows["worst"] == ["domain", "3.1000", "-0.5000*", "+1.4000"]
    assert "faster against baseline: better in 2 of 3 domains, mean -0.200 nats, token-weighted -0.167, " in said
    assert "speed-up 2.02x" in said and "speed-up not reached" in said  # 400 / (100 + 100 * 1.7 / 1.7333)
    assert (runs[-1] / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_speed_up(tmp_path, runs):
    tie = large_run(tmp_path / "tie", [BASELINE[0], BASELINE[3], BASELINE[2], BASELINE[3]], [0.4, 0.3, 0.3])
    half_batch = large_run(tmp_path / "half", FASTER, tokens_per_step=16)
    said, _ = compared(runs[0], tie, half_batch)  # at the very value counts as reached; tokens count, not steps
    assert "speed-up 2.00x\n" in said and "speed-up 4.04x\n" in said
    tokens, loss = np.array([100, 200, 300]), np.array([5.0, 4.0, 3.0])
    assert tokens_to_reach(tokens, loss, 3.5) == pytest.approx(250)
    assert tokens_to_reach(tokens, loss, 5.5) == 100 and np.isnan(tokens_to_reach(tokens, loss, 2.9))


def test_domains_are_matched_by_name_and_other_sizes_noted(tmp_path, runs):
    mirrored = large_run(tmp_path / "mirrored", [row[::-1] for row in FASTER], OTHER[::-1], domains=DOMAINS[::-1],
                         n_params=7000, tokens_per_step=64)
    said, rows = compared(runs[0], mirrored)
    assert rows["books"] == ["2.0000", "-0.1000*"] and rows["web"] == ["3.1000", "-0.5000*"]
    assert "7,000 parameters, baseline has 5,000" in said and "25,600 tokens, baseline has 12,800" in said


def test_seeds_are_paired_unless_they_differ(tmp_path):
    """Losses differ by 1 between the seeds, the changes by 0.2 only: pairing takes out what the seeds share."""
    paths = []
    for name, seed, more, weights in (
            ("baseline", 1, 0, UNIFORM), ("paired", 2, 0.7, OTHER), ("baseline", 2, 1, UNIFORM),
            ("paired", 1, -0.1, OTHER), ("other", 3, 0, OTHER[::-1]), ("other", 4, 0.8, OTHER[::-1])):
        losses = [*BASELINE[:3], [loss + more for loss in BASELINE[3]]]
        paths.append(large_run(tmp_path / f"{name}-s{seed}", losses, weights, seed=seed))
    said, rows = compared(*paths)
    # 2 and 3; -0.1 and -0.3; 0.4 - 0.5, and sqrt(1 / 2 + 0.8**2 / 2)
    assert rows["books"] == ["2.5000", "±0.7071", "-0.2000*", "±0.1414", "-0.1000*", "±0.9055"]
    assert "other has seeds [3, 4], baseline has [1, 2]: not paired" in said


def test_groups_are_named_by_their_mixture(tmp_path):
    """Where it tells them apart; an answer's file says less than the directory."""
    named = [large_run(tmp_path / f"run{i}", BASELINE, [0.2, 0.3, 0.5 + i], flags={"sampling_weights": spec})
             for i, spec in enumerate(("token_count", "temperature:0.7", "proxy/weights.json", "uniform"))]
    assert [group.name for group in read_groups(named)] == ["natural", "temperature 0.7", "run2", "uniform"]
    twin = large_run(tmp_path / "twin", BASELINE, flags={"sampling_weights": "uniform", "batch_size": 8})
    assert [group.name for group in read_groups([named[3], twin])] == ["run3", "twin"]
    names = figures.short([f"_{'x' * 40}${i:02}${'y' * 40}" for i in range(25)])
    assert len(set(names)) == 25 and max(map(len, names)) < 40


@pytest.mark.parametrize("name, changes", [
    ("domains", {"domains": ["books", "code", "news"]}), ("step 300 of 400", {"losses": FASTER[:3]}),
    ("train_tokens", {"data": {"train_tokens": {"books": 500, "code": 400, "web": 299}}}),
    ("only one experiment", {"losses": BASELINE, "weights": UNIFORM, "seed": 2})])
def test_runs_that_cannot_be_compared_are_refused(tmp_path, runs, name, changes):
    other = large_run(tmp_path / "other", **{"losses": FASTER, **changes})
    refused(tmp_path, [name], "compare.py", runs[0], other)


def test_damaged_and_repeated_runs_are_refused(tmp_path, runs):
    """The number of windows is that of metrics.jsonl: config.json may have been written by a later resumption."""
    refused(tmp_path, ["seed twice"], "compare.py", *runs, large_run(tmp_path / "same", FASTER))
    metrics = runs[1] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"eval_windows": 0', '"eval_windows": 5'))
    refused(tmp_path, ["eval_windows", str(runs[1])], "compare.py", runs[0], runs[1])
    metrics.unlink()
    refused(tmp_path, [str(metrics)], "compare.py", runs[0], runs[1])
    shutil.copy(runs[1] / "config.json", runs[2])
    refused(tmp_path, [f"{runs[2]}/ckpt.pt", "two runs"], "compare.py", runs[0], runs[2])
