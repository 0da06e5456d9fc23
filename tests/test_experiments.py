"""The experiments: exactness.py's exact variant is the product, and the arithmetic of the others is right."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import TINY, read_alpha, run_here

from average_weights import total_variation
from common import ranks
from common.run import load_finished
from experiments import exactness, moved, profit, published, theory
from model import Transformer
from sampler import load_dataset

R = np.array([0.5, 0.3, 0.2])


def test_exact_variant_is_the_product_and_the_others_are_not(tmp_path, data_dir):
    reference = tmp_path / "reference"
    run_here("train_reference.py", "--dtype=float64", *TINY, f"--data_dir={data_dir}", f"--out_dir={reference}")
    run_here("train_doremi.py", f"--reference={reference}", f"--out_dir={tmp_path}/proxy", "--no-compile")
    product = read_alpha(tmp_path / "proxy")

    config, checkpoint = load_finished(reference, ("reference",))
    args = Namespace(**config["flags"] | {"step_size": 1.0, "smoothing": 1e-3})
    machine = ranks.setup(args)
    dataset = load_dataset(data_dir, config["model"]["block_size"])
    frozen = Transformer.load(config, checkpoint["model"], machine.dtype).freeze()
    for variant in exactness.VARIANTS:
        alpha = exactness.train_proxy(variant, frozen, dataset, machine, args, seed=2)
        departure = abs(alpha - product).max()
        assert departure < 1e-12 if variant == "exact" else departure > 1e-6, (variant, departure)


def test_prediction_tilts_by_disagreement_and_sums_to_one():
    assert theory.predict(R, np.full(3, 0.3), np.array([0.2, 0.4, 0.1])) == pytest.approx(R)
    alpha = theory.predict(R, np.array([0.2, 0.2, 0.4]), np.full(3, 0.5))  # equal slopes: exp(D / b), normalised
    expected = R * np.exp(np.array([0.2, 0.2, 0.4]) / 0.5)
    assert alpha == pytest.approx(expected / expected.sum())


def test_a_shuffled_disagreement_foretells_nothing():
    """With equal slopes the tilt is D / b but for a constant. Over all orders of D their mean correlation is 0."""
    r, disagreement = np.full((1, 8), 1 / 8), np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]])
    tilt = np.log(theory.predict(r[0], disagreement[0], np.full(8, 0.5)) / r)
    assert np.corrcoef(tilt[0], disagreement[0])[0, 1] == pytest.approx(1)
    found = theory.shuffled_correlation(r, disagreement, np.full(8, 0.5), tilt)
    assert abs(found.mean()) < 4 / 7**0.5 / 200**0.5 and found.max() < 1  # variance of one: 1 / (K - 1)


def test_slopes_and_clipped_excess_by_hand():
    log_weights = np.log([[0.1, 0.9], [0.3, 0.7], [0.6, 0.4]])
    losses = np.array([3.0, 4.0]) - np.array([0.2, 0.5]) * log_weights
    assert theory.own_slope(losses, np.exp(log_weights)) == pytest.approx([0.2, 0.5])
    slope, r2 = theory.line_through_domains(log_weights, 1.4 * log_weights + np.array([1.0, -2.0]))
    assert (slope, r2) == pytest.approx((1.4, 1.0))  # a constant of each domain does not count
    proxy, reference = np.array([[1.0, 2.0, 3.0, np.nan]]), np.array([[2.0, 1.0, 1.0, np.nan]])
    assert theory.clipped_excess(proxy, reference) == pytest.approx([1.0])  # (0 + 1 + 2) / 3


@pytest.mark.parametrize("name, expected", [
    ("natural", [0.25, 0.75]), ("uniform", [0.5, 0.5]), ("uniform+natural", [0.375, 0.625]), ("doremi", [0.6, 0.4]),
    ("moved", [1 / 3, 2 / 3])])  # from uniform: tilts of 1.2 and 0.8 on 0.25 and 0.75
def test_mixtures_of_the_profit(tmp_path, name, expected):
    for run in ("2-natural-7", "2-uniform-7"):
        (proxy := tmp_path / run / "proxy").mkdir(parents=True)
        history = [{"step": i, "domain_weights": torch.tensor(a)} for i, a in enumerate([[0.5, 0.5], [0.7, 0.3]], 1)]
        torch.save(history, proxy / "doremi_domain_weights_2.pt")
    found = profit.mixture_weights(name, np.array([100.0, 300.0]), tmp_path / "2", 7)
    assert found == pytest.approx(expected, rel=1e-6)


def test_an_answer_moves_with_its_tilt():
    """Tilts 1, 2 and 1/2 go onto (0.2, 0.2, 0.6): (0.2, 0.4, 0.3) / 0.9.  Without the third domain: (0.5, 1) / 1.5."""
    old, answer = np.array([0.5, 0.2, 0.3]), np.array([0.5, 0.4, 0.15]) / 1.05
    assert moved.move(answer, old, np.array([0.2, 0.2, 0.6])) == pytest.approx(np.array([2, 4, 3]) / 9)
    group = {"domains": ["a", "b", "c"], "r": old, "answers": np.array([answer, answer])}
    measured = np.array([[0.2, 0.8], [0.4, 0.6]])  # their mean: 0.3, 0.7
    row = moved.compare_moved(group, {"domains": ["a", "b"], "r": np.array([0.5, 0.5]), "answers": measured})
    assert row["moved answer"] == pytest.approx(1 / 3 - 0.3)
    assert row["new reference itself"] == pytest.approx(0.5 - 0.3)
    assert row["two seeds of one run"] == pytest.approx(0.2)


def test_the_published_answers_say_what_the_docs_say():
    """The other runs foretell the official answer to 0.090; the reference's own weights are 0.165 away."""
    runs = {run.name: run for run in published.load()[1]}
    paper, official, nanotron = runs["paper 1B"], runs["official 120M"], runs["nanotron 280M"]
    foretold = published.moved(official.r, published.others_tilt(official, list(runs.values())[:5]))
    assert total_variation(foretold, official.answer) == pytest.approx(0.090, abs=5e-4)
    assert total_variation(official.r, official.answer) == pytest.approx(0.165, abs=5e-4)
    assert published.distances(runs["branch 280M"], nanotron) == pytest.approx([0.120, 0.257, 0.478], abs=5e-4)
    tilt = published.others_tilt(paper, [paper, official, nanotron], strangers=True)  # of other people than its own
    assert tilt == pytest.approx(nanotron.tilt)
