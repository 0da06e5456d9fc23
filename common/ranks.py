"""Devices, precision, ranks, and a model in shards.

Everything here would be the same in any project. Skip this file and you miss nothing of DoReMi.
"""

import ctypes
import datetime
import math
import os
import platform
import shutil
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from common.cli import UserError

KEEP_GATHERED = 4e9  # bytes of parameters in the compute dtype up to which they stay gathered over a step
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "4090": 165e12}  # FLOP/s, dense bfloat16

# ---- machines ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    device: torch.device
    dtype: torch.dtype  # of the computation
    sum_dtype: torch.dtype  # of sums over the batch and of alpha: float64 where the device has it
    micro_batch_size: int  # sequences per forward pass
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1  # ranks on this node
    timeout: datetime.timedelta = datetime.timedelta(seconds=600)

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM):
        """Reduce over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op)
        return tensor

    def gather_objects(self, value):
        """Return the value of every rank, in their order.  value: any small object."""
        if self.world_size == 1:
            return [value]
        found = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def from_main(self, function):
        """Call function() on rank 0 and return its value on all ranks.  A UserError is raised on all of them."""
        found = [None, None]  # value, message of an error
        if self.rank == 0:
            try:
                found[0] = function()
            except UserError as error:
                found[1] = str(error)
        if self.world_size > 1:
            dist.broadcast_object_list(found, src=0)
        if found[1]:
            raise UserError(found[1])
        return found[0]

    def micro_batches(self, batch):
        """Return [(tokens (b, T + 1) int64, domain (b,))] on the device, the whole of this rank's batch."""
        tokens = batch.tokens.to(self.device, non_blocking=True).long()
        domain = batch.domain.to(self.device, non_blocking=True)
        return list(zip(tokens.split(self.micro_batch_size), domain.split(self.micro_batch_size)))

    def peak(self):
        """FLOP/s of all ranks' cards in bfloat16 as their vendor states it; None where that is not known."""
        if self.device.type != "cuda" or self.dtype != torch.bfloat16:
            return None
        name = torch.cuda.get_device_name(self.device)
        known = [flops for card, flops in PEAK.items() if card in name]
        return known[0] * self.world_size if known else None


def pick_device(name):
    """The torch.device that --device asks for, "auto" included.  Raises UserError where there is none."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if there["cuda"] else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device={name} names no device; expected auto, cpu, cuda, cuda:N or mps") from None
    if not there.get(device.type) or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"--device={name}: there is no such device here; use --device=cpu")
    return device


def ranks_of_environment():
    """(rank, world_size, local_rank, local_world_size) as torchrun sets them, or those of a single process.

    Raises UserError for RANK without WORLD_SIZE, for numbers that contradict each other, and for missing addresses.
    """
    def number(name, default, low, high):
        text = os.environ.get(name, str(default))
        if not text.isdecimal() or not low <= int(text) <= high:
            raise UserError(f"the environment has {name}={text!r}; expected a whole number from {low} to {high}: start "
                            "with torchrun, which sets it, or unset RANK and WORLD_SIZE")
        return int(text)

    if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ):
        raise UserError("the environment has only one of RANK and WORLD_SIZE; start with torchrun, which sets both, or "
                        "unset it")
    world_size = number("WORLD_SIZE", 1, 1, 2**20)
    rank = number("RANK", 0, 0, world_size - 1)
    local_world_size = number("LOCAL_WORLD_SIZE", world_size, 1, world_size)
    local_rank = number("LOCAL_RANK", rank % local_world_size, 0, local_world_size - 1)
    if world_size % local_world_size:
        raise UserError(f"the environment has WORLD_SIZE={world_size} and LOCAL_WORLD_SIZE={local_world_size}; every "
                        "node must run the same number of ranks")
    if world_size > 1:
        number("MASTER_PORT", "", 1, 65535)
        if not os.environ.get("MASTER_ADDR"):
            raise UserError(f"the environment has WORLD_SIZE={world_size} but no MASTER_ADDR; start with torchrun")
    return rank, world_size, local_rank, local_world_size


def setup(args):
    """Join the ranks that torchrun started, pick the device, and settle dtype and micro-batch.  Raises UserError."""
    rank, world_size, local_rank, local_world_size = ranks_of_environment()
    device = pick_device(args.device)
    if device.type == "cuda":
        if world_size > 1:
            alone = torch.cuda.device_count() == 1  # Slurm's --gpus-per-task shows every process its own card only
            device = pick_device(f"cuda:{0 if alone else local_rank}")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    if args.dtype == "auto":  # float32 on CPUs: not all multiply bfloat16, and runs should agree between them
        multiplies = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if multiplies else "float32"
    per_rank, left = divmod(args.batch_size, world_size)
    if left or not per_rank:
        raise UserError(f"--batch_size={args.batch_size} is not divisible by {world_size} ranks; every rank takes the "
                        "same number of sequences")
    micro_batch_size = min(args.micro_batch_size or per_rank, per_rank)
    if per_rank % micro_batch_size:
        raise UserError(f"--micro_batch_size={micro_batch_size} does not divide the {per_rank} sequences of a rank "
                        f"(--batch_size={args.batch_size} over {world_size} ranks)")
    timeout = datetime.timedelta(seconds=args.timeout)
    if world_size > 1 and not dist.is_initialized():
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        try:
            dist.init_process_group(backend, device_id=device_id, timeout=timeout)
        except (ValueError, dist.DistError) as error:
            raise UserError(f"rank {rank} cannot meet the other ranks at {os.environ['MASTER_ADDR']}:"
                            f"{os.environ['MASTER_PORT']}: {error}; start all ranks with torchrun") from None
    if rank:
        warnings.simplefilter("ignore")  # rank 0 says it
    if device.type == "cpu":
        keep_freed_memory()
        torch.use_deterministic_algorithms(True)  # a compiled model adds gradients up as its threads come, otherwise
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    sum_dtype = torch.float32 if device.type == "mps" else torch.float64
    return Machine(device, getattr(torch, args.dtype), sum_dtype, micro_batch_size, rank, world_size, local_world_size,
                   timeout)


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


def device_mesh(machine):
    """The ranks as one row, or as nodes x ranks of a node.  --timeout holds in every group of them."""
    nodes, local = machine.world_size // machine.local_world_size, machine.local_world_size
    if nodes == 1:
        return init_device_mesh(machine.device.type, (local,), mesh_dim_names=("ranks",))
    grid = torch.arange(machine.world_size).view(nodes, local)
    across, _ = dist.new_subgroups_by_enumeration(grid.T.tolist(), timeout=machine.timeout)
    within, _ = dist.new_subgroups_by_enumeration(grid.tolist(), timeout=machine.timeout)
    return DeviceMesh.from_group([across, within], machine.device.type, mesh=grid, mesh_dim_names=("nodes", "ranks"))


def place(model, machine, compiled):
    """Move a model from the meta device to this one, in shards if there are several ranks, and draw its parameters.

    FSDP2: every rank keeps 1/N of the parameters, gradients and moments, and gathers one block at a time. With several
    nodes, every node keeps a whole copy between its ranks, so only gradients cross the network, once per step.
    Gradients are *summed* over ranks, since the loops divide by the global number of tokens.

    Return the function to call for token losses, compiled or not: as a whole on one rank, which is 1.12 to 1.17 times
    faster on a CPU than part by part; part by part on several, where FSDP2's hooks would break the graph.
    """
    if machine.world_size > 1:
        if compiled:
            model.compile_parts()
        mesh = device_mesh(machine)
        exact = torch.float64 if machine.dtype == torch.float64 else torch.float32
        for module in [*model.blocks, model]:
            # The root stays in float32: TokenLoss adds up the gradient of the embedding over its chunks. cast_forward
            # would round the rotary table, an input of the blocks.
            block_dtype = None if module is model or machine.dtype == exact else machine.dtype
            policy = MixedPrecisionPolicy(block_dtype, reduce_dtype=exact, cast_forward_inputs=False)
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=not stays_gathered(model))
            module.set_gradient_divide_factor(1.0)  # of this module alone; the blocks need it, too
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums
    model.to_empty(device=machine.device)
    with torch.no_grad():
        for name, value in model.initial_parameters():  # one at a time: they may not fit into memory together
            parameter = model.get_parameter(name)
            value = value.to(machine.device, parameter.dtype)
            if isinstance(parameter, DTensor):  # drawn whole, so that they do not depend on the number of ranks
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(value)
    return torch.compile(model, dynamic=False) if compiled and machine.world_size == 1 else model


def stays_gathered(model):
    """Whether a sharded model keeps its parameters gathered from the first forward pass of a step to its last backward.

    Otherwise they are gathered for every pass of every micro-batch: 3M times in a proxy's step of M micro-batches.
    """
    return sum(p.numel() for p in model.parameters()) * model.dtype.itemsize <= KEEP_GATHERED


def accumulate(model, micro_batches):
    """Yield the micro-batches of a step.  With several nodes, gradients cross the network after the last one only."""
    for i, micro_batch in enumerate(micro_batches, start=1):
        if isinstance(model, FSDPModule):
            last = i == len(micro_batches)
            model.set_requires_all_reduce(last)
            model.set_reshard_after_backward(last or not stays_gathered(model))
        yield micro_batch


def gather(model, optimizer):
    """{"model", "optimizer"}: their whole state as CPU tensors on rank 0, gathered one tensor at a time; empty on the
    other ranks.  Every rank must call this."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    parameters, moments = get_state_dict(model, optimizer, options=options)
    return {"model": parameters, "optimizer": moments}


def load(model, optimizer, checkpoint, machine):
    """Load what `gather` returned.  Only rank 0 needs it; the others get their shards from there.  Raises UserError."""
    machine.from_main(lambda: check_fit(model, checkpoint))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=machine.world_size > 1)
    set_optimizer_state_dict(model, optimizer, checkpoint.get("optimizer", {}), options=options)
    set_model_state_dict(model, checkpoint.get("model", {}), options=options)


def check_fit(model, checkpoint):
    """Raise UserError unless a checkpoint has each parameter and its moments in their shapes: PyTorch leaves what is
    missing as it is."""
    moments = checkpoint["optimizer"].get("state", {})
    for name, parameter in model.named_parameters():
        entries = {"the parameter": checkpoint["model"].get(name)}
        for moment in ("exp_avg", "exp_avg_sq"):
            entries[moment] = moments.get(name, {}).get(moment)
        for what, found in entries.items():
            shape = list(found.shape) if isinstance(found, torch.Tensor) else None
            if shape != list(parameter.shape):
                raise UserError(f"ckpt.pt: {what} of {name} has shape {shape}, expected {list(parameter.shape)}; it "
                                "was changed, or written by another version: delete it to start again")


def decides_to_compile(args, machine, flops):
    """--compile or not, where the flag leaves it open: compiling costs up to half a minute and halves the rest."""
    if args.compile is not None:
        return args.compile
    if machine.device.type != "cpu":
        return machine.device.type == "cuda"
    return flops > 1e12 and args.dtype != "float64" and bool(shutil.which("g++") or shutil.which("clang++"))


def clip_gradients(model, grad_clip):
    """Scale the gradient down to norm grad_clip (0: leave it) and return its norm before that, on the device."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
