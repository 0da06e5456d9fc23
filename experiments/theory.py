"""What DoReMi converges to: measure the runs of theory.sh, print the tables and draw the figure of docs/theory.md.

    python experiments/theory.py weights DATA_DIR OUT_DIR            write the references' weights (theory.sh does it)
    python experiments/theory.py measure DATA_DIR OUT_DIR RESULTS    add the finished runs to RESULTS, a line for each
    python experiments/theory.py report RESULTS [FIGURE.png]         from RESULTS alone
"""

import itertools
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import ModelConfig, Transformer
from sampler import load_dataset

COLOURS = {"natural": "tab:blue", "uniform": "tab:green", "reversed": "tab:red"}


# ---- the arithmetic: arrays in, numbers out


def mixtures(counts):
    """Reference weights by name, (K,) each: by token count, uniform, the counts dealt out in reverse order of size, and
    two that give every other domain three times the share of the rest."""
    counts = np.asarray(counts, dtype=float)
    k, order = len(counts), np.argsort(counts)
    reverse = np.empty(k)
    reverse[order] = counts[order[::-1]]
    up = np.where(np.arange(k) % 2 == 0, 3.0, 1.0)
    weights = {"natural": counts, "uniform": np.ones(k), "reversed": reverse, "up": up, "down": 4 - up}
    return {name: w / w.sum() for name, w in weights.items()}


def total_variation(p, q):
    return 0.5 * np.abs(np.asarray(p) - np.asarray(q)).sum(axis=-1)


def predict(r, disagreement, slope):
    """alpha_i = r_i exp((D_i - c) / b_i), c such that alpha sums to 1.  r, D, b: (K,).  Returns (K,)."""
    low, high = -20.0, 20.0
    for _ in range(100):
        c = (low + high) / 2
        alpha = r * np.exp(np.clip((disagreement - c) / slope, -50, 50))
        low, high = (c, high) if alpha.sum() > 1 else (low, c)
    return alpha


def own_slope(losses, weights):
    """b_i = -dL_i / dlog(weight_i): least squares for each domain.  losses, weights: (N, K).  Returns (K,)."""
    x = np.log(weights) - np.log(weights).mean(axis=0)
    return -(x * losses).sum(axis=0) / (x * x).sum(axis=0)


def line_through_domains(x, y):
    """Slope and R2 of y on x, both (N, K), after each domain's mean is taken off."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    slope = (x * y).sum() / (x * x).sum()
    return slope, 1 - ((y - slope * x) ** 2).sum() / (y * y).sum()


# ---- measuring


@torch.no_grad()
def token_losses(run, dataset, windows=128):
    """Of a finished run's model on the same held-out windows for every run: (K, windows * T), nats, NaN-padded."""
    config = json.loads((run / "config.json").read_text())
    model = Transformer(ModelConfig(**config["model"]), torch.float32)
    model.load_state_dict(torch.load(run / "ckpt.pt", weights_only=True)["model"])
    losses = np.full((len(dataset.val), windows * dataset.block_size), np.nan)
    for row, val in zip(losses, dataset.val):
        chosen = val[np.unique(np.linspace(0, len(val) - 1, windows).astype(int))]
        values = model(torch.from_numpy(chosen.astype(np.int64))).flatten().numpy()
        row[: len(values)] = values
    return losses


def clipped_excess(a, b):
    """E max(a - b, 0) of each domain: (K,) from token losses (K, N)."""
    return np.nanmean(np.maximum(a - b, 0), axis=1)


def measure(data_dir, out_dir, results):
    done = {line["run"] for line in read(results)} if results.exists() else set()
    dataset = load_dataset(data_dir, 64)
    for run in sorted(out_dir.glob("*-*-*")):
        steps, weights, seed = run.name.split("-")
        proxy = run / "proxy"
        finished = (proxy / f"doremi_domain_weights_{steps}.pt").exists() or weights in ("up", "down")
        twins = [out_dir / f"{steps}-{weights}-{s}" for s in (10, 20, 30) if str(s) != seed]
        twins = [twin / "reference" for twin in twins if (twin / "reference/ckpt.pt").exists()]
        if run.name in done or not finished or not (run / "reference/ckpt.pt").exists():
            continue
        config = json.loads((run / "reference/config.json").read_text())
        reference = token_losses(run / "reference", dataset)
        line = {"run": run.name, "steps": int(steps), "reference": weights, "seed": int(seed),
                "domains": config["domains"], "r": list(config["sampling_weights"].values()),
                "loss_reference": np.nanmean(reference, axis=1)}
        if (proxy / "config.json").exists():
            if not twins:
                continue  # the null excess needs a second seed
            twin, own = token_losses(twins[0], dataset), token_losses(proxy, dataset)
            line["null_excess"] = (clipped_excess(twin, reference) + clipped_excess(reference, twin)) / 2
            line["loss_proxy"], line["token_excess"] = np.nanmean(own, axis=1), clipped_excess(own, reference)
            history = torch.load(proxy / f"doremi_domain_weights_{steps}.pt", weights_only=True)
            alpha = torch.stack([entry["domain_weights"] for entry in history]).numpy()
            line["answer"], line["last_half"] = alpha.mean(axis=0), alpha[len(alpha) // 2 :].mean(axis=0)
            line["largest_alpha"] = [part.max(axis=1).mean() for part in np.array_split(alpha, 10)]
            logged = [json.loads(text) for text in (proxy / "metrics.jsonl").read_text().splitlines()]
            late = [e["excess"] for e in logged if "excess" in e and e["step"] > len(alpha) // 2]
            line["late_excess"] = [np.mean([e[name] for e in late]) for name in config["domains"]]
        with open(results, "a") as file:
            rounded = {k: np.round(v, 5).tolist() if k not in ("run", "domains", "reference") else v
                       for k, v in line.items()}
            file.write(json.dumps(rounded) + "\n")
        print(run.name, flush=True)


def read(results):
    lines = [json.loads(text) for text in Path(results).read_text().splitlines()]
    return [{k: np.array(v) if isinstance(v, list) else v for k, v in line.items()} for line in lines]


# ---- reporting


def report(results, figure=None):
    lines = read(results)
    proxies = [line for line in lines if "answer" in line]
    lengths = sorted({line["steps"] for line in proxies})
    names = [name for name in COLOURS if any(line["reference"] == name for line in proxies)]

    def of(steps, name, key, among=proxies):
        return np.array([line[key] for line in among if line["steps"] == steps and line["reference"] == name])

    print("| steps | reference | seeds | answer to r | last half to r | last half to uniform | answer to last half "
          "| between seeds | effective domains | excess, spread over domains | excess / null |\n|" + " --- |" * 11)
    for steps, name in itertools.product(lengths, names):
        if not len(answer := of(steps, name, "answer")):
            continue
        r, last, late = (of(steps, name, key) for key in ("r", "last_half", "late_excess"))
        pairs = [total_variation(p, q) for p, q in itertools.combinations(answer, 2)]
        rests = np.where(last > 0.01, late, np.nan)
        spread = np.nanstd(rests, axis=1) / np.nanmean(rests, axis=1)
        null = of(steps, name, "token_excess").mean() / of(steps, name, "null_excess").mean()
        row = [total_variation(answer, r), total_variation(last, r), total_variation(last, 1 / r.shape[1]),
               total_variation(answer, last), np.array(pairs or [np.nan])]
        print(f"| {steps:,} | {name} | {len(answer)} | " + " | ".join(f"{x.mean():.3f}" for x in row) +
              f" | {np.exp(-(last * np.log(last)).sum(1)).mean():.1f} | {spread.mean():.0%} | {null:.2f} |")

    points, log_r, log_alpha = {}, {}, {}
    print("\n| steps | slope of log alpha on log r | R2 | tilt: correlation between references | between seeds "
          "| domain's loss on its log share, R2 | predicted tilt: R2 | correlation | TV of the prediction | TV of r |\n"
          + "|" + " --- |" * 10)
    for steps in lengths:
        if any(not len(of(steps, name, "r")) for name in names) or len(names) < 2:
            continue
        r = np.array([of(steps, name, "r")[0] for name in names])
        last = [of(steps, name, "last_half") for name in names]
        alpha = np.array([x.mean(axis=0) for x in last])
        log_r[steps], log_alpha[steps] = np.log(r), np.log(alpha)
        slope, r2 = line_through_domains(np.log(r), np.log(alpha))
        tilt = np.log(alpha / r)
        between = [np.corrcoef(tilt[i], tilt[j])[0, 1] for i, j in itertools.combinations(range(len(names)), 2)]
        seeds = [np.corrcoef(np.log(x[i] / w), np.log(x[j] / w))[0, 1] for x, w in zip(last, r)
                 for i, j in itertools.combinations(range(len(x)), 2)]
        own = [line for line in lines if line["steps"] == steps]
        losses, weights = np.array([x["loss_reference"] for x in own]), np.array([x["r"] for x in own])
        b = own_slope(losses, weights)
        share_r2 = line_through_domains(np.log(weights) * b, losses)[1]
        disagreement = np.array([2 * of(steps, name, "null_excess").mean(axis=0) for name in names])
        foretold = np.array([predict(w, d, b) for w, d in zip(r, disagreement)])
        y, x = tilt, np.log(foretold / r)
        fit = 1 - ((y - x) ** 2).sum() / ((y - y.mean()) ** 2).sum()
        points[steps] = x, y
        print(f"| {steps:,} | {slope:.2f} | {r2:.2f} | {', '.join(f'{c:.2f}' for c in between)} | "
              f"{np.mean(seeds or [np.nan]):.2f} | {share_r2:.2f} | {fit:.2f} | "
              f"{np.corrcoef(x.ravel(), y.ravel())[0, 1]:.2f} | "
              f"{total_variation(foretold, alpha).mean():.3f} | {total_variation(r, alpha).mean():.3f} |")
    if figure:
        draw(figure, lengths, names, of, log_r, log_alpha, points)


def draw(path, lengths, names, of, log_r, log_alpha, points):
    """Three panels: distance from r over the length; log alpha against log r; the tilt against its prediction."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for name in names:
        here = [steps for steps in lengths if len(of(steps, name, "answer"))]
        for key, style in (("answer", "-"), ("last_half", "--")):
            distance = [total_variation(of(steps, name, key), of(steps, name, "r")) for steps in here]
            mean = np.array([d.mean() for d in distance])
            left.plot(here, mean, style, color=COLOURS[name], marker="o", markersize=3,
                      label=f"{name}, {key.replace('_', ' ')}")
            left.fill_between(here, [d.min() for d in distance], [d.max() for d in distance], color=COLOURS[name],
                              alpha=0.2, linewidth=0)
    left.set(xscale="log", xlabel="steps", ylabel="total variation from the reference's weights", ylim=(0, None),
             title="The answer approaches its reference's weights")
    left.legend(fontsize=7)
    steps = max(log_r)
    for i, name in enumerate(names):
        middle.scatter(log_r[steps][i], log_alpha[steps][i], s=14, color=COLOURS[name], label=f"reference: {name}")
    ends = [log_r[steps].min(), log_r[steps].max()]
    middle.plot(ends, ends, color="grey", linewidth=0.8)
    middle.set(xlabel="log weight in the reference's mixture", ylabel="log alpha, mean of the last half",
               title=f"Each domain gets its reference's weight ({steps:,} steps)")
    middle.legend(fontsize=7)
    x, y = points[steps]
    for i, name in enumerate(names):
        right.scatter(x[i], y[i], s=14, color=COLOURS[name])
    right.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    right.set(xlabel="predicted from references alone: (D - c) / b", ylabel="measured tilt: log(alpha / r)",
              title="The departure from it, predicted and measured")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, *paths = sys.argv[1:]
    if what == "weights":
        meta = json.loads((Path(paths[0]) / "meta.json").read_text())
        directory = Path(paths[1]) / "weights"
        directory.mkdir(parents=True, exist_ok=True)
        for name, weights in mixtures([d["train_tokens"] for d in meta["domains"].values()]).items():
            (directory / f"{name}.json").write_text(json.dumps(dict(zip(meta["domains"], weights.tolist()))))
    elif what == "measure":
        measure(paths[0], Path(paths[1]), Path(paths[2]))
    elif what == "report":
        report(*paths)
    else:
        sys.exit(__doc__)
