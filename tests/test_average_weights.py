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


def proxy_run(path, alpha, seed=1, flags=None, reference=None, drawn=(1, 1, 1), **changes):
    """A finished proxy run's directory with the history alpha, T rows of K weights; changes are made to its config."""
    config = {
        "stage": "proxy", "n_params": 5000, "domains": DOMAINS, "sampling_weights": dict.fromkeys(DOMAINS, 1 / 3),
        "model": {"block_size": 8}, "data": {"data_dir": "data/toy", "tokenizer": "bytes", "tokenizer_sha256": "ab",
                                             "train_tokens": {"books": 600, "code": 300, "web": 100}},
        "flags": {"max_steps": len(alpha), "batch_size": 4, "step_size": 1.0, "seed": seed, **(flags or {})},
        "reference": {"sampling_weights": {"web": 0.2, "books": 0.5, "code": 0.3}, "seed": 7, "max_steps": 20,
                      "fingerprint": "cd" * 32, **(reference or {})}}
    return finished_run(path, config | changes, len(alpha), sampler={"step": len(alpha), "drawn": list(drawn)},
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
    assert "between seeds      0.400" in said and "to the reference   0.300" in said  # half of 0.2 + 0.4 + 0.2
    assert not (first / "weights.json").exists()


@pytest.mark.parametrize("rows, halves, too_short", [  # in the last two, halves are near but alpha jumps within them
    ([[0.5, 0.5, 0], [0.81, 0.19, 0]], 0.31, True), ([[0.5, 0.5, 0], [0.79, 0.21, 0]], 0.29, False),
    ([[1, 0, 0], [0, 1, 0]] * 2, 0, True), ([[1, 0, 0], [0.5, 0.5, 0], [0, 0.25, 0.75], [0, 0.25, 0.75]], 0.75, True)])
def test_numbers_on_trust(tmp_path, rows, halves, too_short):
    """The distance of the averages of the halves, and exp of the entropy of that of the whole."""
    said, _ = average(proxy_run(tmp_path / "proxy", rows))
    assert ("Too short to trust" in said) == too_short and ("DoReMi raises" in said) != too_short
    entropy = -sum(p * math.log(p) for p in np.mean(rows, axis=0) if p > 0)
    assert f"between halves     {halves:.3f}" in said
    assert f"effective domains  {math.exp(entropy):.2f} of 3" in said and "one seed only" in said


def test_domains_without_a_reference_or_without_a_draw(tmp_path):
    """One that the reference left out has no ratio; one that the proxy never saw has no answer."""
    run = proxy_run(tmp_path / "a", [GOOD], reference={"sampling_weights": {"books": 0.5, "web": 0.5, "code": 0.0}})
    assert average(run)[1]["code"] == ["0.3000", "0.0000", "0.3000", "-", "0.3000"]
    run = proxy_run(tmp_path / "b", [GOOD], drawn=(1, 0, 1))
    refused(tmp_path, ["never drew from 'code'"], "average_weights.py", run)


@pytest.mark.parametrize("name, changes", [
    ("large", {"stage": "large"}), ("step_size", {"flags": {"step_size": 5e-4}}),
    ("sampling_weights", {"sampling_weights": {"books": 0.4, "code": 0.3, "web": 0.3}}),
    ("reference.max_steps", {"reference": {"max_steps": 30}}), ("same seed", {"flags": {"seed": 1}}),
    ("unfinished", {"flags": {"max_steps": 8}})])
def test_runs_that_are_not_seeds_of_one_proxy_are_refused(tmp_path, name, changes):
    run, other = proxy_run(tmp_path / "a", [GOOD] * 3), proxy_run(tmp_path / "b", [GOOD] * 3, seed=2, **changes)
    refused(tmp_path, [name], "average_weights.py", run, other)


def test_names_of_any_characters(tmp_path):
    """On a console that cannot show them, under a notebook's backend: file and picture are there all the same."""
    names = ["新闻", "$x_{y$", "_misc", "a\nb", r"$\frac$", "a$$b"]
    alpha, uniform = [0.1, 0.1, 0.1, 0.1, 0.35, 0.25], dict.fromkeys(names, 1 / 6)  # $\\frac$ is in the title
    data = {"data_dir": "toy", "tokenizer": "bytes", "tokenizer_sha256": "", "train_tokens": dict.fromkeys(names, 9)}
    run = proxy_run(tmp_path / "run", [alpha], 1, {}, {"sampling_weights": uniform}, [1] * 6, domains=names, data=data)
    environment = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "MPLBACKEND": "module://matplotlib_inline.nowhere"}
    result = subprocess.run([sys.executable, ROOT / "average_weights.py", run], capture_output=True,
                            env={**os.environ, **environment})
    assert result.returncode == 0 and not result.stderr, result.stderr.decode()
    assert json.loads((run / "weights.json").read_text())["domain_weights"] == pytest.approx(dict(zip(names, alpha)))
    assert b"\\u65b0\\u95fb" in result.stdout and (run / "weights.png").read_bytes().startswith(b"\x89PNG")
