"""Stage 2 of DoReMi: train a proxy against the reference with minimax domain weights (Algorithm 1).

reads   the reference's checkpoint and config, the data set named there
writes  OUT_DIR/{flags.txt, config.json, metrics.jsonl, ckpt.pt, doremi_domain_weights_STEP.pt}
next    python average_weights.py OUT_DIR

The proxy has the reference's shape. It draws batches with fixed sampling weights; alpha weights the losses, and moves.
"""

import sys

import torch

from common import cli, ranks
from common.cli import UserError
from common.files import write_atomically
from common.run import Run, add_machine_flags, fingerprint, load_finished, read_config
from model import ModelConfig, Transformer
from sampler import Sampler, domain_sums, held_out_loss, load_dataset, sampling_weights
from train_reference import adamw, add_optimization_flags, resolve_recipe, set_learning_rate

OWN = ("seed", "out_dir", "resume", "sampling_weights")  # flags that a proxy does not take from its reference


def parse_args():
    """The flags.  All that this script and the reference's share default to what the reference was run with."""
    known, _ = reference_parser(add_help=False).parse_known_args()
    parser = reference_parser()
    add = parser.add_argument_group("DoReMi").add_argument
    add("--step_size", type=cli.non_negative, default=1.0, help="eta of the update (default: %(default)s, paper's)")
    add("--smoothing", type=cli.fraction, default=1e-3, help="c: alpha is above c / K (default: %(default)s, paper's)")
    add("--sampling_weights", default="uniform", help="what batches are drawn from (default: %(default)s, paper's)")
    add("--data_dir", help="data set of prepare.py (default: the reference's)")
    add("--seed", type=cli.natural, help="of the initial parameters and of the batches (default: the reference's + 1)")
    add_optimization_flags(parser, inherited=True)
    add_machine_flags(parser, "checkpoints/proxy", inherited=True)
    if {"-h", "--help"} & set(sys.argv):
        parser.parse_args()  # explains without a reference, and ends

    theirs = read_config(known.reference)["flags"]
    shared = {action.dest for action in parser._actions} & theirs.keys() - set(OWN)
    derived = {"min_lr": "learning_rate", "warmup_steps": "max_steps"}  # from another flag
    parser.set_defaults(seed=theirs["seed"] + 1, **{name: theirs[name] for name in shared - derived.keys()})
    args = parser.parse_args()
    for name, source in derived.items():
        if getattr(args, name) is None and getattr(args, source) == theirs[source]:
            setattr(args, name, theirs[name])
    return args


def reference_parser(**options):
    parser = cli.ArgumentParser(__doc__, **options)
    parser.add_argument("--reference", default="checkpoints/reference",
                        help="run directory of stage 1 (default: %(default)s)")
    return parser


def save_weight_history(run, alpha_history):
    """Write the list of {"step", "domain_weights": (K,)} that the published recipe averages.  alpha_history: (STEP, K).

    Written at the end and when the run is stopped: at 200,000 steps it takes seconds. Between them alpha_history is in
    ckpt.pt.
    """
    if not run.main:
        return
    path = run.out_dir / f"doremi_domain_weights_{len(alpha_history)}.pt"
    history = [{"step": step, "domain_weights": alpha} for step, alpha in enumerate(alpha_history.cpu(), start=1)]
    write_atomically(path, lambda file: torch.save(history, file))
    for last in set(run.out_dir.glob("doremi_domain_weights_*.pt")) - {path}:
        last.unlink()


def tensor_of(checkpoint, name, shape):
    """A tensor of a checkpoint.  Raises UserError unless it has this shape and is finite."""
    found = checkpoint.get(name)
    if not isinstance(found, torch.Tensor) or found.shape != shape or not found.isfinite().all():
        raise UserError(f"ckpt.pt: {name} is no finite tensor of shape {shape}; it was changed, or written by another "
                        "version: delete it to start again")
    return found


def update_alpha(alpha, excess, step_size, smoothing):
    """alpha' = alpha * exp(step_size * excess);  alpha = (1 - c) * alpha' / sum(alpha') + c / K.    (Alg. 1)

    alpha, excess: (K,); excess in nats per token, >= 0.  Returns (K,), on the simplex, each >= c / K.
    """
    log_alpha = torch.log_softmax(alpha.log() + step_size * excess, dim=0)  # exp(step_size * excess) may overflow
    return (1 - smoothing) * log_alpha.exp() + smoothing / len(alpha)


def train(args):
    """Train from start or checkpoint to end."""
    resolve_recipe(args)
    machine = ranks.setup(args)
    origin, origin_checkpoint = load_finished(args.reference, ("reference",))
    model_config = ModelConfig(**origin["model"])
    dataset = load_dataset(args.data_dir, model_config.block_size)
    dataset.check_same_data(args.reference, origin)
    tokens_per_step = args.batch_size * model_config.block_size
    weights = sampling_weights(args.sampling_weights, dataset, args.max_steps * tokens_per_step)
    K = len(dataset.domains)

    reference = Transformer.load(origin, origin_checkpoint["model"], machine.dtype).to(machine.device).freeze()
    with torch.device("meta"):
        model = Transformer(model_config, machine.dtype, args.activation_checkpointing)
    flops_per_token = model.flops_per_token() * 8 / 6  # the reference's forward pass adds 2 parts to the 6 of a step
    compiled = ranks.decides_to_compile(args, machine, flops_per_token * tokens_per_step * args.max_steps)
    config = {"stage": "proxy", "model": vars(model_config), "n_params": model.n_params(), **dataset.describe(weights),
              "reference": {"out_dir": args.reference, "sampling_weights": origin["sampling_weights"],
                            "fingerprint": fingerprint(reference),
                            **{name: origin["flags"][name] for name in ("seed", "max_steps", "batch_size")}}}
    run = Run(args, machine, config, tokens_per_step, flops_per_token)

    torch.manual_seed(args.seed)
    forward = ranks.place(model, machine, compiled)
    reference_forward = torch.compile(reference, dynamic=False) if compiled else reference
    optimizer = adamw(model, args)
    sampler = Sampler(dataset, weights, args.batch_size, args.seed, machine.rank, machine.world_size,
                      pin_memory=machine.device.type == "cuda")
    alpha = torch.full((K,), 1 / K, dtype=machine.sum_dtype, device=machine.device)  # Alg. 1: alpha_0 = u
    excess = torch.zeros_like(alpha)  # lambda_t, nats per token
    alpha_history = torch.zeros(args.max_steps, K, dtype=machine.sum_dtype, device=machine.device)
    if run.checkpoint:
        ranks.load(model, optimizer, run.checkpoint, machine)
        sampler.load_state_dict(run.checkpoint["sampler"])
        excess = tensor_of(run.checkpoint, "excess", (K,)).to(alpha)
        alpha_history[: run.start] = tensor_of(run.checkpoint, "alpha_history", (run.start, K))
        alpha = alpha_history[run.start - 1].clone()

    step, stop, named = run.start, False, dataset.by_name
    while step < args.max_steps and not stop:
        step += 1
        lr = set_learning_rate(optimizer, step, args)
        micro_batches = machine.micro_batches(sampler.next_batch())

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
        alpha = update_alpha(alpha, excess, args.step_size, args.smoothing)
        alpha_history[step - 1] = alpha

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
            val_loss = held_out_loss(forward, dataset, args.eval_windows, machine)
            run.log_evaluation(step, **dataset.evaluation(val_loss))
        stop = run.stop_requested(step)
        if run.is_due(step, args.save_interval) or stop:
            state = {**ranks.gather(model, optimizer), "sampler": sampler.state_dict()}
            state |= {"excess": excess.cpu(), "alpha_history": alpha_history[:step].cpu()}
            run.save(step, state)
    save_weight_history(run, alpha_history[:step])
    sampler.close()
    run.close(step)


if __name__ == "__main__":
    cli.run(lambda: train(parse_args()), ranks.leave_ranks)
