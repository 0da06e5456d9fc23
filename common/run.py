"""A run's directory: flags, identity, checkpoint, metrics, wandb, progress, and how a run stops.

Everything here would be the same in any project. It knows neither models nor domains: the loops say what is logged and
saved. Skip this file and you miss nothing of DoReMi.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from common import cli, ranks
from common.cli import UserError, flag_lines, shown
from common.files import write_atomically

MACHINE_FLAGS = ("resume", "device", "compile", "micro_batch_size", "activation_checkpointing", "log_interval",
                 "eval_interval", "eval_windows", "save_interval", "timeout", "wandb")
PATH_FLAGS = ("out_dir", "data_dir", "sampling_weights", "reference")


def add_machine_flags(parser, out_dir, inherited=False):
    """Flags that do not change what is computed (up to the order of floating-point sums), except --dtype.

    inherited: --dtype defaults to what the reference's run used."""
    add = parser.add_argument_group("machine").add_argument
    add("--out_dir", default=out_dir, help="the run's directory (default: %(default)s)")
    add("--resume", action="store_true", help="continue from the run's last checkpoint, if it has one")
    add("--device", default="auto", help="cpu, cuda, mps (default: cuda if there is one, else cpu)")
    add("--dtype", choices=["auto", "bfloat16", "float32", "float64"], default="auto",
        help="of the computation (default: " + ("the reference's)" if inherited else
                                                "bfloat16 on GPUs that multiply it, else float32)"))
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: if the run is long)")
    add("--micro_batch_size", type=cli.positive,
        help="sequences per forward pass and rank (default: all of the rank's)")
    add("--activation_checkpointing", action=argparse.BooleanOptionalAction, default=False,
        help="compute each block again in the backward pass: less memory, a third more time (default: no)")
    add("--log_interval", type=cli.positive, default=10, help="steps between lines of metrics (default: %(default)s)")
    add("--eval_interval", type=cli.positive, default=500, help="steps between evaluations (default: %(default)s)")
    add("--eval_windows", type=cli.natural, default=128,
        help="validation windows per domain, spread over val.bin; 0: all (default: %(default)s)")
    add("--save_interval", type=cli.positive, default=500, help="steps between checkpoints (default: %(default)s)")
    add("--timeout", type=cli.positive, default=600,
        help="seconds after which a rank that waits for another gives up (default: %(default)s)")
    add("--wandb", choices=["disabled", "offline", "online"], default="disabled",
        help="log to Weights & Biases, too (default: %(default)s)")


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
            self.peak = ranks.matmul_peak(machine.device, machine.dtype) * machine.world_size
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
        ranks.load_parameters(model, self.checkpoint["model"].items())
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, moments in self.checkpoint["optimizer"]["state"].items():
            for name, value in moments.items():
                moments[name] = ranks.like(parameters[i], value) if value.shape == parameters[i].shape else value
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
        state = ranks.whole({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
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
        ranks.leave_ranks()
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
