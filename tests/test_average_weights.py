"""Stage 3: the answer, the numbers on trust, and what is refused."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from conftest import printed, refused

DOMAINS = ["books", "code", "web"]
GOOD = [0.2, 0.3, 0.5]


def save_history(run, alpha):
    history = [{"step": t, "domain_weights": torch.tensor(row, dtype=torch.float64)} for t, row in enumerate(alpha, 1)]
    torch.save(history, run / f"doremi_domain_weights_{len(alpha)}.pt")


def proxy_run(path, alpha, seed=1, flags=None, reference=None, **changes):
    """A finished proxy run's directory with the history alpha, T rows of K weights; changes are made to its config."""
    path.mkdir()
    save_history(path, alpha)
    config = {
        "stage": "proxy", "n_params": 5000, "domains": DOMAINS, "sampling_weights": dict.fromkeys(DOMAINS, 1 / 3),
        "model": {"block_size": 8}, "data": {
            "data_dir": "data/toy", "tokenizer": "bytes", "tokenizer_sha256": "ab" * 32,
            "train_tokens": {"web": 100, "books": 600, "code": 300}},
        "flags": {"max_steps": len(alpha), "batch_size": 4, "step_size": 1.0, "smoothing": 1e-3, "learning_rate": 1e-3,
                  "warmup_steps": 2, "dtype": "float32", "seed": seed, "out_dir": str(path), **(flags or {})},
        "reference": {"out_dir": "checkpoints/reference", "sampling_weights": {"web": 0.2, "books": 0.5, "code": 0.3},
                      "seed": 7, "max_steps": 20, "batch_size": 6, "fingerprint": "cd" * 32, **(reference or {})}}
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


average = functools.partial(printed, "average_weights.py")


def test_the_published_recipe_gives_the_answer_to_the_bit(tmp_path):
    run = proxy_run(tmp_path / "proxy", np.random.default_rng(0).dirichlet(np.ones(3), size=1000).tolist())
    average(run)
    # The official repository's recipe, word for word but for the path:
    domain_weights = torch.load(run / "doremi_domain_weights_1000.pt")
    total_weights = sum(d["domain_weights"] for d in domain_weights)
    avg_weights = total_weights / len(domain_weights)
    assert json.loads((run / "weights.json").read_text())["domain_weights"] == dict(zip(DOMAINS, avg_weights.tolist()))
    assert (run / "weights.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_are_averaged_and_recorded(tmp_path):
    first = proxy_run(tmp_path / "a", [[0.2, 0.4, 0.4], [0.4, 0.4, 0.2]], seed=1)  # averages 0.3, 0.4, 0.3
    second = proxy_run(tmp_path / "b", [[0.1, 0.8, 0.1], [0.1, 0.8, 0.1]], seed=2)  # averages 0.1, 0.8, 0.1
    said, rows = average(first, second, f"--out_dir={tmp_path / 'out'}")
    content = json.loads((tmp_path / "out/weights.json").read_text())
    assert content["domain_weights"] == pytest.approx({"books": 0.2, "code": 0.6, "web": 0.2}, abs=1e-15)
    record = content["provenance"]
    assert record.pop("largest_move") == pytest.approx(0.3)  # books from 0.5 to 0.2, code from 0.3 to 0.6
    assert record == {
        "tokenizer": "bytes", "tokenizer_sha256": "ab" * 32, "data_dir": "data/toy",
        "reference_weights": {"books": 0.5, "code": 0.3, "web": 0.2}, "n_params": 5000, "block_size": 8, "steps": 2,
        "seeds": [1, 2], "batch_size": 4, "step_size": 1.0, "smoothing": 1e-3}
    # token share, reference, answer, sd over seeds (|difference| / sqrt(2)), ratio, mean of the last alphas
    assert rows["books"] == ["0.6000", "0.5000", "0.2000", "0.1414", "0.40", "0.2500"]
    assert rows["code"] == ["0.3000", "0.3000", "0.6000", "0.2828", "2.00", "0.6000"]
    for line in ("between seeds      0.400",  # half of 0.2 + 0.4 + 0.2
                 "between halves     0.100",  # mean alphas (.15, .6, .25), (.25, .6, .15)
                 "to the reference   0.300", "to uniform         0.267"):  # 0.6 - 1/3
        assert line in said
    assert not (first / "weights.json").exists()


def test_numbers_on_trust(tmp_path):
    """Of four steps: the halves' averages are (0.75, 0.25, 0) and (0, 0.25, 0.75), the whole's 3/8, 1/4, 3/8."""
    said, _ = average(proxy_run(tmp_path / "proxy", [[1.0, 0, 0], [0.5, 0.5, 0], [0, 0.25, 0.75], [0, 0.25, 0.75]]))
    assert "between halves     0.750" in said and "one-hot steps      25.0%" in said
    entropy = -0.75 * math.log(3 / 8) - 0.25 * math.log(1 / 4)
    assert f"effective domains  {math.exp(entropy):.2f} of 3" in said and "between seeds      one seed only" in said


def test_epochs_and_cost_of_a_planned_run(tmp_path):
    runs = [proxy_run(tmp_path / name, [GOOD] * 5, seed=seed) for seed, name in enumerate("abc")]
    said, rows = average(*runs, "--large_params=1e6", "--large_tokens=1e5")
    # 1e5 tokens: 20,000, 30,000 and 50,000 from 600, 300 and 100
    assert [rows[name][-1] for name in DOMAINS] == ["33.3", "100.0", "500.0"]
    # one reference of 20 steps of 6 sequences; three proxies of 5 steps of 4: 5000 * 8 * (6 * 120 + 8 * 60) / 6e11
    assert "cost               0.008% " in said


@pytest.mark.parametrize("alpha", [
    [GOOD] * 2, [GOOD, [math.nan, 0.5, 0.5], GOOD], [GOOD, GOOD, [0.6, 0.6, -0.2]], [[0.2, 0.2, 0.2]] * 3,
    [[0.5, 0.5]] * 3, [GOOD, [0.5, 0.5], GOOD]])
def test_a_bad_history_is_refused(tmp_path, alpha):
    run = proxy_run(tmp_path / "proxy", [GOOD] * 3)
    save_history(run, alpha)
    (run / f"doremi_domain_weights_{len(alpha)}.pt").replace(run / "doremi_domain_weights_3.pt")
    refused(tmp_path, ["doremi_domain_weights_3.pt"], "average_weights.py", run)


@pytest.mark.parametrize("name, changes", [
    ("domains", {"domains": ["books", "code", "news"]}), ("large", {"stage": "large"}),
    ("sampling_weights", {"sampling_weights": {"books": 0.4, "code": 0.3, "web": 0.3}}),
    ("learning_rate", {"flags": {"learning_rate": 5e-4}}), ("step_size", {"flags": {"step_size": 5e-4}}),
    ("reference.max_steps", {"reference": {"max_steps": 30}}),
    ("reference.sampling_weights", {"reference": {"sampling_weights": {"books": 0.2, "code": 0.3, "web": 0.5}}})])
def test_runs_that_are_not_seeds_of_one_proxy_are_refused(tmp_path, name, changes):
    run, other = (proxy_run(tmp_path / n, [GOOD] * 3, s, **c) for n, s, c in (("a", 1, {}), ("b", 2, changes)))
    refused(tmp_path, [str(other), name], "average_weights.py", run, other)


def test_a_seed_counts_once_and_an_unfinished_run_does_not(tmp_path):
    run = proxy_run(tmp_path / "a", [GOOD] * 3)
    refused(tmp_path, ["same seed"], "average_weights.py", run, run)
    refused(tmp_path, ["unfinished"], "average_weights.py", proxy_run(tmp_path / "c", [GOOD], flags={"max_steps": 8}))
    average(run, proxy_run(tmp_path / "b", [GOOD] * 3, reference={"seed": 8, "fingerprint": "ef" * 32}))
