"""How the tilt moves with size: three sizes at 60 tokens per parameter; the gain from size as a predictor of the tilt.

    python -m experiments.sizes     from experiments/results alone

The runs are those of sizes.sh; theory.py measures them.
"""

from pathlib import Path

import numpy as np

from average_weights import total_variation
from experiments.published import correlation, table
from experiments.theory import explained, own_slope, predict, read, shuffled_correlation

RESULTS = Path(__file__).parent / "results"
SET_APART = "plays_ru"  # by far the largest tilt of the twelve domains


def without(values, i):
    return np.delete(values, i)


def scores(foretold, tilt, apart):
    """R2 with nothing fitted and correlation: of all domains, then without domain `apart`."""
    texts = []
    for x, y in ((foretold, tilt), (without(foretold, apart), without(tilt, apart))):
        texts.append(f"{explained(x, y):.2f}, {correlation(x, y):.2f}")
    return "; ".join(texts)


def size_row(lines, key):
    """Columns of a size, and its tilt (K,).  lines: theory.py's, natural weights with proxies, up and down.

    key: what the tilt is taken from, "last_half" (the mean over its steps) or "last_half_median".
    """
    natural = [line for line in lines if line["reference"] == "natural" and key in line]
    r, apart = natural[0]["r"], natural[0]["domains"].tolist().index(SET_APART)
    disagreement = 2 * np.mean([line["null_excess"] for line in natural], axis=0)
    last_half = np.mean([line[key] / line[key].sum() for line in natural], axis=0)  # a median does not sum to 1
    tilt = np.log(last_half / r)
    seeds = [np.log(line[key] / r) for line in natural]
    columns = {
        "proxies": f"{len(natural)}",
        "loss": f"{np.mean([line['loss_reference'] for line in natural]):.3f}",
        "D: mean": f"{disagreement.mean():.3f}",
        "D: spread": f"{disagreement.std():.3f}",
        "tilt: spread": f"{tilt.std():.3f}",
        f"without {SET_APART}": f"{without(tilt, apart).std():.3f}",
        "two seeds: correlation": f"{correlation(*seeds[:2]):.2f}" if len(seeds) > 1 else "one seed",
        "last half to r": f"{total_variation(last_half, r):.3f}",
        "D and tilt: correlation": f"{correlation(disagreement, tilt):.2f}",
        f"without {SET_APART}, too": f"{correlation(without(disagreement, apart), without(tilt, apart)):.2f}",
    }
    if "up" not in [line["reference"] for line in lines]:
        return columns, tilt
    b = own_slope(np.array([line["loss_reference"] for line in lines]), np.array([line["r"] for line in lines]))
    columns["b: median"] = f"{np.median(b):.3f}"
    for name, slopes in (("own b", b), ("common b", np.full_like(b, np.median(b)))):
        if slopes.min() <= 0:
            columns[f"formula, {name}: R2, correlation; without {SET_APART}"] = "b not above 0"
            continue
        foretold = np.log(predict(r, disagreement, slopes) / r)
        shuffled = shuffled_correlation(r[None], disagreement[None], slopes, tilt[None])
        columns[f"formula, {name}: R2, correlation; without {SET_APART}"] = scores(foretold, tilt, apart)
        columns[f"{name}, D shuffled: correlation"] = f"{shuffled.mean():.2f} ± {shuffled.std():.2f}"
    return columns, tilt


def report_sizes(key):
    groups = {}
    for line in read(RESULTS / "sizes-twelve.jsonl"):
        groups.setdefault((line["n_params"], line["steps"]), []).append(line)
    for line in read(RESULTS / "theory-twelve.jsonl"):  # the smallest size with as many steps as the larger ones
        if line["reference"] in ("natural", "up", "down") and line["steps"] >= 6400 and key == "last_half":
            groups.setdefault((41120, line["steps"]), []).append(line)
    groups = dict(sorted(groups.items()))
    columns, tilts = {}, {}
    for (size, steps), lines in groups.items():
        label = f"{size:,}, {steps:,} steps"
        columns[label], tilts[label] = size_row(lines, key)
        columns[label] = {"tokens per parameter": f"{steps * 24 * 64 / size:.0f}"} | columns[label]
    every = max(columns.values(), key=len)
    size_rows = []
    for row in every:
        size_rows.append([row, *[column.get(row, "") for column in columns.values()]])
    table(f"Sizes; tilts from {key}", ["", *columns], size_rows)
    domain_rows = []
    for i, name in enumerate(line["domains"]):
        domain_rows.append([name, *[f"{tilt[i]:+.2f}" for tilt in tilts.values()]])
    table(f"Tilts from {key}", ["domain", *tilts], domain_rows)
    rows, apart = [], line["domains"].tolist().index(SET_APART)
    for one, tilt in tilts.items():
        rows.append([one])
        for other in tilts.values():
            small = correlation(without(tilt, apart), without(other, apart))
            rows[-1].append(f"{correlation(tilt, other):.2f} ({small:.2f})")
    table(f"Correlation of tilts (without {SET_APART})", ["", *tilts], rows)


def report_bursts():
    """The largest alpha in the last half of each proxy's run, and its domain's median there."""
    rows = []
    for file in ("sizes-twelve.jsonl", "moved-twelve.jsonl"):
        for line in read(RESULTS / file):
            if "last_half_largest" in line:
                i = (line["last_half_largest"] / line["last_half_median"]).argmax()
                largest, median = line["last_half_largest"][i], line["last_half_median"][i]
                rows.append([f"{len(line['domains'])} domains, {line['n_params']:,}, {line['run']}", line["domains"][i],
                             f"{largest:.3f}", f"{median:.4f}"])
    table("Bursts of alpha in the last half", ["run", "domain of the largest", "its largest alpha", "its median"], rows)


def report_gain(corpus):
    """What correlates with the tilt of natural weights at 6,400 steps: the gain from size, the loss, or D."""
    runs = [line for line in read(RESULTS / f"theory-{corpus}.jsonl") if line["reference"] == "natural"]
    at = {steps: [line for line in runs if line["steps"] == steps] for steps in (1600, 6400)}
    loss = {steps: np.mean([line["loss_reference"] for line in lines], axis=0) for steps, lines in at.items()}
    large = [line for line in read(RESULTS / f"profit-{corpus}.jsonl") if line["mixture"] == "natural"]
    large_loss = np.mean([line["loss"] for line in large], axis=0)
    tilt = np.log(np.mean([line["last_half"] for line in at[6400]], axis=0) / at[6400][0]["r"])
    predictors = {
        "gain from size (small: 1,600 steps)": loss[1600] - large_loss,
        "gain from size (small: 6,400 steps)": loss[6400] - large_loss,
        "loss": loss[6400],
        "D": 2 * np.mean([line["null_excess"] for line in at[6400]], axis=0),
    }
    domains = runs[0]["domains"]
    largest, generator, rows = np.abs(tilt).argmax(), np.random.default_rng(0), []
    for name, values in predictors.items():
        found = correlation(values, tilt)
        small = correlation(without(values, largest), without(tilt, largest))
        shuffles = np.array([correlation(generator.permutation(values), tilt) for _ in range(2000)])
        rows.append([name, f"{found:.3f}", f"{small:.3f}", f"{(shuffles >= found).mean():.1%}"])
    table(f"{corpus}: correlation with the tilt", ["", "all domains", f"without {domains[largest]}",
          "of 2,000 shuffles as high"], rows)
    rows = []
    for i in np.argsort(tilt):
        rows.append([domains[i], f"{tilt[i]:+.2f}", *[f"{values[i]:.2f}" for values in predictors.values()]])
    table(f"{corpus}: the predictors", ["domain", "tilt", *predictors], rows)


if __name__ == "__main__":
    report_sizes("last_half")
    report_sizes("last_half_median")
    report_bursts()
    for name in ("twelve", "demo"):
        report_gain(name)
