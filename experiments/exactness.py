"""What does each departure from Algorithm 1 cost?  The exact proxy beside five that public implementations train.

    python -m experiments.exactness --reference=checkpoints/reference --max_steps=1000

It prints the table of docs/exactness.md. Every variant sees the same batches from the same initial parameters. Only the
lines that name a variant differ from train_doremi.py.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from average_weights import effective_domains, total_variation
from common import cli, figures, ranks
from common.files import write_atomically
from common.run import load_finished
from model import Transformer
from sampler import Sampler, domain_sums, load_dataset
from train_doremi import update_alpha
from train_reference import adamw, resolve_recipe, set_learning_rate

VARIANTS = {
    "exact": "Algorithm 1",
    "carry lost": "alpha starts from uniform at every step",
    "clipped gradient": "the gradient is that of the clipped excess",
    "stale alpha": "the loss is weighted with the last step's alpha",
    "positive tokens": "the clipped excess is divided by the number of tokens above 0",
    "domain clip": "the excess is clipped after the mean over the domain",
}


def train_proxy(variant, reference, dataset, machine, args, seed):
    """alpha_1..alpha_T of one proxy: (T, K) array."""
    K = len(dataset.domains)
    torch.manual_seed(seed)
    model = Transformer(reference.config, machine.dtype).to(machine.device)
    forward = torch.compile(model, dynamic=False) if args.compile else model
    optimizer = adamw(model, args)
    sampler = Sampler(dataset, np.full(K, 1 / K), args.batch_size, seed)
    alpha = torch.full((K,), 1 / K, dtype=machine.sum_dtype, device=machine.device)
    excess, history = torch.zeros_like(alpha), []
    for step in tqdm(range(1, args.max_steps + 1), desc=f"{variant}, seed {seed}"):
        set_learning_rate(optimizer, step, args)
        [(tokens, domain)] = machine.micro_batches(sampler.next_batch())
        with torch.no_grad():
            reference_loss = reference(tokens)
        token_loss = forward(tokens)
        difference = token_loss.detach() - reference_loss
        clipped = difference if variant == "domain clip" else difference.clamp(min=0)
        excess_sum, positive, count = domain_sums(domain, K, machine.sum_dtype, clipped, (difference > 0).double())
        divisor = positive if variant == "positive tokens" else count
        excess = torch.where(count > 0, excess_sum.clamp(min=0) / divisor.clamp(min=1), excess)
        before = torch.full_like(alpha, 1 / K) if variant == "carry lost" else alpha
        alpha = update_alpha(before, excess, args.step_size, args.smoothing)
        history.append(alpha)
        weight = ((before if variant == "stale alpha" else alpha) / count.clamp(min=1)).to(token_loss.dtype)
        objective = (token_loss - reference_loss).clamp(min=0) if variant == "clipped gradient" else token_loss
        (weight[domain] * objective.sum(dim=1)).sum().backward()
        ranks.clip_gradients(model, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    sampler.close()
    return torch.stack(history).cpu().numpy()


def distance(a, b):
    """Total variation between the answers of two histories (T, K)."""
    return total_variation(a.mean(axis=0), b.mean(axis=0))


def draw(domains, alphas, setting):
    """A panel per variant: alpha over the steps, and at the right edge its average, the answer."""
    figure = figures.new(13, 5.2)
    away = {variant: distance(alphas[variant], alphas["exact"]) for variant in VARIANTS}
    for panel, variant in zip(figure.subplots(2, 3, sharex=True, sharey=True).flat, VARIANTS):
        T = len(alphas[variant])
        for i, (name, alpha) in enumerate(zip(domains, alphas[variant].T)):
            style = {"color": f"C{i}", "label": name if variant == "exact" else None}
            panel.plot(range(1, T + 1), alpha, ["-", "--", ":"][i // 10 % 3], linewidth=0.7, **style)
            panel.plot(T * 1.03, alpha.mean(), "o", color=f"C{i}", markersize=4, clip_on=False)
        panel.set(title=f"{variant}: {away[variant]:.3f} away", yscale="log", ylim=(1e-4, 1))
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("alpha", fontsize=10)
    worst = max(away, key=away.get)
    figure.suptitle(f"The costliest departure is '{worst}': {away[worst]:.0%} of the tokens would come from other "
                    f"domains\n{setting}", fontsize=11)
    return figure


def main():
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--reference", type=cli.path, default="checkpoints/reference", help="run of stage 1 (default: %(default)s)")
    add("--step_size", type=cli.non_negative, default=1.0, help="of the weight update (default: %(default)s)")
    add("--smoothing", type=cli.fraction, default=1e-3, help="of the weight update (default: %(default)s)")
    add("--seeds", type=cli.natural, nargs="+", default=[2, 3, 4],
        help="of the exact proxies; the first also of the others (default: 2 3 4)")
    add("--out", type=cli.path, default="checkpoints/exactness.png", help="the figure (default: %(default)s)")
    add("--max_steps", type=cli.positive, help="of every proxy (default: the reference's)")
    add("--device", default="auto", help="cpu, cuda, cuda:N or mps (default: cuda if there is one, else cpu)")
    add("--compile", action="store_true", help="torch.compile (default: no)")
    args = parser.parse_args()
    config, checkpoint = load_finished(args.reference, ("reference",))
    flags = {**config["flags"], "micro_batch_size": None}  # the whole batch at once
    if args.max_steps not in (None, flags["max_steps"]):
        flags["warmup_steps"] = None  # derives again
    flags |= {name: value for name, value in vars(args).items() if value is not None}
    args = argparse.Namespace(**flags)
    resolve_recipe(args)
    machine, seeds = ranks.setup(args), args.seeds
    dataset = load_dataset(config["data"]["data_dir"], config["model"]["block_size"])
    reference = Transformer.load(config, checkpoint["model"], machine.dtype).to(machine.device).freeze()

    alphas = {variant: train_proxy(variant, reference, dataset, machine, args, seeds[0]) for variant in VARIANTS}
    alphas |= {f"exact, seed {seed}": train_proxy("exact", reference, dataset, machine, args, seed)
               for seed in seeds[1:]}
    r = np.array([config["sampling_weights"][name] for name in dataset.domains])
    columns = ("variant", "distance to exact", "last half to r", "domains in alpha", "in the answer", "largest weight")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for variant, alpha in alphas.items():
        answer, last_half = alpha.mean(axis=0), alpha[len(alpha) // 2 :].mean(axis=0)
        print(f"| {variant} | {distance(alpha, alphas['exact']):.3f} | {total_variation(last_half, r):.3f} | "
              f"{np.median(effective_domains(alpha)):.1f} | {effective_domains(answer):.1f} | "
              f"{dataset.domains[int(answer.argmax())]} {answer.max():.2f} |")
    setting = f"{reference.n_params():,} parameters, {args.max_steps} steps of {args.batch_size} sequences"
    write_atomically(Path(args.out), lambda file: draw(dataset.domains, alphas, setting).savefig(file, dpi=80))
    print(f"written: {args.out}")


if __name__ == "__main__":
    cli.run(main)
