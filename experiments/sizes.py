"""How the tilt moves with size: three sizes at 60 tokens per parameter, and the gain from size as a predictor of the tilt.

    python -m experiments.sizes     from experiments/results alone

The runs are those of sizes.sh; theory.py measures them.
"""

import json
from pathlib import Path

import numpy as np

from experiments.theory import explained, own_slope, predict, read, shuffled_correlation

RESULTS = Path(__file__).parent / "results"


def correlation(x, y):
    return np.corrcoef(x, y)[0, 1]


def without(values, i):
    return np.delete(values, i)


def size_row(lines):
    """What the runs of one size say.  lines: of theory.py's measure; natural weights with proxies, "up" and "down"."""
    natural = [line for line in lines if line["reference"] == "natural"]
    r = natural[0]["r"]
    disagreement = 2 * np.mean([line["null_excess"] for line in natural], axis=0)
    b = own_slope(np.array([line["loss_reference"] for line in lines]), np.array([line["r"] for line in lines]))
    tilt = np.log(np.mean([line["last_half"] for line in natural], axis=0) / r)
    foretold = np.log(predict(r, disagreement, b) / r)
    shuffled = shuffled_correlation(r[None], disagreement[None], b, tilt[None])
    largest = np.abs(tilt).argmax()
    small = without(foretold, largest), without(tilt, largest)
    columns = {
        "loss": f"{np.mean([line['loss_reference'] for line in natural]):.3f}",
        "D": f"{disagreement.mean():.3f}", "D, standard deviation": f"{disagreement.std():.3f}",
        "b": f"{np.median(b):.3f}",
        "tilt, standard deviation": f"{tilt.std():.3f}", "without the largest": f"{small[1].std():.3f}",
        "formula: R2, correlation, standard deviation":
            f"{explained(foretold, tilt):.2f}, {correlation(foretold, tilt):.2f}, {foretold.std():.3f}",
        "without the largest: R2, correlation": f"{explained(*small):.2f}, {correlation(*small):.2f}",
        "D shuffled: correlation": f"{shuffled.mean():.2f} ± {shuffled.std():.2f}",
        "last half to r": f"{np.abs(np.exp(tilt) * r - r).sum() / 2:.3f}",
    }
    return columns, tilt


def report_sizes():
    groups = {}
    for line in read(RESULTS / "sizes-twelve.jsonl"):
        groups.setdefault((line["n_params"], line["steps"]), []).append(line)
    for line in read(RESULTS / "theory-twelve.jsonl"):
        if line["reference"] in ("natural", "up", "down") and line["steps"] >= 6400:
            groups.setdefault((41120, line["steps"]), []).append(line)
    tilts = {}
    for (size, steps), lines in sorted(groups.items()):
        columns, tilt = size_row(lines)
        if not tilts:
            print(f"| parameters | steps | tokens per parameter | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 3)}")
        print(f"| {size:,} | {steps:,} | {steps * 24 * 64 / size:.0f} | {' | '.join(columns.values())} |")
        tilts[size, steps] = tilt
    print("\nCorrelations of the tilts:")
    keys = list(tilts)
    for i, one in enumerate(keys):
        for other in keys[i + 1 :]:
            largest = np.abs(tilts[one]).argmax()
            small = correlation(without(tilts[one], largest), without(tilts[other], largest))
            print(f"{one} and {other}: {correlation(tilts[one], tilts[other]):.2f}, without the largest {small:.2f}")
    domains = read(RESULTS / "theory-twelve.jsonl")[0]["domains"]
    print(f"\n| domain | {' | '.join(f'{size:,}, {steps:,} steps' for size, steps in tilts)} |\n|{' --- |' * (len(tilts) + 1)}")
    for i, name in enumerate(domains):
        print(f"| {name} | {' | '.join(f'{tilt[i]:+.2f}' for tilt in tilts.values())} |")


def report_gain(corpus):
    """Correlations with the tilt: of the gain from size, of the loss and of D, each at one reference on natural weights."""
    runs = [line for line in read(RESULTS / f"theory-{corpus}.jsonl") if line["reference"] == "natural" and "answer" in line]
    large = [json.loads(text) for text in (RESULTS / f"profit-{corpus}.jsonl").read_text().splitlines()]
    large_loss = np.mean([line["loss"] for line in large if line["mixture"] == "natural"], axis=0)
    at = {steps: [line for line in runs if line["steps"] == steps] for steps in (1600, 6400)}
    loss = {steps: np.mean([line["loss_reference"] for line in lines], axis=0) for steps, lines in at.items()}
    tilt = np.log(np.mean([line["last_half"] for line in at[6400]], axis=0) / at[6400][0]["r"])
    predictors = {
        "gain from size (small: 1,600 steps)": loss[1600] - large_loss,
        "gain from size (small: 6,400 steps)": loss[6400] - large_loss,
        "loss": loss[6400],
        "D": 2 * np.mean([line["null_excess"] for line in at[6400]], axis=0),
    }
    largest = np.abs(tilt).argmax()
    generator = np.random.default_rng(0)
    print(f"\n| {corpus}: correlation with the tilt | all domains | without {runs[0]['domains'][largest]} | shuffles as high |"
          "\n| --- | --- | --- | --- |")
    for name, values in predictors.items():
        found = correlation(values, tilt)
        shuffles = np.array([correlation(generator.permutation(values), tilt) for _ in range(2000)])
        small = correlation(without(values, largest), without(tilt, largest))
        print(f"| {name} | {found:.2f} | {small:.2f} | {(shuffles >= found).mean():.1%} |")
    print(f"\n| domain | tilt | {' | '.join(predictors)} |\n|{' --- |' * (len(predictors) + 2)}")
    for i in np.argsort(tilt):
        values = " | ".join(f"{column[i]:.2f}" for column in predictors.values())
        print(f"| {runs[0]['domains'][i]} | {tilt[i]:+.2f} | {values} |")


if __name__ == "__main__":
    report_sizes()
    for name in ("twelve", "demo"):
        report_gain(name)
