"""The arithmetic with which the experiments are read."""

import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import profit
import theory


def test_prediction_tilts_by_disagreement_and_sums_to_one():
    r = np.array([0.5, 0.3, 0.2])
    assert theory.predict(r, np.array([0.3, 0.3, 0.3]), np.array([0.2, 0.4, 0.1])) == pytest.approx(r)
    alpha = theory.predict(r, np.array([0.2, 0.2, 0.4]), np.full(3, 0.5))  # equal slopes: exp(D / b), normalised
    expected = r * np.exp(np.array([0.2, 0.2, 0.4]) / 0.5)
    assert alpha == pytest.approx(expected / expected.sum())


def test_slopes_and_clipped_excess():
    log_weights = np.log([[0.1, 0.9], [0.3, 0.7], [0.6, 0.4]])
    losses = np.array([3.0, 4.0]) - np.array([0.2, 0.5]) * log_weights
    assert theory.own_slope(losses, np.exp(log_weights)) == pytest.approx([0.2, 0.5])
    proxy, reference = np.array([[1.0, 2.0, 3.0, np.nan]]), np.array([[2.0, 1.0, 1.0, np.nan]])
    assert theory.clipped_excess(proxy, reference) == pytest.approx([1.0])  # (0 + 1 + 2) / 3


def test_mixtures_and_tokens_of_the_profit():
    counts = np.array([100.0, 900.0])
    for name, weights in {"temperature-0.5": [0.25, 0.75], "uniform": [0.5, 0.5], "natural": [0.1, 0.9],
                          "uniform+natural": [0.3, 0.7]}.items():
        assert profit.mixture_weights(name, counts, None, 1) == pytest.approx(weights)
    answer, r = np.array([0.4, 0.4, 0.2]), np.array([0.2, 0.4, 0.4])
    assert profit.reversed_tilt(answer, r) == pytest.approx(np.array([0.1, 0.4, 0.8]) / 1.3)
    assert profit.tokens_to_reach(np.array([100, 200, 300]), np.array([5.0, 4.0, 3.0]), 3.5) == pytest.approx(250)
