"""Stage 5: who is better where, by how much and how much sooner, over seeds, and what cannot be compared."""

import json
import math

import pytest
from matplotlib.image import imread

import cli
import compare
from compare import MEAN, change, passing, read_groups, speed_up

DOMAINS = ["books", "code", "web"]
STEPS = (100, 200, 300, 400)
BASELINE = [[4.0, 3.0, 5.0], [3.5, 2.5, 4.5], [3.0, 2.0, 4.0], [2.0, 1.5, 3.1]]  # means 4, 3.5, 3, 2.2
FASTER = [[3.9, 2.9, 4.9], [2.0, 1.5, 3.0], [2.0, 1.4, 2.9], [1.9, 1.5, 2.6]]  # means 3.9, 2.1667, 2.1, 2
SLOWER = [[4.0, 3.0, 5.0], [3.9, 3.0, 4.9], [3.8, 2.9, 4.8], [3.0, 1.0, 4.5]]  # means 4, 3.9333, 3.8333, 2.8333
UNIFORM, OTHER = [1 / 3, 1 / 3, 1 / 3], [0.5, 0.25, 0.25]  # sampling weights


def large_run(path, losses, weights=OTHER, domains=DOMAINS, seed=1, tokens_per_step=32, flags=None, **changes):
    """A run's directory with an evaluation every 100 steps; changes replace parts of its config."""
    path.mkdir(parents=True)
    config = {
        "stage": "large",
        "model": {"vocab_size": 300, "block_size": 8},
        "n_params": 5000,
        "domains": domains,
        "sampling_weights": dict(zip(domains, weights)),
        "data": {"data_dir": "data/toy", "tokenizer": "bytes", "tokenizer_sha256": "ab" * 32, "vocab_size": 300,
                 "train_tokens": {name: 100 * len(name) for name in sorted(domains)}},  # 500, 400, 300
        "flags": {"max_steps": 400, "batch_size": tokens_per_step // 8, "eval_windows": 0, "seed": seed,
                  "out_dir": str(path), **(flags or {})},
        "versions": {"python": "3.12.0", "torch": "2.13.0", "numpy": "2.4.0"},
        "device": "cpu",
        "world_size": 1,
    }
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    with open(path / "metrics.jsonl", "w") as file:
        for step, row in zip(STEPS, losses):
            file.write(json.dumps({"step": step, "loss": 3.0, "mfu": None, "domain_loss": {}}) + "\n")
            file.write(json.dumps({
                "step": step, "tokens": step * tokens_per_step, "seconds": 1.0, "val_loss": dict(zip(domains, row)),
                "val_bpb": {}, "val_loss_mean": sum(row) / len(row), "val_loss_worst": max(row)}) + "\n")
    return path


def shifted(losses, last):
    """The losses with `last` (K,) added to the last row."""
    return [*losses[:-1], [a + b for a, b in zip(losses[-1], last)]]


def run_compare(*args):
    compare.main([str(arg) for arg in args])


def refused(capsys, *args):
    """The single line on standard error of a run that must fail with status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: run_compare(*args))
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    return printed.err


@pytest.fixture
def runs(tmp_path):
    return [large_run(tmp_path / name, losses, weights) for name, losses, weights in
            (("baseline", BASELINE, UNIFORM), ("faster", FASTER, OTHER), ("slower", SLOWER, OTHER[::-1]))]


def printed_rows(capsys):
    """{first word: the other words} of what was printed."""
    return {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}


# ---- one seed ----

def test_table(runs, capsys):
    run_compare(*runs)
    rows = printed_rows(capsys)
    assert rows["books"] == ["2.0000", "-0.1000*", "+1.0000"]
    assert rows["code"] == ["1.5000", "+0.0000", "-0.5000*"]  # equal is not better
    assert rows["mean"] == ["2.2000", "-0.2000*", "+0.6333"]
    # shares 5/12, 4/12, 3/12: 25/12 in the baseline; -0.1 * 5/12 - 0.5 * 3/12; (5 * 1 - 4 * 0.5 + 3 * 1.4) / 12
    assert rows["token-weighted"] == ["mean", "2.1083", "-0.1667*", "+0.6000"]
    assert rows["worst"] == ["domain", "3.1000", "-0.5000*", "+1.4000"]
    assert rows["domains"] == ["better", "2", "of", "3", "1", "of", "3"]
    assert rows["speed-up"] == ["in", "tokens", "2.00x", "not", "reached"]
    assert (runs[-1] / "compare.png").exists()


def test_speed_up(tmp_path, runs):
    baseline, faster, slower = read_groups(runs)
    assert speed_up(faster, baseline) == 2.0  # 400 steps against 200
    assert speed_up(slower, baseline) is None
    tie = large_run(tmp_path / "tie", [BASELINE[0], BASELINE[3], BASELINE[2], BASELINE[3]])
    assert speed_up(read_groups([runs[0], tie])[1], baseline) == 2.0  # at the very value counts as reached
    half_batch = large_run(tmp_path / "half", FASTER, tokens_per_step=16)
    assert speed_up(read_groups([runs[0], half_batch])[1], baseline) == 4.0  # tokens count, not steps
    early = large_run(tmp_path / "early", [BASELINE[0], BASELINE[3], BASELINE[3], BASELINE[3]], UNIFORM[::-1])
    assert speed_up(faster, read_groups([early, runs[1]])[0]) == 1.0  # that baseline had its last loss at step 200, too
    assert passing(faster, 2.1, MEAN) == 2 and passing(faster, 1.9, MEAN) is None


def test_domains_are_matched_by_name(tmp_path, runs):
    mirrored = large_run(tmp_path / "mirrored", [row[::-1] for row in FASTER], OTHER[::-1], domains=DOMAINS[::-1])
    baseline, group = read_groups([runs[0], mirrored])
    assert change(group, baseline)[0] == pytest.approx([-0.1, 0, -0.5, -0.2, -1 / 6, -0.5])
    assert group.weights.tolist() == OTHER


def test_runs_of_other_sizes_are_noted(tmp_path, runs, capsys):
    run_compare(runs[0], large_run(tmp_path / "larger", FASTER, n_params=7000, tokens_per_step=64))
    said = capsys.readouterr().out
    assert "7,000 parameters, baseline has 5,000" in said and "25,600 tokens, baseline has 12,800" in said


# ---- several seeds ----

def test_seeds_are_paired(tmp_path, capsys):
    """Losses differ by 1 between the seeds, the changes by 0.2 only: pairing takes out what the seeds share."""
    paths = []
    for seed, noise in ((1, 0.0), (2, 1.0)):
        paths.append(large_run(tmp_path / f"baseline-s{seed}", shifted(BASELINE, [noise] * 3), UNIFORM, seed=seed))
        paths.append(large_run(tmp_path / f"doremi-s{seed}", shifted(BASELINE, [noise - 0.1 - 0.2 * noise] * 3),
                               seed=seed))
    baseline, doremi = read_groups([paths[0], paths[3], paths[1], paths[2]])  # in any order
    assert (baseline.name, doremi.name) == ("baseline", "doremi")
    assert baseline.seeds == doremi.seeds == [1, 2]
    mean, sd = change(doremi, baseline)  # -0.1 and -0.3
    assert mean == pytest.approx([-0.2] * 6)
    assert sd == pytest.approx([0.2 / math.sqrt(2)] * 6)
    run_compare(*paths)
    rows = printed_rows(capsys)
    assert rows["books"] == ["2.5000", "±0.7071", "-0.2000*", "±0.1414"]  # 2 and 3
    assert rows["worst"] == ["domain", "3.6000", "±0.7071", "-0.2000*", "±0.1414"]


def test_other_seeds_are_not_paired(tmp_path, capsys):
    paths = [large_run(tmp_path / f"{name}-s{seed}", shifted(BASELINE, [noise] * 3), weights, seed=seed)
             for name, seed, noise, weights in (("baseline", 1, 0, UNIFORM), ("baseline", 2, 0.6, UNIFORM),
                                                ("doremi", 3, 0.0, OTHER), ("doremi", 4, 0.8, OTHER))]
    baseline, doremi = read_groups(paths)
    mean, sd = change(doremi, baseline)
    assert mean == pytest.approx([0.1] * 6)  # 0.4 - 0.3
    assert sd == pytest.approx([math.sqrt(0.6**2 / 2 + 0.8**2 / 2)] * 6)
    run_compare(*paths)
    assert "doremi has seeds [3, 4], baseline has [1, 2]: not paired" in capsys.readouterr().out
    single = read_groups([paths[0], *paths[2:]])[0]
    assert change(doremi, single)[1] == pytest.approx([0.8 / math.sqrt(2)] * 6)  # one seed has no deviation


def test_only_the_seed_makes_a_group(tmp_path, runs):
    same_name = large_run(tmp_path / "faster-s2", FASTER, seed=2, flags={"learning_rate": 1.0})
    names = [group.name for group in read_groups([*runs[:2], same_name])]
    assert names == ["baseline", str(runs[1]), str(same_name)]  # names that do not tell them apart are given in full


def test_seeds_are_compared_at_the_steps_that_they_share(tmp_path, runs):
    rare = large_run(tmp_path / "faster-s2", FASTER, seed=2)
    lines = (rare / "metrics.jsonl").read_text().splitlines()
    (rare / "metrics.jsonl").write_text("\n".join([*lines[:2], *lines[4:]]))  # without step 200
    group = read_groups([runs[0], runs[1], rare])[1]
    assert group.step.tolist() == [100, 300, 400] and group.tokens.tolist() == [3200, 9600, 12800]
    assert group.loss.shape == (2, 3, 6)


@pytest.mark.parametrize("k", [1, 22])
def test_picture_shows_something_and_fits(tmp_path, k):
    domains = [f"a domain of number {i}" for i in range(k)]
    paths = [large_run(tmp_path / f"{name}-s{seed}", [[loss] * k for loss in (4, 3.5, 3, last + seed / 50)],
                       [last / k] * k, domains, seed=seed)
             for name, last in (("baseline", 2.0), ("uniform", 2.1), ("doremi", 1.9)) for seed in (1, 2)]
    run_compare(*paths, f"--out_dir={tmp_path / 'pictures' / 'here'}")
    pixels = imread(tmp_path / "pictures" / "here" / "compare.png")[..., :3]
    assert 0.01 < (pixels < 0.9).any(axis=2).mean() < 0.5
    assert (pixels[:, [0, -1]] == 1).all() and (pixels[[0, -1]] == 1).all()  # nothing runs off the edge


# ---- what is refused ----

@pytest.mark.parametrize(("name", "changes"), [
    ("domains", {"domains": ["books", "code", "news"]}),
    ("tokenizer_sha256", {"data": {"tokenizer_sha256": "cd" * 32}}),
    ("train_tokens", {"data": {"train_tokens": {"books": 500, "code": 400, "web": 299}}}),
    ("block_size", {"model": {"vocab_size": 300, "block_size": 16}}),
    ("eval_windows", {"flags": {"eval_windows": 5}}),
])
def test_runs_with_other_held_out_tokens_are_refused(tmp_path, runs, capsys, name, changes):
    if "data" in changes:
        changes = {"data": json.loads((runs[0] / "config.json").read_text())["data"] | changes["data"]}
    other = large_run(tmp_path / "other", FASTER, **changes)
    assert f"other: {name} is" in refused(capsys, runs[0], other)
    assert not list(tmp_path.glob("*/compare.png"))


def test_unfinished_and_repeated_runs_are_refused(tmp_path, runs, capsys):
    stopped = large_run(tmp_path / "stopped", FASTER[:3])
    assert "stopped: the run is unfinished, evaluated up to step 300 of 400" in refused(capsys, runs[0], stopped)
    assert "only one experiment" in refused(capsys, runs[0])
    assert "only one experiment" in refused(capsys, runs[0], large_run(tmp_path / "again", BASELINE, UNIFORM, seed=2))
    assert "seed twice" in refused(capsys, *runs, large_run(tmp_path / "same", FASTER))


def test_damaged_metrics_are_refused(tmp_path, runs, capsys):
    assert "nowhere/config.json" in refused(capsys, runs[0], tmp_path / "nowhere")
    metrics = runs[1] / "metrics.jsonl"
    whole = metrics.read_text()
    for damaged in (whole + '{"step": 500, "lo', whole.replace('"web"', '"news"'), ""):
        metrics.write_text(damaged)
        assert "faster" in refused(capsys, *runs)
    metrics.unlink()
    assert "metrics.jsonl" in refused(capsys, *runs)
    assert not list(tmp_path.glob("*/compare.png"))
