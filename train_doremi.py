"""Stage 2 of DoReMi: train a proxy against the reference with minimax domain weights (Algorithm 1).

reads   the reference's checkpoint and config, the data set named there
writes  OUT_DIR/{flags.txt, config.json, metrics.jsonl, ckpt.pt, doremi_domain_weights_STEP.pt}
next    python average_weights.py OUT_DIR

The proxy has the reference's shape. It draws batches with fixed sampling weights; alpha weights the losses, and moves.
"""

import sys
from pathlib import Path

import torch

from common import cli, ranks
from common.cli import UserError
from common.files import write_atomically
from common.run import Run, add_machine_flags, load_finished, read_config
from model import ModelConfig, Transformer
from sampler import Sampler, domain_sums, load_dataset, sampling_weights
from train_reference import adamw, add_optimization_flags, held_out_loss, resolve_recipe, set_learning_rate

OWN = ("seed", "out_dir", "resume", "sampling_weights")  # flags that a proxy does not take from its reference
DERIVED = {"min_lr": "learning_rate", "warmup_steps": "max_steps"}  # flags that derive from another, which is given


def parse_args():
    """The flags.  All that this script and the reference's share default to what the reference was run with."""
    known, _ = reference_parser(add_help=False).parse_known_args()
    parser = reference_parser()
    add = parser.add_argument_group("DoReMi").add_argument
    add("--step_size", type=cli.non_negative, default=1.0, help="eta of the update (default: %(default)s, paper's)")
    add("--smoothing", type=cli.fraction, default=1e-3, help="c: alpha is above c / K (default: %(default)s, paper's)")
    add("--sampling_weights", default="uniform", help="what batches are drawn from (default: %(default)s, paper's)")
    add("--data_dir", type=cli.path, help="data set of prepare.py (default: the reference's)")
    add("--seed", type=cli.natural, help="of the initial parameters and of the batches (default: the reference's + 1)")
    add_optimization_flags(parser)
    add_machine_flags(parser, "checkpoints/proxy")
    if {"-h", "--help"} & set(sys.argv) and not Path(known.reference, "config.json").exists():
        parser.parse_args()  # explains without a reference, and ends

    theirs = read_config(known.reference)["flags"]
    shared = {action.dest for action in parser._actions} & theirs.keys() - set(OWN)
    parser.set_defaults(seed=theirs["seed"] + 1, **{name: theirs[name] for name in shared - DERIVED.keys()})
    args = parser.parse_args()
    for name, source in DERIVED.items():
        if getattr(args, name) is None and getattr(args, source) == theirs[source]:
            setattr(args, name, theirs[name])
    return resolve_recipe(args)


def reference_parser(**options):
    parser = cli.ArgumentParser(__doc__, **options)
    parser.add_argument("--reference", type=cli.path, default="checkpoints/reference", help="run directory of stage 1, "
                        "whose flags are the defaults of most below (default: %(default)s)")
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


def update_alpha(alpha, excess, step_size, smoothing):
    """alpha' = alpha * exp(step_size * excess);  alpha = (1 - c) * alpha' / sum(alpha') + c / K.    (Alg. 1)

    alpha, excess: (K,); excess in nats per token, >= 0.  Returns (K,), on the simplex, each >= c / K.
    """
    log_alpha = torch.log_softmax(alpha.log() + step_size * excess, dim=0)  # exp(step_size * excess) may overflow
    return (1 - smoothing) * log_alpha.exp() + smoothing / len(alpha)


def train(args):
    """Train from start or checkpoint to end."""
    machine = ranks.setup(args)
    origin, origin_checkpoint = load_finished(args.reference, ("reference",))
    dataset = load_dataset(args.data_dir, origin["model"]["block_size"])
    dataset.check_same_data(args.reference, origin)
    model_config = ModelConfig(**origin["model"])
    tokens_per_step = args.batch_size * model_config.block_size
    weights = sampling_weights(args.sampling_weights, dataset, args.max_steps * tokens_per_step)
    K = len(dataset.domains)
    for name, weight in zip(dataset.domains, weights):
        if weight == 0:
            raise UserError(f"--sampling_weights gives '{name}' weight 0: the proxy would never see it, and have no "
                            "answer for it; give it a weight, or prepare the data without it")

    reference = Transformer.load(origin, origin_checkpoint["model"], machine.dtype).to(machine.device).freeze()
    with torch.device("meta"):
        model = Transformer(model_config, machine.dtype, args.activation_checkpointing)
    flops_per_token = model.flops_per_token() * 8 / 6  # the reference's forward pass adds 2 parts to the 6 of a step
    compiled = ranks.decides_to_compile(args, machine, flops_per_token * tokens_per_step * args.max_steps)
    # What this experiment is: --resume compares it. Record here whatever else changes the batches or the updates
    config = {"stage": "proxy", "model": vars(model_config), "n_params": model.n_params(), **dataset.describe(weights)}
    config["reference"] = {"out_dir": args.reference, "sampling_weights": origin["sampling_weights"],
                           "fingerprint": reference.fingerprint(),
                           **{name: origin["flags"][name] for name in ("seed", "max_steps", "batch_size")}}
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
        excess.copy_(run.checkpoint["excess"])
        alpha_history[: run.start] = run.checkpoint["alpha_history"]
        alpha.copy_(alpha_history[run.start - 1])
        run.checkpoint = None

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
                proxy_loss = forward(tokens)  # (b, T)
            clipped_excess = (proxy_loss.detach() - reference_loss).clamp(min=0)
            sums += domain_sums(domain, K, machine.sum_dtype, proxy_loss.detach(), clipped_excess)
        loss_sum, excess_sum, count = run.all_reduce(sums)  # (K,) each
        # Not in the paper: a domain that is absent from the batch keeps its last lambda
        excess = torch.where(count > 0, excess_sum / count.clamp(min=1), excess)

        # Alg. 1: exponentiated gradient ascent, renormalize and smooth
        alpha = update_alpha(alpha, excess, args.step_size, args.smoothing)
        alpha_history[step - 1] = alpha

        # One step on sum_i alpha_t[i] * (mean loss over the tokens of domain i in the global batch), alpha_t constant
        token_weight = (alpha / count.clamp(min=1)).to(proxy_loss.dtype)  # (K,)
        for tokens, domain in ranks.accumulate(model, micro_batches):
            token_loss = proxy_loss if single_pass else forward(tokens)
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
        stop = run.stops_after(step)
        if run.is_due(step, args.save_interval) or stop:
            state = {**ranks.gather(model, optimizer), "sampler": sampler.state_dict()}
            state |= {"excess": excess.cpu(), "alpha_history": alpha_history[:step].cpu()}
            run.save(step, state)
    save_weight_history(run, alpha_history[:step])
    sampler.close()
    run.close(step, f"python average_weights.py {args.out_dir}")


if __name__ == "__main__":
    ranks.run(lambda: train(parse_args()))
