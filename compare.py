"""Stage 5 of DoReMi, the profit: the held-out losses of two or more runs side by side.

reads   RUN/{config.json, metrics.jsonl} of finished runs on the same data; the first is the baseline
writes  OUT_DIR/compare.png
next    python evaluate.py RUN RUN --data_dir=DATA

Runs that differ in the seed alone form one group, shown as mean and standard deviation. Its name is its first
directory's without the seed: large-doremi-s1 and large-doremi-seed1 give large-doremi.

Dimensions: S seeds of a group, N evaluations, K domains, M = K + 3 losses: the domains' and their SUMMARIES.
"""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import cli
import runtime
from average_weights import GREY, add_titles, align, weight_axis
from cli import UserError, shown

SUMMARIES = ("mean", "token-weighted mean", "worst domain")
MEAN, WEIGHTED, WORST = -3, -2, -1  # their places among the M losses
STYLES = (  # colour, marker and dash: runs can be told apart in grey, too. The baseline's is the first
    (GREY, "o", "-"), ("#440154", "s", "--"), ("#d95f02", "^", "-."), ("#21918c", "D", ":"), ("#5b9bd5", "v", "--"),
    ("#b8a200", "P", "-."), ("#a50f15", "X", ":"))


@dataclass
class Group:
    name: str
    config: dict  # of its first seed
    seeds: list  # sorted
    weights: np.ndarray  # (K,) sampling weights
    step: np.ndarray  # (N,)
    tokens: np.ndarray  # (N,)
    loss: np.ndarray  # (S, N, M) nats per token


# ---- the mathematics ----

def with_summaries(loss, share):
    """Append the mean, the mean weighted by the share of the tokens, and the largest: (..., K) -> (..., M)."""
    return np.concatenate([loss, np.stack([loss.mean(axis=-1), loss @ share, loss.max(axis=-1)], axis=-1)], axis=-1)


def deviation(loss):
    """Standard deviation over the seeds: (S, ...) -> (...); 0 for a single seed."""
    return loss.std(axis=0, ddof=1) if len(loss) > 1 else np.zeros(loss.shape[1:])


def change(group, baseline):
    """Mean and standard deviation over the seeds of the change of the last losses: (M,), (M,).

    The same seeds are paired. Otherwise the deviation is that of the difference of two independent runs.
    """
    after, before = group.loss[:, -1], baseline.loss[:, -1]  # (S, M)
    if group.seeds == baseline.seeds:
        return (after - before).mean(axis=0), deviation(after - before)
    return after.mean(axis=0) - before.mean(axis=0), np.hypot(deviation(after), deviation(before))


def passing(group, target, column):
    """Index of the first evaluation at which the seeds' mean is at or below target; None if there is none."""
    reached = np.flatnonzero(group.loss[..., column].mean(axis=0) <= target)
    return int(reached[0]) if len(reached) else None


def speed_up(group, baseline):
    """Tokens that the baseline takes to its last mean loss, over those that the group takes; None if it does not."""
    target = baseline.loss[..., MEAN].mean(axis=0)[-1]
    there, index = passing(baseline, target, MEAN), passing(group, target, MEAN)
    return None if index is None else float(baseline.tokens[there] / group.tokens[index])


# ---- reading the runs ----

def held_out(config):
    """What decides which tokens are held out."""
    return {"domains": sorted(config["domains"]), "block_size": config["model"]["block_size"],
            "eval_windows": config["flags"]["eval_windows"],
            **{name: config["data"][name] for name in ("tokenizer_sha256", "vocab_size", "train_tokens")}}


def read_evaluations(run, config, domains):
    """{step: (tokens, losses (K,))} of a finished run.  Raises UserError."""
    path, steps, found = run / "metrics.jsonl", config["flags"]["max_steps"], {}
    try:
        for line in path.read_text().splitlines():
            if "val_loss" in (entry := json.loads(line)):
                found[entry["step"]] = entry["tokens"], np.array([entry["val_loss"][name] for name in domains])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected the metrics of a finished run") from None
    if steps not in found:
        raise UserError(f"{run}: the run is unfinished, evaluated up to step {max(found, default=0)} of {steps}; "
                        "continue it with --resume")
    return found


def read_groups(runs):
    """The runs as groups of seeds, the baseline's first.  Raises UserError unless all have the same held-out tokens."""
    configs, members = [runtime.read_config(run) for run in runs], {}
    first, domains = configs[0], configs[0]["domains"]
    for run, config in zip(runs, configs):
        for name, value in held_out(config).items():
            if value != held_out(first)[name]:
                raise UserError(f"{run}: {name} is {shown(value)}, but {shown(held_out(first)[name])} in {runs[0]}; "
                                "losses can only be compared on the same held-out tokens")
        experiment = {name: value for name, value in runtime.identity(config).items() if name != "seed"}
        members.setdefault(json.dumps(experiment, sort_keys=True), []).append((config["flags"]["seed"], run, config))
    if len(members) < 2:
        raise UserError(f"{runs[0]}: only one experiment is given; give a baseline and at least one other run")
    share = np.array([first["data"]["train_tokens"][name] for name in domains], dtype=np.float64)
    stems = [re.sub(r"-(s|seed)\d+$", "", group[0][1].resolve().name) for group in members.values()]
    groups = []
    for stem, group in zip(stems, members.values()):
        seeds, paths, (config, *_) = zip(*sorted(group, key=lambda member: member[0]))
        if len(set(seeds)) < len(seeds):
            raise UserError(f"{', '.join(map(str, paths))}: the same experiment and seed twice; give each seed once")
        found = [read_evaluations(run, config, domains) for run in paths]
        step = sorted(set.intersection(*map(set, found)))
        loss = np.stack([[evaluations[t][1] for t in step] for evaluations in found])  # (S, N, K)
        groups.append(Group(stem if stems.count(stem) == 1 else str(group[0][1]), config, list(seeds),
                            np.array([config["sampling_weights"][name] for name in domains]), np.array(step),
                            np.array([found[0][t][0] for t in step]), with_summaries(loss, share / share.sum())))
    return groups


# ---- what it prints and draws ----

def pace(group, baseline):
    factor = speed_up(group, baseline)
    return "not reached" if factor is None else f"{factor:.2f}x"


def finding(group, baseline):
    mean, sd = change(group, baseline)
    spread = f" ± {sd[MEAN]:.3f}" if len(group.seeds) > 1 else ""
    return (f"{group.name} against {baseline.name}: better in {(mean[:MEAN] < 0).sum()} of {len(group.weights)} "
            f"domains, mean {mean[MEAN]:+.3f}{spread} nats, token-weighted {mean[WEIGHTED]:+.3f}, "
            f"speed-up {pace(group, baseline)}")


def table(groups):
    """Lines: the baseline's last losses, then each other group's change, with * where the loss is lower."""
    baseline, several = groups[0], any(len(group.seeds) > 1 for group in groups)
    domains, last = baseline.config["domains"], baseline.loss[:, -1]  # (S, M)
    columns = [["", "", *domains, *SUMMARIES, "domains better", "speed-up in tokens"],
               [baseline.name, "loss" + " ±     sd" * several,
                *(f"{m:.4f}" + f" ±{s:.4f}" * several for m, s in zip(last.mean(axis=0), deviation(last))), "", ""]]
    for group in groups[1:]:
        mean, sd = change(group, baseline)
        columns.append([group.name, "change " + " ±     sd" * several,
                        *(f"{m:+.4f}{'*' if m < 0 else ' '}" + f" ±{s:.4f}" * several for m, s in zip(mean, sd)),
                        f"{(mean[:MEAN] < 0).sum()} of {len(domains)}", pace(group, baseline)])
    return align(columns)


def draw_curves(axes, groups, styles, column):
    """One of the SUMMARIES over the steps, and the step at which each group passes the baseline's last value."""
    means = [group.loss[..., column].mean(axis=0) for group in groups]  # (N,) each
    top = max(mean[np.searchsorted(group.step, group.step[-1] / 4)] for group, mean in zip(groups, means))
    low, target = min(map(np.min, means)), means[0][-1]
    bottom = low - 0.15 * max(top - low, 1e-3)  # room for the steps' numbers; the steep start is above the top
    axes.axhline(target, color=GREY, linewidth=0.8, linestyle=":")
    for group, mean, (colour, marker, dash) in zip(groups, means, styles):
        sd = deviation(group.loss[..., column])
        axes.fill_between(group.step, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
        axes.plot(group.step, mean, dash, color=colour, marker=marker, markevery=[-1], label=group.name,
                  markerfacecolor="white" if group is groups[0] else colour)
        if group is not groups[0] and (index := passing(group, target, column)) is not None:
            axes.plot([group.step[index]] * 2, [bottom, mean[index]], dash, color=colour, linewidth=1)
            axes.annotate(group.step[index], (group.step[index], bottom), (-3, 3), textcoords="offset points",
                          ha="right", fontsize=8, color=colour)
    axes.set(xlim=(0, 1.02 * max(group.step[-1] for group in groups)), ylim=(bottom, top), xlabel="step")
    axes.set_title(f"held-out loss, {SUMMARIES[column]} (nats per token)", fontsize=10)


def draw(groups):
    """Sampling weights, change of loss per domain, and the mean and the worst domain's loss over the steps."""
    baseline, *others = groups
    K, n = len(baseline.weights), len(others)
    styles = [STYLES[0], *itertools.islice(itertools.cycle(STYLES[1:]), n)]
    order = np.argsort(change(others[-1], baseline)[0][:K], kind="stable")  # the last group's best domain on top
    figure = Figure(figsize=(15, max(5.0, K * max(0.24, 0.07 * n) + 1.5)), layout="constrained")
    axes = figure.subplot_mosaic([["weight", "change", "mean"], ["weight", "change", "worst"]],
                                 width_ratios=(1, 1.2, 1.4))
    for panel in axes.values():
        panel.spines[["top", "right"]].set_visible(False)
    rows, offsets = np.arange(K), np.linspace(-0.4, 0.4, n + 2)[1:-1]
    for group, offset, (colour, marker, _) in zip(others, offsets, styles[1:]):
        mean, sd = (values[:K][order] for values in change(group, baseline))
        axes["weight"].plot(group.weights[order], rows + offset, marker, color=colour, markersize=5)
        axes["change"].errorbar(mean, rows + offset, xerr=sd if sd.any() else None, fmt=marker, color=colour,
                                markersize=5, capsize=2)
    axes["weight"].plot(baseline.weights[order], rows, "o", color=GREY, markerfacecolor="none")
    positive = np.concatenate([group.weights[group.weights > 0] for group in groups])
    weight_axis(axes["weight"].xaxis, positive.min() / 1.3, min(1.0, 1.3 * positive.max()))
    axes["change"].axvline(0, color=GREY, linewidth=1)
    axes["change"].grid(True, color="0.9", linewidth=0.6)
    axes["weight"].set(ylim=(K - 0.5, -0.5), xlabel="sampling weight")
    axes["change"].set(ylim=(K - 0.5, -0.5), xlabel="change of held-out loss (nats per token)")
    axes["weight"].set_yticks(rows, [baseline.config["domains"][i] for i in order], fontsize=9)
    axes["change"].set_yticks(rows, [""] * K)
    axes["change"].tick_params(axis="y", length=0)
    axes["change"].set_title(f"left of 0: better than {baseline.name}", fontsize=10)
    draw_curves(axes["mean"], groups, styles, MEAN)
    draw_curves(axes["worst"], groups, styles, WORST)
    axes["mean"].legend(loc="upper right", fontsize=9, frameon=False)
    return figure


# ---- the script ----

def main(argv=None):
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="directory of a finished run; the first is the baseline")
    add("--out_dir", type=Path, help="where compare.png goes (default: the last run's directory)")
    args = parser.parse_args(argv)
    groups = read_groups(args.runs)
    baseline, *others = groups
    print("\n".join(["last held-out loss in nats per token, and its change from the baseline; * is lower", "",
                     *table(groups), ""]))
    for group in others:
        for what, value, expected in (("parameters", group.config["n_params"], baseline.config["n_params"]),
                                      ("tokens", group.tokens[-1], baseline.tokens[-1])):
            if value != expected:
                print(f"note: {group.name} has {value:,} {what}, {baseline.name} has {expected:,}")
        if group.seeds != baseline.seeds:
            print(f"note: {group.name} has seeds {group.seeds}, {baseline.name} has {baseline.seeds}: not paired")
        print(finding(group, baseline))
    figure, config = draw(groups), baseline.config
    add_titles(figure, finding(others[-1], baseline),
               f"{config['n_params']:,} parameters, {config['flags']['max_steps']:,} steps, tokenizer "
               f"{config['data']['tokenizer']}, seed {', '.join(map(str, baseline.seeds))}"
               + "; bars and bands: standard deviation over the seeds" * (len(baseline.seeds) > 1))
    out_dir = args.out_dir or args.runs[-1]
    out_dir.mkdir(parents=True, exist_ok=True)
    runtime.write_atomically(out_dir / "compare.png", lambda file: figure.savefig(file, format="png", dpi=110))
    print(f"written: {out_dir / 'compare.png'}")


if __name__ == "__main__":
    cli.run(main)
