"""The arithmetic with which the experiments are read."""

import numpy as np
import pytest
import torch
from conftest import write_dataset

from experiments import foretold, profit, theory
from experiments.cut import cut
from sampler import load_dataset


def test_mixtures_deal_the_counts_out_in_reverse():
    mixtures = theory.mixtures([10, 70, 20])
    assert mixtures["natural"] == pytest.approx([0.1, 0.7, 0.2])
    assert mixtures["reversed"] == pytest.approx([0.7, 0.1, 0.2])  # the smallest gets the largest's share
    assert mixtures["up"] == pytest.approx([3 / 7, 1 / 7, 3 / 7])
    assert mixtures["down"] == pytest.approx([1 / 5, 3 / 5, 1 / 5])


def test_prediction_tilts_by_disagreement_and_sums_to_one():
    r = np.array([0.5, 0.3, 0.2])
    alpha = theory.predict(r, np.array([0.2, 0.2, 0.4]), np.full(3, 0.5))  # equal slopes: exp(D / b), normalised
    expected = r * np.exp(np.array([0.2, 0.2, 0.4]) / 0.5)
    assert alpha == pytest.approx(expected / expected.sum())


def test_a_shuffled_disagreement_foretells_nothing():
    """With equal slopes the tilt is D / b but for a constant. Over all orders of D their mean correlation is 0."""
    r, disagreement = np.full((1, 8), 1 / 8), np.arange(1, 9)[None] / 10
    found = theory.shuffled_correlation(r, disagreement, np.full(8, 0.5), disagreement / 0.5)
    assert abs(found.mean()) < 4 / 7**0.5 / 200**0.5 and found.max() < 1  # variance of one: 1 / (K - 1)


def test_slopes_are_those_of_the_lines():
    log_weights = np.log([[0.1, 0.9], [0.3, 0.7], [0.6, 0.4]])
    losses = np.array([3.0, 4.0]) - np.array([0.2, 0.5]) * log_weights
    assert theory.own_slope(losses, np.exp(log_weights)) == pytest.approx([0.2, 0.5])
    slope, r2 = theory.line_through_domains(log_weights, 1.4 * log_weights + np.array([1.0, -2.0]))
    assert (slope, r2) == pytest.approx((1.4, 1.0))  # a constant of each domain does not count
    assert theory.line_through_domains(np.array([[0.0], [1.0], [2.0]]), np.array([[0.0], [1.0], [0.0]]))[1] == 0


def test_clipped_excess_is_the_mean_of_its_positive_part():
    proxy, reference = np.array([[1.0, 2.0, 3.0, np.nan]]), np.array([[2.0, 1.0, 1.0, np.nan]])
    assert theory.clipped_excess(proxy, reference) == pytest.approx([1.0])  # (0 + 1 + 2) / 3
    assert theory.clipped_excess(reference, proxy) == pytest.approx([1 / 3])


def test_reversed_tilt_and_distance_from_the_front():
    answer, r = np.array([0.4, 0.4, 0.2]), np.array([0.2, 0.4, 0.4])
    assert profit.reversed_tilt(answer, r) == pytest.approx(np.array([0.1, 0.4, 0.8]) / 1.3)
    front = np.array([[3.0, 4.0], [3.2, 3.8]])  # token-weighted, unweighted
    assert profit.behind_front(front, (3.2, 3.9)) == pytest.approx(0.05, abs=1e-3)  # (3.15, 3.85) is better in both
    assert profit.behind_front(front, (2.9, 4.0)) == pytest.approx(-0.1, abs=1e-3)


def test_mixtures_of_the_profit(tmp_path):
    """A shuffled tilt has the tilts of the answer: with equal shares nothing is normalised away."""
    histories = {"natural": [[0.1, 0.2, 0.3, 0.4], [0.2, 0.2, 0.2, 0.4]], "uniform": [[0.75, 0.25]]}
    for name, history in histories.items():
        (proxy := tmp_path / f"2-{name}-7/proxy").mkdir(parents=True)
        torch.save([{"step": i, "domain_weights": torch.tensor(alpha)} for i, alpha in enumerate(history, 1)],
                   proxy / "doremi_domain_weights_2.pt")
    found, shuffled = (profit.mixture_weights(name, np.full(4, 9.0), tmp_path / "2", 7)
                       for name in ("doremi", "doremi-shuffled-tilt"))
    assert found == pytest.approx([0.15, 0.2, 0.25, 0.4]) and sorted(shuffled) == pytest.approx(sorted(found))
    assert shuffled.tolist() != found.tolist()
    for name, expected in (("temperature-0.5", [0.366, 0.634]), ("uniform+natural", [0.375, 0.625]),
                           ("moved", [0.5, 0.5]), ("moved-half", [9 / 14, 5 / 14])):
        weights = profit.mixture_weights(name, np.array([100.0, 300.0]), tmp_path / "2", 7)
        assert weights == pytest.approx(expected, abs=1e-4), name


def test_slopes_are_found_again():
    """Losses made from known slopes; the third domain lives from the first."""
    log_shares = np.random.default_rng(0).normal(size=(40, 3))
    slopes = np.array([[-0.2, 0, -0.3], [0, -0.5, 0], [0, 0, -0.1]])
    assert foretold.all_slopes(log_shares, log_shares @ slopes, strength=1e-6) == pytest.approx(slopes, abs=1e-4)
    own = foretold.own_slopes(log_shares, log_shares * np.array([-0.2, -0.5, -0.1]))
    assert own == pytest.approx(np.diag([-0.2, -0.5, -0.1]))


def test_the_best_mixture_goes_to_the_steepest_domain_as_far_as_it_may():
    natural = np.array([0.5, 0.25, 0.25])
    weights = foretold.best_mixture(natural, np.diag([-0.1, -0.1, -0.9]), bound=0.5)
    halfway = (natural + 1 / 3) / 2
    assert weights[2] / weights[0] == pytest.approx(halfway[2] / halfway[0] * np.exp(1))  # +0.5 and -0.5
    assert foretold.best_mixture(natural, np.diag([-0.3] * 3)) == pytest.approx(halfway, abs=1e-3)


def test_a_cut_keeps_the_shares_and_whole_pieces(tmp_path):
    counts = {"a": 512 * 80, "b": 512 * 20}
    write_dataset(tmp_path / "whole", {name: (np.arange(n), np.arange(99)) for name, n in counts.items()}, 50_000)
    cut(tmp_path / "whole", tmp_path / "cut", 512 * 25)
    dataset = load_dataset(tmp_path / "cut", 8)  # its hashes hold
    assert dataset.token_counts().tolist() == [512 * 20, 512 * 5]
    starts = np.fromfile(tmp_path / "cut/a/train.bin", "<u2")[::512]
    assert (starts % 512 == 0).all() and (np.diff(starts.astype(int)) > 0).all() and starts.max() > 512 * 40
