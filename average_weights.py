"""Stage 3 of DoReMi: average the proxy's domain weights over its steps. The average is DoReMi's answer.

reads   RUN/{config.json, doremi_domain_weights_STEP.pt} of one finished proxy run, or of several seeds of it
writes  OUT_DIR/{weights.json, weights.png}
next    python train_large.py --data_dir=DATA --out_dir=checkpoints/large-doremi --sampling_weights=OUT_DIR/weights.json

Dimensions: S seeds, T steps, K domains.
"""

import itertools
import json
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

import cli
import runtime
from cli import UserError, shown

GREY = "0.45"  # in every picture, a hollow grey circle is what came before: the reference, the baseline
DASHES = ("-", "--", "-.", ":")


# ---- the mathematics ----

def running_average(alpha):
    """alpha_bar_t = (1/t) * sum_{s=1..t} alpha_s.  alpha: (T, K), rows alpha_1..alpha_T.  Returns (T, K).

    cumsum adds in the order of the steps, like the published recipe's sum(), so the two agree to the bit.
    """
    return np.cumsum(alpha, axis=0) / np.arange(1, len(alpha) + 1)[:, None]


def total_variation(p, q):
    """Half the sum of |p - q|: the share of the tokens that moves to another domain, 0 to 1."""
    return 0.5 * float(np.abs(p - q).sum())


def between_seeds(answers):
    """Mean total variation over all pairs of answers (S, K); 0 for a single seed."""
    return float(np.mean([total_variation(p, q) for p, q in itertools.combinations(answers, 2)] or [0]))


def between_halves(alpha):
    """Total variation between the averages over the two halves of alpha (T, K). An odd middle step is in both."""
    return total_variation(alpha[: (len(alpha) + 1) // 2].mean(axis=0), alpha[len(alpha) // 2 :].mean(axis=0))


def effective_domains(p):
    """exp(entropy): 1 if a single domain has all the weight, K if all weights are equal.  p: (K,) or more."""
    return np.exp(-(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1))  # 0 log 0 = 0


def search_cost(n_params, reference_tokens, proxy_tokens, large_params, large_tokens):
    """FLOPs of the search as a fraction of the large run's: 6 N D to train, and 2 more for the proxy's reference."""
    return n_params * (6 * reference_tokens + 8 * proxy_tokens) / (6 * large_params * large_tokens)


# ---- reading the runs ----

def read_alpha(run, config):
    """alpha_1..alpha_T of a finished proxy run: (T, K) float64.  Raises UserError if the history is not whole."""
    steps, k = config["flags"]["max_steps"], len(config["domains"])
    path = run / f"doremi_domain_weights_{steps}.pt"
    if not path.exists():
        raise UserError(f"{run}: the run is unfinished, {path.name} is missing; finish it with: "
                        f"python train_doremi.py @{run}/flags.txt --resume")
    try:
        history = torch.load(path, map_location="cpu", weights_only=True)
        alpha = torch.stack([entry["domain_weights"].double() for entry in history]).numpy()
        whole = [entry["step"] for entry in history] == list(range(1, steps + 1)) and alpha.shape[1:] == (k,)
    except Exception as error:  # a damaged file can make torch.load raise anything
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); train the proxy again") from None
    if not (whole and (alpha >= 0).all() and (np.abs(alpha.sum(axis=1) - 1) <= 1e-6).all()):  # NaN fails too
        raise UserError(f"{path}: not a whole history; expected steps 1 to {steps} in order, each with {k} weights "
                        ">= 0 that sum to 1; train the proxy again")
    return alpha


def read_seeds(runs):
    """Configs and alphas (S, T, K) of proxy runs.  Raises UserError if more than the seed differs between them."""
    configs = [runtime.read_config(run) for run in runs]
    for run, config in zip(runs, configs):
        if config["stage"] != "proxy":
            raise UserError(f"{run}: a {config['stage']} run; expected a proxy run of train_doremi.py")
        first, other = runtime.identity(configs[0]), runtime.identity(config)
        for name in sorted((first.keys() | other.keys()) - {"seed", "reference.seed", "reference.fingerprint"}):
            if first.get(name) != other.get(name):
                raise UserError(f"{run}: {name} is {shown(other.get(name))}, but {shown(first.get(name))} in "
                                f"{runs[0]}; average only runs that differ in the seed alone")
    if len({(config["flags"]["seed"], config["reference"]["fingerprint"]) for config in configs}) < len(runs):
        raise UserError("two of the runs have the same seed and the same reference; give each seed once")
    return configs, np.stack([read_alpha(run, config) for run, config in zip(runs, configs)])


# ---- what it prints and draws ----

def percent(weight):
    return f"{100 * weight:.0f}%" if weight >= 0.0995 else f"{100 * weight:.2g}%"


def finding(domains, reference, answer):
    """The largest gain and the largest loss of weight, in one line."""
    up, down = (f"{domains[i]} from {percent(reference[i])} to {percent(answer[i])}"
                for i in ((answer - reference).argmax(), (answer - reference).argmin()))
    return f"DoReMi raises {up} and lowers {down}"


def align(columns):
    """Lines of a table from columns of strings, the first flush left and the others flush right."""
    widths = [max(map(len, column)) for column in columns]
    return [f"{row[0]:{widths[0]}}   " + "   ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))
            for row in zip(*columns)]


def weight_axis(axis, low, high):
    """Make an axis (axes.xaxis or axes.yaxis) logarithmic from low to high, with ticks in percent."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda weight, _: percent(weight)))
    axis.set_minor_formatter(NullFormatter())
    axis.axes.grid(True, color="0.9", linewidth=0.6)
    axis.axes.set_axisbelow(True)
    axis.axes.spines[["top", "right"]].set_visible(False)


def add_titles(figure, finding, setting):
    """The finding in bold at the top, the setting in small print at the bottom."""
    figure.suptitle(finding, weight="bold", fontsize=12, wrap=True)
    figure.supxlabel(setting, fontsize=8, color=GREY)


def draw(domains, share, reference, alphas):
    """Left: alpha and its running average over the steps.  Right: each domain's weight before and after.

    share, reference: (K,); alphas: (S, T, K).
    """
    (S, T, K), rows = alphas.shape, np.arange(alphas.shape[2])
    averages = np.stack([running_average(alpha) for alpha in alphas])  # (S, T, K)
    answers, answer = averages[:, -1], averages[:, -1].mean(axis=0)
    order = np.argsort(-answer, kind="stable")
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, K))  # by rank, dark to light: readable in grey
    t = np.unique(np.linspace(0, T - 1, 600).astype(int))  # enough points for any width
    figure = Figure(figsize=(13, max(4.2, 0.23 * K + 1.6)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for i, colour, dash in zip(order, colours, itertools.cycle(DASHES)):
        left.plot(t + 1, alphas[:, t, i].mean(axis=0), color=colour, linewidth=0.5, alpha=0.3)
        left.plot(t + 1, averages[:, t, i].mean(axis=0), dash, color=colour, linewidth=2, label=domains[i])
    weight_axis(left.yaxis, max(averages.mean(axis=0).min() / 1.5, 1e-6), 1.0)
    left.set(xlim=(0, T), xlabel="step")
    left.set_title("alpha (thin) and its running average (thick)" + f", mean of {S} seeds" * (S > 1), fontsize=10)
    left.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8, handlelength=3)

    right.hlines(rows, reference[order], answer[order], color=colours, linewidth=1.5)
    right.plot(share[order], rows, "|", color="black", markersize=11, label="share of the tokens")
    right.plot(reference[order], rows, "o", color=GREY, markerfacecolor="white", label="reference")
    seeds = np.abs(np.sort(answers, axis=0)[[0, -1]] - answer)[:, order]
    right.errorbar(answer[order], rows, xerr=seeds if S > 1 else None, fmt="kD", markersize=5, capsize=2,
                   label="answer" + ", range of seeds" * (S > 1))
    positive = np.concatenate([share, reference, *answers])
    weight_axis(right.xaxis, positive[positive > 0].min() / 1.3, min(1.0, 1.3 * positive.max()))
    right.set(ylim=(K - 0.5, -0.5), xlabel="weight")
    right.set_yticks(rows, [domains[i] for i in order], fontsize=9)
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, fontsize=9)
    return figure


# ---- the script ----

def main(argv=None):
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="directory of a proxy run; several: seeds of one experiment")
    add("--out_dir", type=Path, help="where weights.json and weights.png go (default: the first run's directory)")
    add("--large_tokens", type=cli.non_negative, default=0.0,
        help="tokens of the planned large run, such as 1e11: adds the epochs of each domain (default: none planned)")
    add("--large_params", type=cli.non_negative, default=0.0,
        help="parameters of the planned large model, such as 8e9: adds the cost of the search (default: none planned)")
    args = parser.parse_args(argv)
    if args.large_params and not args.large_tokens:
        raise UserError("--large_params needs --large_tokens: the cost is a share of the whole large run")
    configs, alphas = read_seeds(args.runs)  # (S, T, K)
    config, (S, T, K) = configs[0], alphas.shape
    domains, flags, block_size = config["domains"], config["flags"], config["model"]["block_size"]
    tokens = np.array([config["data"]["train_tokens"][name] for name in domains], dtype=np.float64)
    reference = np.array([config["reference"]["sampling_weights"][name] for name in domains])
    answers = np.stack([running_average(alpha)[-1] for alpha in alphas])  # (S, K)
    answer, share, seeds = answers.mean(axis=0), tokens / tokens.sum(), [c["flags"]["seed"] for c in configs]
    move = np.abs(answer - reference)

    columns = [("tokens", ".4f", share), ("reference", ".4f", reference), ("answer", ".4f", answer)]
    columns += [("sd (seeds)", ".4f", answers.std(axis=0, ddof=1))] if S > 1 else []
    columns += [("ratio", ".2f", answer / np.where(reference > 0, reference, np.nan)),
                ("last alpha", ".4f", alphas[:, -1].mean(axis=0))]
    columns += [("epochs", ".1f", answer * args.large_tokens / tokens)] if args.large_tokens else []
    table = align([["", *domains], *([name, *(f"{x:{form}}" for x in values)] for name, form, values in columns)])
    tv = "total variation"
    numbers = [
        ("largest move", f"{move.max():.4f} from the reference's weight ({domains[move.argmax()]})"),
        ("between seeds", f"{between_seeds(answers):.3f} {tv}, mean over pairs" if S > 1 else "one seed only"),
        ("between halves", f"{between_halves(alphas.mean(axis=0)):.3f} {tv}"),
        ("to the reference", f"{total_variation(answer, reference):.3f} {tv}"),
        ("to uniform", f"{total_variation(answer, np.full(K, 1 / K)):.3f} {tv}"),
        ("effective domains", f"{effective_domains(answer):.2f} of {K}"),
        ("one-hot steps", f"{(alphas.max(axis=-1) > 0.9).mean():.1%}, with one domain above 0.9")]
    if args.large_params:
        origin, references = config["reference"], len({c["reference"]["fingerprint"] for c in configs})  # maybe shared
        cost = search_cost(config["n_params"], references * origin["max_steps"] * origin["batch_size"] * block_size,
                           S * T * flags["batch_size"] * block_size, args.large_params, args.large_tokens)
        numbers.append(("cost", f"{100 * cost:.3g}% of the large run's FLOPs"))
    setting = (f"proxy of {config['n_params']:,} parameters, {T:,} steps of {flags['batch_size']} x {block_size} "
               f"tokens, tokenizer {config['data']['tokenizer']}, seed{'s' * (S > 1)} {', '.join(map(str, seeds))}")
    print("\n".join([setting, "", *table, "", *(f"{name:19}{text}" for name, text in numbers), ""]))

    provenance = {
        **{name: config["data"][name] for name in ("tokenizer", "tokenizer_sha256", "data_dir")},
        "reference_weights": dict(zip(domains, reference.tolist())), "largest_move": float(move.max()),
        "n_params": config["n_params"], "block_size": block_size, "steps": T, "seeds": seeds,
        **{name: flags[name] for name in ("batch_size", "step_size", "smoothing")}}
    content = {"domain_weights": dict(zip(domains, answer.tolist())), "provenance": provenance}
    figure = draw(domains, share, reference, alphas)
    add_titles(figure, finding(domains, reference, answer), setting)
    out_dir = args.out_dir or args.runs[0]
    out_dir.mkdir(parents=True, exist_ok=True)
    runtime.write_atomically(out_dir / "weights.png", lambda file: figure.savefig(file, format="png", dpi=110))
    runtime.write_atomically(out_dir / "weights.json", json.dumps(content, indent=2) + "\n")
    print(f"written: {out_dir / 'weights.json'}, {out_dir / 'weights.png'}")


if __name__ == "__main__":
    cli.run(main)
