"""Print the numbers of docs/theory.md that `experiments.theory report` does not, from the committed results alone.

    python -m experiments.details                   everything, of experiments/results
    python -m experiments.details RESULTS.jsonl     b, D and the tilt of each domain, of your own measurements
"""

import itertools
import json
from pathlib import Path

import numpy as np

from average_weights import total_variation
from common import cli
from common.cli import UserError
from experiments.theory import LOOKS, own_slope, predict, read

RESULTS = Path(__file__).parent / "results"
CORPORA = ("twelve", "demo")
STEPS = 6400


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


def print_longer(lines):
    for reference in LOOKS:
        short, long = by_seed(lines, STEPS, reference), by_seed(lines, 4 * STEPS, reference)
        moved = [total_variation(short[seed]["last_half"], long[seed]["last_half"]) for seed in short.keys() & long]
        print(f"reference on {reference}, last half at {4 * STEPS:,} steps to that at {STEPS:,}, by seed: "
              + ", ".join(f"{x:.3f}" for x in moved))


def print_transient(corpus, lines):
    for reference in LOOKS:
        left = {steps: np.mean([total_variation(line["answer"], line["last_half"])
                                for line in by_seed(lines, steps, reference).values()])
                for steps in (1600, 6400, 25_600) if by_seed(lines, steps, reference)}
        print(f"{corpus}, reference on {reference}, answer to last half: " + ", ".join(
            f"{left[a] / left[b]:.2f} times smaller from {a:,} to {b:,} steps" for a, b in itertools.pairwise(left)))


def print_rounds():
    rounds = {}  # (start, step size, steps): the rounds' answers and references, in order
    for line in read_lines("rounds-twelve"):
        rounds.setdefault((line["start"], line["step_size"], line["steps"]), []).append(line)
    print("\n| start | step size | steps of a round | moves, total variation | largest move of a weight "
          "| factbook_json + plays_ru at the end |\n|" + " --- |" * 6)
    changes = {}  # of the long rounds
    for (start, step_size, steps), group in rounds.items():
        answers = np.array([list(line["answer"].values()) for line in group])
        references = np.array([list(line["reference"].values()) for line in group])
        moves = ", ".join(f"{x:.3f}" for x in total_variation(answers, references))
        largest = ", ".join(f"{x:.3f}" for x in np.abs(answers - references).max(axis=1))
        easy = group[-1]["answer"]["factbook_json"] + group[-1]["answer"]["plays_ru"]
        print(f"| {start} | {step_size} | {steps:,} | {moves} | {largest} | {easy:.2f} |")
        if steps == STEPS:
            changes[start] = np.log(answers / references)
    domains, generator = list(group[0]["answer"]), np.random.default_rng(0)
    for start, change in changes.items():
        found = [correlation(p, q) for p, q in itertools.pairwise(change)]
        shuffled = np.array([correlation(change[0], generator.permutation(change[1])) for _ in range(2000)])
        print(f"\n{start}, {STEPS:,} steps: log changes of successive rounds correlate by "
              f"{', '.join(f'{x:.2f}' for x in found)}; rounds 1 and 2, shuffled 2,000 times: mean "
              f"{shuffled.mean():.2f}, standard deviation {shuffled.std():.2f}, largest {shuffled.max():.2f}")
        for domain in ("factbook_json", "lean_math", "plays_ru"):
            print(f"    {domain}: " + ", ".join(f"{x:+.2f}" for x in change[:, domains.index(domain)]))
    for step_size in (0.03, 0.12):
        ends = [np.array(list(rounds[start, step_size, 400][-1]["answer"].values())) for start in changes]
        print(f"two starts after four rounds, step size {step_size}: {total_variation(*ends):.3f} apart")


def print_domain_clip(lines):
    print("\n| reference run | domain clip: last half to r | token clip |\n| --- | --- | --- |")
    exact = {line["run"]: line for line in lines}
    for line in read_lines("domain-clip-twelve"):
        token = exact[line["reference_run"]]
        print(f"| {line['reference_run']} | {total_variation(np.array(line['last_half']), np.array(line['r'])):.3f} | "
              f"{total_variation(token['last_half'], token['r']):.3f} |")


def read_lines(name):
    return [json.loads(text) for text in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def main():
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("results", nargs="*", type=cli.path, metavar="RESULTS.jsonl",
                        help="what experiments.theory has measured (default: all that is committed)")
    paths = parser.parse_args().results
    for path in paths:
        try:
            lines = read(path)
            print_domains(path, lines, max(line["steps"] for line in lines))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: {error}; expected what experiments.theory has measured") from None
    if paths:
        return
    results = {corpus: read(RESULTS / f"theory-{corpus}.jsonl") for corpus in CORPORA}
    for corpus, lines in results.items():
        print_domains(corpus, lines, STEPS)
        print_transient(corpus, lines)
    print_domains("twelve", results["twelve"], 4 * STEPS)
    print()
    print_longer(results["twelve"])
    print_rounds()
    print_domain_clip(results["twelve"])


if __name__ == "__main__":
    cli.run(main)
