"""What the DoReMi answers that others published say together: print the tables of docs/published.md, draw its figure.

    python -m experiments.published [FIGURE.png]      from experiments/results/published.json, in seconds

A run's tilt is log(answer / its reference's weights). The first five runs of the file are compared with each other; the
other three are measured against them. Dimensions: N runs, K domains.
"""

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from average_weights import total_variation
from common import cli, figures
from common.files import write_atomically

DATA = Path(__file__).parent / "results" / "published.json"
COMPARED = 5
SHUFFLES = 2000


# ---- the arithmetic: arrays in, numbers out


@dataclass
class Run:
    name: str
    by: str  # the same people: the same word
    steps: str
    tokenizer: str
    reference: str  # what the reference was trained on
    certain: bool  # whether the source says so itself
    source: str
    r: np.ndarray  # (K,) the reference's weights
    answer: np.ndarray  # (K,)

    def __post_init__(self):
        self.r, self.answer = normalised(self.r), normalised(self.answer)
        self.tilt = np.log(self.answer / self.r)

    def distance(self, tilt):
        """Total variation of the answer to the one that this tilt foretells; tilt 0: to the reference itself."""
        return total_variation(moved(self.r, tilt), self.answer)

    def on(self, keep):
        """The same run on some of its domains.  keep: (K,) bool."""
        return replace(self, r=self.r[keep], answer=self.answer[keep])


def load():
    data = json.loads(DATA.read_text())
    return data, [Run(**line) for line in data["runs"]]


def normalised(weights):
    return np.array(weights, dtype=float) / np.sum(weights)


def moved(r, tilt):
    """The answer on reference weights r, if the tilt is the same there: proportional to r * exp(tilt).  (K,) each."""
    return normalised(r * np.exp(tilt))


def correlation(x, y):
    return np.corrcoef(x, y)[0, 1]


def others_tilt(run, runs, strangers=False):
    """Mean tilt of the runs but this one; strangers: of other people's runs only.  (K,)"""
    return np.mean([x.tilt for x in runs if x is not run and not (strangers and x.by == run.by)], axis=0)


def shuffled(values):
    """The values dealt out to the domains at random.  (SHUFFLES, K)"""
    generator = np.random.default_rng(0)
    return np.array([generator.permutation(values) for _ in range(SHUFFLES)])


def without(x, y):
    """What is left of y when its best line on x is taken off.  (K,) each."""
    x, y = x - x.mean(), y - y.mean()
    return y - x * (x @ y) / (x @ x)


def features(losses):
    """What the tilt could follow: the loss of eight models, and by how much larger ones are better.  {name: (K,)}"""
    bits = {name: np.array(values) for name, values in losses["bits_per_byte"].items()}
    found = {f"loss of {name}": values for name, values in bits.items()}
    for small, large in (("GPT-2 small", "GPT-2 xl"), ("GPT-3 ada", "GPT-3 babbage"), ("GPT-3 ada", "GPT-3 curie"),
                         ("GPT-3 ada", "GPT-3 davinci")):
        found[f"gain from {small} to {large[6:]}"] = bits[small] - bits[large]
    per_token = {f"{name}, per token": v / losses["tokens_per_byte"] for name, v in found.items()}
    return per_token | {f"{name}, per byte": v for name, v in found.items()}


# ---- the tables


def table(title, columns, rows):
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print("| " + " | ".join(cell if isinstance(cell, str) else f"{cell:.3f}" for cell in row) + " |")


def several(values, digits=2):
    return ", ".join(f"{value:.{digits}f}" for value in values)


def print_runs(runs):
    five, rows = runs[:COMPARED], []
    for run in runs:
        tilt, all_others = others_tilt(run, five), others_tilt(run, runs)
        foretold, orders = run.distance(tilt), shuffled(tilt)
        chance = np.array([run.distance(order) for order in orders])
        rows.append([run.name, run.distance(0), foretold, run.distance(others_tilt(run, five, strangers=True)),
                     total_variation(np.mean([x.answer for x in five if x is not run], axis=0), run.answer),
                     f"{chance.mean():.3f} ± {chance.std():.3f}", f"{(chance <= foretold).sum()}",
                     f"{correlation(tilt, run.tilt):.2f}", f"{max(correlation(x, run.tilt) for x in orders):.2f}",
                     run.distance(all_others), f"{correlation(all_others, run.tilt):.2f}", f"{run.tilt.std():.2f}"])
    table("Total variation of a run's answer to what could foretell it", [
        "run", "its reference r", "r x mean tilt of the others", "of other people only", "mean answer of the others",
        "r x shuffled tilt", f"of {SHUFFLES:,} as near", "own and the others' tilt, corr", "largest of a shuffle",
        "r x mean tilt of all seven others", "own and all others' tilt, corr", "sd of own tilt"], rows)
    matrix = np.corrcoef([run.tilt for run in runs])
    table("Correlation of two runs' tilts", ["", *(run.name for run in runs)],
          [[run.name, *(f"{value:.2f}" for value in row)] for run, row in zip(runs, matrix)])


def print_leave_one_out(domains, runs):
    five, rows = runs[:COMPARED], []
    for who, chosen in (("five runs", five), ("the three of certain reference", [x for x in five if x.certain])):
        for dropped in ([], ["DM Mathematics"], ["DM Mathematics", "OpenSubtitles"]):
            some = [run.on(~np.isin(domains, dropped)) for run in chosen]
            pairs = [correlation(x.tilt, y.tilt) for x, y in itertools.combinations(some, 2)]
            tilts = [(run, others_tilt(run, some)) for run in some]
            rows.append([who + "".join(f", no {name}" for name in dropped), f"{min(pairs):.2f} to {max(pairs):.2f}",
                         several(correlation(tilt, run.tilt) for run, tilt in tilts),
                         several((run.distance(tilt) for run, tilt in tilts), 3),
                         several((run.distance(0) for run in some), 3)])
    table("Leave one out, by domains and runs",
          ["", "two tilts, corr", "own and the others', corr", "r x mean tilt of the others", "r"], rows)
    size = np.log(runs[0].r)
    left = np.corrcoef([without(size, run.tilt) for run in five])[np.triu_indices(COMPARED, 1)]
    print(f"\nTilt and minus log of The Pile's share correlate by {several(-correlation(size, x.tilt) for x in five)}\n"
          f"With a line on that log share taken off, two tilts correlate by {left.min():.2f} to {left.max():.2f}")
    for name, r, label in (("nanotron 280M", np.ones(len(domains)), "uniform"), ("branch 280M", runs[0].r, "natural")):
        run = next(x for x in five if x.name == name)
        tilt, r = others_tilt(run, five), normalised(r)
        print(f"Were the reference of {name} {label}: correlation {correlation(tilt, np.log(run.answer / r)):.2f}, "
              f"distance {total_variation(moved(r, tilt), run.answer):.3f}")


def distances(old, new):
    """From new's answer to old's answer moved onto new's reference, to that reference, and to old's answer."""
    return [total_variation(guess, new.answer) for guess in (moved(new.r, old.tilt), new.r, old.answer)]


def print_moved(runs):
    uniform = next(run for run in runs if run.reference == "uniform")
    table("The answer from a uniform reference, moved onto the others' references: total variation to their answers",
          ["onto the reference of", "moved answer", "new reference itself", "old answer itself"],
          [[run.name, *distances(uniform, run)] for run in runs if run is not uniform])
    found = np.array([distances(old, new) for old, new in itertools.permutations(runs[:COMPARED], 2)])
    print(f"\nAny of the five onto any other: nearest in {(found.argmin(axis=1) == 0).sum()} of {len(found)}, "
          f"mean distances {several(found.mean(axis=0), 3)}")


def print_rounds(corpora):
    rows = []
    for corpus in corpora:
        weights = [normalised(row) for row in corpus["weights"]]
        rounds = list(itertools.pairwise(weights))
        row = [corpus["name"], several((total_variation(old, new) for old, new in rounds), 3)]
        for one, two in itertools.pairwise(np.log(new / old) for old, new in rounds):
            if not two.any():
                row.append("no change")
                continue
            orders = [abs(correlation(one, order)) for order in itertools.permutations(two)]
            found = correlation(one, two)
            row.append(f"{found:.2f} ({np.mean(np.array(orders) > abs(found) - 1e-9):.1%})")
        rows.append(row)
    table("Rounds (in brackets: share of all orders of the domains with as large a correlation)", [
        "", "moves of rounds 1, 2, 3", "log changes of rounds 1 and 2, corr", "of rounds 2 and 3"], rows)


def print_features(data, domains, five):
    regmix = {f"loss of RegMix's {size} models, per token": np.array(values, dtype=float)
              for size, values in data["regmix"]["nats_per_token"].items()}
    mean, found = np.mean([run.tilt for run in five], axis=0), features(data["losses"])
    thirteen = ~np.isnan(regmix["loss of RegMix's 1M models, per token"])
    every, no_maths = np.full(len(domains), True), domains != "DM Mathematics"
    neither, rows = no_maths & (domains != "OpenSubtitles"), []
    for name, values in (found | regmix).items():
        known = ~np.isnan(values)
        row = [name, several(correlation(values[known], run.tilt[known]) for run in five)]
        for of in (every, no_maths, neither, thirteen, ~thirteen):
            row.append(f"{correlation(values[of], mean[of]):.2f}" if known[of].all() else "")
        rows.append(row)
    table("What the tilt follows, looked for afterwards: correlations", [
        "feature", "with the five tilts", "with their mean", "no DM Mathematics", "nor OpenSubtitles",
        "RegMix's 13 domains", "the other nine"], rows)
    for of, label in ((every, "all domains"), (neither, "no DM Mathematics, no OpenSubtitles")):
        all_values = [values[of] for values in found.values()]
        best = [np.abs(np.corrcoef(order, all_values)[0, 1:]).max() for order in shuffled(mean[of])]
        print(f"\nBest of {len(found)} features on a shuffled mean tilt, {label}: {np.mean(best):.2f}, 95% of shuffles "
              f"below {np.quantile(best, 0.95):.2f}")


# ---- the figure


def draw(domains, runs):
    """Left: the tilt of each domain in the five runs and in the paper's 280M run. Right: against the one foretold."""
    figure = figures.new(11, 6.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    five, outlier = runs[:COMPARED], next(run for run in runs if run.name == "paper 280M")
    order, rows = np.argsort(np.mean([run.tilt for run in five], axis=0)), np.arange(len(domains))
    tilts = np.array([run.tilt for run in five])
    left.hlines(rows, tilts.min(axis=0)[order], tilts.max(axis=0)[order], color="0.85", linewidth=5, zorder=1)
    for run, marker, grey in zip([*five, outlier], "os^Dvx", ("0", "0.3", "0.5", "0.7", "1", "0")):
        look = {"marker": marker, "linestyle": "", "color": grey, "markeredgecolor": "0", "markeredgewidth": 0.7}
        left.plot(run.tilt[order], rows, **look, label=f"{run.name} (reference: {run.reference})")
        right.plot(np.log(moved(run.r, others_tilt(run, five)) / run.r), run.tilt, **look)
    left.axvline(0, color="0.4", linewidth=0.8)
    left.set_yticks(rows, domains[order])
    left.set(xlabel="tilt: log(answer / reference's weight)", ylim=(-0.7, len(domains) - 0.3))
    right.axline((0, 0), slope=1, color="0.4", linewidth=0.8)
    right.set(xlabel="tilt that the other runs foretell", ylabel="tilt")
    figure.suptitle("The same domains gain and lose in five DoReMi runs on The Pile; the paper's 280M run (x) departs",
                    weight="bold", fontsize=12)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def main():
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("figure", nargs="?", type=cli.path, metavar="FIGURE.png", help="draw it (default: tables only)")
    figure = parser.parse_args().figure
    data, runs = load()
    domains = np.array(data["domains"])
    print_runs(runs)
    print_leave_one_out(domains, runs)
    print_moved(runs)
    print_rounds(data["rounds"])
    print_features(data, domains, runs[:COMPARED])
    if figure:
        with figures.style():
            write_atomically(Path(figure), lambda file: draw(domains, runs).savefig(file, format="png", dpi=110))


if __name__ == "__main__":
    cli.run(main)
