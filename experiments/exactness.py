"""What does each departure from Algorithm 1 cost?  The exact proxy beside five that public implementations train.

reads   a reference run (stage 1) and its data
writes  docs/exactness.png, and prints the table of docs/exactness.md
e.g.    python experiments/exactness.py --reference=checkpoints/reference --step_sizes=1,0.1 --update_after=200

Each variant sees the same batches from the same initial weights; only the lines marked with its name differ from
train_doremi.py. The departures are here alone: the product does not have them.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import cli
import runtime
from checkpoint import write_atomically
from model import Transformer
from report import add_titles, percent, weight_axis
from sampler import Sampler, domain_sums, load_dataset
from train_doremi import load_reference, load_reference_config, update_alpha
from trust import effective_domains, total_variation

VARIANTS = {
    "exact": "Algorithm 1",
    "carry lost": "alpha starts from uniform at every step",
    "clipped gradient": "the gradient is that of the clipped excess",
    "stale alpha": "the loss is weighted with the last step's alpha",
    "positive tokens": "the clipped excess is divided by the number of tokens above 0",
    "domain clip": "the excess is clipped after the mean over the domain",
}


def train_proxy(variant, reference, dataset, machine, args, step_size, seed):
    """alpha_1..alpha_T of one proxy: (T, K) array."""
    k = len(dataset.domains)
    torch.manual_seed(seed)
    model = Transformer(reference.config, machine.dtype).to(machine.device)
    forward = torch.compile(model, dynamic=False) if args.compile else model
    optimizer = runtime.adamw(model, args)
    sampler = Sampler(dataset, np.full(k, 1 / k), args.batch_size, seed)
    alpha = torch.full((k,), 1 / k, dtype=machine.exact, device=machine.device)
    excess, history = torch.zeros_like(alpha), []
    for step in tqdm(range(1, args.max_steps + 1), desc=f"{variant}, step size {step_size:g}, seed {seed}"):
        runtime.set_learning_rate(optimizer, step, args)
        [(tokens, domain)] = machine.to_device(sampler.next_batch(), args.batch_size)
        with torch.no_grad():
            reference_loss = reference(tokens)
        token_loss = forward(tokens)
        difference = token_loss.detach() - reference_loss
        if variant == "domain clip":
            excess_sum, count = domain_sums(difference, domain, k, machine.exact)
            excess_sum = excess_sum.clamp(min=0)
        else:
            excess_sum, count = domain_sums(difference.clamp(min=0), domain, k, machine.exact)
        divisor = domain_sums((difference > 0).double(), domain, k)[0] if variant == "positive tokens" else count
        excess = torch.where(count > 0, excess_sum / divisor.clamp(min=1), excess)
        before = torch.full_like(alpha, 1 / k) if variant == "carry lost" else alpha
        alpha = update_alpha(before, excess, step_size if step > args.update_after else 0.0, 1e-3)
        history.append(alpha)
        weight = ((before if variant == "stale alpha" else alpha) / count.clamp(min=1)).to(token_loss.dtype)
        objective = (token_loss - reference_loss).clamp(min=0) if variant == "clipped gradient" else token_loss
        (weight[domain] * objective.sum(dim=1)).sum().backward()
        runtime.clip_gradients(model, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    sampler.close()
    return torch.stack(history).cpu().numpy()


def distance(alphas, step_size, variant):
    """Total variation between a variant's answer and the exact one: the share of the tokens that is misplaced."""
    return total_variation(alphas[step_size, variant].mean(axis=0), alphas[step_size, "exact"].mean(axis=0))


def draw(domains, alphas, step_sizes, setting):
    """A row per step size, a column per variant: alpha over the steps, and its average, the answer, at the right edge.

    alphas: {(step_size, variant): (T, K)}.
    """
    figure = Figure(figsize=(2.2 * len(VARIANTS) + 2.2, 2.6 * len(step_sizes) + 1.3))
    axes = figure.subplots(len(step_sizes), len(VARIANTS), sharex=True, sharey="row", squeeze=False)
    height = figure.get_size_inches()[1]
    figure.subplots_adjust(left=0.06, right=0.88, top=1 - 1.15 / height, bottom=0.5 / height, wspace=0.08, hspace=0.15)
    styles = [(shade, dash) for dash in ("-", "--", ":") for shade in ("#440154", "#3b6f8d", "#2fb07f", "#c8a415")]
    for row, step_size in zip(axes, step_sizes):
        for ax, variant in zip(row, VARIANTS):
            alpha = alphas[step_size, variant]
            for i, (colour, dash) in zip(range(len(domains)), styles):
                ax.plot(np.arange(1, len(alpha) + 1), alpha[:, i], dash, color=colour, linewidth=0.8)
                ax.plot(len(alpha) * 1.04, alpha[:, i].mean(), "o", color=colour, markersize=4, clip_on=False)
            away = "" if variant == "exact" else f": {distance(alphas, step_size, variant):.2f} away"
            ax.set_title(f"{variant}{away}", fontsize=9)
        weight_axis(row[0].yaxis, 5e-5, 1)
        row[0].set_ylabel(f"alpha, step size {step_size:g}", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("step", fontsize=9)
    handles = [axes[0, 0].plot([], [], dash, color=colour)[0] for _, (colour, dash) in zip(domains, styles)]
    figure.legend(handles, domains, loc="center left", bbox_to_anchor=(0.9, 0.5), frameon=False, fontsize=8)
    cost, step_size, variant = max((distance(alphas, *run), *run) for run in alphas if run[1] in VARIANTS)
    finding = f"The costliest departure: {variant}, {percent(cost)} of the answer elsewhere at step size {step_size:g}"
    add_titles(figure, finding, setting)
    return figure


def main():
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--reference", default="checkpoints/reference", help="run directory of stage 1 (default %(default)s)")
    add("--step_sizes", default="1,0.1", help="a row of the figure each (default %(default)s)")
    add("--seeds", default="1,2", help="of the proxies; beyond the first, of the exact one (default %(default)s)")
    add("--update_after", type=cli.natural, default=0, help="steps before alpha first moves (default %(default)s)")
    add("--out", type=Path, default=Path("docs/exactness.png"), help="the figure (default %(default)s)")
    cli.add_optimization_flags(parser)
    cli.add_machine_flags(parser, "unused")
    args = parser.parse_args()
    runtime.resolve_flags(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    config = load_reference_config(args.reference)
    args.data_dir, machine = config["data"]["data_dir"], runtime.setup(args)
    dataset = load_dataset(args.data_dir, config["model"]["block_size"])
    reference = load_reference(args, config, dataset, machine)
    step_sizes, seeds = [float(s) for s in args.step_sizes.split(",")], [int(s) for s in args.seeds.split(",")]

    alphas = {}
    for step_size in step_sizes:
        for variant in VARIANTS:
            alphas[step_size, variant] = train_proxy(variant, reference, dataset, machine, args, step_size, seeds[0])
        for seed in seeds[1:]:
            alpha = train_proxy("exact", reference, dataset, machine, args, step_size, seed)
            alphas[step_size, f"exact, seed {seed}"] = alpha

    print("| step size | variant | distance to exact | domains in alpha | domains in the answer | largest weight |\n"
          "|---|---|---|---|---|---|")
    for (step_size, variant), alpha in alphas.items():
        answer, in_alpha = alpha.mean(axis=0), np.median(effective_domains(alpha[args.update_after :]))
        largest = f"{dataset.domains[int(answer.argmax())]} {answer.max():.2f}"
        print(f"| {step_size:g} | {variant} | {distance(alphas, step_size, variant):.3f} | {in_alpha:.1f} | "
              f"{effective_domains(answer):.1f} | {largest} |")

    setting = (f"{reference.n_params():,} parameters, {args.max_steps} steps of {args.batch_size} sequences, alpha "
               f"moves from step {args.update_after + 1} on, seeds {args.seeds}; dots: answers; away: total variation")
    figure = draw(dataset.domains, alphas, step_sizes, setting)
    write_atomically(args.out, lambda file: figure.savefig(file, format="png", dpi=80))
    print(f"written: {args.out}")


if __name__ == "__main__":
    cli.run(main)
