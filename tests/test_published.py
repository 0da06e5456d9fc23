"""The published answers, read again: two numbers of docs/published.md, and the arithmetic behind them."""

import numpy as np
import pytest

from average_weights import total_variation
from experiments import published


@pytest.fixture(scope="module")
def runs():
    return {run.name: run for run in published.load()[1]}


def test_an_answer_moves_onto_another_reference():
    tilt = np.log([2.0, 1.0, 0.5]) + 3  # a constant does not count
    assert published.moved(np.array([0.5, 0.3, 0.2]), tilt) == pytest.approx(np.array([1.0, 0.3, 0.1]) / 1.4)


def test_the_other_runs_foretell_the_official_answer(runs):
    """0.090 where the reference's own weights are 0.165 away."""
    official, five = runs["official 120M"], list(runs.values())[:5]
    foretold = published.moved(official.r, published.others_tilt(official, five))
    assert total_variation(foretold, official.answer) == pytest.approx(0.090, abs=5e-4)
    assert total_variation(official.r, official.answer) == pytest.approx(0.165, abs=5e-4)
    found = published.distances(runs["branch 280M"], runs["nanotron 280M"])
    assert found == pytest.approx([0.120, 0.257, 0.478], abs=5e-4)


def test_other_people_are_other_people(runs):
    """The paper's 1B run is foretold without the official repository's, which its authors made."""
    paper, official, nanotron = runs["paper 1B"], runs["official 120M"], runs["nanotron 280M"]
    assert published.others_tilt(paper, [paper, official, nanotron], strangers=True) == pytest.approx(nanotron.tilt)
    both = (official.tilt + nanotron.tilt) / 2
    assert published.others_tilt(paper, [paper, official, nanotron]) == pytest.approx(both)


def test_a_line_that_is_taken_off_leaves_nothing_of_it():
    x, rest = np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, -1.0, -1.0, 1.0])  # which has neither slope nor mean
    assert published.without(x, 2 * x + 1 + rest) == pytest.approx(rest)
