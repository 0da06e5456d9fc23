"""Stage 5: who is better where, by how much and how much sooner, over seeds, and what cannot be compared."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import finished_run, printed, refused

from common import figures
from compare import draw_logged, logged_loss, read_curves, read_groups, tokens_to_reach

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
            "data_dir": "data/toy", "tokenizer": "bytes", "tokenizer_sha256": "ab" * 32, "sample_sha256": "ef",
            "vocab_size": 300,
            "train_tokens": {name: 100 * len(name) for name in domains}, **(data or {})},  # 500, 400, 300
        "flags": {"max_steps": 400, "batch_size": tokens_per_step // 8, "eval_windows": 0, "seed": seed,
                  "learning_rate": 1e-3, "sampling_weights": "1,2,3", "out_dir": str(path), **(flags or {})}}
    finished_run(path, {**config, **changes}, 400, {"weight": torch.full((3,), float(seed))})
    lines = [{"eval_windows": config["flags"]["eval_windows"], "step": step,
              "tokens": step * tokens_per_step, "seconds": 1.0, "val_loss": dict(zip(domains, row)),
              "val_bpb": {}, "val_loss_mean": sum(row) / len(row), "val_loss_worst": max(row)}
             for step, row in zip((100, 200, 300, 400), losses)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"step": 1, "loss": 3.0}, *lines]))
    return path


def shifted(losses, last):
    """The losses with a number added to the last row."""
    return [*losses[:-1], [loss + last for loss in losses[-1]]]


@pytest.fixture
def runs(tmp_path):
    return [large_run(tmp_path / name, losses, weights) for name, losses, weights in
            (("baseline", BASELINE, UNIFORM), ("faster", FASTER, OTHER), ("slower", SLOWER, OTHER[::-1]))]


compared = functools.partial(printed, "compare.py")


def test_table(runs):
    _, rows = compared(*runs)
    assert rows["books"] == ["2.0000", "-0.1000*", "+1.0000"]
    assert rows["code"] == ["1.5000", "+0.0000", "-0.5000*"]  # equal is not better
    assert rows["mean"] == ["2.2000", "-0.2000*", "+0.6333"]
    # shares 5/12, 4/12, 3/12: 25/12 in the baseline; -0.1 * 5/12 - 0.5 * 3/12; (5 * 1 - 4 * 0.5 + 3 * 1.4) / 12
    assert rows["token-weighted"] == ["mean", "2.1083", "-0.1667*", "+0.6000"]
    assert rows["worst"] == ["domain", "3.1000", "-0.5000*", "+1.4000"]
    assert rows["domains"] == ["better", "2", "of", "3", "1", "of", "3"]
    assert rows["speed-up"] == ["in", "tokens", "2.02x", "not", "reached"]  # 400 / (100 + 100 * 1.7 / 1.7333)
    assert (runs[-1] / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_speed_up(tmp_path, runs):
    tie = large_run(tmp_path / "tie", [BASELINE[0], BASELINE[3], BASELINE[2], BASELINE[3]], [0.4, 0.3, 0.3])
    half_batch = large_run(tmp_path / "half", FASTER, tokens_per_step=16)
    # At the very value counts as reached; tokens count, not steps; that baseline had its last loss at step 200, too
    for baseline, other, expected in ((runs[0], tie, "2.00x"), (runs[0], half_batch, "4.04x"), (tie, runs[1], "1.01x")):
        assert compared(baseline, other)[1]["speed-up"] == ["in", "tokens", expected]


def test_tokens_to_reach_a_loss():
    tokens, loss = np.array([100, 200, 300]), np.array([5.0, 4.0, 3.0])
    assert tokens_to_reach(tokens, loss, 3.5) == pytest.approx(250)
    assert tokens_to_reach(tokens, loss, 5.5) == 100
    assert np.isnan(tokens_to_reach(tokens, loss, 2.9))


def test_domains_are_matched_by_name_and_other_sizes_noted(tmp_path, runs):
    mirrored = large_run(tmp_path / "mirrored", [row[::-1] for row in FASTER], OTHER[::-1], domains=DOMAINS[::-1],
                         n_params=7000, tokens_per_step=64)
    said, rows = compared(runs[0], mirrored)
    assert rows["books"] == ["2.0000", "-0.1000*"] and rows["web"] == ["3.1000", "-0.5000*"]
    assert "7,000 parameters, baseline has 5,000" in said and "25,600 tokens, baseline has 12,800" in said


def test_seeds_are_paired(tmp_path):
    """Losses differ by 1 between the seeds, the changes by 0.2 only: pairing takes out what the seeds share."""
    paths = []
    for seed, noise in ((1, 0.0), (2, 1.0)):
        paths.append(large_run(tmp_path / f"baseline-s{seed}", shifted(BASELINE, noise), UNIFORM, seed=seed))
        paths.append(large_run(tmp_path / f"doremi-s{seed}", shifted(BASELINE, noise - 0.1 - 0.2 * noise), seed=seed))
    _, rows = compared(paths[0], paths[3], paths[1], paths[2])  # in any order
    assert rows["books"] == ["2.5000", "±0.7071", "-0.2000*", "±0.1414"]  # 2 and 3; -0.1 and -0.3
    assert rows["worst"] == ["domain", "3.6000", "±0.7071", "-0.2000*", "±0.1414"]


def test_other_seeds_are_not_paired(tmp_path):
    paths = [large_run(tmp_path / f"{name}-s{seed}", shifted(BASELINE, noise), weights, seed=seed)
             for name, seed, noise, weights in (("baseline", 1, 0, UNIFORM), ("baseline", 2, 0.6, UNIFORM),
                                                ("doremi", 3, 0.0, OTHER), ("doremi", 4, 0.8, OTHER))]
    said, rows = compared(*paths)
    assert rows["books"][2:] == ["+0.1000", "±0.7071"]  # 0.4 - 0.3; sqrt(0.6**2 / 2 + 0.8**2 / 2)
    assert "doremi has seeds [3, 4], baseline has [1, 2]: not paired" in said
    assert compared(paths[0], *paths[2:])[1]["books"][-1] == "±0.5657"  # one seed has no deviation: 0.8 / sqrt(2)


def test_groups_are_named_by_their_mixture(tmp_path):
    """Where it tells them apart; an answer's file says less than the directory."""
    named = [large_run(tmp_path / f"run{i}", BASELINE, [0.2, 0.3, 0.5 + i], flags={"sampling_weights": spec})
             for i, spec in enumerate(("token_count", "temperature:0.7", "proxy/weights.json", "uniform"))]
    assert [group.name for group in read_groups(named)] == ["natural", "temperature 0.7", "run2", "uniform"]
    twin = large_run(tmp_path / "twin", BASELINE, flags={"sampling_weights": "uniform", "batch_size": 8})
    assert [group.name for group in read_groups([named[3], twin])] == ["run3", "twin"]


def test_many_runs_with_long_names_are_told_apart(tmp_path):
    """The legend lies beside the curves, within the picture; matplotlib leaves out labels that begin with _."""
    runs = [large_run(tmp_path / f"_{'x' * 40}${i:02}${'y' * 40}", shifted(BASELINE, i / 9), [i + 1, 2, 3])
            for i in range(25)]
    groups = read_groups(runs)
    curves, _ = read_curves(groups)
    with figures.style():
        figure = draw_logged(groups, curves, logged_loss(groups, curves))
        figure.draw_without_rendering()
    legend, = figure.legends
    assert len({text.get_text() for text in legend.get_texts()}) == 25
    box = legend.get_window_extent()
    assert all(axes.get_window_extent().x1 < box.x0 for axes in figure.axes)
    assert box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1


@pytest.mark.parametrize("name, changes", [
    ("domains", {"domains": ["books", "code", "news"]}), ("eval_windows", {"flags": {"eval_windows": 5}}),
    ("tokenizer_sha256", {"data": {"tokenizer_sha256": "cd" * 32}}), ("step 300 of 400", {"losses": FASTER[:3]}),
    ("train_tokens", {"data": {"train_tokens": {"books": 500, "code": 400, "web": 299}}}),
    ("block_size", {"model": {"block_size": 16}}),
    ("only one experiment", {"losses": BASELINE, "weights": UNIFORM, "seed": 2})])
def test_runs_that_cannot_be_compared_are_refused(tmp_path, runs, name, changes):
    other = large_run(tmp_path / "other", **{"losses": FASTER, **changes})
    refused(tmp_path, [name], "compare.py", runs[0], other)


def test_the_windows_are_those_of_the_metrics(tmp_path, runs):
    """config.json may have been written by a later resumption."""
    metrics = runs[1] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"eval_windows": 0', '"eval_windows": 5'))
    refused(tmp_path, ["eval_windows", str(runs[1])], "compare.py", runs[0], runs[1])


def test_damaged_and_repeated_runs_are_refused(tmp_path, runs):
    refused(tmp_path, ["nowhere/config.json"], "compare.py", runs[0], tmp_path / "nowhere")
    other = shutil.copytree(runs[0], tmp_path / "other")
    shutil.copy(runs[1] / "config.json", other)
    refused(tmp_path, [f"{other}/ckpt.pt", "two runs"], "compare.py", runs[0], other)
    refused(tmp_path, ["seed twice"], "compare.py", *runs, large_run(tmp_path / "same", FASTER))
    metrics = runs[1] / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 500, "lo')
    refused(tmp_path, ["faster"], "compare.py", *runs)
