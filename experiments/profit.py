"""Does the mixture help?  Large models on DoReMi's weights beside large models on simple mixtures, over several seeds.

reads   a data set of prepare.py
writes  OUT_DIR/{seed-S/..., results.json, profit.png, answers.png}, and prints the tables of docs/results.md
e.g.    python experiments/profit.py --data_dir=data/demo --out_dir=checkpoints/profit-demo --seeds=1,2,3,4,5

For each seed: a reference on uniform weights and one by token count, a proxy and an answer for each; further rounds of
DoReMi that begin at the uniform one; then a large model on every mixture, at equal tokens and equal everything else.
Differences are paired: within a seed the large models begin at the same parameters. Every run is one of the stages'
scripts, called as a person would call it; what is done is not done again: stop it and call it again at any time.
"""

import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli
import compare
from cli import UserError
from report import GREY, add_titles, in_order, read_config, text_width, weight_axis
from sampler import load_dataset, sampling_weights
from trust import CONVERGED, total_variation

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "token_count"
SIMPLE = (BASELINE, "uniform", "temperature:0.5", "unimax:4")
# By the reference's weights; the rounds begin at the uniform ones
LEARNED = ("DoReMi, natural", "DoReMi, uniform", "DoReMi, rounds")
STYLES = dict(zip((*SIMPLE[1:], *LEARNED), [("#21918c", "^"), ("#b8a200", "v"), ("0.7", "x"), ("#d95f02", "s"),
                                            ("#440154", "o"), ("#5b9bd5", "D")]))


# ---- running


class Stages:
    """Runs the stages' scripts, each in a directory of its own below out_dir; done.txt there says what was run."""

    def __init__(self, out_dir, jobs):
        self.out_dir, threads = Path(out_dir), max(1, (os.cpu_count() or 1) // jobs)
        self.env = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if jobs > 1 else {})}
        self.progress = tqdm(unit="run", desc=self.out_dir.name, dynamic_ncols=True)

    def run(self, script, name, *flags):
        """Runs a script to its end, its output in log.txt.  Returns OUT_DIR/name; raises UserError where it fails."""
        directory = self.out_dir / name
        command = shlex.join(["python", script, *flags])
        done, log = directory / "done.txt", directory / "log.txt"
        if done.exists():
            if (before := done.read_text().strip()) != command:
                raise UserError(f"{directory} holds the result of '{before}', now it would be '{command}'; choose "
                                "another --out_dir, or delete it.")
            return directory
        directory.mkdir(parents=True, exist_ok=True)
        self.progress.set_postfix_str(name)
        with open(log, "w") as output:
            status = subprocess.run([sys.executable, ROOT / script, *flags], stdout=output, stderr=output, env=self.env,
                                    cwd=ROOT).returncode
        if status:
            last = " ".join(log.read_text().strip().splitlines()[-1:])
            raise UserError(f"'{command}' ended with status {status}: {last} (all of it is in {log})")
        done.write_text(command + "\n")
        self.progress.update()
        return directory

    def train(self, script, name, *flags):
        return self.run(script, name, *flags, f"--out_dir={self.out_dir / name}", "--resume")

    def doremi(self, args, name, start, seed):
        """A round of DoReMi: reference on the weights `start`, proxy, answer.  Returns the path of its weights.json."""
        reference = self.train("train_reference.py", f"{name}/reference", f"--data_dir={args.data_dir}",
                               f"--domain_weights={start}", f"--seed={seed}", *args.small)
        proxy = self.train("train_doremi.py", f"{name}/proxy", f"--reference={reference}", *args.proxy)
        answer = self.out_dir / name / "answer"
        return self.run("average_weights.py", f"{name}/answer", str(proxy), f"--out_dir={answer}") / "weights.json"


def provenance(weights_json):
    return json.loads(weights_json.read_text())["provenance"]


def run_seed(stages, args, dataset, seed):
    """All runs of a seed.  Returns {mixture: its large run}, and the answers (paths of weights.json): of the reference
    by token count, and of the rounds that begin at uniform weights."""
    natural = stages.doremi(args, f"seed-{seed}/natural", BASELINE, seed)
    rounds = [stages.doremi(args, f"seed-{seed}/round-1", "uniform", seed)]
    while len(rounds) < args.rounds and provenance(rounds[-1])["largest_move"] >= CONVERGED:
        rounds.append(stages.doremi(args, f"seed-{seed}/round-{len(rounds) + 1}", rounds[-1], seed))
    runs = {}
    answers = dict(zip(LEARNED, [("natural", natural), ("round-1", rounds[0]), (f"round-{len(rounds)}", rounds[-1])]))
    for mixture, (name, spec) in {**{spec: (spec.replace(":", "-"), spec) for spec in SIMPLE}, **answers}.items():
        if twin := find_twin(runs.values(), str(spec), dataset):
            runs[mixture] = twin
        else:
            name = f"seed-{seed}/large/{name}"
            runs[mixture] = stages.train("train_large.py", name, f"--data_dir={args.data_dir}",
                                         f"--domain_weights={spec}", f"--seed={seed}", *args.large)
    return runs, natural, rounds


def find_twin(runs, spec, dataset):
    """The run that had these very weights, if there is one: unimax is uniform where nothing would be repeated often,
    the last round is the first where that has converged."""
    for run in runs:
        config = read_config(run)
        tokens = config["flags"]["max_steps"] * config["flags"]["batch_size"] * config["model"]["block_size"]
        weights = sampling_weights(spec, dataset, tokens)
        if np.allclose(weights, in_order(config["sampling_weights"], dataset.domains, str(run)), rtol=0, atol=1e-12):
            return run


# ---- what came out


def collect(seeds, outcome, domains):
    """All that the tables and figures need, as arrays over seeds S and domains K (and rounds R, evaluations N)."""
    results = {"seeds": seeds, "domains": list(domains), "mixtures": {}}
    for mixture in (*SIMPLE, *LEARNED):
        runs = [compare.read_evaluations(outcome[seed][0][mixture], mixture, domains) for seed in seeds]
        bases = [compare.read_evaluations(outcome[seed][0][BASELINE], BASELINE, domains) for seed in seeds]
        results["mixtures"][mixture] = {
            "weights": np.stack([run.weights for run in runs]),  # (S, K)
            "loss": np.stack([run.loss[-1] for run in runs]),  # (S, K) nats per token
            "bpb": np.stack([run.bpb[-1] for run in runs]),  # (S, K)
            "step": runs[0].step, "mean": np.stack([run.mean for run in runs]),  # (N,), (S, N)
            "speed_up": [compare.speed_up(run, base)[0] for run, base in zip(runs, bases)],
        }  # fmt: skip
    results["moves"] = [[provenance(path)["largest_move"] for path in outcome[seed][2]] for seed in seeds]
    results["n_params"] = {stage: read_config(run)["n_params"] for stage, run in (
        ("proxy", outcome[seeds[0]][2][0].parent.parent / "proxy"), ("large", outcome[seeds[0]][0][BASELINE]))}
    return results


def spread(values):
    """mean ± standard deviation over seeds; values (S,)."""
    sd = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):+.3f}{sd}"


def pairs(weights):
    """Total variation between each two seeds' weights (S, K)."""
    return [total_variation(p, q) for i, p in enumerate(weights) for q in weights[:i]]


def own_share(results):
    """A line on how far a domain's own share of the tokens explains what becomes of it.

    Least squares over all mixtures and domains: change of loss = a + b * ln(weight / baseline's weight), of means over
    seeds. b is what a domain gains by e times as many tokens of its own, a what it gains by the others' tokens.
    """
    base, others = results["mixtures"][BASELINE], [of for name, of in results["mixtures"].items() if name != BASELINE]
    change = np.stack([(of["loss"] - base["loss"]).mean(axis=0) for of in others]).ravel()
    ratio = np.stack([np.log(of["weights"].mean(axis=0) / base["weights"][0]) for of in others]).ravel()
    (b, a), r = np.polyfit(ratio, change, 1), np.corrcoef(ratio, change)[0, 1]
    return (f"change of a domain's loss = {a:+.3f} {b:+.3f} ln(weight / {BASELINE}'s), nats; "
            f"that explains {100 * r**2:.0f}% of the variance over mixtures and domains")


def tables(results):
    """The lines of the tables in Markdown: mixtures, domains, answers, rounds."""
    mixtures, K = results["mixtures"], len(results["domains"])
    base = mixtures[BASELINE]
    lines = [f"| trained on | domains better than {BASELINE}, by seed | of {K}, mean | change of the mean loss "
             "| of the worst domain's | bits per byte | speed-up | domains better than uniform, mean |",
             "|---|---|---|---|---|---|---|---|"]
    for name, of in mixtures.items():
        if name == BASELINE:
            continue
        better = (of["loss"] < base["loss"]).sum(axis=1)
        uniform = (of["loss"] < mixtures["uniform"]["loss"]).sum(axis=1)
        speed = [factor for factor in of["speed_up"] if factor]
        some = f" ({len(speed)} of {len(better)} seeds)" if len(speed) < len(better) else ""
        pace = f"{np.mean(speed):.2f}x{some}" if speed else "not reached"
        lines.append(
            f"| {name} | {', '.join(map(str, better))} | {better.mean():.1f} "
            f"| {spread((of['loss'] - base['loss']).mean(axis=1))} "
            f"| {spread(of['loss'].max(axis=1) - base['loss'].max(axis=1))} "
            f"| {spread((of['bpb'] - base['bpb']).mean(axis=1))} | {pace} "
            f"| {'' if name == 'uniform' else f'{uniform.mean():.1f}'} |")  # fmt: skip
    shown = [name for name in mixtures if name != BASELINE]
    lines += ["", f"| domain | {BASELINE}: weight, loss | " + " | ".join(shown) + " |", "|---" * (2 + len(shown)) + "|"]
    for i, domain in enumerate(results["domains"]):
        cells = [f"{base['weights'][0, i]:.3f}, {base['loss'][:, i].mean():.3f}"]
        cells += [f"{of['weights'][:, i].mean():.3f}, {spread((of['loss'] - base['loss'])[:, i])}"
                  for name, of in mixtures.items() if name != BASELINE]
        lines.append(f"| {domain} | " + " | ".join(cells) + " |")
    if len(results["seeds"]) > 1:
        lines += ["", "| answer | total variation between seeds, mean | largest | from its reference's weights |",
                  "|---|---|---|---|"]
        for name, start in zip(LEARNED[:2], (base["weights"][0], mixtures["uniform"]["weights"][0])):
            weights = mixtures[name]["weights"]
            far = np.mean([total_variation(answer, start) for answer in weights])
            lines.append(f"| {name} | {np.mean(pairs(weights)):.3f} | {max(pairs(weights)):.3f} | {far:.3f} |")
        lines.append(f"| {LEARNED[2]} | {np.mean(pairs(mixtures[LEARNED[2]]['weights'])):.3f} "
                     f"| {max(pairs(mixtures[LEARNED[2]]['weights'])):.3f} | |")
    lines += ["", own_share(results)]
    lines += ["", "| seed | largest move of each round (converged below 1e-3) |", "|---|---|"]
    lines += [f"| {seed} | {', '.join(f'{move:.4f}' for move in moves)} |"
              for seed, moves in zip(results["seeds"], results["moves"])]
    return lines


# ---- pictures


def draw_profit(results, setting):
    """Left, each domain's change of held-out loss under each mixture; right, the mean over domains while training."""
    mixtures, domains, S = results["mixtures"], results["domains"], len(results["seeds"])
    base, best = mixtures[BASELINE], LEARNED[0]
    distinct = {}
    for name, of in mixtures.items():
        if name != BASELINE and not any(np.array_equal(of["weights"], other["weights"]) for other in distinct.values()):
            distinct[name] = of
    order = np.argsort((mixtures[best]["loss"] - base["loss"]).mean(axis=0))
    label, K = text_width(domains, 9) + 0.3, len(domains)
    width, height = label + 5 + 0.9 + 4.2 + 0.25, max(4.2, 0.085 * len(distinct) * K) + 1.9
    figure = Figure(figsize=(width, height))
    bottom, tall = 0.85 / height, 1 - 1.9 / height
    change = figure.add_axes([label / width, bottom, 5 / width, tall])
    curves = figure.add_axes([(label + 5.9) / width, bottom, 4.2 / width, tall])
    offsets = np.linspace(-0.36, 0.36, len(distinct))
    for (name, of), offset in zip(distinct.items(), offsets):
        (colour, marker), difference = STYLES[name], (of["loss"] - base["loss"])[:, order]
        sd = difference.std(axis=0, ddof=1) if S > 1 else 0
        change.errorbar(difference.mean(axis=0), np.arange(K) + offset, xerr=sd, fmt=marker, color=colour, markersize=4,
                        linewidth=1, label=name)
    change.axvline(0, color=GREY, linewidth=1)
    for row in range(1, K):
        change.axhline(row - 0.5, color="0.92", linewidth=0.6)
    change.set(ylim=(K - 0.5, -0.5), xlabel="change of held-out loss (nats per token)")
    change.set_yticks(np.arange(K), [domains[i] for i in order], fontsize=9)
    change.tick_params(axis="y", length=0)
    change.set_title(f"left of 0: better than {BASELINE}; mean and standard deviation over seeds", fontsize=9)
    shown = {BASELINE: base, **distinct}
    late = base["step"] >= base["step"][-1] / 3  # the first losses are so high that the rest would be a flat line
    for name, of in shown.items():
        colour = STYLES.get(name, (GREY,))[0]
        difference = (of["mean"] - base["mean"])[:, late]
        mean, sd = difference.mean(axis=0), difference.std(axis=0, ddof=1) if S > 1 else 0
        curves.plot(of["step"][late], mean, color=colour, linewidth=1.8)
        curves.fill_between(of["step"][late], mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
    curves.set(xlabel="step")
    curves.set_title(f"mean over domains, change to {BASELINE} at the same step", fontsize=9)
    for axes in (change, curves):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="x" if axes is change else "y", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
    handles, labels = change.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.2 / width, 0.05 / height), ncol=len(labels),
                  frameon=False, fontsize=9)
    better = (mixtures[best]["loss"] < base["loss"]).sum(axis=1)
    finding = (f"DoReMi (reference on token count) better than {BASELINE} in {better.mean():.1f} of {K} domains "
               f"({better.min()} to {better.max()}), ")
    finding += f"mean {spread((mixtures[best]['loss'] - base['loss']).mean(axis=1))} nats"
    add_titles(figure, finding, setting)
    return figure


def draw_answers(results, setting):
    """Each domain's weight in the answers, a mark per seed, beside its share of the tokens."""
    mixtures, domains = results["mixtures"], results["domains"]
    share = mixtures[BASELINE]["weights"][0]
    order = np.argsort(-mixtures[LEARNED[0]]["weights"].mean(axis=0))
    once = np.array_equal(mixtures[LEARNED[1]]["weights"], mixtures[LEARNED[2]]["weights"])
    learned = LEARNED[:2] if once else LEARNED
    label, K = text_width(domains, 9) + 0.3, len(domains)
    width, height = label + 6.5 + 0.3, 0.34 * K + 1.9
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes([label / width, 0.85 / height, 6.5 / width, 1 - 1.9 / height])
    shown = np.concatenate([share[None], *(mixtures[name]["weights"] for name in learned)])
    weight_axis(axes.xaxis, max(shown[shown > 0].min() / 1.4, 1e-4), min(1.0, shown.max() * 1.4))
    axes.plot(share[order], np.arange(K), "|", color="black", markersize=14, label="share of the tokens")
    axes.axvline(1 / K, color=GREY, linewidth=1, linestyle=":", label="uniform")
    for name, offset in zip(learned, (-0.22, 0.0, 0.22)):
        colour, marker = STYLES[name]
        for s, weights in enumerate(mixtures[name]["weights"]):
            axes.plot(weights[order], np.arange(K) + offset, marker, color=colour, markersize=4, alpha=0.6, mew=0,
                      label=name if s == 0 else None)
    axes.set(ylim=(K - 0.5, -0.5), xlabel="weight")
    axes.set_yticks(np.arange(K), [domains[i] for i in order], fontsize=9)
    axes.tick_params(axis="y", length=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="lower left", bbox_to_anchor=(0.1 / width, 0.02 / height),
                  ncol=5, frameon=False, fontsize=8, columnspacing=1, handletextpad=0.3)
    natural, uniform = (mixtures[name]["weights"] for name in LEARNED[:2])
    across = total_variation(natural.mean(axis=0), uniform.mean(axis=0))
    finding = f"Answers: total variation {across:.3f} between references"
    if len(results["seeds"]) > 1:
        finding += f", {np.mean(pairs(natural) + pairs(uniform)):.3f} between seeds"
    add_titles(figure, finding, setting)
    return figure


# ---- the script


def seed_list(text):
    return [cli.natural(seed) for seed in text.split(",")]


def flag_list(text):
    """"@FILE --flag=value" as a list with FILE's flags in it, so that done.txt tells when those have changed."""
    return cli.ArgumentParser("")._read_args_from_files(shlex.split(text))


def add_stage_flags(parser):
    parser.add_argument("--jobs", type=cli.positive, default=1,
                        help="seeds that run at once, sharing the cores (default %(default)s)")
    for name, models in (("small", "references"), ("proxy", "proxies"), ("large", "large models")):
        parser.add_argument(f"--{name}", type=flag_list, default=f"@experiments/profit_{name}.txt",
                            help=f"flags of the {models} (default %(default)s)")


def main():
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--data_dir", default="data/demo", help="data set of prepare.py (default %(default)s)")
    add("--out_dir", default="checkpoints/profit", help="where all runs go (default %(default)s)")
    add("--seeds", type=seed_list, default="1,2,3,4,5", help="separated by commas (default %(default)s)")
    add("--rounds", type=cli.positive, default=4, help="of DoReMi at most, fewer where they converge (default 4)")
    add_stage_flags(parser)
    args = parser.parse_args()
    seeds = args.seeds
    dataset = load_dataset(args.data_dir, 1)
    stages = Stages(args.out_dir, args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        outcome = dict(zip(seeds, pool.map(lambda seed: run_seed(stages, args, dataset, seed), seeds)))
    stages.progress.close()

    results = collect(seeds, outcome, dataset.domains)
    print("\n".join(tables(results)))
    setting = (f"{Path(args.data_dir).name}: proxies of {results['n_params']['proxy']:,} parameters, large models of "
               f"{results['n_params']['large']:,}; seeds {', '.join(map(str, seeds))}")
    for name, draw in (("profit", draw_profit), ("answers", draw_answers)):
        draw(results, setting).savefig(stages.out_dir / f"{name}.png", dpi=150)
    (stages.out_dir / "results.json").write_text(json.dumps(results, default=lambda array: array.tolist()) + "\n")
    print(f"written: {stages.out_dir}/results.json, profit.png, answers.png")


if __name__ == "__main__":
    cli.run(main)
