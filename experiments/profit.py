"""What DoReMi gains: collect the runs of profit.sh, print the tables and draw the figure of docs/results.md.

    python -m experiments.profit weights MIXTURE DATA_DIR THEORY_DIR/STEPS SEED FILE.json   (profit.sh does it)
    python -m experiments.profit collect OUT_DIR RESULTS         the finished runs' numbers, a line for each run
    python -m experiments.profit report RESULTS [FIGURE.png TITLE] from RESULTS alone

Some committed runs also hold bits per byte on unseen text and on tasks, as changes from natural of the same seed.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from experiments.foretold import TEMPERATURES, behind_front, foretold_weights
from sampler import unimax

LABELS = {
    "natural": "natural", "temperature-0.7": "temperature 0.7", "temperature-0.5": "temperature 0.5",
    "temperature-0.3": "temperature 0.3", "uniform": "uniform", "uniform+natural": "(uniform + natural) / 2",
    "unimax-8": "uniform, at most 8 epochs",
    "unimax-32": "uniform, at most 32 epochs",
    "doremi": "DoReMi, reference on natural", "doremi-uniform": "DoReMi, reference on uniform",
    "doremi-reversed": "DoReMi, reference on reversed",
    "doremi-reversed-tilt": "DoReMi, tilt reversed", "doremi-shuffled-tilt": "DoReMi, tilt shuffled",
    "doremi-last-half": "DoReMi, last half",
    "doremi-1600": "DoReMi, 1,600 steps",
    "moved": "DoReMi, moved from uniform onto natural", "moved-shuffled": "the same, tilt shuffled",
    "doremi-half": "DoReMi, reference on (uniform + natural) / 2",
    "moved-half": "DoReMi, moved from uniform onto (uniform + natural) / 2",
    "doremi-mild": "DoReMi, reference on temperature 0.7",
    "moved-mild": "DoReMi, moved from uniform onto temperature 0.7",
    "foretold-own": "foretold best, own shares", "foretold-all": "foretold best, all shares",
    "quarter-1": "a quarter of domain 1", "quarter-6": "a quarter of domain 6",
}
FRONT = TEMPERATURES
PAIRS = (("doremi", "uniform"), ("doremi", "uniform+natural"), ("doremi", "temperature-0.5"),
         ("doremi", "doremi-reversed-tilt"), ("doremi", "doremi-shuffled-tilt"), ("doremi", "doremi-last-half"),
         ("doremi-uniform", "uniform"), ("doremi-uniform", "uniform+natural"), ("doremi-reversed", "doremi"),
         ("moved", "doremi"), ("moved", "moved-shuffled"), ("moved-half", "doremi-half"),
         ("doremi-mild", "temperature-0.7"), ("moved-mild", "doremi-mild"), ("foretold-own", "uniform+natural"),
         ("foretold-all", "uniform+natural"))


# ---- the arithmetic: arrays in, numbers out


def reversed_tilt(answer, r):
    """The mixture that departs from r the other way: r^2 / answer, normalised."""
    opposite = r**2 / answer
    return opposite / opposite.sum()


# ---- mixtures and runs


def mixture_weights(mixture, counts, theory, seed, corpus=None):
    """(K,) of one of LABELS.  theory: THEORY_DIR/STEPS, the prefix of theory.sh's runs; corpus: as in results/."""
    natural = counts / counts.sum()
    power = mixture.partition("-")[2]
    if mixture in FRONT:
        weights = counts ** {"natural": 1, "uniform": 0}.get(mixture, float(power or 0))
    elif mixture == "uniform+natural":
        weights = (natural + 1 / len(natural)) / 2
    elif mixture.startswith("unimax"):  # of the large models' budget
        weights = unimax(counts, 1600 * 32 * 64, float(power))
    elif mixture.startswith("quarter"):  # of one domain's share; the others keep their proportions
        weights = natural.copy()
        weights[int(power)] /= 4
    elif mixture.startswith("foretold"):
        weights = foretold_weights(mixture, corpus)
    else:
        steps = int(power if power.isdigit() else Path(theory).name)
        reference = power if power in ("uniform", "reversed", "half", "mild") else "natural"
        if mixture.startswith("moved"):
            reference = "uniform"
        proxy = Path(theory).parent / f"{steps}-{reference}-{seed}" / "proxy"
        history = torch.load(proxy / f"doremi_domain_weights_{steps}.pt", weights_only=True)
        alpha = torch.stack([entry["domain_weights"] for entry in history]).double().numpy()
        weights = alpha[len(alpha) // 2 if power == "last-half" else 0 :].mean(axis=0)
        if power == "reversed-tilt":
            weights = reversed_tilt(weights, natural)
        if power == "shuffled-tilt":  # tilts of the same sizes that know nothing of the domains
            weights = natural * np.random.default_rng(seed).permutation(weights / natural)
        if power == "shuffled":
            weights = np.random.default_rng(seed).permutation(weights)
        if mixture.startswith("moved"):  # from uniform, where the old shares are equal
            onto = {"half": (natural + 1 / len(natural)) / 2, "mild": natural**0.7}
            weights = weights * onto.get(power, natural)
    return weights / weights.sum()


def collect(out_dir, results):
    lines = []
    for run in sorted(path.parent for path in out_dir.glob("*/done")):
        mixture, _, seed = run.name.rpartition("-")
        config = json.loads((run / "config.json").read_text())
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        evaluations = [line for line in logged if "val_loss" in line]
        counts = np.array(list(config["data"]["train_tokens"].values()), dtype=float)
        losses = np.array([[line["val_loss"][name] for name in config["domains"]] for line in evaluations])
        lines.append({"mixture": mixture, "seed": int(seed), "n_params": config["n_params"],
                      "domains": config["domains"], "natural": np.round(counts / counts.sum(), 5).tolist(),
                      "weights": np.round(list(config["sampling_weights"].values()), 5).tolist(),
                      "tokens": [line["tokens"] for line in evaluations],
                      "unweighted": np.round(losses.mean(axis=1), 5).tolist(),
                      "weighted": np.round(losses @ (counts / counts.sum()), 5).tolist(),
                      "loss": np.round(losses[-1], 5).tolist()})
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))


# ---- reporting


def spread(values):
    """Mean ± standard deviation over seeds, as text. Every ± of the docs is this one."""
    return f"{np.mean(values):+.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def in_standard_errors(values):
    """How many standard errors the mean over seeds is away from 0."""
    if len(values) < 2:
        return np.nan
    return np.mean(values) / (np.std(values, ddof=1) / np.sqrt(len(values)))


def report(results, figure=None, title=""):
    runs = {}
    for text in Path(results).read_text().splitlines():
        line = json.loads(text)
        runs[line["mixture"], line["seed"]] = {k: np.array(v) if isinstance(v, list) else v for k, v in line.items()}
    seeds = sorted({seed for mixture, seed in runs if mixture == "natural"})
    first = runs["natural", seeds[0]]
    print(f"{first['n_params']:,} parameters, {first['tokens'][-1] / first['n_params']:.0f} tokens per parameter\n\n"
          "| trained on | domains better than natural, by seed | mean loss | token-weighted mean "
          "| behind the temperatures' front |\n|" + " --- |" * 5)
    points = {}
    for mixture, label in LABELS.items():
        here = [seed for seed in seeds if (mixture, seed) in runs]
        if not here:
            continue
        better, delta, front = [], [], []
        for seed in here:
            run, base = runs[mixture, seed], runs["natural", seed]
            better.append(int((run["loss"] < base["loss"]).sum()))
            delta.append([run["unweighted"][-1] - base["unweighted"][-1], run["weighted"][-1] - base["weighted"][-1]])
            ends = [runs[name, seed] for name in FRONT if (name, seed) in runs]
            line = np.array([[end["weighted"][-1], end["unweighted"][-1]] for end in ends])
            front.append(behind_front(line, (run["weighted"][-1], run["unweighted"][-1])) if len(ends) > 1 else np.nan)
        delta = np.array(delta)
        points[mixture] = delta
        print(f"| {label} | {', '.join(map(str, better))} | " + " | ".join(spread(column) for column in delta.T) +
              f" | {'' if mixture in FRONT else spread(front)} |")
    print("\n| paired over seeds | mean loss | token-weighted mean | in standard errors |\n|" + " --- |" * 4)
    for one, other in PAIRS:
        both = [seed for seed in seeds if (one, seed) in runs and (other, seed) in runs]
        if both:
            change = [[runs[one, seed][key][-1] - runs[other, seed][key][-1] for seed in both]
                      for key in ("unweighted", "weighted")]
            print(f"| {LABELS[one]}, minus {LABELS[other]} | {spread(change[0])} | {spread(change[1])} | "
                  f"{', '.join(f'{in_standard_errors(values):+.1f}' for values in change)} |")
    if any("unseen" in run for run in runs.values()):
        print("\n| trained on | unseen domains better than natural, by seed | mean change, bits per byte "
              "| tasks better, by seed | mean change | share of unseen domains better (standard errors from half) |\n|"
              + " --- |" * 6)
    for mixture in (name for name in LABELS if name != "natural"):
        if here := [runs[mixture, seed] for seed in seeds if "unseen" in runs.get((mixture, seed), ())]:
            cells = []
            for key in ("unseen", "tasks"):
                change = np.array([list(run[key].values()) for run in here])
                cells += [", ".join(map(str, (change < 0).sum(axis=1))) + f" of {change.shape[1]}",
                          spread(change.mean(axis=1))]
            share = np.array([(np.array(list(run["unseen"].values())) < 0).mean() for run in here])
            cells.append(f"{spread(share).lstrip('+')} ({in_standard_errors(share - 0.5):+.1f})")
            print(f"| {LABELS[mixture]} | {' | '.join(cells)} |")
    if figure:
        draw(figure, points, title)


def draw(path, points, title):
    """The plane of the two means, relative to natural: the temperatures' front, and everything else with error bars."""
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    centre = {mixture: delta.mean(axis=0) for mixture, delta in points.items()}
    front = np.array([centre[name] for name in FRONT if name in centre])
    axes.plot(front[:, 1], front[:, 0], color="grey", marker="o", label="natural, temperatures, uniform")
    for name in (name for name in FRONT if name in centre):
        axes.annotate(f" {LABELS[name]}", centre[name][::-1], va="bottom", fontsize=8, color="dimgrey")
    for marker, mixture in zip("sD^vPX<", (name for name in points if name not in FRONT)):
        delta = points[mixture]
        error = delta.std(axis=0, ddof=1) if len(delta) > 1 else np.zeros(2)
        axes.errorbar(centre[mixture][1], centre[mixture][0], error[0], error[1], marker=marker, linestyle="",
                      label=LABELS[mixture])
    axes.axhline(0, color="lightgrey", zorder=0)
    axes.axvline(0, color="lightgrey", zorder=0)
    figure.suptitle(title, fontsize=11, wrap=True)
    axes.annotate("better in both", (0.02, 0.02), (0.05, 0.06), "axes fraction", arrowprops={"arrowstyle": "->"})
    axes.set(xlabel="token-weighted mean loss (nats), change from natural", ylabel="mean loss (nats), change")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or ["help"]
    if what == "weights":
        mixture, data_dir, theory, seed, path = rest
        meta = json.loads((Path(data_dir) / "meta.json").read_text())["domains"]
        counts = np.array([domain["train_tokens"] for domain in meta.values()], dtype=float)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        weights = mixture_weights(mixture, counts, theory, int(seed), Path(data_dir).name)
        Path(path).write_text(json.dumps(dict(zip(meta, weights.tolist()))))
    elif what == "collect":
        collect(Path(rest[0]), Path(rest[1]))
    elif what == "report":
        report(*rest)
    else:
        sys.exit(__doc__)
