"""Running on machines: ranks, precision, schedule, checkpoints, metrics.

What would be the same in any project: it knows neither models nor domains, and a reader who skips it misses nothing of
DoReMi. A run's directory is described in the README.
"""

import contextlib
import ctypes
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import CheckpointWriter, load_checkpoint, naming, open_metrics, write_atomically
from cli import MACHINE_FLAGS, PLACES, UserError, flag_lines

# ---------------------------------------------------------------------------------------------------------------------
# Machines: device, precision, ranks


def resolve_flags(args):
    """Fills in the flags that depend on others.  Raises UserError for values that no run can have."""
    if args.min_lr is None:
        args.min_lr = args.learning_rate / 10
    if args.warmup_steps is None:  # Not in the paper: at least 300 steps, or a third of a run that is shorter than 900
        args.warmup_steps = max(round(0.06 * args.max_steps), min(300, args.max_steps // 3))
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if multiplies_bfloat16(args.device) else "float32"
    if args.wandb != "disabled":
        import_wandb()  # before anything is written
    if not 0 < args.min_lr <= args.learning_rate:
        raise UserError(f"--min_lr={args.min_lr} must be above 0 and at most --learning_rate={args.learning_rate}.")
    if not 0 <= args.warmup_steps <= args.max_steps:
        raise UserError(f"--warmup_steps={args.warmup_steps} must be between 0 and --max_steps={args.max_steps}.")


def multiplies_bfloat16(device):
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities() if device == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))


@dataclass(frozen=True)
class Machine:
    device: torch.device
    dtype: torch.dtype  # of the computation
    exact: torch.dtype  # of sums over the batch and of alpha: float64 where the device has it
    rank: int = 0
    world_size: int = 1

    def all_reduce(self, tensor):
        """Sums over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_gradients(self, model):
        """One collective over all gradients, laid out the same at every step, so that a resumed run sums in the same
        order to the bit. (DistributedDataParallel lays its buckets out anew after the first step.)"""
        if self.world_size > 1:
            gradients = [p.grad for p in model.parameters()]
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
                gradient.copy_(part.view_as(gradient))

    def to_device(self, batch, micro_batch_size):
        """A batch's tokens and domains on the device, widened, as a list of micro-batches."""
        tokens = batch.tokens.to(self.device, non_blocking=True).long()
        domain = batch.domain.to(self.device, non_blocking=True)
        return list(zip(tokens.split(micro_batch_size), domain.split(micro_batch_size)))


def setup(args):
    """Joins the ranks that torchrun started, picks the device, and settles --micro_batch_size.  Raises UserError."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kinds = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not kinds.get(args.device.split(":")[0]):
        raise UserError(f"--device={args.device}: there is no such device here; use --device=cpu.")
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if world_size > 1 else device.index or 0)
        torch.cuda.set_device(device)
    per_rank, left = divmod(args.batch_size, world_size)
    if left or not per_rank:
        raise UserError(f"--batch_size={args.batch_size} is not divisible by {world_size} ranks; every rank takes the "
                        "same number of sequences.")
    args.micro_batch_size = args.micro_batch_size or per_rank
    if per_rank % args.micro_batch_size:
        raise UserError(f"--micro_batch_size={args.micro_batch_size} does not divide the {per_rank} sequences of a "
                        f"rank (--batch_size={args.batch_size} over {world_size} ranks).")
    if world_size > 1 and not dist.is_initialized():
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    if device.type == "cpu":
        keep_freed_memory()
    exact = torch.float32 if device.type == "mps" else torch.float64
    return Machine(device, getattr(torch, args.dtype), exact, rank, world_size)


def keep_freed_memory():
    """glibc gives large blocks back to the kernel when they are freed, and the next step faults them in anew, page by
    page. Kept, they make a step on a CPU 1.2 to 1.35 times faster (docs/performance.md)."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: blocks up to here come from the heap ...
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: ... which keeps so much that is free


def decide_compile(args, flops):
    """--compile or not, where the flag leaves it open: compiling costs up to half a minute and halves the rest."""
    if args.compile is not None:
        return args.compile
    if args.device != "cpu":
        return args.device.startswith("cuda")
    return flops > 2e12 and args.dtype != "float64" and bool(shutil.which("g++") or shutil.which("clang++"))


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
    """Scales the gradient down to norm grad_clip; returns its norm before that, on the device."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)


def matmul_peak(device, dtype, n=2048, repeats=5):
    """FLOP/s of an n x n x n matrix product, the best of a few: what utilisation (mfu) is measured against."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(1 if device.type == "cpu" else 50):
            a @ a
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / (1 if device.type == "cpu" else 50))
    return 2 * n**3 / best


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


# ---------------------------------------------------------------------------------------------------------------------
# A run's directory


class Run:
    """Writes a run's directory (from rank 0) and, with --resume, brings the last checkpoint back as `self.checkpoint`.

    config: what config.json says of the run, as JSON values; a checkpoint is resumed only under the same config and
    flags. Its "domains" name the K columns of what is logged.
    """

    def __init__(self, args, machine, stage, config, tokens_per_step, flops_per_token):
        self.args, self.machine, self.stage, self.domains = args, machine, stage, config["domains"]
        self.out_dir, self.main = Path(args.out_dir), machine.rank == 0
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        flags = {name: value for name, value in vars(args).items() if name not in MACHINE_FLAGS + PLACES}
        self.identity = {**flags, **{name: without_places(value) for name, value in config.items()}}
        if (self.out_dir / "ckpt.pt").exists() and not args.resume:
            raise UserError(f"{self.out_dir} already holds a run: --resume it, choose another --out_dir, or delete it.")
        self.checkpoint = load_checkpoint(self.out_dir, stage, self.identity) if args.resume else None
        start = self.checkpoint["step"] if self.checkpoint else 0
        self.seconds = self.checkpoint["seconds"] if self.checkpoint else 0.0
        self.pending = []  # (step, losses, gradient norm) since the last look, still on the device
        self.stop = False
        self.writer = CheckpointWriter()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.request_stop)
        if self.main:
            self.peak = matmul_peak(machine.device, machine.dtype) * machine.world_size
            self.out_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(self.out_dir / "flags.txt", flag_lines(args))
            config = {"stage": stage, **config, "flags": vars(args), "versions": versions(),
                      "device": str(machine.device), "world_size": machine.world_size}
            write_atomically(self.out_dir / "config.json", json.dumps(config, indent=2) + "\n")
            self.metrics = open_metrics(self.out_dir / "metrics.jsonl", start)
            self.wandb = start_wandb(args, config) if args.wandb != "disabled" else None
            tqdm.write(f"{stage}: {config['n_params']:,} parameters, {args.max_steps:,} steps of {tokens_per_step:,} "
                       f"tokens on {machine.world_size} x {machine.device}, {args.dtype}, "
                       f"{'compiled' if args.compile else 'eager'}{f', after step {start}' if start else ''}")
        self.progress = tqdm(initial=start, total=args.max_steps, unit="step", desc=self.out_dir.name, mininterval=1,
                             dynamic_ncols=True, disable=not self.main)
        self.clock = time.perf_counter()
        self.mark = start, self.elapsed()  # step and seconds of the last training line

    def elapsed(self):
        """Seconds of training so far, over all resumptions, without evaluations and checkpoints."""
        return self.seconds + time.perf_counter() - self.clock

    @contextlib.contextmanager
    def paused_clock(self):
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def request_stop(self, number, frame):
        """SIGTERM and SIGINT finish the step and write a checkpoint; a second one ends the process at once."""
        self.stop = True
        signal.signal(number, signal.SIG_DFL)

    def stop_requested(self, step):
        """Whether all ranks stop after this step. Several ranks agree on it at log steps: they have to wait."""
        if self.machine.world_size == 1:
            return self.stop
        stop = torch.tensor(float(self.stop), device=self.machine.device)
        return self.is_due(step, self.args.log_interval) and bool(self.machine.all_reduce(stop))

    def is_due(self, step, interval):
        return step % interval == 0 or step == self.args.max_steps

    def record(self, step, totals, grad_norm):
        """Keeps a step's loss sums and counts (2, K) and its gradient norm on the device: nothing waits for them."""
        self.pending.append((step, totals, grad_norm))
        self.progress.update()

    def check_finite(self):
        """Looks at all steps since the last look.  Raises UserError at the first that is not finite."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        rows = torch.stack([torch.cat([totals[0], norm[None].to(totals)]) for _, totals, norm in pending]).cpu()
        for (step, _, _), row in zip(pending, rows.isfinite().tolist()):
            if not all(row):
                bad = [name for name, finite in zip(self.domains, row) if not finite]
                what = f"loss of {', '.join(bad)}" if bad else "gradient"
                raise UserError(f"step {step}: the {what} is not finite; the step is not saved. Lower --learning_rate, "
                                "or look at the data of that step.")

    def log(self, step, lr, totals, grad_norm, **by_domain):
        """Appends a training line: this very step's values, and the speed since the last line.

        totals: (2, K) sum and number of token losses of each domain; by_domain: further (K,) values by name.
        """
        self.check_finite()
        if not self.main:
            return
        total, count = totals.cpu().double()
        seconds = self.elapsed()
        speed = (step - self.mark[0]) * self.tokens_per_step / (seconds - self.mark[1])
        self.mark = step, seconds
        loss = (total.sum() / count.sum()).item()
        present = {name: (t / c).item() for name, t, c in zip(self.domains, total, count) if c > 0}
        named = {name: dict(zip(self.domains, values.tolist())) for name, values in by_domain.items()}
        self.write({"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm.item(), "tokens_per_second": speed,
                    "mfu": speed * self.flops_per_token / self.peak, "domain_loss": present, **named})
        self.progress.set_postfix_str(f"loss {loss:.3f}, {speed / 1e3:.1f}k tokens/s")

    def log_evaluation(self, step, val_loss, bytes_per_token):
        """Appends an evaluation: val_loss (K,) in nats per token, bytes_per_token (K,)."""
        if not self.main:
            return
        bpb = val_loss / bytes_per_token / math.log(2)
        self.write({"step": step, "tokens": step * self.tokens_per_step, "seconds": self.elapsed(),
                    "val_loss": dict(zip(self.domains, val_loss.tolist())),
                    "val_bpb": dict(zip(self.domains, bpb.tolist())),
                    "val_loss_mean": val_loss.mean().item(), "val_loss_worst": val_loss.max().item()})
        tqdm.write(f"step {step}: held-out loss mean {val_loss.mean():.4f}, worst {val_loss.max():.4f} "
                   f"({self.domains[int(val_loss.argmax())]})")

    def write(self, line):
        with naming(self.metrics.name):
            self.metrics.write(json.dumps(line) + "\n")
            self.metrics.flush()
        if self.wandb:
            self.wandb.log(line, step=line["step"])

    def save(self, step, state, then=lambda saved: None):
        """Writes the state as it is now beside ckpt.pt and renames it over that, while training goes on: a kill at any
        moment leaves one of the two, whole.  then(copy of the state) follows it.  Raises what the last save raised."""
        self.check_finite()
        if self.main:
            checkpoint = {"stage": self.stage, "identity": self.identity, "step": step, "seconds": self.elapsed()}
            self.writer.save(self.out_dir / "ckpt.pt", {**checkpoint, **state}, self.flush_metrics, then)

    def flush_metrics(self):
        with naming(self.metrics.name):
            os.fsync(self.metrics.fileno())

    def close(self, step):
        self.progress.close()
        if self.main:
            with self.paused_clock():
                self.writer.wait()
            self.metrics.close()
            if self.wandb:
                self.wandb.finish()
            end = "done" if step == self.args.max_steps else "stopped (--resume goes on)"
            print(f"{self.stage}: {end} after step {step:,} of {self.args.max_steps:,}, {self.elapsed():.0f} s, in "
                  f"{self.out_dir}", flush=True)
        if self.machine.world_size > 1:
            dist.destroy_process_group()


def without_places(value):
    """What is compared on resumption: not where things lie, but what they are."""
    return {k: v for k, v in value.items() if k not in (*PLACES, "out_dir")} if isinstance(value, dict) else value


def import_wandb():
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the package wandb: pip install wandb, or use --wandb=disabled.") from None
    return wandb


def start_wandb(args, config):
    name = Path(args.out_dir).name
    return import_wandb().init(project="nanodoremi", name=name, dir=args.out_dir, mode=args.wandb, config=config)


def fingerprint(model):
    """Hex digest of a model's parameters as they are stored."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}

