"""Stage 3 of DoReMi: average the proxy's domain weights over its steps. The average is DoReMi's answer.

reads   RUN/{config.json, ckpt.pt} of one finished proxy run, or of several seeds of it
writes  OUT_DIR/{weights.json, weights.png}
next    python train_large.py --data_dir=DATA --out_dir=checkpoints/large-doremi --sampling_weights=OUT_DIR/weights.json
        python -m tools.mixture DATA OUT_DIR/weights.json     tokens and epochs, another reference, another trainer

Dimensions: S seeds, T steps, K domains.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import cli, figures
from common.cli import UserError, check_same
from common.files import write_atomically
from common.run import identity, load_finished

# Above these a run is too short. Ours: 0.42 or more at 400 steps, 0.18 or less at 6,400; 0.5 at 300, 0.3 at 3,000
HALVES, WANDER = 0.3, 0.4

# ---- the mathematics ----


def running_average(alpha):
    """alpha_bar_t = (1/t) * sum_{s=1..t} alpha_s, added in this order, as the published recipe does.  (T, K) each."""
    return np.cumsum(alpha, axis=0) / np.arange(1, len(alpha) + 1)[:, None]


def total_variation(p, q):
    """Half the sum of |p - q|: the share of the tokens that moves to another domain, 0 to 1.  p, q: (..., K)."""
    return 0.5 * np.abs(p - q).sum(axis=-1)


def effective_domains(p):
    """exp(entropy): 1 if a single domain has all the weight, K if all weights are equal.  p: (K,) or more."""
    return np.exp(-(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1))  # 0 log 0 = 0


# ---- reading the runs ----


@dataclass
class Answer:
    domains: list  # K names
    seeds: list  # S
    alphas: np.ndarray  # (S, T, K): alpha_1..alpha_T of each seed
    token_share: np.ndarray  # (K,) of the training tokens
    reference_weights: np.ndarray  # (K,) that the reference was trained on
    by_seed: np.ndarray  # (S, K)
    weights: np.ndarray  # (K,), the mean over the seeds: DoReMi's answer

    def between_halves(self):
        """Total variation between the averages over the two halves of the steps. An odd middle step is in both."""
        alpha, T = self.alphas.mean(axis=0), self.alphas.shape[1]
        return float(total_variation(alpha[: (T + 1) // 2].mean(axis=0), alpha[T // 2 :].mean(axis=0)))

    def wander(self):
        """Mean total variation of alpha from its average over the steps."""
        return float(total_variation(self.alphas, self.by_seed[:, None]).mean())


def read_run(run):
    """Config and alpha_1..alpha_T, (T, K) float64, of a finished proxy run, from its checkpoint.  Raises UserError."""
    config, checkpoint = load_finished(run, ("proxy",))
    for name, drawn in zip(config["domains"], checkpoint["sampler"]["drawn"]):
        if not drawn:
            raise UserError(f"{run}: the proxy never drew from '{name}', so its weight there means nothing; change its "
                            "--sampling_weights, or leave out the domain")
    return config, checkpoint["alpha_history"].double().numpy()


def read_answer(runs):
    """Config of the first of several proxy runs, and their Answer.  Raises UserError if more than the seed differs."""
    configs, alphas = zip(*[read_run(run) for run in runs])
    of_a_seed = {name: None for name in ("seed", "reference.seed", "reference.fingerprint")}
    check_same(runs, [identity(config) | of_a_seed for config in configs], "only the seed may differ")
    if len({(config["flags"]["seed"], config["reference"]["fingerprint"]) for config in configs}) < len(runs):
        raise UserError("two of the runs have the same seed and the same reference; give each seed once")
    config, domains = configs[0], configs[0]["domains"]
    tokens = np.array([config["data"]["train_tokens"][name] for name in domains], dtype=np.float64)
    reference_weights = np.array([config["reference"]["sampling_weights"][name] for name in domains])
    by_seed = np.stack([running_average(alpha)[-1] for alpha in alphas])
    return config, Answer(domains, [each["flags"]["seed"] for each in configs], np.stack(alphas), tokens / tokens.sum(),
                          reference_weights, by_seed, by_seed.mean(axis=0))


# ---- what it writes, prints and draws ----


def weights_file(config, answer):
    """The content of weights.json."""
    provenance = {name: config["data"][name] for name in ("tokenizer", "tokenizer_sha256", "data_dir")}
    provenance |= {"reference_weights": dict(zip(answer.domains, answer.reference_weights.tolist())),
                   "largest_move": float(np.abs(answer.weights - answer.reference_weights).max()),
                   "between_halves": answer.between_halves(),
                   "n_params": config["n_params"], "block_size": config["model"]["block_size"],
                   "seeds": answer.seeds, "flags": config["flags"]}  # of the first seed
    return {"domain_weights": dict(zip(answer.domains, answer.weights.tolist())), "provenance": provenance}


def answer_table(answer):
    columns = [["", *answer.domains]]

    def add(title, values, form=".4f"):
        columns.append([title, *(f"{value:{form}}" if np.isfinite(value) else "-" for value in values)])

    add("tokens", answer.token_share)
    add("reference", answer.reference_weights)
    add("answer", answer.weights)
    if len(answer.seeds) > 1:
        add("sd (seeds)", answer.by_seed.std(axis=0, ddof=1))
    with np.errstate(divide="ignore"):
        add("ratio", answer.weights / answer.reference_weights, ".2f")
    add("last alpha", answer.alphas[:, -1].mean(axis=0))
    return cli.align(columns)


def trust(answer):
    """{what: text}: how far the answer moved, and how sure it is."""
    move = np.abs(answer.weights - answer.reference_weights)
    pairs = [total_variation(p, q) for p, q in itertools.combinations(answer.by_seed, 2)]
    return {
        "largest move": f"{move.max():.4f} from the reference's weight ({answer.domains[move.argmax()]})",
        "between seeds": f"{np.mean(pairs):.3f} total variation, mean over pairs" if pairs else "one seed only",
        "between halves": f"{answer.between_halves():.3f} total variation",
        "alpha to its mean": f"{answer.wander():.3f} total variation, mean over steps",
        "to the reference": f"{total_variation(answer.weights, answer.reference_weights):.3f} total variation",
        "effective domains": f"{effective_domains(answer.weights):.2f} of {len(answer.domains)}"}


def finding(answer):
    """What the answer says, in one line: that it says nothing yet, or its largest gain and its largest loss."""
    if answer.between_halves() > HALVES or answer.wander() > WANDER:
        return (f"Too short to trust: alpha still jumps between domains in these {answer.alphas.shape[1]:,} steps. "
                "Train the proxy for several thousand")
    change = answer.weights - answer.reference_weights
    moves = []
    for i in change.argmax(), change.argmin():
        before, after = (figures.percent(weights[i]) for weights in (answer.reference_weights, answer.weights))
        moves.append(f"{answer.domains[i]} from {before} to {after}")
    return f"DoReMi raises {moves[0]} and lowers {moves[1]}"


def draw_answer(answer):
    """Alpha over the steps, and each domain's weight before and after."""
    figure = figures.new(13, max(4.2, 0.23 * len(answer.domains) + 1.6))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    ranking, shades = np.argsort(-answer.weights, kind="stable"), figures.shades(len(answer.domains))
    draw_steps(left, answer, ranking, shades)
    draw_moves(right, answer, ranking, shades)
    return figure


def draw_steps(axes, answer, ranking, shades):
    S, T, _ = answer.alphas.shape
    averages = np.stack([running_average(alpha) for alpha in answer.alphas])  # (S, T, K)
    t = np.unique(np.linspace(0, T - 1, 600).astype(int))  # enough points for any width
    lines = []
    for i, shade, dash in zip(ranking, shades, itertools.cycle(("-", "--", "-.", ":"))):
        axes.plot(t + 1, answer.alphas[:, t, i].mean(axis=0), color=shade, linewidth=0.5, alpha=0.3)
        lines += axes.plot(t + 1, averages[:, t, i].mean(axis=0), dash, color=shade, linewidth=2)
    figures.weight_axis(axes.yaxis, np.append(averages.mean(axis=0), 1.0))
    axes.set(xlim=(0, T), xlabel="step",
             title="alpha (thin) and its running average (thick)" + f", mean of {S} seeds" * (S > 1))
    names = [answer.domains[i] for i in ranking]
    figures.legend(axes, lines, names, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=3)


def draw_moves(axes, answer, ranking, shades):
    several = len(answer.seeds) > 1
    share, before, after = (x[ranking] for x in (answer.token_share, answer.reference_weights, answer.weights))
    deviation = answer.by_seed.std(axis=0, ddof=1)[ranking] if several else None
    axes.hlines(range(len(ranking)), before, after, linewidth=1.5, color=shades)
    marks = figures.draw_rows(axes, [answer.domains[i] for i in ranking], [
        (share, None, {"color": "black", "marker": "|", "markersize": 11}),
        (before, None, figures.BEFORE),
        (after, deviation, {"color": "black", "marker": "D"})], height=0)
    figures.weight_axis(axes.xaxis, np.concatenate([share, before, *answer.by_seed]))
    axes.set_xlabel("weight")
    figures.legend(axes, marks, ["share of the tokens", "reference", "answer" + ", sd of seeds" * several],
                   loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)


def main(argv=None):
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("runs", nargs="+", type=cli.path, metavar="RUN", help="proxy runs: seeds of one experiment")
    parser.add_argument("--out_dir", type=cli.path, help="where the files go (default: the first run's directory)")
    args = parser.parse_args(argv)
    config, answer = read_answer(args.runs)
    flags, T = config["flags"], config["model"]["block_size"]
    setting = (f"proxy of {config['n_params']:,} parameters, {flags['max_steps']:,} steps of {flags['batch_size']} x "
               f"{T} tokens, tokenizer {config['data']['tokenizer']}, seed {', '.join(map(str, answer.seeds))}")
    out_dir = Path(args.out_dir or args.runs[0])
    write_atomically(out_dir / "weights.json", json.dumps(weights_file(config, answer), indent=2) + "\n")
    with figures.style():
        figures.save(draw_answer(answer), finding(answer), setting, out_dir / "weights.png")
    print("\n".join([setting, "", *answer_table(answer), ""]))
    for what, text in trust(answer).items():
        print(f"{what:19}{text}")
    print(f"\n{finding(answer)}\nwritten: {out_dir / 'weights.json'}, weights.png")


if __name__ == "__main__":
    cli.run(main)
