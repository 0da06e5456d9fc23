"""Stage 5 of DoReMi, the profit: two or more runs side by side.

reads   RUN/{config.json, ckpt.pt, metrics.jsonl} of finished runs on the same data; the first is the baseline
        RUN/evaluation/*.json of evaluate.py, of what it has scored in all of the runs
writes  OUT_DIR/compare.png
next    python evaluate.py RUN RUN --data_dir=DATA

Runs that differ in the seed alone form one group, shown as mean and standard deviation. Its name is its first
directory's without the seed: large-doremi-s1 and large-doremi-seed1 give large-doremi. Changes are paired by seed.

Dimensions: S seeds of a group, N evaluations in training, P parts (domains or tasks), R rows: parts, then summaries.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common import cli, figures
from common.cli import UserError
from common.files import count, json_lines, misfit
from common.run import check_same, identity, load_finished
from common.scores import accuracy, bits_per_byte, chance, read_scores

SUMMARIES = ("mean", "token-weighted mean", "worst domain")
MEAN, WEIGHTED, WORST = -3, -2, -1  # their places among the losses


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
    """Tokens at which the loss is first at or below the target, linear between evaluations; NaN if it never is.

    tokens, loss: (N,).
    """
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
    step: np.ndarray = None  # (N,): of the evaluations in training that all seeds have
    tokens: np.ndarray = None  # (N,)
    loss: np.ndarray = None  # (S, N, P + 3): nats per token, of the baseline's domains and SUMMARIES


@dataclass
class Measure:
    """What runs are compared by.  Less is better."""

    title: str
    heading: str  # of its column
    unit: str
    place: str  # " on" a data set, or nothing
    kind: str  # of its parts: domains or tasks
    rows: list  # R names: of the P parts, then of the summaries, the mean first
    values: list  # of each group: (S, R)
    parts: int  # P
    speed: list = field(default_factory=list)  # if it is logged in training: of each group but the first, as text
    accuracy: dict = field(default_factory=dict)  # {task: (chance, [(S,) of each group])}


def read_groups(runs):
    """Read finished runs as groups of seeds, the baseline's first.  Raises UserError."""
    members = {}  # of an experiment: [(seed, path, config, parameters)]
    for run in runs:
        config, checkpoint = load_finished(run, ("reference", "proxy", "large"))
        experiment = json.dumps(identity(config) | {"seed": None}, sort_keys=True)
        members.setdefault(experiment, []).append((config["flags"]["seed"], run, config, checkpoint["model"]))
    stems = [re.sub(r"-(s|seed)\d+$", "", group[0][1].resolve().name) for group in members.values()]
    groups = []
    for stem, group in zip(stems, members.values()):
        name = stem if stems.count(stem) == 1 else str(group[0][1])
        group.sort(key=lambda member: member[0])
        seeds = [seed for seed, *_ in group]
        paths = [path for _, path, *_ in group]
        if len(set(seeds)) < len(seeds):
            raise UserError(f"{', '.join(map(str, paths))}: the same experiment and seed twice; give each seed once")
        groups.append(Group(name, seeds, paths, config=group[0][2], parameters=[member[3] for member in group]))
    return groups


def read_evaluations(run, config, domains):
    """Return {step: losses (P,)} of a finished run, and the number of windows that they are of.  Raises UserError."""
    path, steps, found, windows = run / "metrics.jsonl", config["flags"]["max_steps"], {}, set()
    schema = {"step": count, "eval_windows": count, "val_loss": dict.fromkeys(domains, float)}
    try:
        for number, line in json_lines(path):
            if isinstance(line, dict) and "val_loss" not in line:
                continue
            if fault := str(line) if isinstance(line, ValueError) else misfit(line, schema):
                raise UserError(f"{path}, line {number}: {fault}; expected the metrics of a finished run")
            found[line["step"]] = np.array([line["val_loss"][name] for name in domains])
            windows.add(line["eval_windows"])
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected the metrics of a finished run") from None
    if steps not in found:
        raise UserError(f"{run}: the run is unfinished, evaluated up to step {max(found, default=0)} of {steps}; "
                        "continue it with --resume")
    return found, sorted(windows)


def logged_loss(groups):
    """Fill in what the groups' runs logged in training.  Return the last losses as a Measure.

    Raises UserError unless all runs were evaluated on the same held-out tokens.
    """
    paths, held_out = [], []
    config = groups[0].config
    domains, counts = config["domains"], config["data"]["train_tokens"]
    for group in groups:
        same = {name: value for name, value in group.config["data"].items() if name not in ("data_dir", "tokenizer")}
        same |= {"domains": sorted(group.config["domains"]), "block_size": group.config["model"]["block_size"]}
        paths.append(group.paths[0])
        held_out.append(same)
    check_same(paths, held_out, "losses compare on the same held-out tokens only")
    share = np.array([counts[name] for name in domains]) / sum(counts.values())
    windows = {}
    for group in groups:
        found = []
        for path in group.paths:
            losses, windows[path] = read_evaluations(path, group.config, domains)
            found.append(losses)
        group.step = np.array(sorted(set.intersection(*map(set, found))))
        group.tokens = group.step * group.config["flags"]["batch_size"] * group.config["model"]["block_size"]
        group.loss = with_summaries(np.array([[losses[t] for t in group.step] for losses in found]), share)
    check_same(list(windows), [{"eval_windows": found} for found in windows.values()],
               "losses compare on the same held-out tokens only")
    speed = [speed_up(group, groups[0]) for group in groups[1:]]
    return Measure("last held-out loss in nats per token", "loss", "nats", "", "domains", [*domains, *SUMMARIES],
                   [group.loss[:, -1] for group in groups], len(domains), speed)


def speed_up(group, baseline):
    """Tokens that the baseline takes to its last mean loss, over those that the group takes, as text.

    Both are read off the mean over the seeds.
    """
    curves = [each.loss[..., MEAN].mean(axis=0) for each in (baseline, group)]
    there, here = (tokens_to_reach(each.tokens, curve, curves[0][-1]) for each, curve in zip((baseline, group), curves))
    return "not reached" if np.isnan(here) else f"{there / here:.2f}x"


# ---- what evaluate.py has scored ----


def evaluations(groups, scores, files):
    """Return a Measure of each data set and one of all tasks.

    scores: {path of a run: {file: SCORES}}; files: those that all runs have, of the same text.
    """
    found = {}  # {(kind, data set): {part: [[what a seed scored] of each group]}}
    for file in files:
        first = scores[groups[0].paths[0]][file]
        text = first["name"] if first["kind"] == "domains" else ""
        parts = found.setdefault((first["kind"], text), {})
        for part in first["expected"]:
            parts[part] = [[scores[path][file]["parts"][part] for path in group.paths] for group in groups]
    return [evaluation(kind, text, parts) for (kind, text), parts in sorted(found.items())]


def evaluation(kind, text, parts):
    """Return a Measure.  parts: {name: [[what a seed scored] of each group]}."""
    groups = list(zip(*parts.values()))  # of each: P lists of S
    values = [np.array([[bits_per_byte(seed) for seed in part] for part in group]).T for group in groups]  # (S, P)
    values = [np.column_stack([bpb, bpb.mean(axis=1)]) for bpb in values]
    title = f"bits per byte of the held-out text of {text}" if text else "bits per byte of the right answers"
    place = f" on {text}" if text else ""
    measure = Measure(title, "bits/byte", "bits per byte", place, kind, [*parts, "mean"], values, len(parts))
    for name, part in parts.items():
        if any(part[0][0]["wrong"]):
            hits = [np.array([accuracy(seed) for seed in group]) for group in part]
            measure.accuracy[name] = chance(part[0][0]), hits
    return measure


def shared_evaluations(groups):
    """Return a Measure of each evaluation that all runs have, and notes."""
    scores, notes = {}, []
    for group in groups:
        for path, parameters in zip(group.paths, group.parameters):
            scores[path], left_out = read_scores(path / "evaluation", parameters)
            notes += left_out
    shared = []
    for file in sorted(set.union(*map(set, scores.values()))):
        texts = {found[file]["text"] if file in found else None for found in scores.values()}
        if len(texts) == 1:
            shared.append(file)
        else:
            notes.append(f"evaluation/{file} is not of the same text in all runs, not shown; run evaluate.py on them")
    return evaluations(groups, scores, shared), notes


# ---- what it prints and draws, for evaluate.py, too ----


def looks(n):
    """How to draw a baseline and n other runs: marker and dash tell them apart in grey, too."""
    return [figures.BEFORE, *({"color": f"C{i}", "marker": "s^DvPX"[i % 6], "linestyle": ("--", "-.", ":")[i % 3]}
                              for i in range(n))]


def changes(groups, measure):
    """Mean and standard deviation of the change from the baseline, of each group but the first: [((R,), (R,))]."""
    return [change(values, measure.values[0], group.seeds == groups[0].seeds)
            for group, values in zip(groups[1:], measure.values[1:])]


def in_words(groups, measure):
    """A line for each group but the first."""
    lines, P = [], measure.parts
    for i, (group, (mean, sd)) in enumerate(zip(groups[1:], changes(groups, measure))):
        line = (f"{group.name} against {groups[0].name}{measure.place}: better in {(mean[:P] < 0).sum()} of {P} "
                f"{measure.kind}, mean {mean[P]:+.3f}")
        if len(group.seeds) > 1:
            line += f" ± {sd[P]:.3f}"
        line += f" {measure.unit}"
        if measure.speed:
            line += f", token-weighted {mean[WEIGHTED]:+.3f}, speed-up {measure.speed[i]}"
        lines.append(line)
    return lines


def change_table(groups, measure):
    """Lines: the baseline's values, then each other group's change, with * where it is lower."""
    several = any(len(group.seeds) > 1 for group in groups)
    P = measure.parts
    first = [groups[0].name, measure.heading]
    for mean, sd in zip(measure.values[0].mean(axis=0), deviation(measure.values[0])):
        first.append(f"{mean:.4f}" + f" ±{sd:.4f}" * several)
    columns = [["", "", *measure.rows], first]
    for group, (mean, sd) in zip(groups[1:], changes(groups, measure)):
        column = [group.name, "change "]
        for m, s in zip(mean, sd):
            column.append(f"{m:+.4f}{'*' if m < 0 else ' '}" + f" ±{s:.4f}" * several)
        column.append(f"{(mean[:P] < 0).sum()} of {P}")
        columns.append(column)
    if several:
        for column in columns[1:]:
            column[1] += " ±     sd"
    if len(groups) > 1:
        columns[0].append(f"{measure.kind} better")
        columns[1].append("")
    if measure.speed:
        columns[0].append("speed-up in tokens")
        columns[1].append("")
        for column, speed in zip(columns[2:], measure.speed):
            column.append(speed)
    return figures.align(columns)


def show(groups, measures, notes):
    """Print the tables, and what must be known to read them."""
    notes, (baseline, *others) = list(notes), groups
    for group in others:
        sizes = [("parameters", group.config["n_params"], baseline.config["n_params"])]
        if group.tokens is not None:
            sizes.append(("tokens", group.tokens[-1], baseline.tokens[-1]))
        for what, value, expected in sizes:
            if value != expected:
                notes.append(f"{group.name} has {value:,} {what}, {baseline.name} has {expected:,}")
        if group.seeds != baseline.seeds:
            notes.append(f"{group.name} has seeds {group.seeds}, {baseline.name} has {baseline.seeds}: not paired")
    for measure in measures:
        versus = ", and its change from the baseline; * is lower" if others else ""
        cli.print_anywhere(figures.escaped(f"{measure.title}{versus}") + "\n")
        cli.print_anywhere("\n".join([*change_table(groups, measure), ""]))
        for task, (guesses, found) in measure.accuracy.items():
            each = [f"{group.name} {values.mean():.3f}" + f" ± {deviation(values):.3f}" * (len(values) > 1)
                    for group, values in zip(groups, found)]
            cli.print_anywhere(figures.escaped(f"accuracy on {task} (chance {guesses:.3f}): {', '.join(each)}"))
        for line in in_words(groups, measure):
            cli.print_anywhere(figures.escaped(line))
        print()
    for note in notes:
        cli.print_anywhere(figures.escaped(f"note: {note}"))


def draw_changes(axes, groups, measure):
    """Each part's change from the baseline, or the values of a single group; the last group's best on top.

    Return the parts in this order, and handles and names for a legend.
    """
    P, names, marks = measure.parts, [group.name for group in groups], looks(len(groups) - 1)
    what = measure.title
    if len(groups) > 1:
        series, names, marks = changes(groups, measure), names[1:], marks[1:]
        what = f"change of {what}"
        axes.axvline(0, color="0.45", linewidth=1)
        axes.set_title(f"left of 0: better than {figures.plain(groups[0].name)}")
    else:
        series = [(measure.values[0].mean(axis=0), deviation(measure.values[0]))]
    order = np.argsort(series[-1][0][:P], kind="stable")
    parts = [measure.rows[i] for i in order]
    rows = [(mean[order], sd[order], mark) for (mean, sd), mark in zip(series, marks)]
    handles = figures.draw_rows(axes, parts, rows)
    axes.locator_params(axis="x", nbins=7)
    axes.set_xlabel(figures.plain(what))
    return parts, handles, names


def draw_curves(axes, groups, column):
    """One of the SUMMARIES over the steps, and the step at which each group passes the baseline's last value."""
    means = [group.loss[..., column].mean(axis=0) for group in groups]  # (N,) each
    target, handles = means[0][-1], []
    axes.axhline(target, color="0.45", linewidth=0.8, linestyle=":")
    for i, (group, mean, look) in enumerate(zip(groups, means, looks(len(groups) - 1))):
        sd, passed = deviation(group.loss[..., column]), tokens_to_reach(group.step, mean, target)
        axes.fill_between(group.step, mean - sd, mean + sd, color=look["color"], alpha=0.15, linewidth=0)
        handles += axes.plot(group.step, mean, markevery=[-1], **look)
        if group is not groups[0] and not np.isnan(passed):
            axes.axvline(passed, ymax=0.07 * i, color=look["color"])
            place = passed, 0.07 * i - 0.05  # one above the other, where steps are close
            axes.annotate(f"{passed:.0f} ", place, xycoords=("data", "axes fraction"), ha="right", fontsize=8,
                          color=look["color"])
    top = max(mean[np.searchsorted(group.step, group.step[-1] / 4)] for group, mean in zip(groups, means))
    low = min(map(np.min, means))
    axes.set(xlim=(0, None), ylim=(low - 0.35 * max(top - low, 1e-3), top),  # the steep start is above the top
             xlabel="step", title=f"held-out loss, {SUMMARIES[column]} (nats per token)")
    return handles


def draw_logged(groups, measure):
    """Sampling weights, change of loss per domain, and the mean and the worst domain's loss over the steps."""
    figure = Figure(figsize=(15, height(groups, measure)), layout="constrained")
    axes = figure.subplot_mosaic([["weight", "change", "mean"], ["weight", "change", "worst"]],
                                 width_ratios=(1, 1.2, 1.4))
    domains, _, _ = draw_changes(axes["change"], groups, measure)
    weights = [np.array([group.config["sampling_weights"][name] for name in domains]) for group in groups]
    series = [(values, None, mark) for values, mark in zip(weights, looks(len(groups) - 1))]
    figures.draw_rows(axes["weight"], domains, series)
    figures.weight_axis(axes["weight"].xaxis, np.concatenate(weights))
    axes["weight"].set_xlabel("sampling weight")
    axes["change"].set_yticklabels([])
    lines = draw_curves(axes["mean"], groups, MEAN)
    draw_curves(axes["worst"], groups, WORST)
    figures.legend(axes["mean"], lines, [group.name for group in groups], loc="upper right")
    return figure


def draw_evaluations(groups, measures):
    """A panel for each data set and one for the tasks."""
    size = 7 * len(measures), max(height(groups, measure) for measure in measures)
    figure = Figure(figsize=size, layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures):
        _, handles, names = draw_changes(axes, groups, measure)
        figures.legend(axes, handles, names)
    return figure


def height(groups, measure):
    inches = measure.parts * max(0.24, 0.07 * (len(groups) - 1)) + 1.5
    return min(max(5.0, inches), figures.TALLEST)


def publish_comparison(groups, measures, path):
    """Write the picture of what was logged in training, or else of evaluations."""
    config, seeds = groups[0].config, groups[0].seeds
    title = [groups[0].name, *in_words(groups, measures[0])][-1]
    setting = (f"{config['n_params']:,} parameters, {config['flags']['max_steps']:,} steps, tokenizer "
               f"{config['data']['tokenizer']}, seed {', '.join(map(str, seeds))}"
               + "; bars and bands: standard deviation over the seeds" * (len(seeds) > 1))
    texts = [title, setting, *(group.name for group in groups)]
    for measure in measures:
        texts += [measure.title, *measure.rows]
    with figures.style(*texts):
        figure = draw_logged(groups, measures[0]) if measures[0].speed else draw_evaluations(groups, measures)
        figures.publish(figure, title, setting, path)


# ---- the script ----


def main(argv=None):
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished runs; the first is the baseline")
    parser.add_argument("--out_dir", type=Path, help="where compare.png goes (default: the last run's directory)")
    args = parser.parse_args(argv)
    groups = read_groups(args.runs)
    if len(groups) < 2:
        raise UserError(f"{args.runs[0]}: only one experiment is given; give a baseline and at least one other run")
    logged = logged_loss(groups)
    others, notes = shared_evaluations(groups)
    show(groups, [logged, *others], notes)
    out_dir = args.out_dir or args.runs[-1]
    out_dir.mkdir(parents=True, exist_ok=True)
    publish_comparison(groups, [logged], out_dir / "compare.png")


if __name__ == "__main__":
    cli.run(main)
