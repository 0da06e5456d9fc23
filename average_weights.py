"""Stage 3 of DoReMi: average the proxy's domain weights over its steps; that average is the answer.

reads   RUN/{config.json, doremi_domain_weights_STEP.pt} of one proxy run, or of several that differ in the seed alone
writes  OUT_DIR/{weights.json, weights.png}
next    python train_large.py --data_dir=DATA --out_dir=checkpoints/large-doremi --domain_weights=OUT_DIR/weights.json
"""

import json
import math
import re
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

import cli
import trust
from checkpoint import write_atomically
from cli import ArgumentParser, UserError, shown
from report import GREY, add_titles, in_order, make_directory, percent, read_config, text_width, weight_axis
from trust import CONVERGED, effective_domains, total_variation

PROXY_FLAGS = ("max_steps", "batch_size", "step_size", "smoothing", "update_after")  # what the answer depends on


# ---- the mathematics: arrays in, numbers out


def running_average(alpha):
    """alpha_bar_t = (1/t) * sum_{s=1..t} alpha_s.  alpha (T, K), rows alpha_1..alpha_T.  Returns (T, K).

    cumsum adds in the order of the steps, as the published recipe's sum() does, so the two agree to the bit.
    """
    return np.cumsum(alpha, axis=0) / np.arange(1, len(alpha) + 1)[:, None]


# ---- reading a run's directory


def read_alpha(run, domains):
    """The newest weight history of a proxy run, doremi_domain_weights_STEP.pt with the largest STEP.

    Returns alpha (T, K) float64, rows alpha_1..alpha_T. Raises UserError unless the steps are exactly 1..STEP and every
    row is finite and on the simplex.
    """
    pattern = re.compile(r"doremi_domain_weights_(\d+)\.pt")
    saved = {int(match[1]): file for file in run.glob("*.pt") if (match := pattern.fullmatch(file.name))}
    if not saved:
        raise UserError(f"{run}: no doremi_domain_weights_STEP.pt; let train_doremi.py reach its first save.")
    last_step, path = max(saved.items())
    try:
        entries = torch.load(path, map_location="cpu", weights_only=True)
        steps = [entry["step"] for entry in entries]
        weights = [entry["domain_weights"].to(torch.float64) for entry in entries]
    except Exception as error:  # torch.load raises whatever the broken bytes lead it to
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); damaged or no weight history.") from None
    if steps != list(range(1, last_step + 1)):
        t = next((t for t, step in enumerate(steps[:last_step], start=1) if step != t), min(len(steps), last_step) + 1)
        raise UserError(f"{path}: expected steps 1 to {last_step}, each once; found {len(steps)}, astray at step {t}.")
    for step, row in enumerate(weights, start=1):
        if tuple(row.shape) != (len(domains),):
            raise UserError(f"{path}: step {step} has weights of shape {tuple(row.shape)}, for {len(domains)} domains.")
    alpha = torch.stack(weights).numpy()  # (T, K)
    sound = (alpha >= 0).all(axis=1) & (np.abs(alpha.sum(axis=1) - 1) <= 1e-6)  # False for NaN and infinity too
    if not sound.all():
        t = int(sound.argmin())
        raise UserError(f"{path}: the weights of step {t + 1} are {alpha[t].tolist()}; expected numbers >= 0 of sum 1.")
    return alpha


def experiment(config):
    """All that must be the same in runs that are averaged as seeds of one experiment, by the names used in messages."""
    return {
        "domains": config["domains"],
        **{name: config["data"][name] for name in ("tokenizer_sha256", "vocab_size", "train_tokens")},
        "model": config["model"],
        **{name: config["flags"][name] for name in PROXY_FLAGS},
        "sampling_weights": config["sampling_weights"],
        "reference's sampling_weights": config["reference"]["sampling_weights"],
        **{f"reference's {name}": config["reference"][name] for name in ("max_steps", "batch_size")},
    }


def read_seeds(runs):
    """Configs and alphas (S, T, K) of S proxy runs. Raises UserError where more than the seed differs between them."""
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("the same run is given twice; give each seed's directory once.")
    configs, alphas = [], []
    for run in runs:
        config = read_config(run)
        if config["stage"] != "proxy":
            raise UserError(f"{run}: a run of stage '{config['stage']}'; expected one of train_doremi.py.")
        for name, value in experiment(config).items():
            if configs and value != (first := experiment(configs[0])[name]):
                raise UserError(f"{run}: {name} is {shown(value)}, but {shown(first)} in {runs[0]}; "
                                "average only runs that differ in the seed alone.")
        configs.append(config)
        alphas.append(read_alpha(run, config["domains"]))
        if len(alphas[-1]) != len(alphas[0]):
            raise UserError(f"{run}: has {len(alphas[-1])} steps, but {runs[0]} has {len(alphas[0])}; "
                            "resume the shorter run, or average each alone.")
    return configs, np.stack(alphas)


# ---- what it says


def times(before, after):
    """The change of a weight as a factor: ×3.0, ÷12."""
    if before == 0 or after == 0:
        return "new" if before == 0 else "gone"
    sign, factor = ("\N{MULTIPLICATION SIGN}", after / before) if after >= before else ("÷", before / after)
    return sign + (f"{factor:.1f}" if factor < 9.95 else f"{factor:.0f}")


def headline(domains, reference, answer):
    """The finding in one line: the largest gain and the largest loss of weight."""
    change = answer - reference
    if np.abs(change).max() < CONVERGED:
        return "DoReMi confirms the reference's weights: no domain moves by 0.1% of the tokens"
    up, down = (
        f"{domains[i]} from {percent(reference[i])} to {percent(answer[i])} ({times(reference[i], answer[i])})"
        for i in (change.argmax(), change.argmin())
    )
    return f"DoReMi raises {up} and lowers {down}"


def table(domains, share, reference, answers, last_alpha):
    """Lines of the table, a row per domain in meta.json's order.  share, reference, last_alpha (K,); answers (S, K)."""
    answer, several, width = answers.mean(axis=0), len(answers) > 1, max(map(len, [*domains, "domain"]))
    sd = answers.std(axis=0, ddof=1) if several else None
    lines = [f"{'domain':{width}}   tokens  reference   answer{'  sd(seeds)' * several}   ratio  last alpha"]
    for i, name in enumerate(domains):
        row = f"{name:{width}}   {share[i]:.4f}     {reference[i]:.4f}   {answer[i]:.4f}"
        row += f"  {sd[i]:9.4f}" if several else ""
        row += f" {answer[i] / reference[i]:7.2f}" if reference[i] > 0 else "     new"
        lines.append(f"{row}      {last_alpha[i]:.4f}")
    return lines


def provenance(runs, configs, answer, steps, average_from, **found):
    """Where the answer comes from: weights mean nothing without tokenizer, data, proxy, length and seeds.

    found: what is to be recorded as it is.
    """
    config = configs[0]
    domains, flags, weights = config["domains"], config["flags"], config["reference"]["sampling_weights"]
    reference = in_order(weights, domains, "reference's sampling_weights")
    return {
        **{name: config["data"][name] for name in ("tokenizer", "tokenizer_sha256", "vocab_size", "data_dir")},
        "train_tokens": config["data"]["train_tokens"],
        "reference": {"sampling_weights": weights, "max_steps": config["reference"]["max_steps"]},
        "largest_move": float(np.abs(answer - reference).max()),
        "converged": bool(np.abs(answer - reference).max() < CONVERGED),
        "total_variation": total_variation(answer, reference),
        "effective_domains": float(effective_domains(answer)),
        **found,
        "proxy": {"model": config["model"], "n_params": config["n_params"]},
        "sampling_weights": config["sampling_weights"],
        "steps": steps,
        **{name: flags[name] for name in PROXY_FLAGS},
        "block_size": config["model"]["block_size"],
        "average_from": average_from,
        "seeds": [c["flags"]["seed"] for c in configs],
        "runs": [{"out_dir": str(run), "seed": config["flags"]["seed"], "reference": config["reference"]["out_dir"],
                  "reference_seed": config["reference"]["seed"], "versions": config["versions"]}
                 for run, config in zip(runs, configs)],
    }


# ---- the picture


def thin(alpha, points=600):
    """The middles (P,) and means (P, K) of P <= points equal stretches of alpha (T, K): long runs stay light."""
    edges = np.linspace(0, len(alpha), min(points, len(alpha)) + 1).astype(int)
    middles = (edges[:-1] + edges[1:] + 1) / 2  # steps count from 1
    return middles, np.add.reduceat(alpha, edges[:-1]) / np.diff(edges)[:, None]


def draw(domains, share, reference, alphas, skipped, setting):
    """Left, alpha over steps with its running average; right, each domain's weight before and after.

    share, reference (K,); alphas (S, T, K); the first `skipped` steps are not averaged; setting: a line of small print.
    """
    S, T, K = alphas.shape
    averages = np.stack([running_average(alpha[skipped:]) for alpha in alphas])  # (S, T - skipped, K)
    answers = averages[:, -1]
    answer = answers.mean(axis=0)
    order = np.argsort(-answer, kind="stable")
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.82, K))  # by rank, dark to light: readable in grey

    # One row of labels between the panels serves both: lines lead to it from the left, the right panel continues it.
    plots, label, gap, side = 4.6, text_width(domains, 9), 0.45, 0.75
    width, height = side + 2 * plots + label + 2 * gap, max(3.4, 0.21 * K + 0.6) + 1.55
    figure = Figure(figsize=(width, height))
    bottom, tall = 0.55 / height, 1 - 1.55 / height
    left = figure.add_axes([side / width, bottom, plots / width, tall])
    right = figure.add_axes([(side + plots + label + gap + 0.1) / width, bottom, (plots - 0.7) / width, tall])

    floor = min(array[array > 0].min() for array in (share, reference, answers))
    low, high = floor / 1.6, min(1.0, 1.3 * max(array.max() for array in (share, reference, answers)))
    steps, thinned = thin(alphas.mean(axis=0))
    weight_axis(left.yaxis, max(min(low, thinned.min() / 1.2), 1e-6), min(1.0, 1.2 * max(high, thinned.max())))
    for rank, i in enumerate(order):
        left.plot(steps, thinned[:, i], color=colours[rank], linewidth=0.5, alpha=0.35)
        x, average = thin(averages[:, :, i].T)  # (P, S)
        x = x + skipped
        if S > 1:
            left.fill_between(x, average.min(axis=1), average.max(axis=1), color=colours[rank], alpha=0.25, linewidth=0)
        left.plot(x, average.mean(axis=1), color=colours[rank], linewidth=2)
        start = left.transAxes.inverted().transform(left.transData.transform((T, answer[i])))[1]
        row = 1 - (rank + 0.5) / K
        left.plot([1, 1.01, 1 + (gap - 0.08) / plots], [start, start, row], transform=left.transAxes, clip_on=False,
                  color=colours[rank], linewidth=0.8)
        left.text(1 + (gap - 0.03) / plots, row, domains[i], transform=left.transAxes, va="center", fontsize=9)
    left.set(xlim=(0, T), xlabel="step")
    title = "alpha at each step (thin) and its running average (thick)"
    left.set_title(title + f": mean and range of {S} seeds" * (S > 1), fontsize=9)

    weight_axis(right.xaxis, low, high)
    rows = np.arange(K)
    if S > 1:  # the seeds' range, as on the left
        right.hlines(rows, *np.sort(answers, axis=0)[[0, -1]][:, order], color=colours, linewidth=7, alpha=0.3)
    before, tokens = np.maximum(reference, low)[order], np.maximum(share, low)[order]  # a weight of 0 lies on the edge
    right.plot(tokens, rows, "|", color="black", markersize=10, zorder=4, label="share of the tokens")
    right.plot(before, rows, "o", color=GREY, markerfacecolor="white", label="reference")
    right.hlines(rows, before, answer[order], color=colours, linewidth=1.5, zorder=1.5)
    right.scatter(answer[order], rows, color=colours, zorder=3, label="DoReMi's answer")
    for row, i in enumerate(order):
        factor = times(reference[i], answer[i])
        right.text(1.02, row, factor, transform=right.get_yaxis_transform(), va="center", fontsize=9)
    right.set(ylim=(K - 0.5, -0.5), yticks=[], xlabel="weight")
    right.spines["left"].set_visible(False)
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3, frameon=False, fontsize=8, handletextpad=0.2)
    add_titles(figure, headline(domains, reference, answer), setting)
    return figure


# ---- the script


def main(argv=None):
    parser = ArgumentParser("Average a proxy's domain weights over its steps: DoReMi's answer.")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN",
        help="directory of a proxy run; several: seeds of one experiment, whose answers are averaged")
    add("--out_dir", type=Path, help="where weights.json and weights.png go (default: the first run's directory)")
    add("--average_from", type=float, default=0.0,
        help="fraction of the steps left out at the start, 0 to below 1 (default %(default)s, the paper's rule: all "
        "steps count). Not in the paper: the early steps show a proxy that has learnt little")
    add("--large_tokens", type=float, help="tokens of the planned large run, such as 1e11: says which domains "
        "it would repeat more than 4 times")
    add("--large_params", type=float, help="parameters of the planned large model, such as 8e9: what the search "
        "costs, as a share of that run")
    args = parser.parse_args(argv)
    if not (0.0 <= args.average_from < 1.0):
        raise UserError(f"--average_from: {args.average_from} is no fraction of a run; give 0 to below 1, such as 0.2.")
    for name in ("large_tokens", "large_params"):
        if (number := getattr(args, name)) is not None and not 0 < number < math.inf:
            raise UserError(f"--{name}={number:g}: expected a finite number above 0, such as 8e9.")
    configs, alphas = read_seeds(args.runs)
    config, (S, T) = configs[0], alphas.shape[:2]
    domains, flags = config["domains"], config["flags"]
    tokens = in_order(config["data"]["train_tokens"], domains, "train_tokens")
    share = tokens / tokens.sum()
    reference = in_order(config["reference"]["sampling_weights"], domains, "reference's sampling_weights")
    skipped = int(args.average_from * T)
    averaged = alphas[:, skipped:]
    answers = np.stack([running_average(alpha)[-1] for alpha in averaged])  # (S, K)
    answer, seeds = answers.mean(axis=0), [c["flags"]["seed"] for c in configs]
    spread = trust.measure_spread(domains, answers, averaged, max(0, flags["update_after"] - skipped))
    block_size, first = config["model"]["block_size"], config["reference"]
    step_tokens = flags["batch_size"] * block_size
    references = len({(c["reference"]["out_dir"], c["reference"]["seed"]) for c in configs})  # seeds may share one
    reference_tokens = references * first["max_steps"] * first["batch_size"] * block_size
    flops = trust.search_flops(config["n_params"], reference_tokens, S * T * step_tokens)

    setting = (f"Proxy of {config['n_params']:,} parameters, {T} steps of {flags['batch_size']} x "
               f"{config['model']['block_size']} tokens, tokenizer {config['data']['tokenizer']}, "
               f"seed{'s' * (S > 1)} {', '.join(map(str, seeds))}")
    print("\n".join([setting, "", *table(domains, share, reference, answers, alphas[:, -1].mean(axis=0)), ""]))
    print("\n".join([
        *trust.moves(domains, reference, answer, spread),
        *trust.of_alpha(domains, answer, averaged, flags["smoothing"]),
        *trust.of_large_run(domains, tokens, answer, config["n_params"], flops, T * step_tokens, args.large_params,
                            args.large_tokens)]))
    if flags["max_steps"] > T:
        print(f"note: {T} of {flags['max_steps']} steps are done and the answer still moves; go on with: "
              f"python train_doremi.py @{args.runs[0]}/flags.txt --resume")
    if len(set(seeds)) < S:
        print(f"note: the seeds {seeds} repeat; runs of one seed differ less than seeds do")
    if skipped:
        print(f"note: steps 1 to {skipped} are left out, which is not in the paper")

    out_dir = args.out_dir or args.runs[0]
    origin = provenance(args.runs, configs, answer, T, args.average_from, spread=spread,
                        near_one_hot=trust.near_one_hot(averaged), search_flops=flops)
    content = {"domain_weights": dict(zip(domains, answer.tolist())), "provenance": origin}
    figure = draw(domains, share, reference, alphas, skipped, setting)
    make_directory(out_dir)
    write_atomically(out_dir / "weights.png", lambda file: figure.savefig(file, format="png", dpi=150))
    write_atomically(out_dir / "weights.json", json.dumps(content, indent=2) + "\n")
    print(f"written: {out_dir / 'weights.json'}, {out_dir / 'weights.png'}")


if __name__ == "__main__":
    cli.run(main)
