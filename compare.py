"""Stage 5 of DoReMi, the profit: the held-out losses of two or more runs side by side.

reads   RUN/{config.json, metrics.jsonl} of each run; the first, or --baseline, is what the others are compared with
writes  compare.png in the last run's directory, or --out
next    another round (train_reference.py --domain_weights=PROXY/weights.json), or the large run of your own data
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import cli
from checkpoint import write_atomically
from cli import ArgumentParser, UserError, shown
from report import GREY, add_titles, in_order, make_directory, read_config, read_text, text_width, weight_axis

# Colour, marker and dash, so that runs are told apart in grey too; the last run gets the first. The baseline is grey.
STYLES = (
    ("#440154", "o", "-"), ("#d95f02", "s", "--"), ("#21918c", "^", "-."), ("#5b9bd5", "D", "-"), ("#b8a200", "v", ":"))


@dataclass
class Evaluations:
    """The evaluations of a run, N of them, in the order of steps; domains in the order of its config.

    step, tokens (N,); loss (N, K) nats per token; bpb (N, K) bits per byte; mean, worst (N,) of the domains, in nats.
    """

    name: str
    config: dict
    weights: np.ndarray  # (K,) what the training batches were drawn from
    step: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    bpb: np.ndarray
    mean: np.ndarray
    worst: np.ndarray


# ---- reading


def read_evaluations(run, name, domains):
    """Returns the Evaluations of a run directory. Raises UserError, with file and line, where metrics.jsonl is off."""
    config, path = read_config(run), run / "metrics.jsonl"
    found = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: invalid JSON: {error.msg}; a killed run is mended by --resume.") from None
        if not isinstance(entry, dict) or "step" not in entry:
            raise UserError(f"{where}: not an object with a 'step'; this is no metrics file of a train_*.py.")
        if "val_loss" not in entry:
            continue  # a training line
        if absent := {"tokens", "val_bpb", "val_loss_mean", "val_loss_worst"} - set(entry):
            raise UserError(f"{where}: the evaluation has no {', '.join(sorted(absent))}; evaluate the run again.")
        loss, bpb = (in_order(entry[key], domains, f"{where}, {key}") for key in ("val_loss", "val_bpb"))
        ends = in_order({key: entry[key] for key in ("tokens", "val_loss_mean", "val_loss_worst")},
                        ("tokens", "val_loss_mean", "val_loss_worst"), where)
        found[entry["step"]] = (entry["step"], ends[0], loss, bpb, ends[1], ends[2])
    if not found:
        raise UserError(f"{path}: holds no evaluation yet; let the run reach its first --eval_interval.")
    columns = (np.array(column) for column in zip(*(found[step] for step in sorted(found))))
    weights = in_order(config["sampling_weights"], domains, f"{run / 'config.json'}, sampling_weights")
    return Evaluations(name, config, weights, *columns)


def read_comparable(runs):
    """Evaluations of the runs, the baseline first. Raises UserError where a difference of loss would mean nothing."""
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("the same run is given twice; give each directory once.")
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    configs = [read_config(run) for run in runs]
    domains = configs[0]["domains"]
    for run, config in zip(runs[1:], configs[1:]):
        for what, value, expected in (
            ("domains", sorted(config["domains"]), sorted(domains)),
            *((what, config["data"][what], configs[0]["data"][what])
              for what in ("tokenizer_sha256", "vocab_size", "train_tokens")),
            ("block_size", config["model"]["block_size"], configs[0]["model"]["block_size"]),
            ("eval_windows", config["flags"]["eval_windows"], configs[0]["flags"]["eval_windows"]),
        ):
            if value != expected:
                raise UserError(f"{run}: {what} is {shown(value)}, but {shown(expected)} in {runs[0]}; losses are "
                                "compared on the same held-out tokens alone. Train one of the two again to match.")
    return [read_evaluations(run, name, domains) for run, name in zip(runs, names)]


def remarks(runs):
    """Differences that leave the losses comparable, but not like for like: a line each."""
    baseline, lines = runs[0], []
    for run in runs[1:]:
        differences = [
            f"{what} {value:,} against {expected:,}"
            for what, value, expected in (
                ("parameters", run.config["n_params"], baseline.config["n_params"]),
                ("steps planned", run.config["flags"]["max_steps"], baseline.config["flags"]["max_steps"]),
                ("tokens at the last evaluation", int(run.tokens[-1]), int(baseline.tokens[-1])),
            )
            if value != expected
        ]
        if differences:
            lines.append(f"note: {run.name} is not like {baseline.name}: {', '.join(differences)}")
    for run in runs:
        if run.step[-1] < run.config["flags"]["max_steps"]:
            planned = run.config["flags"]["max_steps"]
            lines.append(f"note: {run.name} is evaluated up to step {run.step[-1]} of {planned}")
    if (early := passing(baseline.mean, baseline.mean[-1])) < len(baseline.mean) - 1:
        lines.append(f"note: {baseline.name} reached its last mean loss at step {baseline.step[early]} already, so the "
                     "factors below flatter the others: it was trained past its best")
    return lines


# ---- the comparison


def passing(mean, target):
    """Index of the first evaluation whose mean (N,) is at or below target, or None if there is none."""
    reached = np.flatnonzero(mean <= target)
    return int(reached[0]) if len(reached) else None


def speed_up(run, baseline):
    """How many times fewer tokens a run needs for the baseline's last mean loss, and the index of the evaluation there.

    Tokens, not steps, so that it holds for runs of different batches; with equal batches the two are the same.
    Returns (factor, index), or (None, None) where the run does not get there.
    """
    index = passing(run.mean, baseline.mean[-1])
    return (None, None) if index is None else (float(baseline.tokens[-1] / run.tokens[index]), index)


def better(run, baseline):
    """In how many domains the last held-out loss is lower than the baseline's; equal is not better."""
    return int((run.loss[-1] < baseline.loss[-1]).sum())


def finding(run, baseline):
    """The title of the picture."""
    factor, _ = speed_up(run, baseline)
    pace = "its last loss never reached" if factor is None else f"its last loss with {factor:.3g}x fewer tokens"
    return (f"{run.name} better than {baseline.name} in {better(run, baseline)} of {len(run.weights)} domains, "
            f"mean {run.mean[-1] - baseline.mean[-1]:+.3f} nats, {pace}")


def summary(run, baseline):
    """The end of what is printed: three lines on a run."""
    domains, factor, index = baseline.config["domains"], *speed_up(run, baseline)
    pace = f"not reached in {run.step[-1]} steps; the nearest is {run.mean.min():.4f}"
    if index is not None:
        pace = f"reached at step {run.step[index]} of {run.step[-1]}: {factor:.3g}x fewer tokens"
    worst, its_worst = (f"{r.worst[-1]:.4f} ({domains[int(r.loss[-1].argmax())]})" for r in (run, baseline))
    return [
        f"{run.name} against {baseline.name}: better in {better(run, baseline)} of {len(domains)} domains, "
        f"mean {run.mean[-1] - baseline.mean[-1]:+.4f} nats per token",
        f"  worst domain {worst} against {its_worst}",
        f"  {baseline.name}'s last mean loss, {baseline.mean[-1]:.4f}: {pace}",
    ]


def table(runs):
    """Lines: each domain's last held-out loss under each run, the difference to the baseline, * where it is better."""
    baseline, domains = runs[0], runs[0].config["domains"]
    width = max(map(len, [*domains, "worst"]))
    columns = [max(23 if run is baseline else 32, len(run.name)) for run in runs]
    heads = ["weight    nats     bpb"] + ["weight    nats    change     bpb"] * (len(runs) - 1)
    lines = [" " * width + "".join(f"   {run.name:>{column}}" for run, column in zip(runs, columns)),
             " " * width + "".join(f"   {head:>{column}}" for head, column in zip(heads, columns))]

    def row(label, cells):
        for (weight, nats, bpb), column, run in zip(cells, columns, runs):
            change = "" if run is baseline else f"  {nats - cells[0][1]:+.4f}{'*' if nats < cells[0][1] else ' '}"
            label += f"   {f'{weight} {nats:7.4f}{change} {bpb:7.4f}':>{column}}"
        lines.append(label)

    for i, name in enumerate(domains):
        row(f"{name:{width}}", [(f"{run.weights[i]:.4f}", run.loss[-1, i], run.bpb[-1, i]) for run in runs])
    row(f"{'mean':{width}}", [(" " * 6, run.mean[-1], run.bpb[-1].mean()) for run in runs])
    row(f"{'worst':{width}}", [(" " * 6, run.worst[-1], run.bpb[-1].max()) for run in runs])
    return lines


# ---- the picture


def draw_curves(axes, runs, styles, key):
    """Evaluations over steps of `key`, "mean" or "worst", and the step at which each run passes the baseline's last."""
    curves = [getattr(run, key) for run in runs]
    target = curves[0][-1]
    # From a quarter of the training on: the first losses are so high that the rest would be a flat line.
    top = max(curve[np.searchsorted(run.step, run.step[-1] / 4)] for run, curve in zip(runs, curves))
    bottom = min(curve.min() for curve in curves)
    margin = max(top - bottom, 1e-3) * 0.08
    axes.set(xlim=(0, max(run.step[-1] for run in runs)), ylim=(bottom - margin, top + margin))
    axes.axhline(target, color=GREY, linewidth=0.8, linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)
    passed = set()
    for run, curve, (colour, marker, dash) in zip(runs, curves, styles):
        axes.plot(run.step, curve, dash, color=colour, linewidth=1.8)
        if run is not runs[0] and (index := passing(curve, target)) is not None:
            step = int(run.step[index])
            axes.plot(step, curve[index], marker, color=colour, markersize=8, markeredgecolor="white")
            axes.vlines(step, bottom - margin, curve[index], color=colour, linewidth=0.8, linestyle=dash)
            passed.add(step)
    for step in sorted(passed):
        axes.annotate(f"{step}", (step, bottom - margin), (-2, 3), textcoords="offset points", ha="right", fontsize=8)
    heights = (np.array([curve[-1] for curve in curves]) - (bottom - margin)) / (top - bottom + 2 * margin)
    for run, height, (colour, *_) in zip(runs, spread(heights, 0.1), styles):
        axes.text(1.03, height, run.name, color=colour, transform=axes.transAxes, va="center", fontsize=9)


def spread(heights, gap):
    """Heights moved apart, in their order, until neighbours differ by gap at least: labels that do not overlap."""
    order = np.argsort(heights, kind="stable")
    apart = heights[order].astype(float)
    for _ in range(200):  # each pass pushes every crowded pair apart by half of what it lacks
        lack = np.maximum(gap - np.diff(apart), 0) / 2
        apart[:-1] -= lack
        apart[1:] += lack
    placed = np.empty_like(apart)
    placed[order] = apart + max(0.05 - apart[0], 0)  # not below the axis
    return placed


def draw(runs):
    """Left to right: each domain's weight, its change of held-out loss, the mean and the worst loss over the steps."""
    baseline, others = runs[0], runs[1:]
    domains, K = baseline.config["domains"], len(baseline.weights)
    order = np.argsort(others[-1].loss[-1] - baseline.loss[-1], kind="stable")  # most improved by the last run on top
    label, tail = text_width(domains, 9) + 0.35, text_width([run.name for run in runs], 9) + 0.25
    width, height = label + 2.3 + 0.35 + 3.2 + 0.9 + 4.2 + tail, max(4.0, 0.12 * len(others) * K, 0.22 * K + 0.4) + 1.85
    figure = Figure(figsize=(width, height))
    bottom, tall = 0.6 / height, 1 - 1.85 / height

    def panel(left, wide, low=0.0, high=1.0):
        return figure.add_axes([left / width, bottom + low * tall, wide / width, (high - low) * tall])

    weights, change = panel(label, 2.3), panel(label + 2.65, 3.2)
    rows = np.arange(K)
    offsets = np.linspace(-0.5, 0.5, len(others)) * min(0.5, 0.06 * K) if len(others) > 1 else [0.0]
    positive = np.concatenate([run.weights[run.weights > 0] for run in runs])
    low, high = positive.min() / 1.6, min(1.0, 1.6 * positive.max())
    weight_axis(weights.xaxis, low, high)
    styles = [(GREY, "o", ":"), *[style for _, style in zip(others, itertools.cycle(STYLES))][::-1]]
    before = np.maximum(baseline.weights, low)[order]  # a weight of 0 lies on the edge
    for run, offset, (colour, marker, _) in zip(others, offsets, styles[1:]):
        after, difference = np.maximum(run.weights, low)[order], (run.loss[-1] - baseline.loss[-1])[order]
        weights.hlines(rows + offset, before, after, color=colour, linewidth=1.2)
        weights.plot(after, rows + offset, marker, color=colour, markersize=5, clip_on=False)
        change.hlines(rows + offset, 0, difference, color=colour, linewidth=1.2)
        change.plot(difference, rows + offset, marker, color=colour, markersize=5, label=run.name)
    weights.plot(before, rows, "o", color=GREY, mfc="white", markersize=5, clip_on=False, label=baseline.name)
    change.axvline(0, color=GREY, linewidth=1)
    change.grid(True, axis="x", color="0.9", linewidth=0.6)
    change.set_axisbelow(True)
    change.spines[["top", "right", "left"]].set_visible(False)
    weights.set(ylim=(K - 0.5, -0.5), xlabel="sampling weight")
    weights.set_yticks(rows, [domains[i] for i in order], fontsize=9)
    weights.tick_params(axis="y", length=0)
    weights.spines["left"].set_visible(False)
    weights.grid(True, axis="y", color="0.94", linewidth=0.6)
    change.set(ylim=(K - 0.5, -0.5), yticks=[], xlabel="change of held-out loss (nats per token)")
    change.xaxis.set_major_locator(MaxNLocator(5))
    change.margins(x=0.08)
    change.set_title(f"left of 0: better than {baseline.name}", fontsize=9)

    start = label + 2.65 + 3.2 + 0.9
    for axes, key, title in ((panel(start, 4.2, 0.56, 1.0), "mean", "mean over domains"),
                             (panel(start, 4.2, 0.0, 0.42), "worst", "worst domain")):
        draw_curves(axes, runs, styles, key)
        axes.set_title(f"held-out loss, {title} (nats per token)", fontsize=9)
    axes.set_xlabel("step")
    handles, labels = (a + b for a, b in zip(weights.get_legend_handles_labels(), change.get_legend_handles_labels()))
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.1 / width, 1 - 0.75 / height), ncol=len(runs),
                  frameon=False, fontsize=9, handletextpad=0.1)
    sizes = sorted({f"{run.config['n_params']:,} parameters, {run.step[-1]} steps" for run in runs})
    tokenizer = baseline.config["data"]["tokenizer"]
    add_titles(figure, finding(others[-1], baseline), f"{' and '.join(sizes)}; tokenizer {tokenizer}")
    return figure


# ---- the script


def main(argv=None):
    parser = ArgumentParser("Compare the held-out losses of two or more runs, domain by domain.")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run, same data; the first is the baseline")
    add("--baseline", type=Path, metavar="RUN", help="what the others are compared with (default: the first RUN)")
    add("--out", type=Path, metavar="FILE", help="the picture (default: compare.png in the last run's directory)")
    args = parser.parse_args(argv)
    paths = args.runs
    if args.baseline:
        paths = [args.baseline, *(run for run in paths if run.resolve() != args.baseline.resolve())]
    if len(paths) < 2:
        raise UserError(f"{paths[0]}: one run only; give a baseline and at least one run to compare with it.")
    out = args.out or args.runs[-1] / "compare.png"
    if out.suffix != ".png":
        raise UserError(f"--out: {out} is not the name of a PNG file; end it in .png.")
    runs = read_comparable(paths)
    baseline, others = runs[0], runs[1:]

    legend = "weight: of sampling; nats: per token; bpb: bits per byte; * better than the baseline"
    print("\n".join([*table(runs), "", legend, *remarks(runs)]))
    figure = draw(runs)
    make_directory(out.parent)
    write_atomically(out, lambda file: figure.savefig(file, format="png", dpi=150))
    print(f"written: {out}\n")
    print("\n".join(line for run in others for line in summary(run, baseline)))


if __name__ == "__main__":
    cli.run(main)
