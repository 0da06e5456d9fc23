"""Stage 2 of DoReMi: train a proxy against the reference with minimax domain weights (Algorithm 1).

reads   the reference's checkpoint and config, the data set named there
writes  OUT_DIR/{flags.txt, config.json, metrics.jsonl, ckpt.pt, doremi_domain_weights_STEP.pt}
next    python average_weights.py OUT_DIR

The proxy has the reference's shape and, unless flags say otherwise, its data, steps, batch and learning rate. Batches
are drawn with the sampling weights, which stay; alpha weights the domains' losses, and moves. Read this beside
train_reference.py: the loops stand in the same order with the same names, and their difference is DoReMi.
"""

import json
from pathlib import Path

import torch

import cli
import runtime
from checkpoint import load_checkpoint, write_atomically
from cli import UserError
from model import ModelConfig, Transformer
from sampler import Sampler, domain_sums, held_out_loss, load_dataset, sampling_weights


def update_alpha(alpha, excess, step_size, smoothing):
    """alpha' = alpha * exp(step_size * excess);  alpha = (1 - c) * alpha' / sum(alpha') + c / K.    (Alg. 1)

    alpha, excess: (K,); excess in nats per token, >= 0.  Returns (K,), on the simplex, each >= c / K.
    """
    log_alpha = torch.log_softmax(alpha.log() + step_size * excess, dim=0)  # exp(step_size * excess) may overflow
    return (1 - smoothing) * log_alpha.exp() + smoothing / len(alpha)


def parse_args():
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument_group("DoReMi").add_argument
    add("--reference", default="checkpoints/reference", help="run directory of stage 1 (default %(default)s)")
    add("--step_size", type=cli.non_negative, default=1.0,
        help="eta of the weight update (default %(default)s, the paper's, for its 200,000 steps; in a short run about "
        "20 over the steps at which alpha moves, with --update_after: see docs/results.md)")
    add("--smoothing", type=cli.fraction, default=1e-3,
        help="c: alpha stays above c / K (default %(default)s, the paper's)")
    add("--update_after", type=cli.natural, default=0, help="steps before alpha first moves (default %(default)s, the "
        "paper's; in a short run half of them: see docs/results.md)")
    add("--sampling_weights", default="uniform", help="what batches are drawn from: see --domain_weights of stage 1 "
        "(default %(default)s, the paper's)")
    add("--data_dir", help="data set of prepare.py (default: the reference's)")
    optimization = cli.add_optimization_flags(parser, "taken over from the reference's run where they are not given")
    cli.add_machine_flags(parser, "checkpoints/proxy")
    reference_config = load_reference_config(parser.parse_args().reference)
    flags = reference_config["flags"]
    inherited = {name: flags[name] for name in (*optimization, "data_dir", "dtype")}
    parser.set_defaults(**inherited | {"warmup_steps": None})
    args = parser.parse_args()
    if args.warmup_steps is None and args.max_steps == flags["max_steps"]:
        args.warmup_steps = flags["warmup_steps"]  # a run of another length has the warm-up of its length
    return args, reference_config


def load_reference_config(directory):
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); --reference must be the directory of a finished run of "
                        "train_reference.py.") from None
    if config.get("stage") != "reference":
        raise UserError(f"{path} describes a {config.get('stage')} run, expected one of train_reference.py.")
    return config


def load_reference(args, config, dataset, machine):
    """The frozen reference in the compute dtype.  Raises UserError unless it was trained to its end on this data with
    this tokenizer."""
    data = dataset.describe(dataset.token_counts())["data"]
    for what in ("tokenizer", "tokenizer_sha256", "vocab_size", "train_tokens"):
        if data[what] != config["data"][what]:
            raise UserError(f"--reference={args.reference} has {what} {config['data'][what]}, but {args.data_dir} has "
                            f"{data[what]}; train a reference on this data.")
    checkpoint = load_checkpoint(args.reference, "reference")
    if checkpoint is None or checkpoint["step"] < checkpoint["identity"]["max_steps"]:
        done = checkpoint["step"] if checkpoint else 0
        raise UserError(f"--reference={args.reference} is unfinished ({done} of {config['flags']['max_steps']} steps): "
                        f"go on with: python train_reference.py @{args.reference}/flags.txt --resume")
    reference = Transformer(ModelConfig(**config["model"]), machine.dtype)
    try:
        reference.load_state_dict(checkpoint["model"])
    except RuntimeError:
        raise UserError(f"{args.reference}/ckpt.pt has not the shape {config['model']} that its config.json promises; "
                        "train the reference again.") from None
    return reference.to(machine.device).freeze()


def save_weight_history(out_dir, alpha_history):
    """Writes doremi_domain_weights_STEP.pt, a list of {"step", "domain_weights": (K,)} from alpha_1 on, in place of the
    last one.  alpha_history: (STEP, K)."""
    path = out_dir / f"doremi_domain_weights_{len(alpha_history)}.pt"
    history = [{"step": step, "domain_weights": alpha} for step, alpha in enumerate(alpha_history, start=1)]
    write_atomically(path, lambda file: torch.save(history, file))
    for other in out_dir.glob("doremi_domain_weights_*.pt"):
        if other != path:
            other.unlink()


def train(args, reference_config):
    """One run from start or checkpoint to end."""
    runtime.resolve_flags(args)
    machine = runtime.setup(args)
    block_size = reference_config["model"]["block_size"]
    dataset = load_dataset(args.data_dir, block_size)
    tokens_per_step = args.batch_size * block_size
    weights = sampling_weights(args.sampling_weights, dataset, args.max_steps * tokens_per_step)
    k = len(dataset.domains)

    reference = load_reference(args, reference_config, dataset, machine)
    torch.manual_seed(args.seed)
    model = Transformer(reference.config, machine.dtype).to(machine.device)
    optimizer = runtime.adamw(model, args)
    fingerprint = runtime.fingerprint(reference)
    sampler = Sampler(dataset, weights, args.batch_size, args.seed, machine.rank, machine.world_size,
                      pin_memory=machine.device.type == "cuda")
    args.compile = runtime.decide_compile(args, model.flops_per_token() * tokens_per_step * args.max_steps)
    forward = torch.compile(model, dynamic=False) if args.compile else model
    reference_forward = torch.compile(reference, dynamic=False) if args.compile else reference

    origin = {"out_dir": args.reference, "sampling_weights": reference_config["sampling_weights"],
              **{name: reference_config["flags"][name] for name in ("seed", "max_steps", "batch_size")},
              "fingerprint": fingerprint}
    config = {"model": vars(model.config), "n_params": model.n_params(), **dataset.describe(weights),
              "reference": origin}
    flops_per_token = model.flops_per_token() * 8 / 6  # the reference's forward pass adds 2 to the 6 parts of a step
    run = runtime.Run(args, machine, "proxy", config, tokens_per_step, flops_per_token)
    step = 0
    alpha = torch.full((k,), 1 / k, dtype=machine.exact, device=machine.device)  # Alg. 1: alpha_0 = u
    excess = torch.zeros_like(alpha)  # lambda_t, nats per token
    alpha_history = torch.zeros(args.max_steps, k, dtype=machine.exact, device=machine.device)
    if run.checkpoint:
        step = run.checkpoint["step"]
        model.load_state_dict(run.checkpoint["model"])
        optimizer.load_state_dict(run.checkpoint["optimizer"])
        sampler.load_state_dict(run.checkpoint["sampler"])
        alpha_history[:step] = run.checkpoint["alpha_history"]
        alpha, excess = alpha_history[step - 1].clone(), run.checkpoint["excess"].to(alpha)
        if run.main:  # a kill may have come between the checkpoint and its history
            save_weight_history(run.out_dir, run.checkpoint["alpha_history"])

    stop = False
    while step < args.max_steps and not stop:
        step += 1
        lr = runtime.set_learning_rate(optimizer, step, args)
        micro_batches = machine.to_device(sampler.next_batch(), args.micro_batch_size)

        # Alg. 1: lambda_t[i] = sum of max(proxy - reference, 0) over the tokens of domain i / number of those tokens,
        # over the global batch. Backward needs alpha_t, which needs all micro-batches: where there are several, the
        # proxy's forward pass is done twice.
        single_pass = len(micro_batches) == 1
        totals = torch.zeros(2, k, dtype=machine.exact, device=machine.device)
        excess_totals = torch.zeros_like(totals)
        for tokens, domain in micro_batches:
            with torch.no_grad():
                reference_loss = reference_forward(tokens)  # (b, T)
            with torch.set_grad_enabled(single_pass):
                token_loss = forward(tokens)  # (b, T)
            clipped_excess = (token_loss.detach() - reference_loss).clamp(min=0)
            totals += domain_sums(token_loss.detach(), domain, k, machine.exact)
            excess_totals += domain_sums(clipped_excess, domain, k, machine.exact)
        totals, excess_totals = machine.all_reduce(torch.stack([totals, excess_totals]))
        excess_sum, count = excess_totals
        # Not in the paper: a domain that is absent from the batch keeps its last lambda
        excess = torch.where(count > 0, excess_sum / count.clamp(min=1), excess)

        # Alg. 1: exponentiated gradient ascent, renormalize and smooth
        # Not in the paper: --update_after leaves alpha uniform at first
        step_size = args.step_size if step > args.update_after else 0.0
        alpha = update_alpha(alpha, excess, step_size, args.smoothing)
        alpha_history[step - 1] = alpha

        # One step on sum_i alpha_t[i] * (mean loss over the tokens of domain i in the global batch), alpha_t constant
        token_weight = (alpha / count.clamp(min=1)).to(token_loss.dtype)  # (K,)
        for tokens, domain in micro_batches:
            if not single_pass:
                token_loss = forward(tokens)
            (token_weight[domain] * token_loss.sum(dim=1)).sum().backward()
        machine.all_reduce_gradients(model)
        grad_norm = runtime.clip_gradients(model, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

        run.record(step, totals, grad_norm)
        if run.is_due(step, args.log_interval):
            run.log(step, lr, totals, grad_norm, epochs=sampler.epochs(), alpha=alpha, excess_loss=excess)
        if run.is_due(step, args.eval_interval):
            with run.paused_clock():
                val_loss = held_out_loss(forward, dataset, args.eval_windows, args.micro_batch_size, machine)
                run.log_evaluation(step, val_loss, dataset.bytes_per_token())
        stop = run.stop_requested(step)
        if run.is_due(step, args.save_interval) or stop:
            with run.paused_clock():
                run.save(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                "sampler": sampler.state_dict(), "excess": excess,
                                "alpha_history": alpha_history[:step]},
                         then=lambda saved: save_weight_history(run.out_dir, saved["alpha_history"]))
    sampler.close()
    run.close(step)


if __name__ == "__main__":
    cli.run(lambda: train(*parse_args()))
