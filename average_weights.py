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

from common import cli
from common.cli import UserError
from common.figures import BEFORE, STYLE, align, draw_rows, percent, publish, weight_axis
from common.files import write_atomically
from common.run import check_same, identity, read_config

# ---- the mathematics ----

def running_average(alpha):
    """alpha_bar_t = (1/t) * sum_{s=1..t} alpha_s.  alpha: (T, K), rows alpha_1..alpha_T.  Returns (T, K).

    cumsum adds in the order of the steps, like the published recipe's sum(), so the two agree to the bit.
    """
    return np.cumsum(alpha, axis=0) / np.arange(1, len(alpha) + 1)[:, None]


def total_variation(p, q):
    """Half the sum of |p - q|: the share of the tokens that moves to another domain, 0 to 1.  p, q: (..., K)."""
    return 0.5 * np.abs(p - q).sum(axis=-1)


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
        raise UserError(f"{run} is unfinished, {path.name} is missing; continue it with --resume")
    try:
        history = torch.load(path, map_location="cpu", weights_only=True)
        alpha = torch.stack([entry["domain_weights"].double() for entry in history]).numpy()
        whole = [entry["step"] for entry in history] == list(range(1, steps + 1)) and alpha.shape[1:] == (k,)
    except Exception:  # a damaged file can make torch.load raise anything
        whole = False
    if not (whole and (alpha >= 0).all() and (np.abs(alpha.sum(axis=1) - 1) <= 1e-6).all()):  # NaN fails too
        raise UserError(f"{path} cannot be read as steps 1 to {steps}, each of {k} weights >= 0 of sum 1; train again")
    return alpha


def read_seeds(runs):
    """Configs and alphas (S, T, K) of proxy runs.  Raises UserError if more than the seed differs between them."""
    configs = [read_config(run) for run in runs]
    if configs[0]["stage"] != "proxy":
        raise UserError(f"{runs[0]} is a {configs[0]['stage']} run; expected a proxy run of train_doremi.py")
    of_a_seed = {name: None for name in ("seed", "reference.seed", "reference.fingerprint")}
    check_same(runs, [identity(config) | of_a_seed for config in configs], "only the seed may differ")
    if len({(config["flags"]["seed"], config["reference"]["fingerprint"]) for config in configs}) < len(runs):
        raise UserError("two of the runs have the same seed and the same reference; give each seed once")
    return configs, np.stack([read_alpha(run, config) for run, config in zip(runs, configs)])


# ---- what it prints and draws, and what compare.py and evaluate.py share ----

def finding(domains, reference, answer):
    """The largest gain and the largest loss of weight, in one line."""
    up, down = (f"{domains[i]} from {percent(reference[i])} to {percent(answer[i])}"
                for i in ((answer - reference).argmax(), (answer - reference).argmin()))
    return f"DoReMi raises {up} and lowers {down}"


@matplotlib.rc_context(STYLE)
def draw(domains, share, reference, alphas):
    """Alpha over the steps, and each domain's weight before and after.  share, reference: (K,); alphas: (S, T, K)."""
    S, T, K = alphas.shape
    averages = np.stack([running_average(alpha) for alpha in alphas])  # (S, T, K)
    answers, answer = averages[:, -1], averages[:, -1].mean(axis=0)
    order = np.argsort(-answer, kind="stable")
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, K))  # by rank, dark to light: readable in grey
    t = np.unique(np.linspace(0, T - 1, 600).astype(int))  # enough points for any width
    figure = Figure(figsize=(13, max(4.2, 0.23 * K + 1.6)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for i, colour, dash in zip(order, colours, itertools.cycle(("-", "--", "-.", ":"))):
        left.plot(t + 1, alphas[:, t, i].mean(axis=0), color=colour, linewidth=0.5, alpha=0.3)
        left.plot(t + 1, averages[:, t, i].mean(axis=0), dash, color=colour, linewidth=2, label=domains[i])
    weight_axis(left.yaxis, np.append(averages.mean(axis=0), 1.0))
    left.set(xlim=(0, T), xlabel="step",
             title="alpha (thin) and its running average (thick)" + f", mean of {S} seeds" * (S > 1))
    left.legend(loc="center left", bbox_to_anchor=(1, 0.5), handlelength=3)

    right.hlines(range(K), reference[order], answer[order], color=colours, linewidth=1.5)
    deviation = answers.std(axis=0, ddof=1)[order] if S > 1 else None
    draw_rows(right, [domains[i] for i in order], [
        ("share of the tokens", share[order], None, {"color": "black", "marker": "|", "markersize": 11}),
        ("reference", reference[order], None, BEFORE),
        ("answer" + ", sd of seeds" * (S > 1), answer[order], deviation, {"color": "black", "marker": "D"})], height=0)
    weight_axis(right.xaxis, np.concatenate([share, reference, *answers]))
    right.set_xlabel("weight")
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    return figure


# ---- the script ----

def main(argv=None):
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="directory of a proxy run; several: seeds of one experiment")
    add("--out_dir", type=Path, help="where weights.json and weights.png go (default: the first run's directory)")
    add("--large_tokens", type=cli.non_negative, help="tokens of the large run, such as 1e11: adds epochs")
    add("--large_params", type=cli.non_negative, help="its parameters, such as 8e9: adds the search's cost")
    args = parser.parse_args(argv)
    if args.large_params and not args.large_tokens:
        raise UserError("--large_params needs --large_tokens: the cost is a share of the whole large run")
    configs, alphas = read_seeds(args.runs)  # (S, T, K)
    config, (S, T, K), out_dir = configs[0], alphas.shape, args.out_dir or args.runs[0]
    domains, flags, origin, data = (config[name] for name in ("domains", "flags", "reference", "data"))
    tokens = np.array([data["train_tokens"][name] for name in domains], dtype=np.float64)
    reference = np.array([origin["sampling_weights"][name] for name in domains])
    answers = np.stack([running_average(alpha)[-1] for alpha in alphas])  # (S, K)
    answer, share, seeds = answers.mean(axis=0), tokens / tokens.sum(), [each["flags"]["seed"] for each in configs]
    move, block_size = np.abs(answer - reference), config["model"]["block_size"]

    columns = {"tokens": share, "reference": reference, "answer": answer,
               **({"sd (seeds)": answers.std(axis=0, ddof=1)} if S > 1 else {}),
               "ratio": answer / np.where(reference > 0, reference, np.nan), "last alpha": alphas[:, -1].mean(axis=0),
               **({"epochs": answer * args.large_tokens / tokens} if args.large_tokens else {})}
    forms = {"ratio": ".2f", "epochs": ".1f"}
    table = align([["", *domains], *([name, *(f"{x:{forms.get(name, '.4f')}}" for x in values)]
                                     for name, values in columns.items())])
    numbers = {
        "largest move": f"{move.max():.4f} from the reference's weight ({domains[move.argmax()]})",
        "between seeds": f"{between_seeds(answers):.3f} total variation, mean over pairs" if S > 1 else "one seed only",
        "between halves": f"{between_halves(alphas.mean(axis=0)):.3f} total variation",
        "to the reference": f"{total_variation(answer, reference):.3f} total variation",
        "to uniform": f"{total_variation(answer, np.full(K, 1 / K)):.3f} total variation",
        "effective domains": f"{effective_domains(answer):.2f} of {K}",
        "one-hot steps": f"{(alphas.max(axis=-1) > 0.9).mean():.1%}, with one domain above 0.9"}
    if args.large_params:
        references = len({each["reference"]["fingerprint"] for each in configs})  # seeds may share one
        cost = search_cost(config["n_params"], references * origin["max_steps"] * origin["batch_size"] * block_size,
                           S * T * flags["batch_size"] * block_size, args.large_params, args.large_tokens)
        numbers["cost"] = f"{100 * cost:.3g}% of the large run's FLOPs"
    setting = (f"proxy of {config['n_params']:,} parameters, {T:,} steps of {flags['batch_size']} x {block_size} "
               f"tokens, tokenizer {data['tokenizer']}, seed{'s' * (S > 1)} {', '.join(map(str, seeds))}")
    print("\n".join([setting, "", *table, "", *(f"{name:19}{text}" for name, text in numbers.items()), ""]))

    weights = dict(zip(domains, answer.tolist()))
    provenance = {
        **{name: data[name] for name in ("tokenizer", "tokenizer_sha256", "data_dir")},
        "reference_weights": dict(zip(domains, reference.tolist())), "largest_move": float(move.max()),
        "n_params": config["n_params"], "block_size": block_size, "steps": T, "seeds": seeds,
        **{name: flags[name] for name in ("batch_size", "step_size", "smoothing")}}
    out_dir.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"domain_weights": weights, "provenance": provenance}, indent=2) + "\n"
    write_atomically(out_dir / "weights.json", content)
    print(f"written: {out_dir / 'weights.json'}")
    publish(draw(domains, share, reference, alphas), finding(domains, reference, answer), setting,
            out_dir / "weights.png", args.runs[-1], **{f"answer/{name}": weight for name, weight in weights.items()})


if __name__ == "__main__":
    cli.run(main)
