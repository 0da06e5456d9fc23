"""When data repeat: large models on the demo's corpus, cut by cut.py to 1, 1/4 and 1/16 of the budget of tokens.

    python -m experiments.repeat [FIGURE.png]     from experiments/results alone
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.profit import LABELS, spread
from experiments.published import correlation

RESULTS = Path(__file__).parent / "results"
BUDGET = 1600 * 32 * 64  # tokens of a large model
FILES = {BUDGET / 18_081_412: "profit-demo", 1: "repeat-demo-1", 4: "repeat-demo-4", 16: "repeat-demo-16"}
SEEDS = (10, 20, 30)
OWN_EPOCHS = (0, 2, 5, 10, 20, 30, 50, 100)  # edges


def read_changes(name):
    """{mixture: (weights (N, K), changes of loss (N, K))} from natural of the same seed, and the natural shares."""
    lines = [json.loads(text) for text in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
    base = {line["seed"]: np.array(line["loss"]) for line in lines if line["mixture"] == "natural"}
    found = {}
    for line in lines:
        if line["seed"] in base and line["seed"] in SEEDS:
            found.setdefault(line["mixture"], []).append((line["weights"], line["loss"] - base[line["seed"]]))
    changes = {mixture: tuple(np.array(column) for column in zip(*rows)) for mixture, rows in found.items()}
    return changes, np.array(lines[0]["natural"])


def tilt_of_whole_data(natural):
    """Of DoReMi's answer after 1,600 steps on the whole data, mean over seeds: (K,)."""
    lines = [json.loads(text) for text in (RESULTS / "theory-demo.jsonl").read_text().splitlines()]
    answers = [line["answer"] for line in lines if line["run"].startswith("1600-natural") and "answer" in line]
    return np.log(np.mean(answers, axis=0) / natural)


def report(groups):
    """groups: {label: (epochs, changes, natural)}."""
    print("| data, epochs of natural | trained on | seeds | epochs of the smallest domain | mean | token-weighted mean |\n|"
          + " --- |" * 6)
    for label, (epochs, changes, natural) in groups.items():
        for mixture in (name for name in LABELS if name in changes and name != "natural"):
            weights, change = changes[mixture]
            smallest = epochs * (weights.mean(axis=0) / natural)[natural.argmin()]
            print(f"| {label}, {epochs:.2g} | {LABELS[mixture]} | {len(change)} | {smallest:.1f} | "
                  f"{spread(change.mean(axis=1))} | {spread(change @ natural)} |")
    print("\n| a domain that gets more than its natural share, by its own epochs | domains and mixtures | mean change "
          "| share that gained |\n|" + " --- |" * 4)
    own, gain = [], []
    for epochs, changes, natural in groups.values():
        for mixture, (weights, change) in changes.items():
            ratio = weights.mean(axis=0) / natural
            raised = ratio > 1.02
            own.extend(epochs * ratio[raised])
            gain.extend(change.mean(axis=0)[raised])
    own, gain = np.array(own), np.array(gain)
    for low, high in zip(OWN_EPOCHS, OWN_EPOCHS[1:]):
        inside = (own >= low) & (own < high)
        if inside.any():
            print(f"| {low} to {high} | {inside.sum()} | {gain[inside].mean():+.3f} | "
                  f"{(gain[inside] < 0).mean():.0%} |")


def report_tilts(groups):
    epochs, changes, natural = groups["demo, cut to 1/16"]
    if "doremi" in changes:
        tilts = np.log(changes["doremi"][0] / natural)
        whole = tilt_of_whole_data(natural)
        print(f"\nDoReMi's tilt at {epochs} epochs, mean over seeds, with that of the whole data: correlation "
              f"{correlation(tilts.mean(axis=0), whole):.2f}, standard deviation {tilts.mean(axis=0).std():.2f} and "
              f"{whole.std():.2f}; two seeds correlate by {correlation(*tilts[:2]):.2f}")


def draw(path, groups):
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharex=True)
    looks = {"temperature-0.7": ("tab:blue", "o"), "uniform+natural": ("tab:orange", "s"), "uniform": ("tab:red", "^"),
             "doremi": ("tab:green", "D")}
    demo = [group for label, group in groups.items() if label.startswith("demo")]
    for mixture, (colour, marker) in looks.items():
        here = [(epochs, *changes[mixture], natural) for epochs, changes, natural in demo if mixture in changes]
        for panel, mean_of in zip(axes, (lambda change, natural: change.mean(axis=1),
                                         lambda change, natural: change @ natural)):
            values = [mean_of(change, natural) for _, _, change, natural in here]
            panel.errorbar([group[0] for group in here], [x.mean() for x in values], [x.std(ddof=1) for x in values],
                           color=colour, marker=marker, capsize=3, label=LABELS[mixture])
    for panel, name in zip(axes, ("mean loss", "token-weighted mean loss")):
        panel.axhline(0, color="grey", linewidth=1)
        panel.set(xscale="log", xlabel="epochs of natural proportions", ylabel=f"{name} (nats), change from natural")
        panel.set_xticks([epochs for epochs, *_ in demo], [f"{epochs:.2g}" for epochs, *_ in demo])
        panel.minorticks_off()
    axes[0].legend(fontsize=8)
    figure.suptitle("Mixtures that raise small domains stop paying when the data repeat", fontsize=11)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    groups = {}
    for epochs, name in FILES.items():
        if (RESULTS / f"{name}.jsonl").exists():
            label = "demo, whole" if epochs < 1 else f"demo, cut to 1/{epochs}" if epochs > 1 else "demo, cut to 1"
            groups[label] = (epochs, *read_changes(name))
    if (RESULTS / "repeat-twelve-16.jsonl").exists():
        groups["twelve, cut to 1/16"] = (16, *read_changes("repeat-twelve-16"))
    report(groups)
    report_tilts(groups)
    if sys.argv[1:]:
        draw(sys.argv[1], groups)
