"""Stage 1 of DoReMi: train the small reference model on given sampling weights.

reads   --data_dir, as prepare.py wrote it
writes  OUT_DIR/{flags.txt, config.json, metrics.jsonl, ckpt.pt}
next    python train_doremi.py --reference=OUT_DIR

Nothing here is particular to DoReMi: the loss is the mean over all tokens. train_large.py trains with this same loop.
"""

import math

import torch

from common import cli, ranks
from common.cli import UserError
from common.run import Run, add_machine_flags
from model import ModelConfig, Transformer
from sampler import Sampler, domain_sums, evaluation_batches, load_dataset, sampling_weights

DEFAULTS = {"out_dir": "checkpoints/reference", "sampling_weights": "token_count",
            "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32, "n_ffn": 96}
NEXT = {"reference": "train_doremi.py --reference=", "large": "compare.py BASELINE "}


def add_data_and_model_flags(parser, defaults):
    """Flags of stages 1 and 4.  defaults: {flag: value}; without one, --sampling_weights must be given."""
    add = parser.add_argument_group("data and model").add_argument
    add("--data_dir", type=cli.path, default="data/demo", help="data set of prepare.py (default: %(default)s)")
    add("--sampling_weights", required="sampling_weights" not in defaults, help="what batches are drawn from: uniform, "
        "token_count, temperature:P (token_count ** P), unimax:EPOCHS, FILE.json, numbers such as 0.2,0.8, or the mean "
        "of several of these: uniform+token_count "
        f"(default: {defaults.get('sampling_weights', 'none, it must be given')})")
    add("--block_size", type=cli.positive, default=64, help="context in tokens (default: %(default)s)")
    for name, meaning in [("n_layer", "blocks"), ("n_head", "query heads"), ("n_kv_head", "key and value heads"),
                          ("n_embd", "width"), ("n_ffn", "hidden width of the feed-forward")]:
        add(f"--{name}", type=cli.positive, help=f"{meaning} (default: %(default)s)")


def add_optimization_flags(parser):
    """The recipe."""
    group = parser.add_argument_group("optimization")

    def add(name, kind, default, meaning, shown="%(default)s"):
        choices = {"choices": kind} if isinstance(kind, list) else {"type": kind}
        group.add_argument(name, default=default, help=f"{meaning} (default: {shown})", **choices)

    add("--max_steps", cli.positive, 4000, "optimizer steps")
    add("--batch_size", cli.positive, 24, "sequences per step over all ranks")
    add("--learning_rate", cli.non_negative, 3e-3, "peak learning rate")
    add("--min_lr", cli.non_negative, None, "last learning rate", "a tenth of the peak")
    add("--lr_schedule", ["cosine", "exponential"], "cosine", "decay after warm-up; exponential is the paper's")
    add("--warmup_steps", cli.natural, None, "steps of linear warm-up",
        "the paper's 6%% of max_steps, but at least 300, or a third of a shorter run")
    add("--weight_decay", cli.non_negative, 0.01, "AdamW's weight decay, on matrices only")
    add("--beta1", cli.fraction, 0.9, "AdamW's decay of the first moment")
    add("--beta2", cli.fraction, 0.99, "AdamW's decay of the second moment")
    add("--grad_clip", cli.non_negative, 1.0, "largest norm of the gradient; 0: no limit")


def parse_args(description, defaults):
    parser = cli.ArgumentParser(description)
    add_data_and_model_flags(parser, defaults)
    add_optimization_flags(parser)
    add_machine_flags(parser, defaults["out_dir"])
    parser.add_argument("--seed", type=cli.natural, default=1,
                        help="of the initial parameters and of the batches (default: %(default)s)")
    parser.set_defaults(**defaults)
    return resolve_recipe(parser.parse_args())


def resolve_recipe(args):
    """Fill in the flags that derive from others, and return args.  Raises UserError for values that no run can have."""
    if args.min_lr is None:
        args.min_lr = args.learning_rate / 10
    if args.warmup_steps is None:  # Not in the paper: at least 300 steps, or a third of a run shorter than 900
        args.warmup_steps = max(round(0.06 * args.max_steps), min(300, args.max_steps // 3))
    if not 0 < args.min_lr <= args.learning_rate:
        raise UserError(f"--min_lr={args.min_lr} must be above 0 and at most --learning_rate={args.learning_rate}")
    if not 0 <= args.warmup_steps <= args.max_steps:
        raise UserError(f"--warmup_steps={args.warmup_steps} must be between 0 and --max_steps={args.max_steps}")
    return args


def adamw(model, args):
    """AdamW with weight decay on matrices only.  Not in the paper (Adafactor), but in its official code."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(args.beta1, args.beta2), fused=True)


def set_learning_rate(optimizer, step, args):
    """Linear warm-up, then cosine or exponential decay to min_lr at the last step.  step: 1..max_steps."""
    if step <= args.warmup_steps:
        lr = args.learning_rate * step / args.warmup_steps
    else:
        progress = (step - args.warmup_steps) / (args.max_steps - args.warmup_steps)
        if args.lr_schedule == "cosine":
            lr = args.min_lr + (args.learning_rate - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2
        else:
            lr = args.learning_rate * (args.min_lr / args.learning_rate) ** progress
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


@torch.no_grad()
def held_out_loss(forward, dataset, n_windows, machine):
    """Mean validation loss of each domain in nats per token: (K,) float64 array, the same on all ranks.

    forward: a function from tokens (b, T + 1) to token losses (b, T); n_windows: of each domain, 0 for all.
    """
    K = len(dataset.domains)
    sums = torch.zeros(2, K, dtype=machine.sum_dtype, device=machine.device)
    batches = evaluation_batches(dataset, n_windows, machine.micro_batch_size, machine.rank, machine.world_size)
    for tokens, domain in batches:
        token_loss = forward(tokens.to(machine.device).long())
        sums += domain_sums(domain.to(machine.device), K, machine.sum_dtype, token_loss)
    loss_sum, count = machine.all_reduce(sums).cpu().double().numpy()
    return loss_sum / count


def train(args, stage):
    """Train from start or checkpoint to end.  stage: "reference" or "large"."""
    machine = ranks.setup(args)
    dataset = load_dataset(args.data_dir, args.block_size)
    shape = {name: getattr(args, name) for name in ("block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_ffn")}
    model_config = ModelConfig(dataset.vocab_size, **shape)
    tokens_per_step = args.batch_size * model_config.block_size
    weights = sampling_weights(args.sampling_weights, dataset, args.max_steps * tokens_per_step)
    K = len(dataset.domains)

    with torch.device("meta"):
        model = Transformer(model_config, machine.dtype, args.activation_checkpointing)
    flops_per_token = model.flops_per_token()
    compiled = ranks.decides_to_compile(args, machine, flops_per_token * tokens_per_step * args.max_steps)
    # What this experiment is: --resume compares it. Record here whatever else changes the batches or the updates
    config = {"stage": stage, "model": vars(model_config), "n_params": model.n_params(), **dataset.describe(weights)}
    run = Run(args, machine, config, tokens_per_step, flops_per_token)

    torch.manual_seed(args.seed)
    forward = ranks.place(model, machine, compiled)
    optimizer = adamw(model, args)
    sampler = Sampler(dataset, weights, args.batch_size, args.seed, machine.rank, machine.world_size,
                      pin_memory=machine.device.type == "cuda")
    if run.checkpoint:
        ranks.load(model, optimizer, run.checkpoint, machine)
        sampler.load_state_dict(run.checkpoint["sampler"])
        run.checkpoint = None

    step, stop, named = run.start, False, dataset.by_name
    while step < args.max_steps and not stop:
        step += 1
        lr = set_learning_rate(optimizer, step, args)
        micro_batches = machine.micro_batches(sampler.next_batch())

        # One step on the mean loss over all tokens of the global batch
        sums = torch.zeros(2, K, dtype=machine.sum_dtype, device=machine.device)  # of loss and tokens
        for tokens, domain in ranks.accumulate(model, micro_batches):
            token_loss = forward(tokens)  # (b, T)
            sums += domain_sums(domain, K, machine.sum_dtype, token_loss.detach())
            (token_loss.sum() / tokens_per_step).backward()
        loss_sum, count = run.all_reduce(sums)  # (K,) each
        grad_norm = ranks.clip_gradients(model, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

        run.record(step, loss=loss_sum, gradient=grad_norm)
        if run.is_due(step, args.log_interval):
            run.log(step, loss=loss_sum.sum() / count.sum(), lr=lr, grad_norm=grad_norm,
                    epochs=named(sampler.epochs()), domain_loss=named(loss_sum / count))
        if run.is_due(step, args.eval_interval):
            val_loss = held_out_loss(forward, dataset, args.eval_windows, machine)
            run.log_evaluation(step, **dataset.evaluation(val_loss))
        stop = run.stops_after(step)
        if run.is_due(step, args.save_interval) or stop:
            state = {**ranks.gather(model, optimizer), "sampler": sampler.state_dict()}
            run.save(step, state)
    sampler.close()
    run.close(step, f"python {NEXT[stage]}{args.out_dir}")


if __name__ == "__main__":
    ranks.run(lambda: train(parse_args(__doc__, DEFAULTS), "reference"))
