"""Stage 3: the answer, the numbers on trust, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import average_weights
import cli
from average_weights import between_halves, between_seeds, effective_domains, finding, search_cost, total_variation

DOMAINS = ["books", "code", "web"]
GOOD = [0.2, 0.3, 0.5]


def history(*entries):
    return [{"step": step, "domain_weights": torch.tensor(row, dtype=torch.float64)} for step, row in entries]


def proxy_run(path, alpha, seed=1, flags=None, reference=None, **changes):
    """A finished proxy run's directory with the history alpha, T rows of K weights; changes are made to its config."""
    path.mkdir()
    torch.save(history(*enumerate(alpha, start=1)), path / f"doremi_domain_weights_{len(alpha)}.pt")
    config = {
        "stage": "proxy",
        "model": {"vocab_size": 300, "block_size": 8, "n_layer": 1, "n_head": 1, "n_kv_head": 1, "n_embd": 8,
                  "n_ffn": 16},
        "n_params": 5000,
        "domains": DOMAINS,
        "sampling_weights": dict.fromkeys(DOMAINS, 1 / 3),
        "data": {"data_dir": "data/toy", "tokenizer": "bytes", "tokenizer_sha256": "ab" * 32, "vocab_size": 300,
                 "train_tokens": {"web": 100, "books": 600, "code": 300}},
        "flags": {"max_steps": len(alpha), "batch_size": 4, "step_size": 1.0, "smoothing": 1e-3, "learning_rate": 1e-3,
                  "warmup_steps": 2, "dtype": "float32", "seed": seed, "out_dir": str(path), **(flags or {})},
        "reference": {"out_dir": "checkpoints/reference", "sampling_weights": {"web": 0.2, "books": 0.5, "code": 0.3},
                      "seed": 7, "max_steps": 20, "batch_size": 6, "fingerprint": "cd" * 32, **(reference or {})},
        "versions": {"python": "3.12.0", "torch": "2.13.0", "numpy": "2.4.0"},
        "device": "cpu",
        "world_size": 1,
    }
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


def random_alpha(steps, seed):
    return np.random.default_rng(seed).dirichlet(np.ones(3), size=steps).tolist()


def average(*args):
    average_weights.main([str(arg) for arg in args])


def written(run):
    return json.loads((run / "weights.json").read_text())


def refused(capsys, *args):
    """The single line on standard error of a run that must fail with status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: average(*args))
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    return printed.err


# ---- the answer ----

def test_the_published_recipe_gives_the_answer_to_the_bit(tmp_path):
    run = proxy_run(tmp_path / "proxy", random_alpha(1000, seed=0))
    average(run)
    # The official repository's recipe, word for word but for the path:
    domain_weights = torch.load(run / "doremi_domain_weights_1000.pt")
    total_weights = sum(d["domain_weights"] for d in domain_weights)
    avg_weights = total_weights / len(domain_weights)
    answer = written(run)["domain_weights"]
    assert list(answer) == DOMAINS
    assert list(answer.values()) == avg_weights.tolist()


def test_seeds_are_averaged_and_recorded(tmp_path, capsys):
    first = proxy_run(tmp_path / "a", [[0.2, 0.4, 0.4], [0.4, 0.4, 0.2]], seed=1)  # averages 0.3, 0.4, 0.3
    second = proxy_run(tmp_path / "b", [[0.1, 0.8, 0.1], [0.1, 0.8, 0.1]], seed=2)  # averages 0.1, 0.8, 0.1
    average(first, second, f"--out_dir={tmp_path / 'out'}")
    content = written(tmp_path / "out")
    assert content["domain_weights"] == pytest.approx({"books": 0.2, "code": 0.6, "web": 0.2}, abs=1e-15)
    record = content["provenance"]
    assert record.pop("largest_move") == pytest.approx(0.3)  # books from 0.5 to 0.2, code from 0.3 to 0.6
    assert record == {
        "tokenizer": "bytes", "tokenizer_sha256": "ab" * 32, "data_dir": "data/toy",
        "reference_weights": {"books": 0.5, "code": 0.3, "web": 0.2}, "n_params": 5000, "block_size": 8, "steps": 2,
        "seeds": [1, 2], "batch_size": 4, "step_size": 1.0, "smoothing": 1e-3}
    said = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.split()[:1]}
    # token share, reference, answer, sd over seeds (|difference| / sqrt(2)), ratio, mean of the last alphas
    assert rows["books"] == ["0.6000", "0.5000", "0.2000", "0.1414", "0.40", "0.2500"]
    assert rows["code"] == ["0.3000", "0.3000", "0.6000", "0.2828", "2.00", "0.6000"]
    assert "between seeds      0.400" in said  # half of 0.2 + 0.4 + 0.2
    assert "between halves     0.100" in said  # mean alphas (.15, .6, .25), (.25, .6, .15)
    assert "to the reference   0.300" in said
    assert "to uniform         0.267" in said  # 0.6 - 1/3
    assert not (first / "weights.json").exists()


def test_epochs_and_cost_are_said_for_a_planned_run(tmp_path, capsys):
    runs = [proxy_run(tmp_path / name, [GOOD] * 5, seed=seed) for seed, name in enumerate("abc")]
    average(*runs, "--large_params=1e6", "--large_tokens=1e5")
    said = capsys.readouterr().out
    # 1e5 tokens: 20,000, 30,000 and 50,000 from 600, 300 and 100
    rows = {line.split()[0]: line.split()[-1] for line in said.splitlines() if line.split()[:1]}
    assert [rows[name] for name in DOMAINS] == ["33.3", "100.0", "500.0"]
    # one reference of 20 steps of 6 sequences; three proxies of 5 steps of 4: 5000 * 8 * (6 * 120 + 8 * 60) / 6e11
    assert "cost               0.008% " in said
    others = [proxy_run(tmp_path / name, [GOOD] * 5, seed=1, reference={"seed": seed, "fingerprint": name})
              for seed, name in enumerate("def")]
    average(*others, "--large_params=1e6", "--large_tokens=1e5")  # three references: 6 * 360 in place of 6 * 120
    assert "cost               0.0176% " in capsys.readouterr().out


def test_a_reference_weight_of_zero(tmp_path, capsys):
    average(proxy_run(tmp_path / "proxy", [GOOD] * 3,
                      reference={"sampling_weights": {"books": 0.5, "code": 0.5, "web": 0.0}}))
    assert "nan" in capsys.readouterr().out  # no ratio to nothing
    assert written(tmp_path / "proxy")["provenance"]["largest_move"] == 0.5


# ---- the numbers on trust ----

def test_total_variation():
    assert total_variation(np.array([0.5, 0.5, 0]), np.array([0.25, 0.5, 0.25])) == 0.25
    assert between_seeds(np.array([[1.0, 0, 0], [0, 1, 0], [0.5, 0.5, 0]])) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert between_seeds(np.array([[0.2, 0.3, 0.5]])) == 0


def test_between_halves():
    alpha = np.array([[1.0, 0, 0]] * 2 + [[0.5, 0.5, 0]] * 2 + [[0, 0.25, 0.75]] * 4)
    assert between_halves(alpha) == 0.75  # averages 0.75, 0.25, 0 and 0, 0.25, 0.75
    assert between_halves(np.array([[1.0, 0], [0.5, 0.5], [0, 1]])) == 0.5  # 0.75, 0.25 and 0.25, 0.75
    assert between_halves(alpha[:1]) == 0


def test_effective_domains():
    p = np.array([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    assert effective_domains(p) == pytest.approx([4, 1, 2])


@pytest.mark.parametrize(("peak", "said"), [(0.95, "25.0%"), (0.9, "0.0%")])  # more than 0.9
def test_one_hot_steps(tmp_path, capsys, peak, said):
    average(proxy_run(tmp_path / "proxy", [[peak, 1 - peak, 0]] + [GOOD] * 3))
    assert f"one-hot steps      {said}" in capsys.readouterr().out


def test_cost_of_the_papers_search():
    """280M for 8B at equal tokens: (6 + 8) * 280e6 / (6 * 8e9) = 8.17%, the paper's 8%."""
    tokens = 512 * 1024 * 200_000
    assert search_cost(280e6, tokens, tokens, 8e9, tokens) == pytest.approx(0.0817, abs=5e-5)
    assert search_cost(280e6, tokens, tokens, 8e9, 2 * tokens) == pytest.approx(0.0408, abs=5e-5)


def test_finding_names_the_largest_moves():
    found = finding(DOMAINS, np.array([0.5, 0.3, 0.2]), np.array([0.25, 0.3, 0.45]))
    assert "web from 20% to 45%" in found and "books from 50% to 25%" in found


@pytest.mark.parametrize(("steps", "k"), [(1, 3), (2, 1), (1500, 22)])
def test_picture_shows_something_and_fits(tmp_path, steps, k):
    domains = [f"a domain of number {i}" for i in range(k)]
    alpha = np.random.default_rng(3).dirichlet(np.ones(k), size=steps).tolist()
    average(proxy_run(tmp_path / "proxy", alpha, domains=domains,
                      data={"data_dir": "d", "tokenizer": "bytes", "tokenizer_sha256": "", "vocab_size": 300,
                            "train_tokens": dict.fromkeys(domains, 100)},
                      reference={"sampling_weights": dict.fromkeys(domains, 1 / k)}))
    pixels = imread(tmp_path / "proxy" / "weights.png")[..., :3]
    assert 0.01 < (pixels < 0.9).any(axis=2).mean() < 0.5
    assert (pixels[:, [0, -1]] == 1).all() and (pixels[[0, -1]] == 1).all()  # nothing runs off the edge


# ---- what is refused ----

@pytest.mark.parametrize("entries", [
    history((1, GOOD), (3, GOOD), (4, GOOD)),
    history((1, GOOD), (2, GOOD)),
    history((0, GOOD), (1, GOOD), (2, GOOD)),
    history((1, GOOD), (2, [math.nan, 0.5, 0.5]), (3, GOOD)),
    history((1, GOOD), (2, GOOD), (3, [0.6, 0.6, -0.2])),
    history((1, GOOD), (2, GOOD), (3, [0.2, 0.2, 0.2])),
    history((1, [0.5, 0.5]), (2, [0.5, 0.5]), (3, [0.5, 0.5])),
    history((1, GOOD), (2, [0.5, 0.5]), (3, GOOD)),
    {"step": 1},
])
def test_a_bad_history_is_refused(tmp_path, capsys, entries):
    run = proxy_run(tmp_path / "proxy", [GOOD] * 3)
    torch.save(entries, run / "doremi_domain_weights_3.pt")
    assert "doremi_domain_weights_3.pt" in refused(capsys, run)
    assert not list(run.glob("weights.*"))


def test_bad_directories_are_refused(tmp_path, capsys):
    assert "config.json" in refused(capsys, tmp_path / "nowhere")
    run = proxy_run(tmp_path / "proxy", [GOOD] * 3)
    (run / "doremi_domain_weights_3.pt").write_bytes(b"PK\x03\x04 cut short")
    assert "cannot be read" in refused(capsys, run)
    assert "large" in refused(capsys, proxy_run(tmp_path / "large", [GOOD], stage="large"))
    assert "--large_tokens" in refused(capsys, run, "--large_params=8e9")


def test_an_unfinished_run_is_refused(tmp_path, capsys):
    assert "unfinished" in refused(capsys, proxy_run(tmp_path / "proxy", [GOOD] * 3, flags={"max_steps": 8}))


@pytest.mark.parametrize(("name", "changes"), [
    ("domains", {"domains": ["books", "code", "news"]}),
    ("sampling_weights", {"sampling_weights": {"books": 0.4, "code": 0.3, "web": 0.3}}),
    *((flag, {"flags": {flag: 5e-4}}) for flag in ("learning_rate", "warmup_steps", "dtype", "step_size")),
    ("reference.max_steps", {"reference": {"max_steps": 30}}),
    ("reference.sampling_weights", {"reference": {"sampling_weights": {"books": 0.2, "code": 0.3, "web": 0.5}}}),
])
def test_runs_that_differ_in_more_than_the_seed_are_refused(tmp_path, capsys, name, changes):
    run = proxy_run(tmp_path / "a", [GOOD] * 3)
    line = refused(capsys, run, proxy_run(tmp_path / "b", [GOOD] * 3, seed=2, **changes))
    assert f"b: {name} is" in line
    assert not list(tmp_path.glob("*/weights.*"))


def test_a_seed_counts_once(tmp_path, capsys):
    run = proxy_run(tmp_path / "a", [GOOD] * 3)
    assert "same seed" in refused(capsys, run, run)
    other = proxy_run(tmp_path / "b", [GOOD] * 3, reference={"seed": 8, "fingerprint": "ef" * 32, "out_dir": "other"})
    average(run, other)  # the same seed against another seed's reference is another seed of the experiment
