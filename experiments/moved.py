"""Does an answer serve another reference?  Move the answers of theory.sh's runs; compare with what was measured there.

    python -m experiments.moved     from experiments/results alone

The new references are in moved-twelve.jsonl, measured by theory.py: theory.sh with the reference "half", and on the
data without one domain, which prepare.py made with the tokenizer of the whole.
"""

import itertools
import json
from pathlib import Path

import numpy as np

from average_weights import total_variation
from experiments.published import table
from experiments.theory import own_slope, read
from tools.mixture import moved

RESULTS = Path(__file__).parent / "results"
STEPS = 6400


# ---- the arithmetic: arrays in, numbers out


def move(answer, old, onto, exponent=1.0):
    """What a run on another reference would give: answer * (onto / old) ^ exponent, normalised.  (K,) each."""
    part_way = old ** (1 - exponent) * onto**exponent
    return moved(answer, old, part_way / part_way.sum())


def shuffled_distances(tilt, onto, measured, n=2000):
    """The control without information: distances of onto * tilt to what was measured, the tilts dealt out at random."""
    generator, found = np.random.default_rng(0), []
    for _ in range(n):
        weights = onto * generator.permutation(tilt)
        found.append(total_variation(weights / weights.sum(), measured))
    return np.array(found)


def compare_moved(old, new):
    """Columns of a row: distances to the mean answer on the new reference, whose domains are all among the old one's.

    old, new: {"domains", "r": (K,), "answers": (seeds, K)}.
    """
    keep = [list(old["domains"]).index(name) for name in new["domains"]]
    onto, measured = new["r"], new["answers"].mean(axis=0)
    r, answers = old["r"][keep], old["answers"][:, keep]
    answer = answers.mean(axis=0)
    foretold = move(answer, r, onto)
    distance = total_variation(foretold, measured)
    shuffled = shuffled_distances(answer / r, onto, measured)
    each = [total_variation(move(one, r, onto), measured) for one in answers]
    pairs = [total_variation(p, q) for p, q in itertools.combinations(new["answers"], 2)]
    return {
        "moved answer": distance,
        "a single run's, moved: nearest": min(each),
        "furthest": max(each),
        "new reference itself": total_variation(onto, measured),
        "old answer itself": total_variation(answer / answer.sum(), measured),
        "two seeds of one run": np.mean(pairs),
        "moved, tilt shuffled": shuffled.mean(),
        "share of shuffles as near": np.mean(shuffled <= distance),
        "moved, exponent 0.9": total_variation(move(answer, r, onto, 0.9), measured),
        "spread of log(moved / measured)": np.log(foretold / measured).std(),
        "exponent 0.9": np.log(move(answer, r, onto, 0.9) / measured).std(),
    }


# ---- reading and reporting


def read_answers(path):
    """Runs of STEPS steps by (reference, number of domains), in the form of compare_moved."""
    runs = {}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        if line["steps"] == STEPS and "answer" in line:
            runs.setdefault((line["reference"], len(line["domains"])), []).append(line)
    groups = {}
    for key, lines in runs.items():
        answers = np.array([line["answer"] for line in lines])
        groups[key] = {"domains": lines[0]["domains"], "r": np.array(lines[0]["r"]), "answers": answers}
    return groups


def report():
    rows = []
    for corpus in ("twelve", "demo"):
        groups = read_answers(RESULTS / f"theory-{corpus}.jsonl")
        for (old, _), (new, _) in itertools.permutations(groups, 2):
            rows.append((f"{corpus}, {old} -> {new}", groups[old, _], groups[new, _]))
    first = read_answers(RESULTS / "theory-twelve.jsonl")
    for (name, _), new in read_answers(RESULTS / "moved-twelve.jsonl").items():
        dropped = sorted(set(first["uniform", 12]["domains"]) - set(new["domains"]))
        label = f"{name} without {dropped[0]}" if dropped else name
        for (old, _), group in first.items():
            rows.append((f"twelve, {old} -> {label} (new)", group, new))
    lines = []
    for label, old, new in rows:
        columns = compare_moved(old, new)
        lines.append([label, f"{len(old['answers'])}, {len(new['answers'])}", *columns.values()])
    table("Distances to the answer that was measured on the new reference", ["from -> onto", "seeds", *columns], lines)

    new = read_answers(RESULTS / "moved-twelve.jsonl")
    targets = {"natural": first["natural", 12], "half": new["half", 12], "sharp": new["sharp", 12]}
    report_domains(first["uniform", 12], targets)


def report_domains(old, targets):
    """Weight of each domain, moved / measured; what that does to large models' mean loss, by the domain's own slope."""
    lines = read(RESULTS / "profit-twelve.jsonl")
    b = own_slope(np.array([line["loss"] for line in lines]), np.array([line["weights"] for line in lines]))
    ratios = []
    for new in targets.values():
        ratios.append(move(old["answers"].mean(axis=0), old["r"], new["r"]) / new["answers"].mean(axis=0))
    rows = [[name, *column] for name, column in zip(old["domains"], np.transpose(ratios))]
    rows.append(["foretold change of the mean loss", *[-(b * np.log(ratio)).mean() for ratio in ratios]])
    table("Weights from a uniform reference: moved / measured", ["domain", *targets], rows)


if __name__ == "__main__":
    report()
