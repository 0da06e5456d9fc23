"""Stage 3: the answer, the numbers on trust, the picture, and what is refused."""

import functools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, finished_run, printed, refused

DOMAINS = ["books", "code", "web"]
GOOD = [0.2, 0.3, 0.5]


def proxy_run(path, alpha, seed=1, step=None, flags=None, reference=None, drawn=(1, 1, 1), **changes):
    """A finished proxy run's directory with the history alpha, T rows of K weights; changes are made to its config."""
    config = {
        "stage": "proxy", "n_params": 5000, "domains": DOMAINS, "sampling_weights": dict.fromkeys(DOMAINS, 1 / 3),
        "model": {"block_size": 8}, "data": {
            "data_dir": "data/toy", "tokenizer": "bytes", "tokenizer_sha256": "ab" * 32, "sample_sha256": "ef",
            "vocab_size": 300, "train_tokens": {"books": 600, "code": 300, "web": 100}},
        "flags": {"max_steps": len(alpha), "batch_size": 4, "eval_windows": 4, "step_size": 1.0, "smoothing": 1e-3,
                  "learning_rate": 1e-3, "dtype": "float32", "seed": seed, "out_dir": str(path), **(flags or {})},
        "reference": {"out_dir": "checkpoints/reference", "sampling_weights": {"web": 0.2, "books": 0.5, "code": 0.3},
                      "seed": 7, "max_steps": 20, "batch_size": 6, "fingerprint": "cd" * 32, **(reference or {})}}
    return finished_run(path, config | changes, step or len(alpha), sampler={"step": len(alpha), "drawn": list(drawn)},
                        alpha_history=torch.tensor(alpha, dtype=torch.float64))


average = functools.partial(printed, "average_weights.py")


def test_the_published_recipe_gives_the_answer_to_the_bit(tmp_path):
    alpha = np.random.default_rng(0).dirichlet(np.ones(3), size=1000).tolist()
    run = proxy_run(tmp_path / "proxy", alpha)
    history = [{"step": t, "domain_weights": torch.tensor(row, dtype=torch.float64)} for t, row in enumerate(alpha, 1)]
    torch.save(history, run / "doremi_domain_weights_1000.pt")
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
    assert record["largest_move"] == pytest.approx(0.3)  # books from 0.5 to 0.2, code from 0.3 to 0.6
    assert record["reference_weights"] == {"books": 0.5, "code": 0.3, "web": 0.2} and record["seeds"] == [1, 2]
    assert record["flags"] == json.loads((first / "config.json").read_text())["flags"]  # a fork's own, too
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


def test_a_run_that_is_too_short_is_judged(tmp_path):
    """The halves' averages differ by 0.31 and 0.29 of the weights; or alpha jumps, in both of them."""
    for i, (row, expected) in enumerate((([0.81, 0.19, 0], True), ([0.79, 0.21, 0], False), ([0, 1, 0], True))):
        rows = [[0.5, 0.5, 0], row] if i < 2 else [[1, 0, 0], row] * 2
        said, _ = average(proxy_run(tmp_path / str(i), rows))
        assert ("Too short to trust" in said) == expected and ("DoReMi raises" in said) != expected


def test_domains_without_a_reference_or_without_a_draw(tmp_path):
    """One that the reference left out has no ratio; one that the proxy never saw has no answer."""
    run = proxy_run(tmp_path / "a", [GOOD], reference={"sampling_weights": {"books": 0.5, "web": 0.5, "code": 0.0}})
    assert average(run)[1]["code"] == ["0.3000", "0.0000", "0.3000", "-", "0.3000"]
    run = proxy_run(tmp_path / "b", [GOOD], drawn=(1, 0, 1))
    refused(tmp_path, ["never drew from 'code'"], "average_weights.py", run)


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


def test_names_of_any_characters(tmp_path):
    """On a console that cannot show them, under a notebook's backend: file and picture are there all the same."""
    names = ["新闻", "$x_{y$", "_misc", "a\nb", r"$\frac$", "a$$b"]
    config = {"domains": names, "sampling_weights": dict.fromkeys(names, 1 / 6), "data": {
        "data_dir": "data/toy", "tokenizer": "bytes", "tokenizer_sha256": "ab" * 32, "sample_sha256": "ef",
        "vocab_size": 300, "train_tokens": dict.fromkeys(names, 9)}}
    alpha = [0.1, 0.1, 0.1, 0.1, 0.35, 0.25]  # the largest moves, which are the title, are of $\\frac$ and the first
    run = proxy_run(tmp_path / "proxy", [alpha], reference={"sampling_weights": dict.fromkeys(names, 1 / 6)},
                    drawn=[1] * 6, **config)
    environment = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "MPLBACKEND": "module://matplotlib_inline.nowhere"}
    result = subprocess.run([sys.executable, ROOT / "average_weights.py", run], capture_output=True,
                            env={**os.environ, **environment})
    assert result.returncode == 0 and not result.stderr, result.stderr.decode()
    assert json.loads((run / "weights.json").read_text())["domain_weights"] == pytest.approx(dict(zip(names, alpha)))
    assert b"\\u65b0\\u95fb" in result.stdout and (run / "weights.png").read_bytes().startswith(b"\x89PNG")
