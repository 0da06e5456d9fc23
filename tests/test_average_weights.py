"""Stage 3: the answer, the numbers on trust, and what is refused."""

import functools
import io
import json
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT, finished_run, printed, refused, write_dataset
from matplotlib import font_manager
from matplotlib.figure import Figure

from average_weights import Answer, draw_answer
from common import figures

DOMAINS = ["books", "code", "web"]
GOOD = [0.2, 0.3, 0.5]


def proxy_run(path, alpha, seed=1, step=None, flags=None, reference=None, **changes):
    """A finished proxy run's directory with the history alpha, T rows of K weights; changes are made to its config."""
    config = {
        "stage": "proxy", "n_params": 5000, "domains": DOMAINS, "sampling_weights": dict.fromkeys(DOMAINS, 1 / 3),
        "model": {"block_size": 8}, "data": {
            "data_dir": "data/toy", "tokenizer": "bytes", "tokenizer_sha256": "ab" * 32, "sample_sha256": "ef",
            "vocab_size": 300,
            "train_tokens": {"books": 600, "code": 300, "web": 100}},
        "flags": {"max_steps": len(alpha), "batch_size": 4, "eval_windows": 4, "step_size": 1.0, "smoothing": 1e-3,
                  "learning_rate": 1e-3,
                  "warmup_steps": 2, "dtype": "float32", "seed": seed, "out_dir": str(path), **(flags or {})},
        "reference": {"out_dir": "checkpoints/reference", "sampling_weights": {"web": 0.2, "books": 0.5, "code": 0.3},
                      "seed": 7, "max_steps": 20, "batch_size": 6, "fingerprint": "cd" * 32, **(reference or {})}}
    return finished_run(path, config | changes, step or len(alpha), alpha_history=torch.tensor(
        alpha, dtype=torch.float64))


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
    [[0.5, 0.5]] * 3])
def test_a_bad_history_is_refused(tmp_path, alpha):
    run = proxy_run(tmp_path / "proxy", alpha, step=3, flags={"max_steps": 3})
    refused(tmp_path, [f"{run}/ckpt.pt", "3 steps of 3 weights"], "average_weights.py", run)


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


def moved_weights(tmp_path, run, spec, *flags):
    """weights.json of the run moved onto `spec`, and what was printed."""
    said, _ = average(run, f"--onto={spec}", f"--out_dir={tmp_path / 'out'}", *flags)
    return json.loads((tmp_path / "out/weights.json").read_text()), said


def toy_data(path, counts):
    """A data set in which these domains have these numbers of training tokens."""
    return write_dataset(path, {name: ([1] * n, [1] * 9) for name, n in counts.items()}, tokenizer="ab" * 8)


def test_an_answer_is_moved_onto_another_reference(tmp_path):
    """Reference 0.5, 0.3, 0.2, answer 0.2, 0.3, 0.5: tilts of 0.4, 1 and 2.5."""
    run = proxy_run(tmp_path / "proxy", [[0.1, 0.3, 0.6], [0.3, 0.3, 0.4]])
    data = toy_data(tmp_path / "data", {"web": 90, "books": 30, "code": 60})
    content, said = moved_weights(tmp_path, run, "uniform", f"--data_dir={data}")
    assert content["domain_weights"] == pytest.approx({"web": 2.5 / 3.9, "books": 0.4 / 3.9, "code": 1 / 3.9})
    record = content["provenance"]
    assert record["reference_weights"] == pytest.approx(dict.fromkeys(DOMAINS, 1 / 3)) and "note:" not in said
    assert record["data_dir"] == str(data)
    assert record["moved"] == {
        "onto": "uniform", "data_dir": "data/toy", "tokenizer_sha256": "ab" * 32,
        "unknown": [], "without_weight": [], "dropped": [],
        "reference_weights": {"books": 0.5, "code": 0.3, "web": 0.2},
        "domain_weights": pytest.approx({"books": 0.2, "code": 0.3, "web": 0.5})}
    content, _ = moved_weights(tmp_path, run, "token_count", f"--data_dir={data}")
    # 90 * 2.5, 30 * 0.4, 60 * 1
    assert content["domain_weights"] == pytest.approx({"web": 225 / 297, "books": 12 / 297, "code": 60 / 297})
    content, _ = moved_weights(tmp_path, run, "0.2,0.5,0.3", f"--data_dir={data}")  # the old reference: the old answer
    assert content["domain_weights"] == pytest.approx({"web": 0.5, "books": 0.2, "code": 0.3})


def test_domains_that_come_and_go(tmp_path):
    """The run knew no news and saw no code: they keep their reference weights; books and web share the other half."""
    reference = {"sampling_weights": {"books": 0.5, "web": 0.5, "code": 0.0}}
    run = proxy_run(tmp_path / "proxy", [GOOD], reference=reference)  # 0.2 / 0.5 = 0.4 of books, 0.5 / 0.5 = 1 of web
    data = toy_data(tmp_path / "data", {"news": 20, "books": 30, "code": 30, "web": 20})
    content, said = moved_weights(tmp_path, run, "token_count", f"--data_dir={data}")
    # (0.3 * 0.4, 0.2 * 1) is (0.12, 0.2), scaled to 0.3 + 0.2
    assert content["domain_weights"] == pytest.approx({"news": 0.2, "code": 0.3, "books": 0.1875, "web": 0.3125})
    assert "note: news: unknown" in said and "note: code: of reference weight 0" in said
    data = toy_data(tmp_path / "fewer", {"news": 50, "web": 50})
    content, said = moved_weights(tmp_path, run, "token_count", f"--data_dir={data}")
    assert content["domain_weights"] == {"news": 0.5, "web": 0.5} and "note: books, code: not in the new data" in said
    assert content["provenance"]["moved"]["dropped"] == ["books", "code"]
    data = toy_data(tmp_path / "other", {"news": 50})
    refused(tmp_path, ["--onto", "no domain"], "average_weights.py", run, "--onto=uniform", f"--data_dir={data}")
    refused(tmp_path, ["--onto"], "average_weights.py", run, f"--data_dir={data}")


def test_seeds_are_moved_together(tmp_path):
    """The mean over the seeds is moved: 0.2, 0.6, 0.2 over 0.5, 0.3, 0.2."""
    runs = [proxy_run(tmp_path / "a", [[0.3, 0.4, 0.3]], seed=1), proxy_run(tmp_path / "b", [[0.1, 0.8, 0.1]], seed=2)]
    data = toy_data(tmp_path / "data", dict.fromkeys(DOMAINS, 30))
    average(*runs, "--onto=uniform", f"--data_dir={data}", f"--out_dir={tmp_path / 'out'}")
    found = json.loads((tmp_path / "out/weights.json").read_text())["domain_weights"]
    assert found == pytest.approx({"books": 0.4 / 3.4, "code": 2 / 3.4, "web": 1 / 3.4})


def test_names_of_any_characters(tmp_path):
    """The console cannot show them, and weights.json is there all the same; no picture takes them for markup."""
    names = ["新闻", "$x_{y$", "_misc", "a\nb"]
    config = {"domains": names, "sampling_weights": dict.fromkeys(names, 0.25), "data": {
        "data_dir": "data/toy", "tokenizer": "bytes", "tokenizer_sha256": "ab" * 32, "sample_sha256": "ef",
            "vocab_size": 300,
        "train_tokens": dict.fromkeys(names, 9)}}
    reference = {"sampling_weights": dict.fromkeys(names, 0.25)}
    run = proxy_run(tmp_path / "proxy", [[0.1, 0.2, 0.3, 0.4]], reference=reference, **config)
    result = subprocess.run([sys.executable, ROOT / "average_weights.py", run], capture_output=True,
                            env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"})
    assert result.returncode == 0, result.stderr.decode()
    assert json.loads((run / "weights.json").read_text())["domain_weights"] == pytest.approx(
        dict(zip(names, (0.1, 0.2, 0.3, 0.4))))
    assert b"\\u65b0\\u95fb" in result.stdout and (run / "weights.png").exists()


def test_every_name_is_in_the_picture(tmp_path, monkeypatch):
    names = ["_misc", "$x_{y$", "a\nb", "plain"]
    answer = Answer(names, np.ones(4), np.full(4, 0.25), np.full((1, 4), 0.25), np.full(4, 0.25))
    with figures.style(*names):
        figure = draw_answer(answer, names, np.full((1, 3, 4), 0.25))
        figure.savefig(tmp_path / "picture.png")  # raises where $x_{y$ is taken for a formula
    left, right = figure.axes
    expected = {"_misc", "$x_{y$", "a\\nb", "plain"}
    assert {text.get_text() for text in left.get_legend().get_texts()} == expected
    assert {label.get_text() for label in right.get_yticklabels()} == expected


def test_a_font_that_has_the_character():
    """matplotlib's own STIX has what its DejaVu Sans has not; what no font has is written as its code."""
    stix = dict(figures.installed_fonts())["STIXGeneral"]
    default = font_manager.findfont(font_manager.FontProperties(family=["sans-serif"]))
    found = figures.characters(stix) - figures.characters(default)
    character = max(chr(c) for c in found if chr(c).isprintable())
    assert figures.plain(f"a{character}\U000e0fff") == f"a{character}\\U000e0fff"
    with figures.style(character), warnings.catch_warnings():
        warnings.simplefilter("error")  # "Glyph missing from font"
        figure = Figure()
        figure.suptitle(character)
        figure.savefig(io.BytesIO())
