"""Predict memory, operations and hours of a training run before it is paid for.  Takes seconds, needs no GPU or data.

    python experiments/memory.py @configs/paper_8b.txt --vocab_size=256000 --ranks=16

Takes the flags of train_large.py. The bytes between steps are exact: nothing else is held. The activations are counted
from what autograd keeps when the model is run on tensors without content; torch.compile keeps less. "At most" is a
bound of the peak: not all parts reach their largest size at the same moment. CUDA and NCCL take 1 to 3 GB more.
"""

import math
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli
import model as model_py
from model import ModelConfig, Transformer
from train_large import DEFAULTS


def parse_args():
    parser = cli.ArgumentParser(__doc__)
    defaults = {**DEFAULTS, "sampling_weights": "token_count"}
    cli.add_data_and_model_flags(parser, defaults)
    cli.add_optimization_flags(parser)
    cli.add_machine_flags(parser, "checkpoints/large")
    add = parser.add_argument_group("plan").add_argument
    add("--vocab_size", type=cli.positive, required=True, help="tokens of the vocabulary (in training, the data's)")
    add("--ranks", type=cli.positive, default=1, help="processes, one per GPU (default: %(default)s)")
    add("--local_ranks", type=cli.positive, help="of these on one node (default: 8, or all if there are fewer)")
    add("--tflops", type=cli.positive, default=989, help="peak of a GPU, 1e12 operations per second (default: "
        "%(default)s, an H100 in bfloat16)")
    add("--share", type=cli.fraction, default=0.4, help="of the peak that is reached (default: %(default)s)")
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    args.local_ranks = args.local_ranks or min(args.ranks, 8)
    args.dtype = getattr(torch, "bfloat16" if args.dtype == "auto" else args.dtype)
    per_rank, left = divmod(args.batch_size, args.ranks)
    if left or not per_rank or args.ranks % args.local_ranks:
        raise cli.UserError(f"--ranks={args.ranks} must divide --batch_size={args.batch_size} and be a multiple of "
                            f"--local_ranks={args.local_ranks}")
    args.micro_batch_size = args.micro_batch_size or per_rank
    return args


def config_of(args, n_layer):
    return ModelConfig(args.vocab_size, args.block_size, n_layer, args.n_head, args.n_kv_head, args.n_embd, args.n_ffn)


def saved_for_backward(args, n_layer):
    """Bytes that the forward pass of a micro-batch keeps for the backward pass, parameters not counted."""
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[id(storage)] = storage
        return tensor

    with FakeTensorMode():
        model = Transformer(config_of(args, n_layer), args.dtype)
        if args.ranks > 1:  # blocks are gathered in the compute dtype, so nothing is cast
            for parameter in model.blocks.parameters():
                parameter.data = parameter.data.to(args.dtype)
        tokens = torch.zeros(args.micro_batch_size, args.block_size + 1, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(tokens)
        for parameter in model.parameters():
            saved.pop(id(parameter.untyped_storage()), None)
        return sum(storage.nbytes() for storage in saved.values())


def predict(args):
    """Return {name: bytes of one rank}, in the order of a step."""
    with torch.device("meta"):
        model = Transformer(config_of(args, args.n_layer), args.dtype)
    shards = args.local_ranks if args.ranks > 1 else 1  # each node holds a whole copy between its ranks
    mine = sum(math.ceil(len(p) / shards) * p[0].numel() for p in model.parameters())
    size, exact = args.dtype.itemsize, max(4, args.dtype.itemsize)
    root = args.vocab_size * args.n_embd
    block_parameters = sum(p.numel() for p in model.blocks[0].parameters())
    # Gathered: the embedding and its gradient for the whole step, two blocks, and what is being reduced
    gathered = 3 * root * exact + block_parameters * (3 * size + exact) if shards > 1 else 0
    one, two = saved_for_backward(args, 1), saved_for_backward(args, 2)
    block = two - one
    if args.activation_checkpointing:  # the input of every block, and one block's activations at a time
        activations = one + args.n_layer * args.micro_batch_size * args.block_size * args.n_embd * size
    else:
        activations = one + (args.n_layer - 1) * block
    logits = model_py.LOSS_CHUNK * (1 if args.device == "cpu" else 64)
    embedding = root * (exact + size)  # a second gradient of the tied embedding, and its copy in the compute dtype
    return {"weights": exact * mine, "moments": 2 * exact * mine, "gradients": exact * mine, "gathered": gathered,
            "activations": activations, "head": 3 * exact * logits + embedding}


def at_most(sizes, accumulating):
    """The peak, in bytes.  Gradients grow while activations go, so one of the two ends of the backward pass is the
    highest; with several micro-batches, gradients are there from the start."""
    loss, end = sizes["activations"] + sizes["head"], sizes["gradients"]
    return sizes["weights"] + sizes["moments"] + sizes["gathered"] + (loss + end if accumulating else max(loss, end))


def main():
    args = parse_args()
    with torch.device("meta"):
        model = Transformer(config_of(args, args.n_layer), args.dtype)
    tokens = args.max_steps * args.batch_size * args.block_size
    flops = model.flops_per_token() * tokens
    print(f"{model.n_params():,} parameters, {tokens:,} tokens, {flops:.2e} operations; {args.ranks} ranks, "
          f"{args.local_ranks} per node, {args.micro_batch_size} x {args.block_size} tokens per forward pass")
    print(f"\n{'GB per rank':24}{'kept':>12}{'recomputed':>12}    (--activation_checkpointing)")
    columns = []
    for args.activation_checkpointing in (False, True):
        columns.append(predict(args))
        columns[-1]["at most"] = at_most(columns[-1], args.batch_size > args.ranks * args.micro_batch_size)
    for name in columns[0]:
        print(f"{name:24}" + "".join(f"{column[name] / 1e9:12.3f}" for column in columns))
    hours = [flops * factor / (args.ranks * args.share * args.tflops * 1e12) / 3600 for factor in (1, 4 / 3)]
    print(f"{'hours':24}" + "".join(f"{value:12.1f}" for value in hours) + f"    at {args.share:.0%} of the peak")
    print(f"\nA proxy also holds its frozen reference, whole: {model.n_params() * args.dtype.itemsize / 1e9:.2f} GB. "
          "Its steps take a third longer.")


if __name__ == "__main__":
    cli.run(main)
