"""Does an answer serve another reference?  Move the answers of theory.sh's runs and compare with what was measured there.

    python -m experiments.moved     from experiments/results alone

The new references are in moved-twelve.jsonl, measured by theory.py: theory.sh with the reference "half", and theory.sh on
data sets that prepare.py made of all domains but one, with the tokenizer of the whole.
"""

import itertools
import json
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
STEPS = 6400


# ---- the arithmetic: arrays in, numbers out


def move(answer, old, onto):
    """The answer that a run on another reference would give: onto * answer / old, normalised.  All (K,)."""
    weights = onto * answer / old
    return weights / weights.sum()


def total_variation(p, q):
    """Half the sum of |p - q|: the share of the text that is exchanged.  p, q: (..., K)."""
    return np.abs(p - q).sum(axis=-1) / 2


def shuffled_distances(tilt, onto, measured, n=2000):
    """The control without information: distances of onto * tilt to what was measured, the tilts dealt out at random."""
    generator, found = np.random.default_rng(0), []
    for _ in range(n):
        weights = onto * generator.permutation(tilt)
        found.append(total_variation(weights / weights.sum(), measured))
    return np.array(found)


def compare_moved(old, new):
    """Columns of a row: distances to the mean answer on the new reference.

    old, new: {"domains", "r": (K,), "answers": (seeds, K)}.  The new reference may lack domains of the old, not have more.
    """
    keep = [list(old["domains"]).index(name) for name in new["domains"]]
    onto, measured = new["r"], new["answers"].mean(axis=0)
    r, answers = old["r"][keep], old["answers"][:, keep]
    answer = answers.mean(axis=0)
    moved = move(answer, r, onto)
    distance = total_variation(moved, measured)
    shuffled = shuffled_distances(answer / r, onto, measured)
    each = [total_variation(move(one, r, onto), measured) for one in answers]
    pairs = [total_variation(p, q) for p, q in itertools.combinations(new["answers"], 2)]
    return {"moved answer": f"{distance:.3f}", "one run's, moved": f"{min(each):.3f} to {max(each):.3f}",
            "new reference itself": f"{total_variation(onto, measured):.3f}",
            "old answer itself": f"{total_variation(answer / answer.sum(), measured):.3f}",
            "two seeds of one run": f"{np.mean(pairs):.3f}", "moved, tilt shuffled": f"{shuffled.mean():.3f}",
            "shuffles as near": f"{(shuffled <= distance).mean():.2%}"}


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
    for (name, k), new in read_answers(RESULTS / "moved-twelve.jsonl").items():
        dropped = sorted(set(first["uniform", 12]["domains"]) - set(new["domains"]))
        label = f"{name} without {dropped[0]}" if dropped else f"{name}"
        for (old, _), group in first.items():
            rows.append((f"twelve, {old} -> {label} (new)", group, new))
    for i, (label, old, new) in enumerate(rows):
        columns = compare_moved(old, new)
        if i == 0:
            print(f"| corpus, from -> onto | seeds | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 2)}")
        seeds = f"{len(old['answers'])}, {len(new['answers'])}"
        print(f"| {label} | {seeds} | {' | '.join(columns.values())} |")


if __name__ == "__main__":
    report()
