"""Stage 5 of DoReMi, the profit: the held-out losses of two or more runs side by side.

reads   RUN/{config.json, metrics.jsonl} of finished runs on the same data; the first is the baseline
writes  OUT_DIR/compare.png
next    python evaluate.py RUN RUN --data_dir=DATA

Runs that differ in the seed alone form one group, shown as mean and standard deviation. Its name is its first
directory's without the seed: large-doremi-s1 and large-doremi-seed1 give large-doremi.

Dimensions: S seeds of a group, N evaluations, K domains, M = K + 3 losses: the domains' and their SUMMARIES.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from common import cli
from common.cli import UserError
from common.figures import BEFORE, STYLE, align, draw_rows, publish, weight_axis
from common.run import check_same, identity, read_config

SUMMARIES = ("mean", "token-weighted mean", "worst domain")
MEAN, WEIGHTED, WORST = -3, -2, -1  # their places among the M losses


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
    paired = group.seeds == baseline.seeds
    sd = deviation(after - before) if paired else np.hypot(deviation(after), deviation(before))
    return after.mean(axis=0) - before.mean(axis=0), sd


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

def read_evaluations(run, config, domains):
    """{step: losses (K,)} of a finished run.  Raises UserError."""
    path, steps, found = run / "metrics.jsonl", config["flags"]["max_steps"], {}
    try:
        for line in path.read_text().splitlines():
            if "val_loss" in (entry := json.loads(line)):
                found[entry["step"]] = np.array([entry["val_loss"][name] for name in domains])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected the metrics of a finished run") from None
    if steps not in found:
        raise UserError(f"{run}: the run is unfinished, evaluated up to step {max(found, default=0)} of {steps}; "
                        "continue it with --resume")
    return found


def read_groups(runs):
    """The runs as groups of seeds, the baseline's first.  Raises UserError unless all have the same held-out tokens."""
    configs, members, groups = [read_config(run) for run in runs], {}, []
    held_out = [{"domains": sorted(config["domains"]), "block_size": config["model"]["block_size"],
                 "eval_windows": config["flags"]["eval_windows"],
                 **{name: config["data"][name] for name in ("tokenizer_sha256", "vocab_size", "train_tokens")}}
                for config in configs]
    check_same(runs, held_out, "losses compare on the same held-out tokens only")
    for run, config in zip(runs, configs):
        experiment = json.dumps(identity(config) | {"seed": None}, sort_keys=True)
        members.setdefault(experiment, []).append((config["flags"]["seed"], run, config))
    if len(members) < 2:
        raise UserError(f"{runs[0]}: only one experiment is given; give a baseline and at least one other run")
    domains, counts = configs[0]["domains"], configs[0]["data"]["train_tokens"]
    share = np.array([counts[name] for name in domains]) / sum(counts.values())
    stems = [re.sub(r"-(s|seed)\d+$", "", group[0][1].resolve().name) for group in members.values()]
    for stem, group in zip(stems, members.values()):
        name = stem if stems.count(stem) == 1 else str(group[0][1])
        seeds, paths, (config, *_) = zip(*sorted(group, key=lambda member: member[0]))
        if len(set(seeds)) < len(seeds):
            raise UserError(f"{', '.join(map(str, paths))}: the same experiment and seed twice; give each seed once")
        found = [read_evaluations(run, config, domains) for run in paths]
        step = np.array(sorted(set.intersection(*map(set, found))))  # (N,)
        loss = with_summaries(np.array([[losses[t] for t in step] for losses in found]), share)  # (S, N, M)
        groups.append(SimpleNamespace(
            name=name, config=config, seeds=list(seeds), domains=domains, step=step, loss=loss,
            tokens=step * config["flags"]["batch_size"] * config["model"]["block_size"],
            weights=np.array([config["sampling_weights"][name] for name in domains])))
    return groups


# ---- what it prints and draws ----

def looks(n):
    """How to draw a baseline and n other runs: marker and dash tell them apart in grey, too."""
    return [BEFORE, *({"color": f"C{i}", "marker": "s^DvPX"[i % 6], "linestyle": ("--", "-.", ":")[i % 3]}
                      for i in range(n))]


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
    last = baseline.loss[:, -1]  # (S, M)
    columns = [["", "", *baseline.domains, *SUMMARIES, "domains better", "speed-up in tokens"],
               [baseline.name, "loss" + " ±     sd" * several,
                *(f"{m:.4f}" + f" ±{s:.4f}" * several for m, s in zip(last.mean(axis=0), deviation(last))), "", ""]]
    for group in groups[1:]:
        mean, sd = change(group, baseline)
        columns.append([group.name, "change " + " ±     sd" * several,
                        *(f"{m:+.4f}{'*' if m < 0 else ' '}" + f" ±{s:.4f}" * several for m, s in zip(mean, sd)),
                        f"{(mean[:MEAN] < 0).sum()} of {len(group.weights)}", pace(group, baseline)])
    return align(columns)


def draw_curves(axes, groups, column):
    """One of the SUMMARIES over the steps, and the step at which each group passes the baseline's last value."""
    means = [group.loss[..., column].mean(axis=0) for group in groups]  # (N,) each
    target = means[0][-1]
    axes.axhline(target, color="0.45", linewidth=0.8, linestyle=":")
    for group, mean, look in zip(groups, means, looks(len(groups) - 1)):
        sd, index = deviation(group.loss[..., column]), passing(group, target, column)
        axes.fill_between(group.step, mean - sd, mean + sd, color=look["color"], alpha=0.15, linewidth=0)
        axes.plot(group.step, mean, markevery=[-1], label=group.name, **look)
        if group is not groups[0] and index is not None:
            axes.axvline(group.step[index], ymax=0.1, color=look["color"])
            axes.annotate(f"{group.step[index]} ", (group.step[index], 0.03), xycoords=("data", "axes fraction"),
                          ha="right", fontsize=8, color=look["color"])
    top = max(mean[np.searchsorted(group.step, group.step[-1] / 4)] for group, mean in zip(groups, means))
    low = min(map(np.min, means))
    axes.set(xlim=(0, None), ylim=(low - 0.15 * max(top - low, 1e-3), top),  # the steep start is above the top
             xlabel="step", title=f"held-out loss, {SUMMARIES[column]} (nats per token)")


@matplotlib.rc_context(STYLE)
def draw(groups):
    """Sampling weights, change of loss per domain, and the mean and the worst domain's loss over the steps."""
    baseline, *others = groups
    K, marks = len(baseline.weights), looks(len(others))
    order = np.argsort(change(others[-1], baseline)[0][:K], kind="stable")  # the last group's best domain on top
    figure = Figure(figsize=(15, max(5.0, K * max(0.24, 0.07 * len(others)) + 1.5)), layout="constrained")
    axes = figure.subplot_mosaic([["weight", "change", "mean"], ["weight", "change", "worst"]],
                                 width_ratios=(1, 1.2, 1.4))
    draw_rows(axes["weight"], [baseline.domains[i] for i in order],
              [(group.name, group.weights[order], None, mark) for group, mark in zip(groups, marks)])
    weight_axis(axes["weight"].xaxis, np.concatenate([group.weights for group in groups]))
    axes["weight"].set_xlabel("sampling weight")
    draw_rows(axes["change"], [""] * K,
              [(group.name, *(values[order] for values in change(group, baseline)), mark)
               for group, mark in zip(others, marks[1:])])
    axes["change"].axvline(0, color="0.45", linewidth=1)
    axes["change"].locator_params(axis="x", nbins=7)
    axes["change"].set(title=f"left of 0: better than {baseline.name}",
                       xlabel="change of held-out loss (nats per token)")
    draw_curves(axes["mean"], groups, MEAN)
    draw_curves(axes["worst"], groups, WORST)
    axes["mean"].legend(loc="upper right")
    return figure


# ---- the script ----

def main(argv=None):
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished runs; the first is the baseline")
    parser.add_argument("--out_dir", type=Path, help="where compare.png goes (default: the last run's directory)")
    args = parser.parse_args(argv)
    groups = read_groups(args.runs)
    baseline, *others = groups
    print("last held-out loss in nats per token, and its change from the baseline; * is lower\n")
    print("\n".join([*table(groups), ""]))
    for group in others:
        for what, value, expected in (("parameters", group.config["n_params"], baseline.config["n_params"]),
                                      ("tokens", group.tokens[-1], baseline.tokens[-1])):
            if value != expected:
                print(f"note: {group.name} has {value:,} {what}, {baseline.name} has {expected:,}")
        if group.seeds != baseline.seeds:
            print(f"note: {group.name} has seeds {group.seeds}, {baseline.name} has {baseline.seeds}: not paired")
        print(finding(group, baseline))
    config, out_dir = baseline.config, args.out_dir or args.runs[-1]
    out_dir.mkdir(parents=True, exist_ok=True)
    setting = (f"{config['n_params']:,} parameters, {config['flags']['max_steps']:,} steps, tokenizer "
               f"{config['data']['tokenizer']}, seed {', '.join(map(str, baseline.seeds))}"
               + "; bars and bands: standard deviation over the seeds" * (len(baseline.seeds) > 1))
    publish(draw(groups), finding(others[-1], baseline), setting, out_dir / "compare.png", args.runs[-1])


if __name__ == "__main__":
    cli.run(main)
