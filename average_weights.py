"""Stage 3 of DoReMi: average the proxy's domain weights over its steps. The average is DoReMi's answer.

reads   RUN/{config.json, ckpt.pt} of one finished proxy run, or of several seeds of it
writes  OUT_DIR/{weights.json, weights.png}
next    python train_large.py --data_dir=DATA --out_dir=checkpoints/large-doremi --sampling_weights=OUT_DIR/weights.json

With --onto the answer is moved onto other reference weights, or onto other domains, without a new run.

Dimensions: S seeds, T steps, K domains of the run, D domains of the answer (K, unless it is moved).
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from common import cli, figures
from common.cli import UserError
from common.figures import percent
from common.files import write_atomically
from common.run import check_same, identity, load_finished
from sampler import load_dataset, sampling_weights

EXCEPTIONS = {"unknown": "unknown to the run, so with the new reference weight",
              "without_weight": "of reference weight 0 in the run, so with the new reference weight",
              "dropped": "not in the new data, so dropped"}

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


def moved(answer, old, new):
    """Move an answer onto new reference weights: proportional to new * answer / old (docs/theory.md: the tilt stays).

    answer: (..., D); old, new: (D,) reference weights, of sum 1 each. Where the old one is 0 or NaN (a domain that the
    run did not know) the tilt is unknown and the domain keeps its new reference weight; the others share what is left
    of 1. The answer is 0 on a domain that the new reference leaves out.  Raises UserError where nothing can be moved.
    """
    known = old > 0  # False for NaN
    if not known.any():
        raise UserError("--onto: the run has no domain of that data set with a reference weight above 0")
    tilted = new[known] * answer[..., known] / old[known]
    total = tilted.sum(axis=-1, keepdims=True)
    share = new[known].sum()
    if share > 0 and not (total > 0).all():
        raise UserError("--onto: the answer is 0 on all domains that the new reference weights have in common with it")
    found = np.broadcast_to(new, answer.shape).copy()
    found[..., known] = share * tilted / np.where(total > 0, total, 1)
    return found


# ---- reading the runs ----


def read_alpha(run):
    """Config and alpha_1..alpha_T, (T, K) float64, of a finished proxy run.  Raises UserError.

    They come from the checkpoint: the list of the published recipe holds the same, but takes long to read.
    """
    config, checkpoint = load_finished(run, ("proxy",))
    steps, k = config["flags"]["max_steps"], len(config["domains"])
    try:
        alpha = checkpoint["alpha_history"].double().numpy()
    except (KeyError, AttributeError, TypeError):
        alpha = np.zeros(0)
    simplex = alpha.shape == (steps, k) and (alpha >= 0).all() and (np.abs(alpha.sum(axis=1) - 1) <= 1e-6).all()
    if not simplex:  # of NaN, too
        raise UserError(f"{run}/ckpt.pt: alpha_history is not {steps} steps of {k} weights >= 0 of sum 1; train again")
    return config, alpha


def read_seeds(runs):
    """Configs and alphas (S, T, K) of proxy runs.  Raises UserError if more than the seed differs between them."""
    configs, alphas = zip(*[read_alpha(run) for run in runs])
    of_a_seed = {name: None for name in ("seed", "reference.seed", "reference.fingerprint")}
    check_same(runs, [identity(config) | of_a_seed for config in configs], "only the seed may differ")
    if len({(config["flags"]["seed"], config["reference"]["fingerprint"]) for config in configs}) < len(runs):
        raise UserError("two of the runs have the same seed and the same reference; give each seed once")
    return configs, np.stack(alphas)


@dataclass
class Answer:
    domains: list  # D names
    tokens: np.ndarray  # (D,) training tokens
    reference: np.ndarray  # (D,) the reference's weights
    by_seed: np.ndarray  # (S, D)
    weights: np.ndarray  # (D,), the mean over the seeds: DoReMi's answer


def read_answer(config, alphas):
    domains = config["domains"]
    tokens = np.array([config["data"]["train_tokens"][name] for name in domains], dtype=np.float64)
    reference = np.array([config["reference"]["sampling_weights"][name] for name in domains])
    by_seed = np.stack([running_average(alpha)[-1] for alpha in alphas])
    return Answer(domains, tokens, reference, by_seed, by_seed.mean(axis=0))


def move_answer(answer, dataset, spec, planned_tokens):
    """Move an answer onto the reference weights that `spec` gives the domains of a data set.

    Return it, and {kind: names} of domains that are exceptions, see EXCEPTIONS.
    """
    if "unimax" in spec and not planned_tokens:
        raise UserError(f"--onto={spec}: unimax needs --large_tokens, the tokens that are shared out")
    new = sampling_weights(spec, dataset, planned_tokens)
    names = list(dataset.domains)
    old, by_seed = np.full(len(names), np.nan), np.zeros((len(answer.by_seed), len(names)))
    weights = np.zeros(len(names))
    for i, name in enumerate(names):
        if name in answer.domains:
            place = answer.domains.index(name)
            old[i] = answer.reference[place]
            by_seed[:, i] = answer.by_seed[:, place]
            weights[i] = answer.weights[place]
    exceptions = {
        "unknown": [name for name, weight in zip(names, old) if np.isnan(weight)],
        "without_weight": [name for name, weight in zip(names, old) if weight == 0],
        "dropped": [name for name in answer.domains if name not in names]}
    result = Answer(names, dataset.token_counts(), new, moved(by_seed, old, new), moved(weights, old, new))
    return result, exceptions


# ---- what it prints and draws ----


def answer_table(answer, large_tokens, last_alpha=None):
    """Lines.  large_tokens: of the large run, or None; last_alpha: (D,), or None where the answer was moved."""
    ratio = answer.weights / np.where(answer.reference > 0, answer.reference, np.nan)
    columns = [("tokens", answer.tokens / answer.tokens.sum(), ".4f"), ("reference", answer.reference, ".4f"),
               ("answer", answer.weights, ".4f")]
    if len(answer.by_seed) > 1:
        columns.append(("sd (seeds)", answer.by_seed.std(axis=0, ddof=1), ".4f"))
    columns.append(("ratio", ratio, ".2f"))
    if last_alpha is not None:
        columns.append(("last alpha", last_alpha, ".4f"))
    if large_tokens:
        columns.append(("epochs", answer.weights * large_tokens / answer.tokens, ".1f"))
    cells = [[title, *(f"{value:{form}}" for value in values)] for title, values, form in columns]
    return figures.align([["", *answer.domains], *cells])


def trust(answer, alphas):
    """{what: how far the answer moved, and how sure it is, as text}.  alphas: (S, T, K)."""
    move, D = np.abs(answer.weights - answer.reference), len(answer.domains)
    several = len(answer.by_seed) > 1
    return {
        "largest move": f"{move.max():.4f} from the reference's weight ({answer.domains[move.argmax()]})",
        "between seeds": (f"{between_seeds(answer.by_seed):.3f} total variation, mean over pairs" if several else
                          "one seed only"),
        "between halves": f"{between_halves(alphas.mean(axis=0)):.3f} total variation",
        "to the reference": f"{total_variation(answer.weights, answer.reference):.3f} total variation",
        "to uniform": f"{total_variation(answer.weights, np.full(D, 1 / D)):.3f} total variation",
        "effective domains": f"{effective_domains(answer.weights):.2f} of {D}",
        "one-hot steps": f"{(alphas.max(axis=-1) > 0.9).mean():.1%}, with one domain above 0.9"}


def largest_changes(answer):
    """The largest gain and the largest loss of weight, in one line."""
    change = answer.weights - answer.reference
    up, down = (f"{answer.domains[i]} from {percent(answer.reference[i])} to {percent(answer.weights[i])}"
                for i in (change.argmax(), change.argmin()))
    return f"DoReMi raises {up} and lowers {down}"


def draw_answer(answer, domains, alphas):
    """Alpha over the steps, and each domain's weight before and after.  domains: of the run; alphas: (S, T, K)."""
    S, T, K = alphas.shape
    averages = np.stack([running_average(alpha) for alpha in alphas])  # (S, T, K)
    t = np.unique(np.linspace(0, T - 1, 600).astype(int))  # enough points for any width
    height = min(max(4.2, 0.23 * max(K, len(answer.domains)) + 1.6), figures.TALLEST)
    figure = Figure(figsize=(13, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))

    order = np.argsort(-averages[:, -1].mean(axis=0), kind="stable")
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, K))  # by rank, dark to light: readable in grey
    colour_of, lines = {}, []
    for i, colour, dash in zip(order, shades, itertools.cycle(("-", "--", "-.", ":"))):
        colour_of[domains[i]] = colour
        left.plot(t + 1, alphas[:, t, i].mean(axis=0), color=colour, linewidth=0.5, alpha=0.3)
        lines += left.plot(t + 1, averages[:, t, i].mean(axis=0), dash, color=colour, linewidth=2)
    figures.weight_axis(left.yaxis, np.append(averages.mean(axis=0), 1.0))
    left.set(xlim=(0, T), xlabel="step",
             title="alpha (thin) and its running average (thick)" + f", mean of {S} seeds" * (S > 1))
    figures.legend(left, lines, [domains[i] for i in order], loc="center left", bbox_to_anchor=(1, 0.5), handlelength=3)

    order = np.argsort(-answer.weights, kind="stable")
    names = [answer.domains[i] for i in order]
    right.hlines(range(len(names)), answer.reference[order], answer.weights[order], linewidth=1.5,
                 color=[colour_of.get(name, "0.7") for name in names])
    deviation = answer.by_seed.std(axis=0, ddof=1)[order] if S > 1 else None
    share = answer.tokens / answer.tokens.sum()
    marks = figures.draw_rows(right, names, [
        (share[order], None, {"color": "black", "marker": "|", "markersize": 11}),
        (answer.reference[order], None, figures.BEFORE),
        (answer.weights[order], deviation, {"color": "black", "marker": "D"})], height=0)
    figures.weight_axis(right.xaxis, np.concatenate([share, answer.reference, *answer.by_seed]))
    right.set_xlabel("weight")
    labels = ["share of the tokens", "reference", "answer" + ", sd of seeds" * (S > 1)]
    figures.legend(right, marks, labels, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    return figure


# ---- the script ----


def main(argv=None):
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="directory of a proxy run; several: seeds of one experiment")
    add("--out_dir", type=Path, help="where weights.json and weights.png go (default: the first run's "
        "directory; with --onto, its folder moved)")
    add("--large_tokens", type=cli.non_negative, help="tokens of the large run, such as 1e11: adds epochs")
    add("--large_params", type=cli.non_negative, help="its parameters, such as 8e9: adds the search's cost")
    add("--onto", metavar="WEIGHTS", help="move the answer onto these reference weights, given like --sampling_weights")
    add("--data_dir", help="the data set whose domains --onto speaks of (default: the run's)")
    args = parser.parse_args(argv)
    if args.large_params and not args.large_tokens:
        raise UserError("--large_params needs --large_tokens: the cost is a share of the whole large run")
    if args.data_dir and not args.onto:
        raise UserError("--data_dir needs --onto: without it, the answer is for the run's own data set")
    configs, alphas = read_seeds(args.runs)  # (S, T, K)
    config = configs[0]
    S, T, _ = alphas.shape
    answer = read_answer(config, alphas)
    data, flags, block_size = config["data"], config["flags"], config["model"]["block_size"]

    seeds = [each["flags"]["seed"] for each in configs]
    setting = (f"proxy of {config['n_params']:,} parameters, {T:,} steps of {flags['batch_size']} x {block_size} "
               f"tokens, tokenizer {data['tokenizer']}, seed{'s' * (S > 1)} {', '.join(map(str, seeds))}")
    provenance = {name: data[name] for name in ("tokenizer", "tokenizer_sha256", "data_dir")}
    notes, last_alpha = [], alphas[:, -1].mean(axis=0)
    if args.onto:
        dataset = load_dataset(args.data_dir or data["data_dir"], block_size)
        origin, last_alpha = answer, None
        answer, exceptions = move_answer(origin, dataset, args.onto, args.large_tokens)
        notes = [f"{', '.join(names)}: {EXCEPTIONS[kind]}" for kind, names in exceptions.items() if names]
        if dataset.meta["tokenizer_sha256"] != data["tokenizer_sha256"]:
            notes.append(f"{dataset.directory} has another tokenizer than the run; the tilt may be another, too")
        setting += f"; moved onto {args.onto}, {dataset.directory}"
        provenance |= {"tokenizer": dataset.meta["tokenizer"], "tokenizer_sha256": dataset.meta["tokenizer_sha256"],
                       "data_dir": dataset.directory}
        provenance["moved"] = {
            "onto": args.onto, **exceptions, "data_dir": data["data_dir"],
            "tokenizer_sha256": data["tokenizer_sha256"],
            "reference_weights": dict(zip(origin.domains, origin.reference.tolist())),
            "domain_weights": dict(zip(origin.domains, origin.weights.tolist()))}
    numbers = trust(answer, alphas)
    if args.large_params:
        origins = [each["reference"] for each in configs]
        references = len({each["fingerprint"] for each in origins})  # seeds may share one
        reference_tokens = references * origins[0]["max_steps"] * origins[0]["batch_size"] * block_size
        cost = search_cost(config["n_params"], reference_tokens, S * T * flags["batch_size"] * block_size,
                           args.large_params, args.large_tokens)
        numbers["cost"] = f"{100 * cost:.3g}% of the large run's FLOPs"

    out_dir = args.out_dir or (args.runs[0] / "moved" if args.onto else args.runs[0])
    out_dir.mkdir(parents=True, exist_ok=True)
    provenance |= {"reference_weights": dict(zip(answer.domains, answer.reference.tolist())),
                   "largest_move": float(np.abs(answer.weights - answer.reference).max()),
                   "n_params": config["n_params"], "block_size": block_size, "steps": T, "seeds": seeds}
    provenance |= {name: flags[name] for name in ("batch_size", "step_size", "smoothing")}
    content = {"domain_weights": dict(zip(answer.domains, answer.weights.tolist())), "provenance": provenance}
    write_atomically(out_dir / "weights.json", json.dumps(content, indent=2) + "\n")

    cli.print_anywhere("\n".join([setting, "", *answer_table(answer, args.large_tokens, last_alpha), ""]))
    for what, text in numbers.items():
        cli.print_anywhere(figures.escaped(f"{what:19}{text}"))
    for note in notes:
        cli.print_anywhere(figures.escaped(f"note: {note}"))
    cli.print_anywhere(f"\nwritten: {out_dir / 'weights.json'}")
    title = largest_changes(answer)
    with figures.style(title, setting, *answer.domains, *config["domains"]):
        figures.publish(draw_answer(answer, config["domains"], alphas), title, setting, out_dir / "weights.png")


if __name__ == "__main__":
    cli.run(main)
