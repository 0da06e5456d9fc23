"""Stage 2 of DoReMi: train a proxy against the reference with minimax domain weights (Algorithm 1).

reads   the reference's checkpoint and config, the data set named there
writes  OUT_DIR/{flags.txt, config.json, metrics.jsonl, ckpt.pt, doremi_domain_weights_STEP.pt}
next    python average_weights.py OUT_DIR

The proxy has the reference's shape. It draws batches with fixed sampling weights; alpha weights the losses, and moves.
"""

import torch

from common import cli, ranks
from common.files import write_atomically
from common.run import Run, add_machine_flags, fingerprint, load_finished, read_config
from model import ModelConfig, Transformer
from sampler import Sampler, domain_sums, held_out_loss, load_dataset, sampling_weights
from train_reference import adamw, add_optimization_flags, resolve_flags, set_learning_rate


def parse_args():
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument_group("DoReMi").add_argument
    add("--reference", default="checkpoints/reference", help="run directory of stage 1 (default: %(default)s)")
    add("--step_size", type=cli.non_negative, default=1.0, help="eta of the update (default: %(default)s, paper's)")
    add("--smoothing", type=cli.fraction, default=1e-3, help="c: alpha is above c / K (default: %(default)s, paper's)")
    add("--sampling_weights", default="uniform", help="what batches are drawn from (default: %(default)s, paper's)")
    add("--data_dir", help="data set of prepare.py (default: the reference's)")
    optimization = add_optimization_flags(parser, inherited=True)
    add_machine_flags(parser, "checkpoints/proxy", inherited=True)
    flags = read_config(parser.parse_args().reference)["flags"]
    inherited = {name: flags[name] for name in (*optimization, "data_dir", "dtype")}
    parser.set_defaults(**inherited | {"seed": flags["seed"] + 1})  # not the reference's initial parameters
    if parser.parse_args().max_steps != flags["max_steps"]:
        parser.set_defaults(warmup_steps=None)
    return parser.parse_args()


def save_weight_history(run, alpha_history):
    """Write a list of {"step", "domain_weights": (K,)} in place of the last one.  alpha_history: (STEP, K)."""
    if not run.main:
        return
    path = run.out_dir / f"doremi_domain_weights_{len(alpha_history)}.pt"
    history = [{"step": step, "domain_weights": alpha} for step, alpha in enumerate(alpha_history.cpu(), start=1)]
    write_atomically(path, lambda file: torch.save(history, file))
    for last in set(run.out_dir.glob("doremi_domain_weights_*.pt")) - {path}:
        last.unlink()


def update_alpha(alpha, excess, step_size, smoothing):
    """alpha' = alpha * exp(step_size * excess);  alpha = (1 - c) * alpha' / sum(alpha') + c / K.    (Alg. 1)

    alpha, excess: (K,); excess in nats per token, >= 0.  Returns (K,), on the simplex, each >= c / K.
    """
    log_alpha = torch.log_softmax(alpha.log() + step_size * excess, dim=0)  # exp(step_size * excess) may overflow
    return (1 - smoothing) * log_alpha.exp() + smoothing / len(alpha)


def train(args):
    """Train from start or checkpoint to end."""
    resolve_flags(args)
    machine = ranks.setup(args)
    origin, checkpoint = load_finished(args.reference, ("reference",))
    model_config = ModelConfig(**origin["model"])
    dataset = load_dataset(args.data_dir, model_config.block_size)
    dataset.check_same_data(args.reference, origin)
    tokens_per_step = args.batch_size * model_config.block_size
    weights = sampling_weights(args.sampling_weights, dataset, args.max_steps * tokens_per_step)
    K = len(dataset.domains)

    reference = Transformer.load(origin, checkpoint["model"], machine.dtype).to(machine.device).freeze()
    torch.manual_seed(args.seed)
    with torch.device("meta"):
        model = Transformer(model_config, machine.dtype, args.activation_checkpointing)
    model = ranks.shard(model, machine)
    ranks.load_parameters(model, model.initial_parameters())
    optimizer = adamw(model, args)
    sampler = Sampler(dataset, weights, args.batch_size, args.seed, machine.rank, machine.world_size,
                      pin_memory=machine.device.type == "cuda")
    args.compile = ranks.decide_compile(args, model.flops_per_token() * tokens_per_step * args.max_steps)
    forward = torch.compile(model, dynamic=False) if args.compile else model
    reference_forward = torch.compile(reference, dynamic=False) if args.compile else reference

    config = {"stage": "proxy", "model": vars(model_config), "n_params": model.n_params(), **dataset.describe(weights),
              "reference": {"out_dir": args.reference, "sampling_weights": origin["sampling_weights"],
                            "fingerprint": fingerprint(reference),
                            **{name: origin["flags"][name] for name in ("seed", "max_steps", "batch_size")}}}
    flops_per_token = model.flops_per_token() * 8 / 6  # the reference's forward pass adds 2 parts to the 6 of a step
    run = Run(args, machine, config, tokens_per_step, flops_per_token)
    step = run.restore(model, optimizer, sampler)
    alpha = torch.full((K,), 1 / K, dtype=machine.sum_dtype, device=machine.device)  # Alg. 1: alpha_0 = u
    excess = torch.zeros_like(alpha)  # lambda_t, nats per token
    alpha_history = torch.zeros(args.max_steps, K, dtype=machine.sum_dtype, device=machine.device)
    if step:
        excess, alpha_history[:step] = run.checkpoint["excess"].to(alpha), run.checkpoint["alpha_history"]
        alpha = alpha_history[step - 1].clone()
        save_weight_history(run, alpha_history[:step])  # a kill may have come between the checkpoint and its history

    named, stop = dataset.by_name, False
    while step < args.max_steps and not stop:
        step += 1
        lr = set_learning_rate(optimizer, step, args)
        micro_batches = machine.micro_batches(sampler.next_batch(), args.micro_batch_size)

        # Alg. 1: lambda_t[i] = sum of max(proxy - reference, 0) over the tokens of domain i / number of those tokens,
        # of the global batch. One micro-batch keeps its graph for backward; several are passed through twice.
        single_pass = len(micro_batches) == 1
        sums = torch.zeros(3, K, dtype=machine.sum_dtype, device=machine.device)  # of loss, excess and tokens
        for tokens, domain in micro_batches:
            with torch.no_grad():
                reference_loss = reference_forward(tokens)  # (b, T)
            with torch.set_grad_enabled(single_pass):
                token_loss = forward(tokens)  # (b, T)
            clipped_excess = (token_loss.detach() - reference_loss).clamp(min=0)
            sums += domain_sums(domain, K, machine.sum_dtype, token_loss.detach(), clipped_excess)
        loss_sum, excess_sum, count = machine.all_reduce(sums)  # (K,) each
        # Not in the paper: a domain that is absent from the batch keeps its last lambda
        excess = torch.where(count > 0, excess_sum / count.clamp(min=1), excess)

        # Alg. 1: exponentiated gradient ascent, renormalize and smooth
        alpha = alpha_history[step - 1] = update_alpha(alpha, excess, args.step_size, args.smoothing)

        # One step on sum_i alpha_t[i] * (mean loss over the tokens of domain i in the global batch), alpha_t constant
        token_weight = (alpha / count.clamp(min=1)).to(token_loss.dtype)  # (K,)
        for tokens, domain in ranks.accumulate(model, micro_batches):
            if not single_pass:
                token_loss = forward(tokens)
            (token_weight[domain] * token_loss.sum(dim=1)).sum().backward()
        grad_norm = ranks.clip_gradients(model, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

        run.record(step, loss=loss_sum, gradient=grad_norm)
        if run.is_due(step, args.log_interval):
            run.log(step, loss=loss_sum.sum() / count.sum(), lr=lr, grad_norm=grad_norm,
                    epochs=named(sampler.epochs()), domain_loss=named(loss_sum / count), alpha=named(alpha),
                    excess=named(excess))
        if run.is_due(step, args.eval_interval):
            val_loss = held_out_loss(forward, dataset, args.eval_windows, args.micro_batch_size, machine)
            run.log_evaluation(step, **dataset.evaluation(val_loss))
        stop = run.stop_requested(step)
        if run.is_due(step, args.save_interval) or stop:
            run.save(step, model, optimizer, sampler, excess=excess, alpha_history=alpha_history[:step])
            save_weight_history(run, alpha_history[:step])
    sampler.close()
    run.close(step)


if __name__ == "__main__":
    cli.run(lambda: train(parse_args()), ranks.leave_ranks)
