"""What DoReMi converges to: measure the runs of theory.sh, print the tables and draw the figure of docs/theory.md.

    python -m experiments.theory weights DATA_DIR OUT_DIR            write the references' weights (theory.sh does it)
    python -m experiments.theory measure DATA_DIR OUT_DIR RESULTS    add the finished runs to RESULTS, a line for each
    python -m experiments.theory report RESULTS [FIGURE.png]         from RESULTS alone
"""

import itertools
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import FixedLocator

from average_weights import total_variation
from model import ModelConfig, Transformer
from sampler import load_dataset

LOOKS = {"natural": ("tab:blue", "o"), "uniform": ("tab:green", "s"), "reversed": ("tab:red", "^")}  # colour, marker


# ---- the arithmetic: arrays in, numbers out


def mixtures(counts):
    """Reference weights by name, (K,) each: by token count, uniform, half of both, temperatures 1.5 and 0.7, the
    counts dealt out in reverse order of size, and two with three times the rest's share for every other domain."""
    counts = np.asarray(counts, dtype=float)
    k, order = len(counts), np.argsort(counts)
    reverse = np.empty(k)
    reverse[order] = counts[order[::-1]]
    up = np.where(np.arange(k) % 2 == 0, 3.0, 1.0)
    weights = {"natural": counts, "uniform": np.ones(k), "reversed": reverse, "up": up, "down": 4 - up,
               "sharp": counts**1.5, "mild": counts**0.7}
    weights = {name: w / w.sum() for name, w in weights.items()}
    return weights | {"half": (weights["uniform"] + weights["natural"]) / 2}


def clipped_excess(a, b):
    """E max(a - b, 0) of each domain: (K,) from token losses (K, N)."""
    return np.nanmean(np.maximum(a - b, 0), axis=1)


def own_slope(losses, weights):
    """b_i = -dL_i / dlog(weight_i): least squares for each domain.  losses, weights: (N, K).  Returns (K,)."""
    x = np.log(weights) - np.log(weights).mean(axis=0)
    return -(x * losses).sum(axis=0) / (x * x).sum(axis=0)


def predict(r, disagreement, slope):
    """alpha_i = r_i exp((D_i - c) / b_i), c such that alpha sums to 1.  r, D, b: (K,), b > 0.  Returns (K,)."""
    low, high = disagreement.min() - 1, disagreement.max() + 1
    for _ in range(100):
        c = (low + high) / 2
        alpha = r * np.exp((disagreement - c) / slope)
        low, high = (c, high) if alpha.sum() > 1 else (low, c)
    return alpha


def shuffled_correlation(r, disagreement, slope, tilt, n=200):
    """The formula without information: its correlation with the tilt in each of n shuffles of D's domains.  (n,)."""
    generator, found = np.random.default_rng(0), []
    for order in (generator.permutation(r.shape[1]) for _ in range(n)):
        alpha = np.array([predict(w, d[order], slope) for w, d in zip(r, disagreement)])
        found.append(np.corrcoef(np.log(alpha / r).ravel(), tilt.ravel())[0, 1])
    return np.array(found)


def line_through_domains(x, y):
    """Slope and R2 of y on x, both (N, K), after each domain's mean is taken off."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    slope = (x * y).sum() / (x * x).sum()
    return slope, 1 - ((y - slope * x) ** 2).sum() / (y * y).sum()


def explained(prediction, measured):
    """R2 of a prediction with nothing fitted, against the mean of what was measured."""
    return 1 - ((measured - prediction) ** 2).sum() / ((measured - measured.mean()) ** 2).sum()


# ---- measuring


@torch.no_grad()
def token_losses(run, dataset, windows=128):
    """Of a finished run's model, on the same held-out windows for every run: (K, windows * T), nats, NaN-padded."""
    config = json.loads((run / "config.json").read_text())
    model = Transformer(ModelConfig(**config["model"]), torch.float32)
    model.load_state_dict(torch.load(run / "ckpt.pt", weights_only=True)["model"])
    losses = np.full((len(dataset.val), windows * dataset.block_size), np.nan)
    for row, val in zip(losses, dataset.val):
        chosen = val[np.unique(np.linspace(0, len(val) - 1, windows).astype(int))]
        values = model(torch.from_numpy(chosen.astype(np.int64))).flatten().numpy()
        row[: len(values)] = values
    return losses


def measure(data_dir, out_dir, results):
    done = {line["run"] for line in read(results)} if results.exists() else set()
    dataset = load_dataset(data_dir, 64)
    for run in sorted(out_dir.glob("*-*-*")):
        (steps, weights, seed), proxy = run.name.split("-"), run / "proxy"
        history = proxy / f"doremi_domain_weights_{steps}.pt"
        twins = [twin for twin in out_dir.glob(f"{steps}-{weights}-*/reference/ckpt.pt") if run not in twin.parents]
        finished = weights in ("up", "down") or (history.exists() and twins)  # the null excess needs a second seed
        if run.name in done or not finished or not (run / "reference/ckpt.pt").exists():
            continue
        config = json.loads((run / "reference/config.json").read_text())
        reference = token_losses(run / "reference", dataset)
        line = {"run": run.name, "steps": int(steps), "reference": weights, "seed": int(seed),
                "n_params": config["n_params"], "r": list(config["sampling_weights"].values()),
                "loss_reference": np.nanmean(reference, axis=1)}
        if history.exists():
            twin, own = token_losses(sorted(twins)[0].parent, dataset), token_losses(proxy, dataset)
            line["null_excess"] = (clipped_excess(twin, reference) + clipped_excess(reference, twin)) / 2
            line["loss_proxy"], line["token_excess"] = np.nanmean(own, axis=1), clipped_excess(own, reference)
            alpha = torch.stack([entry["domain_weights"] for entry in torch.load(history, weights_only=True)]).numpy()
            late_alpha = alpha[len(alpha) // 2 :]
            line["answer"], line["last_half"] = alpha.mean(axis=0), late_alpha.mean(axis=0)
            line["last_half_median"], line["last_half_largest"] = np.median(late_alpha, axis=0), late_alpha.max(axis=0)
            logged = [json.loads(text) for text in (proxy / "metrics.jsonl").read_text().splitlines()]
            late = [entry["excess"] for entry in logged if "excess" in entry and entry["step"] > len(alpha) // 2]
            line["late_excess"] = np.mean([list(excess.values()) for excess in late], axis=0)
        line = {k: v if isinstance(v, str | int) else np.round(v, 5).tolist() for k, v in line.items()}
        with open(results, "a") as file:
            file.write(json.dumps(line | {"domains": config["domains"]}) + "\n")


def read(results):
    lines = [json.loads(text) for text in Path(results).read_text().splitlines()]
    return [{k: np.array(v) if isinstance(v, list) else v for k, v in line.items()} for line in lines]


# ---- reporting


def header(*columns):
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")


def report(results, figure=None):
    lines = read(results)
    lengths = sorted({line["steps"] for line in lines})
    runs = {(steps, name): [line for line in lines if (line["steps"], line["reference"]) == (steps, name)
                            and "answer" in line] for steps in lengths for name in LOOKS}
    runs = {key: found for key, found in runs.items() if found}

    header("steps", "reference", "seeds", "answer to r", "last half to r", "last half to uniform",
           "answer to last half", "between seeds", "excess: spread over domains", "excess / null")
    for (steps, name), found in runs.items():
        answer, last, r, late = (np.array([x[k] for x in found]) for k in ("answer", "last_half", "r", "late_excess"))
        pairs = [total_variation(p, q) for p, q in itertools.combinations(answer, 2)] or [np.nan]
        resting = np.where(last > 0.01, late, np.nan)  # at the floor of the smoothing, an excess need not be equal
        null = np.mean([x["token_excess"] for x in found]) / np.mean([x["null_excess"] for x in found])
        distances = (total_variation(answer, r), total_variation(last, r), total_variation(last, 1 / r.shape[1]),
                     total_variation(answer, last), np.array(pairs))
        print(f"| {steps:,} | {name} | {len(found)} | " + " | ".join(f"{x.mean():.3f}" for x in distances) +
              f" | {(np.nanstd(resting, axis=1) / np.nanmean(resting, axis=1)).mean():.0%} | {null:.2f} |")

    header("steps", "slope of log alpha on log r, R2", "tilts of two references, corr", "of two seeds, corr",
           "loss on own log share, R2", "predicted tilt, own b: R2, corr", "common b: R2, corr",
           "own b, without the largest tilt", "common b, without it", "D shuffled, own b, common b: corr",
           "own b, common b, r to alpha: TV")
    clouds = {}
    for steps in lengths:
        found = [runs[steps, name] for name in LOOKS if (steps, name) in runs]
        if len(found) < 2:
            continue
        r, disagreement = (np.array([np.mean([x[key] for x in group], axis=0) for group in found])
                           for key in ("r", "null_excess"))
        seeds = [np.array([x["last_half"] for x in group]) for group in found]
        alpha = np.array([x.mean(axis=0) for x in seeds])
        tilt = np.log(alpha / r)
        slope, r2 = line_through_domains(np.log(r), np.log(alpha))
        between = [np.corrcoef(p, q)[0, 1] for p, q in itertools.combinations(tilt, 2)]
        repeat = [np.corrcoef(np.log(p / w), np.log(q / w))[0, 1] for group, w in zip(seeds, r)
                  for p, q in itertools.combinations(group, 2)]
        losses, weights = (np.array([x[k] for x in lines if x["steps"] == steps]) for k in ("loss_reference", "r"))
        b = own_slope(losses, weights)
        row = [f"{steps:,}", f"{slope:.2f}, {r2:.2f}", ", ".join(f"{x:.2f}" for x in between), f"{np.mean(repeat):.2f}",
               f"{line_through_domains(np.log(weights) * b, losses)[1]:.2f}"]
        small, scores, distances, control = np.abs(tilt).mean(axis=0) < np.abs(tilt).mean(axis=0).max(), [], [], []
        for slopes in (b, np.full_like(b, np.median(b))):
            if slopes.min() <= 0:
                scores.append(["b not above 0"] * 2)
                continue
            foretold = np.array([predict(w, 2 * excess, slopes) for w, excess in zip(r, disagreement)])
            shuffled = shuffled_correlation(r, 2 * disagreement, slopes, tilt)
            control.append(f"{shuffled.mean():.2f} ± {shuffled.std():.2f}")
            clouds.setdefault(steps, (r, alpha, foretold))
            distances.append(total_variation(foretold, alpha).mean())
            both = [(np.log(foretold / r)[:, of].ravel(), tilt[:, of].ravel()) for of in (small | True, small)]
            scores.append([f"{explained(x, y):.2f}, {np.corrcoef(x, y)[0, 1]:.2f}" for x, y in both])
        distances.append(total_variation(r, alpha).mean())
        print("| " + " | ".join([*row, scores[0][0], scores[1][0], scores[0][1], scores[1][1], ", ".join(control),
                                 ", ".join(f"{x:.3f}" for x in distances)]) + " |")
    if figure:
        draw(figure, runs, clouds)


def draw(path, runs, clouds):
    """Three panels: distance from r over the length, alpha against r, the tilt against its prediction."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for name, (colour, marker) in LOOKS.items():
        for key, style in (("answer", "-"), ("last_half", "--")):
            distance = {steps: [total_variation(x[key], x["r"]) for x in found]
                        for (steps, of), found in runs.items() if of == name}
            left.plot(distance.keys(), [np.mean(d) for d in distance.values()], style, color=colour, marker=marker,
                      markersize=4, label=f"{name}, {key.replace('_', ' ')}")
            left.fill_between(distance.keys(), *zip(*[(min(d), max(d)) for d in distance.values()]), color=colour,
                              alpha=0.2, linewidth=0)
    left.set(xscale="log", xlabel="steps", ylabel="total variation to the reference's weights r", ylim=(0, None),
             title="The answer approaches its reference's weights")
    lengths = sorted({steps for steps, _ in runs})
    left.set_xticks(lengths, [f"{steps:,}" for steps in lengths])
    left.minorticks_off()
    left.legend(fontsize=7)
    shown = max(clouds)
    r, alpha, foretold = clouds[shown]
    for i, name in enumerate(name for name in LOOKS if (shown, name) in runs):
        colour, marker = LOOKS[name]
        middle.loglog(r[i], alpha[i], marker, color=colour, markersize=4, label=f"reference: {name}")
        right.plot(np.log(foretold[i] / r[i]), np.log(alpha[i] / r[i]), marker, color=colour, markersize=4)
    middle.axline((0.05, 0.05), (0.1, 0.1), color="grey", linewidth=0.8)
    middle.set(xlabel="r", ylabel="alpha, mean of the last half", title=f"Each domain gets about r ({shown:,} steps)")
    for axis in (middle.xaxis, middle.yaxis):
        axis.set_minor_formatter("")
        axis.set_major_formatter("{x:g}")
        axis.set_major_locator(FixedLocator([0.01, 0.02, 0.05, 0.1, 0.2]))
    middle.legend(fontsize=7)
    right.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    right.set(xlabel="predicted without a proxy: (D - c) / b", ylabel="measured: log(alpha / r)",
              title="References alone predict the rest")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, *paths = sys.argv[1:] or ["help"]
    if what == "weights":
        meta = json.loads((Path(paths[0]) / "meta.json").read_text())["domains"]
        (Path(paths[1]) / "weights").mkdir(parents=True, exist_ok=True)
        for name, weights in mixtures([domain["train_tokens"] for domain in meta.values()]).items():
            (Path(paths[1]) / "weights" / f"{name}.json").write_text(json.dumps(dict(zip(meta, weights.tolist()))))
    elif what == "measure":
        measure(paths[0], Path(paths[1]), Path(paths[2]))
    elif what == "report":
        report(*paths)
    else:
        sys.exit(__doc__)
