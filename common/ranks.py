"""Devices, precision, ranks, and a model in shards.

Everything here would be the same in any project. Skip this file and you miss nothing of DoReMi.
"""

import ctypes
import datetime
import math
import os
import platform
import shutil
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from common.cli import UserError

# ---- machines ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    device: torch.device
    dtype: torch.dtype  # of the computation
    sum_dtype: torch.dtype  # of sums over the batch and of alpha: float64 where the device has it
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1  # ranks on this node

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM):
        """Reduce over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op)
        return tensor

    def micro_batches(self, batch, size):
        """Return [(tokens (size, T + 1) int64, domain (size,))] on the device, the whole of this rank's batch."""
        tokens = batch.tokens.to(self.device, non_blocking=True).long()
        domain = batch.domain.to(self.device, non_blocking=True)
        return list(zip(tokens.split(size), domain.split(size)))


def setup(args):
    """Join the ranks that torchrun started, pick the device, and settle --micro_batch_size.  Raises UserError."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kinds = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not kinds.get(args.device.split(":")[0]):
        raise UserError(f"--device={args.device}: there is no such device here; use --device=cpu")
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if world_size > 1 else device.index or 0)
        torch.cuda.set_device(device)
    per_rank, left = divmod(args.batch_size, world_size)
    if left or not per_rank:
        raise UserError(f"--batch_size={args.batch_size} is not divisible by {world_size} ranks; every rank takes the "
                        "same number of sequences")
    args.micro_batch_size = args.micro_batch_size or per_rank
    if per_rank % args.micro_batch_size:
        raise UserError(f"--micro_batch_size={args.micro_batch_size} does not divide the {per_rank} sequences of a "
                        f"rank (--batch_size={args.batch_size} over {world_size} ranks)")
    if world_size > 1 and not dist.is_initialized():
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None,
                                timeout=datetime.timedelta(seconds=args.timeout))
    if device.type == "cpu":
        keep_freed_memory()
        torch.use_deterministic_algorithms(True)  # a compiled model adds gradients up as its threads come, otherwise
    sum_dtype = torch.float32 if device.type == "mps" else torch.float64
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return Machine(device, getattr(torch, args.dtype), sum_dtype, rank, world_size, local)


def leave_ranks():
    """Stop the threads that talk to other ranks: Python aborts if one still holds a tensor when it ends."""
    if dist.is_initialized():
        dist.destroy_process_group()


def keep_freed_memory():
    """Keep freed memory in the process: glibc gives large blocks back to the kernel, and the next step has to fault
    them in again, page by page. This makes a step on a CPU 1.2 to 1.35 times faster (docs/performance.md)."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: blocks up to 1 GB come from the heap ...
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: ... which keeps up to 2 GB that is free


# ---- the model and its optimizer, whole or in shards ----------------------------------------------------------------


def shard(model, machine):
    """Move a model from the meta device to this one, in shards if there are several ranks.  Its values are undefined.

    FSDP2: every rank keeps 1/N of the parameters, gradients and moments, and gathers one block at a time. With several
    nodes, every node keeps a whole copy between its ranks, so only gradients cross the network, once per step.
    Gradients are *summed* over ranks, since the loops divide by the global number of tokens.
    """
    if machine.world_size > 1:
        nodes = machine.world_size // machine.local_world_size
        shape = (machine.world_size,) if nodes == 1 else (nodes, machine.local_world_size)
        mesh = init_device_mesh(machine.device.type, shape, mesh_dim_names=("nodes", "ranks")[-len(shape):])
        exact = torch.float64 if machine.dtype == torch.float64 else torch.float32
        for module in [*model.blocks, model]:
            # The root stays in float32: TokenLoss adds up the gradient of the embedding over its chunks. cast_forward
            # would round the rotary table, an input of the blocks.
            block_dtype = None if module is model or machine.dtype == exact else machine.dtype
            policy = MixedPrecisionPolicy(block_dtype, reduce_dtype=exact, cast_forward_inputs=False)
            fully_shard(module, mesh=mesh, mp_policy=policy)
            module.set_gradient_divide_factor(1.0)  # of this module alone; the blocks need it, too
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums
    return model.to_empty(device=machine.device)


def like(target, tensor):
    """tensor, the whole of it on every rank, in the dtype, device and shards of target."""
    tensor = tensor.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)
    return tensor


@torch.no_grad()
def load_parameters(model, tensors):
    """Copy whole tensors into all parameters of the model.  tensors: an iterable of (name, tensor)."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors:
        parameter = parameters.pop(name)
        parameter.copy_(like(parameter, tensor))
    if parameters:
        raise KeyError(f"no values for {sorted(parameters)}")


def whole(value):
    """Return value with its shards gathered, one tensor at a time, on the CPU of rank 0 (None elsewhere).  Every rank
    must call this."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole(item) for item in value]
    if isinstance(value, DTensor):
        value = value.full_tensor()
        return value.cpu() if dist.get_rank() == 0 else None
    return value


def accumulate(model, micro_batches):
    """Yield the micro-batches of a step.  With several nodes, gradients cross the network after the last one only."""
    for i, micro_batch in enumerate(micro_batches, start=1):
        if isinstance(model, FSDPModule):
            model.set_requires_all_reduce(i == len(micro_batches))
        yield micro_batch


def decide_compile(args, flops):
    """--compile or not, where the flag leaves it open: compiling costs up to half a minute and halves the rest."""
    if args.compile is not None:
        return args.compile
    if args.device != "cpu":
        return args.device.startswith("cuda")
    return flops > 1e12 and args.dtype != "float64" and bool(shutil.which("g++") or shutil.which("clang++"))


def clip_gradients(model, grad_clip):
    """Scale the gradient down to norm grad_clip (0: leave it) and return its norm before that, on the device."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def matmul_peak(device, dtype, n=2048, repeats=5):
    """FLOP/s of an n x n x n matrix product, the best of a few.  Utilisation (mfu) is measured against it."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    products, best = 1 if device.type == "cpu" else 50, math.inf
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(products):
            a @ a
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / products)
    return 2 * n**3 / best


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
