"""Running on machines: ranks, shards, precision, schedule, and a run's directory.

Everything here would be the same in any project. It knows neither models nor domains: the loops say what is logged and
saved. Skip this file and you miss nothing of DoReMi.
"""

import contextlib
import ctypes
import datetime
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from cli import MACHINE_FLAGS, PATH_FLAGS, UserError, flag_lines, shown

# ---- machines ------------------------------------------------------------------------------------------------------


def resolve_flags(args):
    """Fill in the flags that depend on others.  Raises UserError for values that no run can have."""
    if args.min_lr is None:
        args.min_lr = args.learning_rate / 10
    if args.warmup_steps is None:  # Not in the paper: at least 300 steps, or a third of a run shorter than 900
        args.warmup_steps = max(round(0.06 * args.max_steps), min(300, args.max_steps // 3))
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "auto":  # float32 on CPUs: not all multiply bfloat16, and runs should agree between them
        multiplies = args.device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if multiplies else "float32"
    if not 0 < args.min_lr <= args.learning_rate:
        raise UserError(f"--min_lr={args.min_lr} must be above 0 and at most --learning_rate={args.learning_rate}")
    if not 0 <= args.warmup_steps <= args.max_steps:
        raise UserError(f"--warmup_steps={args.warmup_steps} must be between 0 and --max_steps={args.max_steps}")


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


# ---- a run's directory ----------------------------------------------------------------------------------------------


class Run:
    """Write a run's directory from rank 0, and bring the last checkpoint back with --resume.

    config: what config.json says of the run besides its flags, as JSON values.  A checkpoint is resumed only under the
    same identity, see `identity`.
    """

    def __init__(self, args, machine, config, tokens_per_step, flops_per_token):
        self.args, self.machine, self.main = args, machine, machine.rank == 0
        self.out_dir, self.stage = Path(args.out_dir), config["stage"]
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        config = {**config, "flags": vars(args), "versions": versions, "device": str(machine.device),
                  "world_size": machine.world_size}
        self.identity = identity(config)
        if (self.out_dir / "ckpt.pt").exists() and not args.resume:
            raise UserError(f"{self.out_dir} already holds a run: --resume it, choose another --out_dir, or delete it")
        self.checkpoint = load_checkpoint(self.out_dir, self.stage, self.identity) if args.resume else None
        start = self.checkpoint["step"] if self.checkpoint else 0
        self.agree_on(start)
        self.seconds = self.checkpoint["seconds"] if self.checkpoint else 0.0
        self.pending = []  # (step, {name: tensor}) since the last look, still on the device
        self.signal = 0  # that asked the run to stop
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.request_stop)
        if self.main:
            self.peak = matmul_peak(machine.device, machine.dtype) * machine.world_size
            self.out_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(self.out_dir / "flags.txt", flag_lines(args))
            write_atomically(self.out_dir / "config.json", json.dumps(config, indent=2) + "\n")
            self.metrics = open_metrics(self.out_dir / "metrics.jsonl", start)
            self.wandb = None
            if args.wandb != "disabled":
                self.wandb = start_wandb(self.out_dir, args.wandb, self.checkpoint, name=self.out_dir.name,
                                         job_type=self.stage, config=config)
            tqdm.write(f"{self.out_dir.name}: {config['n_params']:,} parameters, {args.max_steps:,} steps of "
                       f"{tokens_per_step:,} tokens on {machine.world_size} x {machine.device}, {args.dtype}, "
                       f"{'compiled' if args.compile else 'eager'}{f', after step {start}' if start else ''}")
        self.progress = tqdm(initial=start, total=args.max_steps, unit="step", desc=self.out_dir.name, mininterval=1,
                             dynamic_ncols=True, disable=not self.main)
        self.clock = time.perf_counter()
        self.mark = start, self.elapsed()  # step and seconds from which the speed of the next line is counted

    def agree_on(self, step):
        """Raise UserError on every rank if they would not all resume from this step."""
        ends = torch.tensor([step, -step], device=self.machine.device)
        high, low = self.machine.all_reduce(ends, dist.ReduceOp.MAX).tolist()
        if high != -low:
            raise UserError(f"{self.out_dir}: the ranks see checkpoints of steps {-low} to {high}; put the same "
                            "ckpt.pt on every node, or use a disk that all nodes share")

    def restore(self, model, optimizer, sampler):
        """Load the checkpoint, if there is one.  Return the number of steps that are done."""
        if not self.checkpoint:
            return 0
        load_parameters(model, self.checkpoint["model"].items())
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, moments in self.checkpoint["optimizer"]["state"].items():
            for name, value in moments.items():
                moments[name] = like(parameters[i], value) if value.shape == parameters[i].shape else value
        optimizer.load_state_dict(self.checkpoint["optimizer"])
        sampler.load_state_dict(self.checkpoint["sampler"])
        return self.checkpoint["step"]

    def elapsed(self):
        """Seconds since the start of the run, over all of its resumptions."""
        return self.seconds + time.perf_counter() - self.clock

    def request_stop(self, number, frame):
        """Finish the step and save; a second signal ends the process at once."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def stop_requested(self, step):
        """Whether to stop after this step.  Several ranks agree on it at log steps only, since they have to wait."""
        if self.machine.world_size > 1:
            if not self.is_due(step, self.args.log_interval):
                return False
            signals = torch.tensor(self.signal, device=self.machine.device)
            self.signal = int(self.machine.all_reduce(signals, dist.ReduceOp.MAX))
        return self.signal > 0

    def is_due(self, step, interval):
        return step % interval == 0 or step == self.args.max_steps

    def record(self, step, **tensors):
        """Keep tensors that have to be finite on the device.  Nothing waits for them before the next log line."""
        self.pending.append((step, tensors))
        self.progress.update()

    def check_finite(self):
        """Raise UserError at the first step since the last look that is not finite."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        finite = torch.stack([torch.stack([t.isfinite().all() for t in tensors.values()]) for _, tensors in pending])
        for (step, tensors), row in zip(pending, finite.tolist()):
            if not all(row):
                bad = " and ".join(name for name, good in zip(tensors, row) if not good)
                raise UserError(f"step {step}: the {bad} is not finite; the step is not saved. Lower --learning_rate, "
                                "or look at the data of that step")

    def log(self, step, **values):
        """Append a line of this step's values and the speed since the last line.  values: numbers, tensors of one
        number, or {name: number}."""
        self.check_finite()
        if not self.main:
            return
        seconds = self.elapsed()
        speed = (step - self.mark[0]) * self.tokens_per_step / (seconds - self.mark[1])
        self.mark = step, seconds
        self.write({"step": step, **values, "tokens_per_second": speed,
                    "mfu": speed * self.flops_per_token / self.peak})
        self.progress.set_postfix_str(f"loss {float(values['loss']):.3f}, {speed / 1e3:.1f}k tokens/s")

    def log_evaluation(self, step, **values):
        if self.main:
            self.write({"step": step, "tokens": step * self.tokens_per_step, "seconds": self.elapsed(), **values})
            numbers = [f"{name} {value:.4f}" for name, value in values.items() if isinstance(value, float)]
            tqdm.write(f"{self.out_dir.name}, step {step}: {', '.join(numbers)}")
        self.mark = step, self.elapsed()

    def write(self, line):
        line = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in line.items()}
        try:
            self.metrics.write(json.dumps(line) + "\n")
            self.metrics.flush()
        except OSError as error:
            raise UserError(f"{self.metrics.name} could not be written ({error}); choose another --out_dir") from None
        if self.wandb:
            self.wandb.log(slashed(line), step=line["step"])

    def save(self, step, model, optimizer, sampler, **state):
        """Write ckpt.pt: a kill at any moment leaves the old one or the new one, whole."""
        self.check_finite()
        state = whole({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                       "sampler": sampler.state_dict(), **state})
        if self.main:
            os.fsync(self.metrics.fileno())
            checkpoint = {"stage": self.stage, "identity": self.identity, "step": step, "seconds": self.elapsed(),
                          "wandb_id": self.wandb.id if self.wandb else None, **state}
            write_atomically(self.out_dir / "ckpt.pt", lambda file: torch.save(checkpoint, file))
        self.mark = step, self.elapsed()

    def close(self, step):
        """Say how the run ended.  Exit with 128 + signal if it was stopped: that is not a finished run."""
        self.progress.close()
        stopped = step < self.args.max_steps
        if self.main:
            self.metrics.close()
            if self.wandb:
                self.wandb.finish()
            print(f"{self.out_dir}: {'stopped (--resume continues)' if stopped else 'done'} after step {step:,} of "
                  f"{self.args.max_steps:,}, {self.elapsed():.0f} s", flush=True)
        leave_ranks()
        if stopped:
            sys.exit(128 + self.signal)


def start_wandb(out_dir, mode, checkpoint, **settings):
    """Log to the project WANDB_PROJECT, else nanodoremi.  checkpoint: the run's, to continue its curves, or None."""
    import wandb

    return wandb.init(project=os.environ.get("WANDB_PROJECT", "nanodoremi"), dir=out_dir, mode=mode, resume="allow",
                      id=(checkpoint or {}).get("wandb_id"), **settings)


def slashed(line):
    """Name a line's values for wandb, which groups its panels by the part before the slash."""
    section, named = "val" if "val_loss" in line else "train", {}
    for name, value in line.items():
        if isinstance(value, dict):
            named |= {f"{name}/{key}": number for key, number in value.items()}
        elif name != "step":
            named[f"{section}/{name.removeprefix('val_')}"] = value
    return named


def identity(config):
    """{name: value} of all that makes a run this experiment and no other, from its config.json.

    Flags of the machine are left out, and so are paths: what lies there is compared.
    """
    left_out = {*MACHINE_FLAGS, *PATH_FLAGS}
    flat = {name: value for name, value in config["flags"].items() if name not in left_out}
    for name, value in config.items():
        if name in ("data", "reference"):
            flat |= {f"{name}.{key}": item for key, item in value.items() if key not in ("out_dir", "data_dir")}
        elif name not in ("flags", "versions", "device", "world_size"):
            flat[name] = value
    return flat


def check_same(runs, found, remedy):
    """Raise UserError where {name: value} of a run is not that of the first run.  found: of each run."""
    for run, values in zip(runs, found):
        for name in sorted(values.keys() | found[0].keys()):
            if (here := values.get(name)) != (there := found[0].get(name)):
                raise UserError(f"{run}: {name} is {shown(here)}, but {shown(there)} in {runs[0]}; {remedy}")


def read_config(out_dir):
    """config.json of a run.  Raises UserError."""
    path = Path(out_dir) / "config.json"
    try:
        config = json.loads(path.read_text())
        identity(config), config["stage"], config["model"], config["n_params"], config["domains"], config["data"]
        config["flags"]["seed"], config["flags"]["max_steps"]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected the directory of a training run") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} lacks or garbles {error}; it was not written by this version") from None
    return config


def load_checkpoint(out_dir, stage=None, expected=None):
    """The checkpoint of a run, on the CPU, or None if there is none yet.

    Raises UserError if it cannot be read, is of another stage, or differs from the identity `expected`.
    """
    path = Path(out_dir) / "ckpt.pt"
    if not path.exists():
        return None
    try:
        # Mapped, so the ranks of a node share one copy of it in memory
        checkpoint = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        found = checkpoint["stage"]
    except Exception as error:  # torch.load raises whatever the broken bytes lead it to
        raise UserError(f"{path} cannot be read ({type(error).__name__}): it is corrupt, or no checkpoint of this "
                        "project; delete it to start again") from None
    if stage and found != stage:
        raise UserError(f"{path} is the checkpoint of a {found} run; expected a {stage} run")
    for name, value in (expected or {}).items():
        before = checkpoint["identity"].get(name)
        if before != value:
            raise UserError(f"{path}: the run was started with {name} {shown(before)}, now it is {shown(value)}; "
                            "resume with the same flags and data, or choose another --out_dir")
    return checkpoint


def load_finished(out_dir, stages):
    """(config, checkpoint) of a run that has reached its last step.  Raises UserError.  stages: the ones accepted."""
    config = read_config(out_dir)
    if config["stage"] not in stages:
        raise UserError(f"{out_dir} is a {config['stage']} run; expected a {' or '.join(stages)} run")
    checkpoint, planned = load_checkpoint(out_dir, config["stage"]), config["flags"]["max_steps"]
    if checkpoint is None or checkpoint["step"] < planned:
        script = "train_doremi.py" if config["stage"] == "proxy" else f"train_{config['stage']}.py"
        raise UserError(f"{out_dir} is unfinished ({checkpoint['step'] if checkpoint else 0} of {planned} steps): "
                        f"continue it with: python {script} @{out_dir}/flags.txt --resume")
    return config, checkpoint


def write_atomically(path, content):
    """Write a file that appears whole or not at all.  content: a string, or a function that writes to a binary file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode()) if isinstance(content, str) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError | RuntimeError):  # torch.save reports a full disk as the latter
            raise UserError(f"{path} could not be written ({error}); choose another --out_dir") from None
        raise


def open_metrics(path, step):
    """Open metrics.jsonl for appending after `step`; later lines, and one that a kill cut short, are dropped."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            with contextlib.suppress(ValueError):
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
    write_atomically(path, "".join(kept))
    return open(path, "a")


def fingerprint(model):
    """Hex digest of a model's parameters as they are stored."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
