"""Stage 1 of DoReMi: train the small reference model on given domain weights.

reads   --data_dir as prepare.py wrote it
writes  OUT_DIR/{flags.txt, config.json, metrics.jsonl, ckpt.pt}
next    python train_doremi.py --reference=OUT_DIR

Nothing here is particular to DoReMi: batches drawn with fixed sampling weights, the mean loss over all tokens.
train_large.py trains the large model with this same loop.
"""

import torch

import cli
import runtime
from cli import UserError
from model import ModelConfig, Transformer
from sampler import Sampler, domain_sums, held_out_loss, load_dataset, sampling_weights

DEFAULTS = {"out_dir": "checkpoints/reference", "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 64, "n_ffn": 192}


def parse_args(description, defaults):
    parser = cli.ArgumentParser(description)
    add = parser.add_argument_group("data and model").add_argument
    add("--data_dir", default="data/demo", help="data set of prepare.py (default %(default)s)")
    add("--domain_weights", default="uniform", help="sampling weights of the domains: uniform, token_count, "
        "temperature:P (token_count ** P), unimax:EPOCHS, a FILE.json, or numbers like 0.2,0.8 (default %(default)s)")
    add("--block_size", type=cli.positive, default=256, help="context in tokens (default %(default)s)")
    for name, meaning in [("n_layer", "blocks"), ("n_head", "query heads"), ("n_kv_head", "key and value heads"),
                          ("n_embd", "width"), ("n_ffn", "hidden width of the feed-forward")]:
        add(f"--{name}", type=cli.positive, help=f"{meaning} (default %(default)s)")
    cli.add_optimization_flags(parser)
    cli.add_machine_flags(parser, defaults["out_dir"])
    parser.set_defaults(**defaults)
    return parser.parse_args()


def train(args, stage):
    """One run from start or checkpoint to end.  stage: "reference" or "large", the name it is recorded under."""
    runtime.resolve_flags(args)
    machine = runtime.setup(args)
    dataset = load_dataset(args.data_dir, args.block_size)
    tokens_per_step = args.batch_size * args.block_size
    weights = sampling_weights(args.domain_weights, dataset, args.max_steps * tokens_per_step)
    k = len(dataset.domains)

    shape = {name: getattr(args, name) for name in ("block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_ffn")}
    try:
        model_config = ModelConfig(vocab_size=dataset.vocab_size, **shape)
    except ValueError as error:
        raise UserError(f"the model's shape cannot be: {error}") from None
    torch.manual_seed(args.seed)
    model = Transformer(model_config, machine.dtype).to(machine.device)
    optimizer = runtime.adamw(model, args)
    sampler = Sampler(dataset, weights, args.batch_size, args.seed, machine.rank, machine.world_size,
                      pin_memory=machine.device.type == "cuda")
    args.compile = runtime.decide_compile(args, model.flops_per_token() * tokens_per_step * args.max_steps)
    forward = torch.compile(model, dynamic=False) if args.compile else model

    config = {"model": vars(model_config), "n_params": model.n_params(), **dataset.describe(weights)}
    run = runtime.Run(args, machine, stage, config, tokens_per_step, model.flops_per_token())
    step = 0
    if run.checkpoint:
        step = run.checkpoint["step"]
        model.load_state_dict(run.checkpoint["model"])
        optimizer.load_state_dict(run.checkpoint["optimizer"])
        sampler.load_state_dict(run.checkpoint["sampler"])

    stop = False
    while step < args.max_steps and not stop:
        step += 1
        lr = runtime.set_learning_rate(optimizer, step, args)
        micro_batches = machine.to_device(sampler.next_batch(), args.micro_batch_size)

        # One step on the mean loss over all tokens of the global batch
        totals = torch.zeros(2, k, dtype=machine.exact, device=machine.device)
        for tokens, domain in micro_batches:
            token_loss = forward(tokens)  # (b, T)
            totals += domain_sums(token_loss.detach(), domain, k, machine.exact)
            (token_loss.sum() / tokens_per_step).backward()
        machine.all_reduce(totals)
        machine.all_reduce_gradients(model)
        grad_norm = runtime.clip_gradients(model, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

        run.record(step, totals, grad_norm)
        if run.is_due(step, args.log_interval):
            run.log(step, lr, totals, grad_norm, epochs=sampler.epochs())
        if run.is_due(step, args.eval_interval):
            with run.paused_clock():
                val_loss = held_out_loss(forward, dataset, args.eval_windows, args.micro_batch_size, machine)
                run.log_evaluation(step, val_loss, dataset.bytes_per_token())
        stop = run.stop_requested(step)
        if run.is_due(step, args.save_interval) or stop:
            with run.paused_clock():
                run.save(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                "sampler": sampler.state_dict()})
    sampler.close()
    run.close(step)


def main():
    train(parse_args(__doc__, DEFAULTS), "reference")


if __name__ == "__main__":
    cli.run(main)
