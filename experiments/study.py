"""What decides DoReMi's answer?  One setting is changed at a time, over several seeds.

reads   a data set of prepare.py; --tokenizers=DIR,DIR: the same text prepared with other vocabularies
writes  OUT_DIR/{VARIANT/seed-S/..., study.json, study.png}, and prints the table of docs/results.md
e.g.    python experiments/study.py --data_dir=data/demo --out_dir=checkpoints/study-demo --seeds=1,2,3

For each variant: how far its answer lies from the standard's and from another seed's (total variation), on how many
domains alpha rests (exp of its entropy) early and late, and how much averaging a later part of the run would change.
With --train, a model is trained on each answer (all steps, and the last half), paired by seed with one on token count.
"""

import json
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent))
from profit import BASELINE, Stages, add_stage_flags, pairs, seed_list, spread  # the path above first

import cli
import compare
from average_weights import read_alpha
from cli import UserError
from report import GREY, add_titles, read_config
from sampler import load_dataset
from trust import effective_domains, total_variation

# Name: flags of the reference, flags of the proxy. Everything else is as in "standard".
VARIANTS = {
    "standard": ("", ""),
    "updates from the start": ("", "--update_after=0"),
    "step size 1 from the start": ("", "--step_size=1 --update_after=0"),  # the paper's
    "step size 1": ("", "--step_size=1"),
    "step size 0.2": ("", "--step_size=0.2"),
    "step size 0.04": ("", "--step_size=0.04"),
    "step size 0.01": ("", "--step_size=0.01"),
    "smoothing 1e-2": ("", "--smoothing=1e-2"),
    "reference on uniform weights": ("--domain_weights=uniform", ""),
    "warm-up 6%": ("--warmup_steps=24", ""),
    "batch / 4": ("--batch_size=4", ""),
    "steps / 2": ("--max_steps=200 --warmup_steps=100", "--update_after=100"),
    "steps / 2, step size x 2": ("--max_steps=200 --warmup_steps=100", "--update_after=100 --step_size=0.2"),
    "steps x 2, step size / 2": ("--max_steps=800 --warmup_steps=400", "--update_after=400 --step_size=0.05"),
    "proxy x 4": ("--n_layer=3 --n_embd=128 --n_ffn=448", ""),
}


def run_variant(stages, args, name, reference_flags, proxy_flags, data_dir, seed):
    """Returns the proxy's alpha (T, K), and {"all", "half": large run} where there are any."""
    directory = name.replace(",", "").replace(" / ", "-by-").replace(" ", "-")
    own = directory if reference_flags or data_dir != args.data_dir else "standard"  # the others share a reference
    reference = stages.train("train_reference.py", f"{own}/seed-{seed}/reference", f"--data_dir={data_dir}",
                             f"--domain_weights={BASELINE}", f"--seed={seed}",
                             *args.small, *shlex.split(reference_flags))
    proxy = stages.train("train_doremi.py", f"{directory}/seed-{seed}/proxy", f"--reference={reference}",
                         *args.proxy, *shlex.split(proxy_flags))
    large = {}
    if name in args.train.split(";"):
        for part, average_from in (("all", 0), ("half", 0.5)):
            answer = f"{directory}/seed-{seed}/answer-{part}"
            stages.run("average_weights.py", answer, str(proxy), f"--average_from={average_from}",
                       f"--out_dir={stages.out_dir / answer}")
            large[part] = train_large(stages, args, f"{directory}/seed-{seed}/large-{part}",
                                      stages.out_dir / answer / "weights.json", seed)
    return read_alpha(proxy, read_config(proxy)["domains"]), large


def train_large(stages, args, name, weights, seed):
    return stages.train("train_large.py", name, f"--data_dir={args.data_dir}", f"--domain_weights={weights}",
                        f"--seed={seed}", *args.large)


def describe(alphas):
    """What the table says of a variant.  alphas (S, T, K)."""
    T = alphas.shape[1]
    answers = alphas.mean(axis=1)  # (S, K)
    later = {part: alphas[:, start:].mean(axis=1) for part, start in (("half", T // 2), ("quarter", 3 * T // 4))}
    number = effective_domains(alphas)  # (S, T)
    return {
        "answer": answers.mean(axis=0), "between": float(np.mean(pairs(answers))) if len(answers) > 1 else None,
        "effective": [float(np.median(number[:, : T // 4])), float(np.median(number[:, 3 * T // 4 :]))],
        "one_hot": float((alphas.max(axis=2) > 0.9).mean()),
        **{part: float(np.mean([total_variation(p, q) for p, q in zip(answers, of)])) for part, of in later.items()},
        "number": np.median(number, axis=0),  # (T,)
    }  # fmt: skip


def profit(large, bases, part):
    """The cell on the large models: domains better than the baseline's, mean change; "" where none were trained."""
    if not large[0]:
        return ""
    loss = np.stack([final_loss(runs[part]) for runs in large])
    change = loss - np.stack([final_loss(base) for base in bases])  # (S, K)
    return f"{', '.join(map(str, (change < 0).sum(axis=1)))}; {spread(change.mean(axis=1))}"


def final_loss(run):
    return compare.read_evaluations(run, run.name, read_config(run)["domains"]).loss[-1]


def table(found, K, S):
    lines = [f"| changed ({S} seeds) | from the standard answer | between seeds | alpha rests on (of {K} domains): "
             "first, last quarter | one-hot steps | last half, quarter instead of all "
             "| large model: domains better by seed, change | the same, last half |", "|---" * 8 + "|"]
    for name, (of, large_all, large_half) in found.items():
        far = total_variation(of["answer"], found["standard"][0]["answer"])
        between = "" if of["between"] is None else f"{of['between']:.3f}"
        early, late = of["effective"]
        lines.append(f"| {name} | {far:.3f} | {between} | {early:.1f}, {late:.1f} | {100 * of['one_hot']:.0f}% "
                     f"| {of['half']:.3f}, {of['quarter']:.3f} | {large_all} | {large_half} |")
    return lines


def draw(found, K, setting):
    """The effective number of domains of alpha over the run, a line per variant of the step size and its length."""
    figure = Figure(figsize=(9, 4.4))
    axes = figure.add_axes([0.07, 0.13, 0.6, 0.68])
    shown = [name for name in found if name in ("standard", "updates from the start") or "step size" in name[:9]]
    for name, colour in zip(shown, ["#440154", "#d95f02", "#b8a200", "#21918c", "#5b9bd5", "#c2185b", "0.5", "0.75"]):
        number = found[name][0]["number"]
        smooth = np.convolve(number, np.ones(9) / 9, mode="valid")
        axes.plot(np.linspace(0, 1, len(smooth)), smooth, color=colour, linewidth=1.5, label=name)
    axes.axhline(K, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 1), ylim=(0.9, K * 1.03), xlabel="share of the run", ylabel="exp(H(alpha)), domains")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)
    name = min(found, key=lambda name: found[name][0]["effective"][0])
    early, standard = found[name][0]["effective"][0], found["standard"][0]["effective"][0]
    add_titles(figure, f"With '{name}' alpha rests on {early:.1f} of {K} domains in the run's first quarter, "
               f"in the standard run on {standard:.1f}", setting)
    return figure


def main():
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--data_dir", default="data/demo", help="data set of prepare.py (default %(default)s)")
    add("--tokenizers", default="", help="the same text with other vocabularies, separated by commas (default: none)")
    add("--out_dir", default="checkpoints/study", help="where all runs go (default %(default)s)")
    add("--seeds", type=seed_list, default="1,2,3", help="separated by commas (default %(default)s)")
    add("--only", default=";".join(VARIANTS), help="variants to run, separated by semicolons (default: all)")
    add("--train", default="", help="those whose answers a large model is trained on, likewise (default: none)")
    add_stage_flags(parser)
    args = parser.parse_args()
    seeds, stages = args.seeds, Stages(args.out_dir, args.jobs)
    for name in {*args.only.split(";"), *filter(None, args.train.split(";"))} - set(VARIANTS):
        raise UserError(f"'{name}' is no variant; there are: {'; '.join(VARIANTS)}.")
    variants = {name: (*VARIANTS[name], args.data_dir) for name in dict.fromkeys(["standard", *args.only.split(";")])}
    for data_dir in filter(None, args.tokenizers.split(",")):
        variants[f"vocabulary {load_dataset(data_dir, 1).vocab_size:,}"] = "", "", data_dir

    def run_seed(seed):
        base = train_large(stages, args, f"baseline/seed-{seed}", BASELINE, seed) if args.train else None
        return base, {name: run_variant(stages, args, name, *how, seed) for name, how in variants.items()}

    with ThreadPoolExecutor(args.jobs) as pool:
        bases, runs = zip(*pool.map(run_seed, seeds))
    stages.progress.close()

    found = {}
    for name in variants:
        alphas, large = zip(*(of[name] for of in runs))
        found[name] = describe(np.stack(alphas)), profit(large, bases, "all"), profit(large, bases, "half")
    K = alphas[0].shape[1]
    print("\n".join(table(found, K, len(seeds))))
    draw(found, K, f"{Path(args.data_dir).name}, seeds {', '.join(map(str, seeds))}").savefig(
        stages.out_dir / "study.png", dpi=150)
    (stages.out_dir / "study.json").write_text(json.dumps(found, default=lambda array: array.tolist()) + "\n")
    print(f"written: {stages.out_dir}/study.json, study.png")


if __name__ == "__main__":
    cli.run(main)
