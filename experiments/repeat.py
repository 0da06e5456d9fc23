"""When data repeat: large models on the demo's corpus, cut by cut.py to 1, 1/4 and 1/16 of the budget of tokens.

    python -m experiments.repeat [FIGURE.png]     from experiments/results alone

The runs: python -m experiments.cut data/demo data/demo-4 819200; then profit.sh with the mixtures below, and for DoReMi
theory.sh with 1,600 steps, both on data/demo-4.
"""

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.profit import LABELS, spread
from experiments.published import correlation

RESULTS = Path(__file__).parent / "results"
FILES = {  # label: epochs of natural proportions, file
    "demo, whole (0.18 epochs)": (0.18, "profit-demo"), "demo, 1 epoch": (1, "repeat-demo-1"),
    "demo, 4 epochs": (4, "repeat-demo-4"), "demo, 16 epochs": (16, "repeat-demo-16"),
    "twelve, 16 epochs": (16, "repeat-twelve-16"),
}
MIXTURES = ("temperature-0.7", "uniform+natural", "uniform", "unimax-8", "unimax-32", "doremi")
SEEDS = (10, 20, 30)
OWN_EPOCHS = (0, 2, 5, 10, 20, 30, 50, 100)  # edges


@dataclass
class Group:
    """The runs of one data set; what differs is from natural of the same seed."""

    domains: list
    epochs: float  # of natural proportions
    natural: np.ndarray  # (K,)
    weights: dict  # mixture: (K,), mean over seeds
    changes: dict  # mixture: (seeds, K), of the last loss
    lowest: dict  # mixture: (seeds,), of the lowest mean loss on the way


def read_group(epochs, name):
    lines = [json.loads(text) for text in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
    base = {line["seed"]: line for line in lines if line["mixture"] == "natural"}
    group = Group(lines[0]["domains"], epochs, np.array(lines[0]["natural"]), {}, {}, {})
    for mixture in MIXTURES:
        here = [line for line in lines if line["mixture"] == mixture and line["seed"] in SEEDS and line["seed"] in base]
        if here:
            group.weights[mixture] = np.mean([line["weights"] for line in here], axis=0)
            group.changes[mixture] = np.array([np.subtract(x["loss"], base[x["seed"]]["loss"]) for x in here])
            group.lowest[mixture] = np.array([min(x["unweighted"]) - min(base[x["seed"]]["unweighted"]) for x in here])
    return group


def report(groups):
    """groups: {label: Group}."""
    print("| data | trained on | seeds | epochs of the smallest domain | mean | token-weighted mean "
          "| lowest mean on the way |\n|" + " --- |" * 7)
    for label, group in groups.items():
        for mixture, change in group.changes.items():
            smallest = group.epochs * (group.weights[mixture] / group.natural)[group.natural.argmin()]
            print(f"| {label} | {LABELS[mixture]} | {len(change)} | {smallest:.1f} | {spread(change.mean(axis=1))} | "
                  f"{spread(change @ group.natural)} | {spread(group.lowest[mixture])} |")


def report_domains(groups):
    """Do domains that get more than their natural share gain?  By how often each is seen."""
    own, gain = [], []
    for group in groups.values():
        for mixture, change in group.changes.items():
            ratio = group.weights[mixture] / group.natural
            own.extend(group.epochs * ratio[ratio > 1.02])
            gain.extend(change.mean(axis=0)[ratio > 1.02])
    own, gain = np.array(own), np.array(gain)
    print("\n| epochs of a domain that is raised | domains and mixtures | mean change | share that gained |\n|"
          + " --- |" * 4)
    for low, high in itertools.pairwise(OWN_EPOCHS):
        inside = (own >= low) & (own < high)
        if inside.any():
            gained = np.mean(gain[inside] < 0)
            print(f"| {low} to {high} | {inside.sum()} | {gain[inside].mean():+.3f} | {gained:.0%} |")


def report_tilts(group):
    """DoReMi's answer where data repeat, and that of the whole data after as many steps."""
    lines = [json.loads(text) for text in (RESULTS / "theory-demo.jsonl").read_text().splitlines()]
    whole = [line["answer"] for line in lines if line["run"].startswith("1600-natural") and "answer" in line]
    tilts = [np.log(weights / group.natural) for weights in (group.weights["doremi"], np.mean(whole, axis=0))]
    print(f"\nDoReMi's tilt at {group.epochs} epochs with that of the whole data: correlation "
          f"{correlation(*tilts):.2f}")
    print(", ".join(f"{name} {one:+.2f} ({other:+.2f})" for name, one, other in zip(group.domains, *tilts)))


def draw(path, groups):
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharex=True, sharey=True)
    looks = {"temperature-0.7": ("tab:blue", "o"), "uniform+natural": ("tab:orange", "s"), "uniform": ("tab:red", "^"),
             "doremi": ("tab:green", "D")}
    for mixture, (colour, marker) in looks.items():
        here = [group for group in groups if mixture in group.changes]
        epochs = [group.epochs for group in here]
        means = [group.changes[mixture].mean(axis=1) for group in here]
        weighted = [group.changes[mixture] @ group.natural for group in here]
        for panel, values in zip(axes, (means, weighted)):
            spreads = [x.std(ddof=1) if len(x) > 1 else 0 for x in values]
            panel.errorbar(epochs, [x.mean() for x in values], spreads, color=colour, marker=marker, capsize=3,
                           label=LABELS[mixture])
    for panel, name in zip(axes, ("mean loss", "token-weighted mean loss")):
        panel.axhline(0, color="grey", linewidth=1)
        panel.set(xscale="log", xlabel="epochs of natural proportions", ylabel="change from natural (nats)", title=name)
        panel.set_xticks([group.epochs for group in groups], [f"{group.epochs:.2g}" for group in groups])
        panel.minorticks_off()
    axes[0].legend(fontsize=8)
    figure.suptitle("Mixtures that raise small domains stop paying when the data repeat", fontsize=11)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    groups = {label: read_group(*place) for label, place in FILES.items()}
    report(groups)
    report_domains(groups)
    report_tilts(groups["demo, 16 epochs"])
    if sys.argv[1:]:
        draw(sys.argv[1], [group for label, group in groups.items() if "demo" in label])
