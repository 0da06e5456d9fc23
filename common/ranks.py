"""Devices, precision, ranks, and a model in shards.

Everything here would be the same in any project. Skip this file and you miss nothing of DoReMi.
"""

import ctypes
import datetime
import hashlib
import math
import os
import platform
import signal
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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

from common import cli
from common.cli import UserError, check_same

PATH_FLAGS = ("out_dir", "data_dir", "reference", "sampling_weights")  # what lies there may have another name elsewhere
KEEP_GATHERED = 4e9  # bytes of parameters in the compute dtype up to which they stay gathered over a step
COMPILE_ABOVE = {"cpu": 1e12, "cuda": 1e16}  # operations of a run from which compiling, half a minute or more, pays
PEAKS = {"H100 80GB HBM3": 989e12, "H100 SXM": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12,
         "B200": 2250e12, "A100-SXM": 312e12, "A100-PCI": 312e12, "A100 80GB PCI": 312e12,
         "GeForce RTX 4090": 165e12}  # FLOP/s in dense bfloat16, as the vendor states them

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

    def all_reduce(self, tensor):
        """Sum over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather_objects(self, value):
        """Return the value of every rank, in their order.  value: any small object."""
        if self.world_size == 1:
            return [value]
        found = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def check_same(self, values, remedy):
        """Raise UserError on all ranks where {name: value} of one is not that of rank 0."""
        check_same([f"rank {i}" for i in range(self.world_size)], self.gather_objects(values), remedy)

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

    def wait_for_all(self):
        """Wait until all ranks are here: torchrun kills those that are left behind by one that ends with a status."""
        if self.world_size > 1:
            dist.barrier()

    def micro_batches(self, batch):
        """Return [(tokens (b, T + 1) int64, domain (b,))] on the device, the whole of this rank's batch."""
        asynchronous = self.device.type == "cuda"  # MPS would read memory that the host has used again
        tokens = batch.tokens.to(self.device, non_blocking=asynchronous).long()
        domain = batch.domain.to(self.device, non_blocking=asynchronous)
        return list(zip(tokens.split(self.micro_batch_size), domain.split(self.micro_batch_size)))

    def peak(self):
        """FLOP/s of all ranks' cards in bfloat16; None where that is not known."""
        if self.device.type != "cuda" or self.dtype != torch.bfloat16:
            return None
        one = peak_flops(torch.cuda.get_device_name(self.device))
        return one * self.world_size if one else None


class Fetched:
    """A number on its way from the device to the host, behind the work that was queued before it."""

    def __init__(self, tensor):
        self.host, self.arrived = tensor.to("cpu", non_blocking=tensor.is_cuda), None
        if tensor.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def value(self):
        """Wait until it is there.  Work that was queued after it goes on meanwhile."""
        if self.arrived:
            self.arrived.synchronize()
        return self.host.item()


def peak_flops(name):
    """FLOP/s of a card in dense bfloat16; None of a card that is not known, or of a part of one."""
    whole = "MIG" not in name and "Laptop" not in name
    return next((flops for card, flops in PEAKS.items() if whole and card in name), None)


def pick_device(name, local_rank=0, local_world_size=1):
    """The torch.device that --device asks for, "auto" included; one with an index on CUDA.  Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device={name} names no device; expected auto, cpu, cuda, cuda:N or mps") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type):
        raise UserError(f"--device={name}: there is no such device here; use --device=cpu")
    if device.type != "cuda":
        return device
    cards, index = torch.cuda.device_count(), device.index or 0
    if local_world_size > 1:  # a process that sees one card was given its own, as by Slurm's --gpus-per-task
        index = local_rank if cards > 1 else 0
    if index >= cards:
        raise UserError(f"--device={name}: this process wants card {index}, but sees {cards}; start one rank for each "
                        "card, or choose another one")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    major, minor = torch.cuda.get_device_capability(device)
    built_for = [arch for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
    oldest = min((int("".join(filter(str.isdigit, arch))) for arch in built_for), default=0)
    if 10 * major + minor < oldest:
        raise UserError(f"--device={name}: this PyTorch has no code for a {torch.cuda.get_device_name(device)} "
                        f"(sm_{major}{minor}, it begins at sm_{oldest}); install one that is built for CUDA 12.6")
    return device


def ranks_of_environment():
    """(rank, world_size, local_rank, local_world_size) as torchrun sets them, or those of a single process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    found = [os.environ.get(name, "nothing") for name in names]
    if found[:2] in (["nothing", "nothing"], ["0", "1"]):
        return 0, 1, 0, 1
    if all(text.isdecimal() for text in found):
        rank, world_size, local_rank, local_world_size = map(int, found)
        if rank < world_size and local_rank < local_world_size and world_size % local_world_size == 0:
            return rank, world_size, local_rank, local_world_size
    told = ", ".join(f"{name}={text}" for name, text in zip(names, found))
    raise UserError(f"the environment has {told}; start with torchrun, which sets all four, or unset them")


def setup(args):
    """Join the ranks that torchrun started, pick the device, and settle dtype and micro-batch.  Raises UserError."""
    rank, world_size, local_rank, local_world_size = ranks_of_environment()
    device = pick_device(args.device, local_rank, local_world_size)
    dtype = args.dtype
    if dtype == "auto":  # float32 on CPUs: not all multiply bfloat16, and runs should agree between them
        multiplies = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if multiplies else "float32"
    if device.type == "mps" and dtype != "float32":
        raise UserError(f"--dtype={dtype}: MPS has no float64, and its bfloat16 attention looks ahead (pytorch issue "
                        "195910); use --dtype=float32")
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
        meet(device, timeout)
    if rank:
        warnings.simplefilter("ignore")  # rank 0 says it
    if device.type == "cpu":
        keep_freed_memory()
        torch.use_deterministic_algorithms(True)  # a compiled model adds gradients up as its threads come, otherwise
    sum_dtype = torch.float32 if device.type == "mps" else torch.float64
    machine = Machine(device, getattr(torch, dtype), sum_dtype, micro_batch_size, rank, world_size, local_world_size,
                      timeout)
    flags = {name: value for name, value in vars(args).items() if name not in PATH_FLAGS}
    machine.check_same({**versions(), **flags}, "start every rank with the same code and flags")
    return machine


def versions():
    """What a run was made with: Python, libraries, and a hash of this project's sources."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted([*root.glob("*.py"), *root.glob("common/*.py")]):
        digest.update(path.read_bytes())
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "sources": digest.hexdigest()[:16]}


def meet(device, timeout):
    """Join the process group of all ranks.  Raises UserError."""
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    if backend == "nccl" and not dist.is_nccl_available():
        raise UserError("this PyTorch has no NCCL, which several cards need; use Linux, or one card without torchrun")
    try:
        dist.init_process_group(backend, device_id=device_id, timeout=timeout)
    except (ValueError, dist.DistError) as error:
        raise UserError(f"rank {os.environ['RANK']} cannot meet the other ranks at "
                        f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {error}; start all ranks "
                        "with torchrun") from None


def run(main):
    """cli.run for a script that may be one rank of several, on a card that may be too small.

    A rank ends at once, without Python's clearing up: one that failed would wait for the others, and the threads that
    talk to them may abort a process that has finished.
    """
    def explained():
        try:
            main()
        except torch.OutOfMemoryError as error:
            raise UserError(f"the card's memory is full ({str(error).split('. ')[0]}); lower --micro_batch_size, add "
                            "--activation_checkpointing, or use more cards") from None

    status = 0
    try:
        cli.run(explained)
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) else 1
        if status == 2 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            os.kill(os.getppid(), signal.SIGTERM)  # torchrun would repeat what cannot succeed
        if not dist.is_initialized():
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def keep_freed_memory():
    """Keep freed memory in the process: glibc gives large blocks back to the kernel, and the next step has to fault
    them in again, page by page. This makes a step on a CPU 1.2 to 1.35 times faster."""
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

    Return the function to call for token losses, compiled or not: as one graph on one rank, which is 1.12 to 1.17 times
    faster on a CPU than part by part; part by part on several, where FSDP2's hooks would break the graph, and where the
    loss has so many chunks that one graph of all takes minutes to compile.
    """
    tokens = machine.micro_batch_size * model.config.block_size
    whole = machine.world_size == 1 and model.loss_chunks(tokens, machine.device) <= 16
    if compiled and not whole:
        model.compile_parts()
    if machine.world_size > 1:
        shard(model, machine)
    model.to_empty(device=machine.device)
    draw_parameters(model, machine)
    return torch.compile(model, dynamic=False) if compiled and whole else model


def shard(model, machine):
    """FSDP2: every rank keeps 1/N of the parameters, gradients and moments, and gathers one block at a time.

    With several nodes, every node keeps a whole copy between its ranks, so only gradients cross the network, once per
    step. Gradients are *summed* over ranks, since the loops divide by the global number of tokens.
    """
    mesh = device_mesh(machine)
    exact = torch.float64 if machine.dtype == torch.float64 else torch.float32
    for module in [*model.blocks, model]:
        # The root stays in float32: the gradient of the embedding adds up over the chunks of the loss. cast_forward
        # would round the rotary table, an input of the blocks.
        block_dtype = None if module is model or machine.dtype == exact else machine.dtype
        policy = MixedPrecisionPolicy(block_dtype, reduce_dtype=exact, cast_forward_inputs=False)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=not stays_gathered(model))
        module.set_gradient_divide_factor(1.0)  # of this module alone; the blocks need it, too
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums


@torch.no_grad()
def draw_parameters(model, machine):
    """One at a time: they may not fit into memory together. Drawn whole, so the number of ranks changes nothing."""
    for name, value in model.initial_parameters():
        parameter = model.get_parameter(name)
        value = value.to(machine.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)


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
    def check_names():  # PyTorch leaves a parameter that is missing as it is
        if checkpoint["model"].keys() != {name for name, _ in model.named_parameters()}:
            raise UserError("ckpt.pt holds other parameters than this model has; choose another --out_dir")

    machine.from_main(check_names)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=machine.world_size > 1)
    set_optimizer_state_dict(model, optimizer, checkpoint.get("optimizer", {}), options=options)
    set_model_state_dict(model, checkpoint.get("model", {}), options=options)


def decides_to_compile(args, machine, flops):
    """--compile or not.  Where the flag leaves it open: yes if the run is long enough, and if compiling works here."""
    if args.compile is not None:
        return args.compile
    if machine.dtype == torch.float64 or flops < COMPILE_ABOVE.get(machine.device.type, math.inf):
        return False
    return all(machine.gather_objects(can_compile(machine.device)))


def can_compile(device):
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except Exception as error:  # no C++ compiler, no Triton, a compiler without its headers ...
        warnings.warn(f"torch.compile does not work here ({type(error).__name__}), so the run is not compiled; "
                      "--compile shows why", stacklevel=2)
        return False
    return True


def clip_gradients(model, grad_clip):
    """Scale the gradient down to norm grad_clip (0: leave it) and return its norm before that, on the device."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
