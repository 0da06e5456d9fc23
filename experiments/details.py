"""Print b, D and the tilt of each domain, which `experiments.theory report` does not.

    python -m experiments.details                   of the two corpora in experiments/results
    python -m experiments.details RESULTS.jsonl     of your own measurements
"""

import itertools
from pathlib import Path

import numpy as np

from average_weights import total_variation
from common import cli
from common.cli import UserError
from experiments.theory import LOOKS, own_slope, predict, read

RESULTS = Path(__file__).parent / "results"


def by_seed(lines, steps, reference):
    """{seed: line} of the proxies of one length and one reference."""
    return {line["seed"]: line for line in lines
            if (line["steps"], line["reference"]) == (steps, reference) and "answer" in line}


def mean(group, key):
    return np.mean([line[key] for line in group.values()], axis=0)


def correlation(x, y):
    return np.corrcoef(x, y)[0, 1]


def print_domains(corpus, lines, steps):
    """The table of b, D and the tilt of each domain, and what follows from it."""
    groups = {name: by_seed(lines, steps, name) for name in LOOKS if by_seed(lines, steps, name)}
    references = [line for line in lines if line["steps"] == steps]
    losses, weights = (np.array([line[key] for line in references]) for key in ("loss_reference", "r"))
    b = own_slope(losses, weights)
    disagreement, tilt, foretold, lead = [], [], [], []
    for group in groups.values():
        r = mean(group, "r")
        disagreement.append(2 * mean(group, "null_excess"))
        tilt.append(np.log(mean(group, "last_half") / r))
        foretold.append(np.log(predict(r, disagreement[-1], b) / r))
        lead.append(mean(group, "loss_proxy") - mean(group, "loss_reference"))
    disagreement, tilt, foretold = np.array(disagreement), np.array(tilt), np.array(foretold)

    print(f"\n{corpus}, {steps:,} steps: tilt of the last half, mean over seeds (in brackets: predicted)\n")
    print("| domain | b | D, least to most | " + " | ".join(f"reference on {name}" for name in groups) + " |")
    print("|" + " --- |" * (3 + len(groups)))
    for i, domain in enumerate(lines[0]["domains"]):
        cells = " | ".join(f"{t:+.2f} ({p:+.2f})" for t, p in zip(tilt[:, i], foretold[:, i]))
        print(f"| {domain} | {b[i]:.2f} | {disagreement[:, i].min():.2f} to {disagreement[:, i].max():.2f} | {cells} |")
    small = np.abs(tilt).mean(axis=0) < np.abs(tilt).mean(axis=0).max()
    pairs = [correlation(p[small], q[small]) for p, q in itertools.combinations(tilt, 2)]
    print("\ntilts of two references without the largest, correlation: " + ", ".join(f"{x:.2f}" for x in pairs))
    print("Delta (proxy's loss - reference's) with D, correlation: "
          + ", ".join(f"{name} {correlation(x, d):.2f}" for name, x, d in zip(groups, lead, disagreement)))
    print(f"standard deviation of the tilt over domains: {', '.join(f'{t.std():.2f}' for t in tilt)}")
    for name, group in groups.items():
        others = {other: np.mean([total_variation(line["last_half"], mean(groups[other], "r"))
                                  for line in group.values()]) for other in groups}
        print(f"reference on {name}, last half to the weights of each reference: "
              + ", ".join(f"{other} {distance:.3f}" for other, distance in others.items()))


def main():
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("results", nargs="*", type=cli.path, metavar="RESULTS.jsonl",
                        help="what experiments.theory has measured (default: the two corpora in experiments/results)")
    paths = parser.parse_args().results
    for path in paths:
        try:
            lines = read(path)
            print_domains(path, lines, max(line["steps"] for line in lines))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: {error}; expected what experiments.theory has measured") from None
    if not paths:
        for corpus in ("twelve", "demo"):
            print_domains(corpus, read(RESULTS / f"theory-{corpus}.jsonl"), 6400)


if __name__ == "__main__":
    cli.run(main)
