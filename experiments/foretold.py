"""Why nothing beats a temperature: a mixture's profit, foretold from its weights alone.

    python -m experiments.foretold [FIGURE.png]     from experiments/results alone

Give each domain one slope b: its loss falls by b when the log of its own share rises by 1. Fit b on the temperatures,
from natural to uniform. Then -b log(weight / natural share) foretells every other mixture's change, domain by domain.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.theory import explained

RESULTS = Path(__file__).parent / "results"
TEMPERATURES = ("natural", "temperature-0.7", "temperature-0.5", "temperature-0.3", "uniform")


# ---- the arithmetic: arrays in, numbers out


def own_slopes(log_shares, changes):
    """Slope of each domain's change on its own log share, through 0: (K, K) diagonal, changes = log_shares @ slopes.

    log_shares, changes: (N, K), log(weight / natural share) and change of loss from natural.
    """
    return np.diag((log_shares * changes).sum(axis=0) / (log_shares**2).sum(axis=0))


def all_slopes(log_shares, changes, strength=3.0):
    """Slopes on every domain's log share, by ridge regression towards `own_slopes`: (K, K)."""
    own = own_slopes(log_shares, changes)
    gram = log_shares.T @ log_shares + strength * np.eye(log_shares.shape[1])
    return own + np.linalg.solve(gram, log_shares.T @ (changes - log_shares @ own))


def best_mixture(natural, slopes, bound=0.5):
    """The mixture with the lowest foretold loss, domains weighted as halfway, no log weight more than `bound` from it.

    The bound holds before the weights are scaled to sum to 1.
    """
    halfway = (natural + 1 / len(natural)) / 2
    pull = slopes @ halfway  # of the weighted loss on each log share
    moves = np.zeros(len(natural))
    for _ in range(3000):
        weights = halfway * np.exp(moves)
        weights /= weights.sum()
        moves = np.clip(moves - 0.05 * (pull - weights * pull.sum()) / np.abs(pull).max(), -bound, bound)
    weights = halfway * np.exp(moves)
    return weights / weights.sum()


# ---- the committed runs


@dataclass
class Runs:
    domains: list
    natural: np.ndarray  # (K,) shares
    mixtures: np.ndarray  # (N,) names, natural left out
    log_shares: np.ndarray  # (N, K) log(weight / natural share)
    changes: np.ndarray  # (N, K) loss minus that of natural with the same seed

    def of(self, *mixtures):
        """The rows of these mixtures: log shares and changes."""
        chosen = np.isin(self.mixtures, mixtures)
        return self.log_shares[chosen], self.changes[chosen]


def read_runs(name):
    lines = [json.loads(text) for text in (RESULTS / f"profit-{name}.jsonl").read_text().splitlines()]
    base = {line["seed"]: np.array(line["loss"]) for line in lines if line["mixture"] == "natural"}
    lines = [line for line in lines if line["mixture"] != "natural" and line["seed"] in base]
    natural = np.array(lines[0]["natural"])
    return Runs(lines[0]["domains"], natural, np.array([line["mixture"] for line in lines]),
                np.array([np.log(np.array(line["weights"]) / natural) for line in lines]),
                np.array([np.array(line["loss"]) - base[line["seed"]] for line in lines]))


def foretold_weights(mixture, corpus):
    """(K,) of "foretold-own" (slopes on the own share, from the temperatures) or "foretold-all" (from all runs)."""
    runs = read_runs(corpus)
    if mixture == "foretold-own":
        return best_mixture(runs.natural, own_slopes(*runs.of(*TEMPERATURES)))
    return best_mixture(runs.natural, all_slopes(runs.log_shares, runs.changes))
