"""Stage 5 of DoReMi, the profit: two or more runs side by side.

reads   RUN/{config.json, ckpt.pt, metrics.jsonl} of finished runs on the same data; the first is the baseline
writes  OUT_DIR/compare.png
next    python evaluate.py RUN RUN     all held-out windows, other text, tasks

Runs that differ in the seed alone form one group, shown as mean and standard deviation; changes are paired by seed. A
group is named by its mixture (natural, uniform, temperature P) where that tells the groups apart, otherwise by its
first directory without the seed: large-doremi-s1 gives large-doremi. The speed-up is the baseline's tokens over those
that a run needs to reach the baseline's last mean loss.

Dimensions: S seeds of a group, N evaluations in training, P parts (domains or tasks), R rows: parts, then summaries.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import cli, figures
from common.cli import UserError, check_same
from common.run import identity, load_finished, read_metrics

SUMMARIES = ("mean", "token-weighted mean", "worst domain")
MEAN, WEIGHTED, WORST = -3, -2, -1  # their places among the losses
SAME = "losses compare on the same held-out tokens only"


# ---- the mathematics ----


def with_summaries(loss, share):
    """Append the mean, the mean weighted by the share of the tokens, and the largest: (..., P) -> (..., P + 3)."""
    return np.concatenate([loss, np.stack([loss.mean(axis=-1), loss @ share, loss.max(axis=-1)], axis=-1)], axis=-1)


def deviation(values):
    """Standard deviation over the seeds: (S, ...) -> (...); 0 for a single seed."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def change(after, before, paired):
    """Mean and standard deviation over the seeds of a change: (R,), (R,).  after, before: (S, R).

    paired: they have the same seeds. Otherwise the deviation is that of the difference of two independent runs.
    """
    sd = deviation(after - before) if paired else np.hypot(deviation(after), deviation(before))
    return after.mean(axis=0) - before.mean(axis=0), sd


def tokens_to_reach(tokens, loss, target):
    """Tokens at which the loss (N,) is first at or below the target, linear between evaluations; NaN if it never is."""
    below = np.flatnonzero(loss <= target)
    if not len(below):
        return np.nan
    i = below[0]
    if i == 0:
        return float(tokens[0])
    part = (loss[i - 1] - target) / (loss[i - 1] - loss[i])
    return float(tokens[i - 1] + part * (tokens[i] - tokens[i - 1]))


# ---- reading the runs ----


@dataclass
class Group:
    """Runs that differ in their seed alone."""

    name: str
    seeds: list  # S, ascending
    paths: list  # S directories
    config: dict  # of the first seed
    parameters: list  # of each seed: {name: tensor}, mapped from its checkpoint

    def tokens_per_step(self):
        return self.config["flags"]["batch_size"] * self.config["model"]["block_size"]

    def n_tokens(self):
        return self.tokens_per_step() * self.config["flags"]["max_steps"]


def read_groups(runs):
    """Read finished runs as groups of seeds, the baseline's first.  Raises UserError."""
    members = {}  # of an experiment: [(seed, path, config, parameters)]
    for path in map(Path, runs):
        config, checkpoint = load_finished(path, ("reference", "proxy", "large"))
        experiment = json.dumps(identity(config) | {"seed": None}, sort_keys=True)
        members.setdefault(experiment, []).append((config["flags"]["seed"], path, config, checkpoint["model"]))
    groups = []
    for group in members.values():
        name = re.sub(r"-(s|seed)\d+$", "", group[0][1].resolve().name)
        seeds, paths, configs, parameters = map(list, zip(*sorted(group, key=lambda member: member[0])))
        if len(set(seeds)) < len(seeds):
            raise UserError(f"{', '.join(map(str, paths))}: the same experiment and seed twice; give each seed once")
        groups.append(Group(name, seeds, paths, configs[0], parameters))
    stems = [group.name for group in groups]
    mixtures = [group.config["flags"]["sampling_weights"] for group in groups]
    for group, mixture in zip(groups, mixtures):
        if len(set(mixtures)) == len(groups) and re.fullmatch(r"token_count|uniform|temperature:[\d.]+", mixture):
            group.name = mixture.replace("token_count", "natural").replace(":", " ")
        elif stems.count(group.name) > 1:
            group.name = str(group.paths[0])
    return groups


@dataclass
class Curve:
    """What a group has logged in training, at the evaluations that all of its seeds have."""

    step: np.ndarray  # (N,)
    tokens: np.ndarray  # (N,)
    loss: np.ndarray  # (S, N, P + 3): nats per token, of the baseline's domains and SUMMARIES


def read_curves(groups):
    """Return the Curve of each group, and of how many windows of each domain.  Raises UserError if that differs."""
    held_out = []
    for group in groups:
        found = group.config["data"] | {"data_dir": None, "tokenizer": None, "domains": sorted(group.config["domains"])}
        held_out.append(found | {"block_size": group.config["model"]["block_size"]})
    check_same([group.paths[0] for group in groups], held_out, SAME)
    domains, tokens = groups[0].config["domains"], groups[0].config["data"]["train_tokens"]
    share = np.array([tokens[name] for name in domains]) / sum(tokens.values())
    curves, windows = [], {}
    for group in groups:
        losses = []  # of each seed: {step: (P,)}
        for path in group.paths:
            found, windows[path] = read_evaluations(path, group.config, domains)
            losses.append(found)
        step = np.array(sorted(set.intersection(*map(set, losses))))
        loss = with_summaries(np.array([[found[t] for t in step] for found in losses]), share)
        curves.append(Curve(step, step * group.tokens_per_step(), loss))
    check_same(list(windows), [{"eval_windows": found} for found in windows.values()], SAME)
    return curves, windows[groups[0].paths[0]][-1]


def read_evaluations(run, config, domains):
    """Return {step: losses (P,)} of a finished run, and the numbers of windows that they are of.  Raises UserError."""
    found, windows, steps = {}, set(), config["flags"]["max_steps"]
    for line in read_metrics(run / "metrics.jsonl"):
        if "val_loss" in line:
            found[line["step"]] = np.array([line["val_loss"][name] for name in domains])
            windows.add(line["eval_windows"])
    if steps not in found:
        raise UserError(f"{run}/metrics.jsonl is missing or not of the finished run: its last evaluation is at step "
                        f"{max(found, default=0)} of {steps}; bring the file that was written with ckpt.pt")
    return found, sorted(windows)


# ---- what is compared, for evaluate.py, too ----


@dataclass
class Measure:
    """What runs are compared by.  Less is better."""

    title: str
    heading: str  # of its column
    unit: str
    kind: str  # of its parts: domains or tasks
    rows: list  # R names: of the P parts, then of the summaries, the mean first
    values: list  # of each group: (S, R)
    parts: int  # P
    place: str = ""  # " on" a data set


def speed_up(curve, baseline):
    """Tokens that the baseline takes to its last loss, over those of the other; of the mean over domains and seeds."""
    target = baseline.loss[:, -1, MEAN].mean()
    there = tokens_to_reach(baseline.tokens, baseline.loss[..., MEAN].mean(axis=0), target)
    here = tokens_to_reach(curve.tokens, curve.loss[..., MEAN].mean(axis=0), target)
    return "not reached" if np.isnan(here) else f"{there / here:.2f}x"


def changes(groups, measure):
    """Mean and standard deviation of the change from the baseline, of each group but the first: [((R,), (R,))]."""
    return [change(values, measure.values[0], group.seeds == groups[0].seeds)
            for group, values in zip(groups[1:], measure.values[1:])]


def verdicts(groups, measure):
    """A line for each group but the first."""
    lines, P = [], measure.parts
    for group, (mean, sd) in zip(groups[1:], changes(groups, measure)):
        spread = f" ± {sd[P]:.3f}" if len(group.seeds) > 1 else ""
        lines.append(f"{group.name} against {groups[0].name}{measure.place}: better in {(mean[:P] < 0).sum()} of {P} "
                     f"{measure.kind}, mean {mean[P]:+.3f}{spread} {measure.unit}")
    return lines


def print_table(groups, measure, lines):
    """The baseline's values, then each other group's change, with * where it is lower; then these lines."""
    several = any(len(group.seeds) > 1 for group in groups)
    heading = " ±     sd" if several else ""
    column = [groups[0].name, measure.heading + heading]
    for mean, sd in zip(measure.values[0].mean(axis=0), deviation(measure.values[0])):
        column.append(f"{mean:.4f}" + f" ±{sd:.4f}" * several)
    columns = [["", "", *measure.rows], column]
    for group, (mean, sd) in zip(groups[1:], changes(groups, measure)):
        column = [group.name, "change " + heading]
        for m, s in zip(mean, sd):
            column.append(f"{m:+.4f}{'*' if m < 0 else ' '}" + f" ±{s:.4f}" * several)
        columns.append(column)
    versus = ", and its change from the baseline; * is lower" if len(groups) > 1 else ""
    print("\n".join([measure.title + versus, "", *cli.align(columns), "", *lines, ""]))


def size_notes(groups):
    notes, baseline = [], groups[0]
    for group in groups[1:]:
        if group.config["n_params"] != baseline.config["n_params"]:
            notes.append(f"{group.name} has {group.config['n_params']:,} parameters, "
                         f"{baseline.name} has {baseline.config['n_params']:,}")
        if group.n_tokens() != baseline.n_tokens():
            notes.append(f"{group.name} has {group.n_tokens():,} tokens, {baseline.name} has {baseline.n_tokens():,}")
        if group.seeds != baseline.seeds:
            notes.append(f"{group.name} has seeds {group.seeds}, {baseline.name} has {baseline.seeds}: not paired")
    return notes


def setting(groups):
    """What a picture is of, in one line."""
    config, seeds = groups[0].config, groups[0].seeds
    return (f"{config['n_params']:,} parameters, {config['flags']['max_steps']:,} steps, tokenizer "
            f"{config['data']['tokenizer']}, seed {', '.join(map(str, seeds))}"
            + "; bars and bands: standard deviation over the seeds" * (len(seeds) > 1))


# ---- pictures ----


def looks(n):
    """How to draw a baseline and n other runs: marker and dash tell them apart in grey, too."""
    return [figures.BEFORE, *({"color": f"C{i}", "marker": "s^DvPX"[i % 6], "linestyle": ("--", "-.", ":")[i % 3]}
                              for i in range(n))]


def draw_changes(axes, groups, measure):
    """Draw each part's change from the baseline, the last group's best on top.

    Return the parts in this order, and a handle of each group but the first for a legend.
    """
    series, marks = changes(groups, measure), looks(len(groups) - 1)[1:]
    ranking = np.argsort(series[-1][0][: measure.parts], kind="stable")
    parts = [measure.rows[i] for i in ranking]
    rows = [(mean[ranking], sd[ranking] if sd.any() else None, mark) for (mean, sd), mark in zip(series, marks)]
    axes.axvline(0, color="0.45", linewidth=1)
    axes.set_title(f"left of 0: better than {figures.short([groups[0].name])[0]}")
    handles = figures.draw_rows(axes, parts, rows)
    axes.locator_params(axis="x", nbins=7)
    axes.set_xlabel(figures.wrapped(f"change of {measure.title}", 60))
    return parts, handles


def draw_curves(axes, curves, column):
    """Draw one of the SUMMARIES over the steps, with a line at the baseline's last value."""
    means = [curve.loss[..., column].mean(axis=0) for curve in curves]  # (N,) each
    handles = []
    axes.axhline(means[0][-1], color="0.45", linewidth=0.8, linestyle=":")
    for curve, mean, look in zip(curves, means, looks(len(curves) - 1)):
        sd = deviation(curve.loss[..., column])
        axes.fill_between(curve.step, mean - sd, mean + sd, color=look["color"], alpha=0.15, linewidth=0)
        handles += axes.plot(curve.step, mean, markevery=[-1], **look)
    top = max(mean[np.searchsorted(curve.step, curve.step[-1] / 4)] for curve, mean in zip(curves, means))
    low = min(map(np.min, means))
    axes.set(xlim=(0, None), ylim=(low - 0.05 * max(top - low, 1e-3), top),  # the steep start is above the top
             xlabel="step", title=f"held-out loss, {SUMMARIES[column]} (nats per token)")
    return handles


def draw_logged(groups, curves, measure):
    """Sampling weights, change of loss per domain, and the mean and the worst domain's loss over the steps."""
    figure = figures.new(16, height(groups, measure))
    axes = figure.subplot_mosaic([["weight", "change", "mean"], ["weight", "change", "worst"]],
                                 width_ratios=(1, 1.2, 1.4))
    domains, _ = draw_changes(axes["change"], groups, measure)
    weights = [np.array([group.config["sampling_weights"][name] for name in domains]) for group in groups]
    series = [(values, None, mark) for values, mark in zip(weights, looks(len(groups) - 1))]
    figures.draw_rows(axes["weight"], domains, series)
    figures.weight_axis(axes["weight"].xaxis, np.concatenate(weights))
    axes["weight"].set_xlabel("sampling weight")
    axes["change"].set_yticklabels([])
    lines = draw_curves(axes["mean"], curves, MEAN)
    draw_curves(axes["worst"], curves, WORST)
    figures.legend(figure, lines, [group.name for group in groups], loc="outside right center")
    return figure


def height(groups, measure):
    """Inches, enough for a mark of each group in each row and for the legend."""
    return 1.5 + max(3.5, measure.parts * max(0.24, 0.07 * (len(groups) - 1)), 0.2 * len(groups))


def main(argv=None):
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=cli.path, metavar="RUN", help="finished runs; the first is the baseline")
    add("--out_dir", type=cli.path, help="where compare.png goes (default: the last run's directory)")
    args = parser.parse_args(argv)
    groups = read_groups(args.runs)
    if len(groups) < 2:
        raise UserError(f"{args.runs[0]}: only one experiment is given; give a baseline and at least one other run")
    curves, windows = read_curves(groups)
    domains = groups[0].config["domains"]
    measure = Measure("last held-out loss in nats per token", "loss", "nats", "domains", [*domains, *SUMMARIES],
                      [curve.loss[:, -1] for curve in curves], len(domains))
    lines = []
    for curve, line, (mean, _) in zip(curves[1:], verdicts(groups, measure), changes(groups, measure)):
        speed = speed_up(curve, curves[0])
        lines.append(f"{line}, token-weighted {mean[WEIGHTED]:+.3f}, speed-up {speed}")
    measured_on = f"{windows:,} windows of each domain's held-out text" if windows else "all held-out text"
    measured_on += ", as logged in training"

    path = Path(args.out_dir or args.runs[-1]) / "compare.png"
    with figures.style():
        figures.save(draw_logged(groups, curves, measure), lines[-1], f"{setting(groups)}; {measured_on}", path)
    print_table(groups, measure, lines)
    for note in [*size_notes(groups), f"these losses are on {measured_on}; evaluate.py scores more windows, per byte"]:
        print(f"note: {note}")
    print(f"written: {path}")


if __name__ == "__main__":
    cli.run(main)
