"""Stage 1 of DoReMi: train the small reference model on given sampling weights.

reads   --data_dir, as prepare.py wrote it
writes  OUT_DIR/{flags.txt, config.json, metrics.jsonl, ckpt.pt}
next    python train_doremi.py --reference=OUT_DIR

Nothing here is particular to DoReMi: the loss is the mean over all tokens. train_large.py trains with this same loop.
"""

import torch

import cli
import runtime
from model import ModelConfig, Transformer
from sampler import Sampler, domain_sums, held_out_loss, load_dataset, sampling_weights

DEFAULTS = {"out_dir": "checkpoints/reference", "sampling_weights": "token_count",
            "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32, "n_ffn": 96}


def parse_args(description, defaults):
    parser = cli.ArgumentParser(description)
    cli.add_data_and_model_flags(parser, defaults)
    cli.add_optimization_flags(parser)
    cli.add_machine_flags(parser, defaults["out_dir"])
    parser.set_defaults(**defaults)
    return parser.parse_args()


def train(args, stage):
    """Train from start or checkpoint to end.  stage: "reference" or "large"."""
    runtime.resolve_flags(args)
    machine = runtime.setup(args)
    dataset = load_dataset(args.data_dir, args.block_size)
    tokens_per_step = args.batch_size * args.block_size
    weights = sampling_weights(args.sampling_weights, dataset, args.max_steps * tokens_per_step)
    K = len(dataset.domains)

    shape = ("block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_ffn")
    model_config = ModelConfig(dataset.vocab_size, **{name: getattr(args, name) for name in shape})
    torch.manual_seed(args.seed)
    with torch.device("meta"):
        model = Transformer(model_config, machine.dtype, args.activation_checkpointing)
    model = runtime.shard(model, machine)
    runtime.load_parameters(model, model.initial_parameters())
    optimizer = runtime.adamw(model, args)
    sampler = Sampler(dataset, weights, args.batch_size, args.seed, machine.rank, machine.world_size,
                      pin_memory=machine.device.type == "cuda")
    args.compile = runtime.decide_compile(args, model.flops_per_token() * tokens_per_step * args.max_steps)
    forward = torch.compile(model, dynamic=False) if args.compile else model

    config = {"stage": stage, "model": vars(model_config), "n_params": model.n_params(), **dataset.describe(weights)}
    flops_per_token = model.flops_per_token()
    run = runtime.Run(args, machine, config, tokens_per_step, flops_per_token)
    step = run.restore(model, optimizer, sampler)

    named, stop = dataset.by_name, False
    while step < args.max_steps and not stop:
        step += 1
        lr = runtime.set_learning_rate(optimizer, step, args)
        micro_batches = machine.micro_batches(sampler.next_batch(), args.micro_batch_size)

        # One step on the mean loss over all tokens of the global batch
        sums = torch.zeros(2, K, dtype=machine.sum_dtype, device=machine.device)  # of loss and tokens
        for tokens, domain in runtime.accumulate(model, micro_batches):
            token_loss = forward(tokens)  # (b, T)
            sums += domain_sums(domain, K, machine.sum_dtype, token_loss.detach())
            (token_loss.sum() / tokens_per_step).backward()
        loss_sum, count = machine.all_reduce(sums)  # (K,) each
        grad_norm = runtime.clip_gradients(model, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

        run.record(step, loss=loss_sum, gradient=grad_norm)
        if run.is_due(step, args.log_interval):
            run.log(step, loss=loss_sum.sum() / count.sum(), lr=lr, grad_norm=grad_norm,
                    epochs=named(sampler.epochs()), domain_loss=named(loss_sum / count))
        if run.is_due(step, args.eval_interval):
            val_loss = held_out_loss(forward, dataset, args.eval_windows, args.micro_batch_size, machine)
            run.log_evaluation(step, **dataset.evaluation(val_loss))
        stop = run.stop_requested(step)
        if run.is_due(step, args.save_interval) or stop:
            run.save(step, model, optimizer, sampler)
    sampler.close()
    run.close(step)


if __name__ == "__main__":
    cli.run(lambda: train(parse_args(__doc__, DEFAULTS), "reference"), runtime.leave_ranks)
