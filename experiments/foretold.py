"""Why nothing beats the simple rules: a mixture's profit, foretold from its weights alone.

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

from experiments.theory import explained, header

RESULTS = Path(__file__).parent / "results"
LOOKS = {"temperatures and halfway": ("grey", "o"), "DoReMi": ("tab:blue", "s"),
         "DoReMi, tilt reversed or shuffled": ("tab:orange", "^"), "best by the law": ("tab:red", "D")}
# The slopes are fitted on the first set of each corpus. "again" is the same text, prepared anew in another order.
SETS = {"twelve": ("twelve", "twelve-fresh", "twelve-again"), "demo": ("demo", "demo-fresh")}
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


def behind_front(front, point):
    """By how much some mixture on the front is better than the point in both means; below 0: none is better in both.

    front: (N, 2) of (token-weighted, unweighted) means, joined by straight lines; point: (2,).
    """
    share = np.linspace(0, len(front) - 1, 1000)
    ends = np.array([np.interp(share, range(len(front)), column) for column in front.T])  # (2, 1000)
    return (np.asarray(point)[:, None] - ends).min(axis=0).max()


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


# ---- reporting


def slopes_for(mixture, runs):
    """Own slopes fitted on the temperatures without `mixture`."""
    return own_slopes(*runs.of(*(name for name in TEMPERATURES if name != mixture)))


def foretell(mixture, fitted, tested):
    """A mixture's foretold and measured changes, each (K,), means over the seeds of `tested`."""
    log_shares, changes = tested.of(mixture)
    return (log_shares @ slopes_for(mixture, fitted)).mean(axis=0), changes.mean(axis=0)


def with_shuffled_slopes(mixture, fitted, tested, n=200):
    """The control: R2 of the same law with its slopes dealt out to the domains at random, mean of n."""
    generator, slopes = np.random.default_rng(0), slopes_for(mixture, fitted).diagonal()
    log_shares, changes = (values.mean(axis=0) for values in tested.of(mixture))
    return np.mean([explained(log_shares * generator.permutation(slopes), changes) for _ in range(n)])


def two_means(changes, natural):
    """Token-weighted mean and mean."""
    return changes @ natural, changes.mean()


def lead_on_rules(mixture, runs):
    """By how much the mixture beats, in one mean at least, every point of the line of temperatures and halfway."""
    line = [np.zeros(2)]
    for rule in ("temperature-0.7", "temperature-0.5", "uniform+natural", "uniform"):
        if rule in runs.mixtures:
            line.append(two_means(runs.of(rule)[1].mean(axis=0), runs.natural))
    return -behind_front(np.array(line), two_means(runs.of(mixture)[1].mean(axis=0), runs.natural))


def print_foretold(corpus, sets):
    """sets: {name: Runs}."""
    first = sets[corpus]
    header(corpus + ": runs", "trained on", "seeds", "mean: foretold, measured", "token-weighted mean",
           "R2 over domains", "slopes shuffled", "lead on temperatures and halfway")
    for name, runs in sets.items():
        for mixture in dict.fromkeys(runs.mixtures):
            foretold, measured = foretell(mixture, first, runs)
            weighted, mean = zip(two_means(foretold, runs.natural), two_means(measured, runs.natural))
            print(f"| {name} | {mixture} | {len(runs.of(mixture)[1])} | {mean[0]:+.3f}, {mean[1]:+.3f} | "
                  f"{weighted[0]:+.3f}, {weighted[1]:+.3f} | {explained(foretold, measured):.2f} | "
                  f"{with_shuffled_slopes(mixture, first, runs):.2f} | {lead_on_rules(mixture, runs):+.3f} |")
    header(f"{corpus}: domain", "b", "spread of its log share over the temperatures")
    spread = first.of(*TEMPERATURES)[0].std(axis=0)
    for row in zip(first.domains, -slopes_for("", first).diagonal(), spread):
        print("| {} | {:.2f} | {:.2f} |".format(*row))


def print_transfer():
    """What a quarter of python_tests does to domains whose share is as in the control, a quarter of cpp_headers."""
    runs = read_runs("demo-more")
    difference = runs.of("quarter-6")[1] - runs.of("quarter-1")[1]
    header("domain", "loss with a quarter of python_tests, minus that with a quarter of cpp_headers")
    for name, values in zip(runs.domains, difference.T):
        print(f"| {name} | {values.mean():+.3f} ± {values.std(ddof=1):.3f} |")


def kind_of(mixture):
    if mixture in TEMPERATURES or mixture == "uniform+natural":
        return "temperatures and halfway"
    if mixture.startswith("foretold"):
        return "best by the law"
    return "DoReMi, tilt reversed or shuffled" if mixture.endswith("tilt") else "DoReMi"


def draw(path, corpora):
    figure, axes = plt.subplots(1, len(corpora), figsize=(11, 5), layout="constrained")
    for panel, (corpus, sets) in zip(axes, corpora.items()):
        for runs in sets.values():
            for mixture in dict.fromkeys(runs.mixtures):
                kind = kind_of(mixture)
                colour, marker = LOOKS[kind]
                foretold, measured = foretell(mixture, sets[corpus], runs)
                panel.scatter(foretold, measured, 14, color=colour, marker=marker, alpha=0.8, label=kind)
        panel.axline((0, 0), slope=1, color="grey", linewidth=1, zorder=0)
        panel.set(xlabel="predicted change of a domain's loss from natural (nats)", ylabel="measured", title=corpus)
        by_label = dict(zip(*panel.get_legend_handles_labels()[::-1]))
        panel.legend(by_label.values(), by_label.keys(), fontsize=8)
    figure.suptitle("One slope for each domain predicts what a mixture does to its loss", fontsize=11)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    corpora = {corpus: {name: read_runs(name) for name in names} for corpus, names in SETS.items()}
    for corpus, sets in corpora.items():
        print_foretold(corpus, sets)
    print_transfer()
    if sys.argv[1:]:
        draw(sys.argv[1], corpora)
