"""A run's directory: flags, identity, checkpoint, metrics, wandb, progress, and how a run stops.

Everything here would be the same in any project: it knows neither models nor domains. What the loops call is the class.
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import uuid
from pathlib import Path

import torch
from tqdm import tqdm

from common import cli, ranks
from common.cli import UserError, check_same, flag_lines
from common.files import hold, write_atomically

FORMAT = 1  # of config.json and ckpt.pt; another one is refused
MADE = ("flags.txt", "config.json", "metrics.jsonl", "ckpt.pt", "doremi_domain_weights_*.pt", "weights.json",
        "weights.png", "evaluation", "evaluation.png", "compare.png")  # what a run and the later stages write there
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # of terminals and schedulers, where there

# Flags that do not change what is computed, up to the order of floating-point sums: defined below, but for the paths,
# whose contents are compared instead
NOT_COMPARED = {*ranks.PATH_FLAGS, "resume", "device", "compile", "micro_batch_size", "activation_checkpointing",
                "log_interval", "eval_interval", "save_interval", "timeout", "wandb"}


def add_machine_flags(parser, out_dir):
    """Flags that do not change what is computed (up to the order of floating-point sums), except --dtype."""
    group = parser.add_argument_group("machine")

    def add(name, default, meaning, shown_default="%(default)s", **options):
        group.add_argument(name, default=default, help=f"{meaning} (default: {shown_default})", **options)

    add("--out_dir", out_dir, "the run's directory", type=cli.path)
    group.add_argument("--resume", action="store_true", help="continue from the run's last checkpoint, if it has one")
    add("--device", "auto", "cpu, cuda, cuda:N or mps", "cuda if there is one, else cpu")
    add("--dtype", "auto", "of the computation", "bfloat16 on GPUs that multiply it, else float32",
        choices=["auto", "bfloat16", "float32", "float64"])
    add("--compile", None, "torch.compile", "if the run is long enough to win its minute back",
        action=argparse.BooleanOptionalAction)
    add("--micro_batch_size", None, "sequences per forward pass and rank, at most", "all of the rank's",
        type=cli.positive)
    add("--activation_checkpointing", False, "compute each block again in the backward pass: less memory, a third more "
        "time", "no", action=argparse.BooleanOptionalAction)
    add("--log_interval", 10, "steps between lines of metrics", type=cli.positive)
    add("--eval_interval", 500, "steps between evaluations", type=cli.positive)
    add("--eval_windows", 128, "validation windows per domain, spread over val.bin; 0: all", type=cli.natural)
    add("--save_interval", 500, "steps between checkpoints", type=cli.positive)
    add("--timeout", 600, "seconds after which a rank that waits for another gives up", type=cli.positive)
    add("--wandb", "disabled", "log to Weights & Biases, too", choices=["disabled", "offline", "online"])


class Run:
    """Write a run's directory from rank 0, and bring the last checkpoint back with --resume.

    config: what config.json says of the run besides its flags, as JSON values; see `identity`.  checkpoint: the last
    one or None; parameters and moments are on rank 0 alone.  start: the step it was saved at.
    """

    def __init__(self, args, machine, config, tokens_per_step, flops_per_token):
        self.args, self.machine, self.main = args, machine, machine.rank == 0
        self.out_dir, self.stage = Path(args.out_dir), config["stage"]
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        flags = {**vars(args), "dtype": str(machine.dtype).removeprefix("torch.")}
        self.config = {"format": FORMAT, **config, "flags": flags, "versions": ranks.versions(),
                       "device": machine.device.type, "world_size": machine.world_size,
                       "wandb_id": uuid.uuid4().hex[:8]}
        self.identity = identity(self.config)
        machine.check_same(self.identity, "give all ranks the same data")
        self.lock, self.metrics, self.wandb, self.checkpoint = None, None, None, None
        small = machine.from_main(self.open)
        if not self.main:
            self.checkpoint = small
        self.start = self.checkpoint["step"] if self.checkpoint else 0
        self.seconds = self.checkpoint["seconds"] if self.checkpoint else 0.0
        self.peak = machine.peak()
        self.last = {}  # {name: tensor} of the last step, still on the device
        self.loss = math.nan  # of the last log line
        self.signal, self.asked = 0, 0.0  # that asked the run to stop, and when
        self.wishes = []  # of the last two steps: how many ranks wish to stop, on their way from the device
        for name in SIGNALS:
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self.request_stop)
        self.progress = tqdm(initial=self.start, total=args.max_steps, unit="step", desc=self.out_dir.name,
                             mininterval=1, dynamic_ncols=True, disable=None if self.main else True)
        self.clock = time.perf_counter()
        self.mark = self.start, self.elapsed()  # step and seconds from which the speed of the next line is counted

    # ---- the start, on rank 0 ----

    def open(self):
        """Take the directory, read its checkpoint, and write what is known before the first step.

        Return the checkpoint without parameters and moments, or None.  Raises UserError and leaves nothing behind.
        """
        new = not self.out_dir.exists()
        self.lock = self.take_directory()
        try:
            self.checkpoint = self.last_checkpoint()
            with contextlib.suppress(UserError):
                self.config["wandb_id"] = read_config(self.out_dir)["wandb_id"]  # also of one without a checkpoint
            if self.args.wandb != "disabled":
                self.wandb = start_wandb(self.out_dir, self.args.wandb, self.config)
            for path in self.out_dir.glob(f".*.{'[0-9a-f]' * 8}.tmp"):  # of write_atomically, left by a kill
                path.unlink()
            write_atomically(self.out_dir / "config.json", json.dumps(self.config, indent=2) + "\n")
            write_atomically(self.out_dir / "flags.txt", flag_lines(argparse.Namespace(**self.config["flags"])))
            self.metrics = open_metrics(self.out_dir / "metrics.jsonl", self.checkpoint)
        except UserError:
            self.lock.close()
            if new:
                shutil.rmtree(self.out_dir, ignore_errors=True)
            raise
        tqdm.write(self.plan())
        return self.checkpoint and {name: value for name, value in self.checkpoint.items()
                                    if name not in ("model", "optimizer")}

    def take_directory(self):
        """Make the directory and hold its lock for as long as this process lives."""
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            if lock := hold(self.out_dir / ".lock"):
                return lock
        except OSError as error:
            raise UserError(f"--out_dir={self.out_dir} cannot be written to ({error.strerror}); choose another one") \
                from None
        raise UserError(f"{self.out_dir}: another process is training there; wait for it, stop it, or choose another "
                        "--out_dir")

    def last_checkpoint(self):
        """The checkpoint to resume from; None where the run begins.  Raises UserError where a start would lose work."""
        checkpoint = load_checkpoint(self.out_dir)
        if checkpoint is None:
            self.check_nothing_is_lost()
            return None
        if not self.args.resume:
            raise UserError(f"{self.out_dir} already holds a run: --resume it, or choose another --out_dir")
        if checkpoint["stage"] != self.stage:
            raise UserError(f"{self.out_dir}/ckpt.pt is of a {checkpoint['stage']} run; expected a {self.stage} run")
        check_same([f"{self.out_dir}/ckpt.pt", "this start"], [checkpoint["identity"], self.identity],
                   "resume with the same flags and data, or choose another --out_dir")
        return checkpoint

    def check_nothing_is_lost(self):
        """Without a checkpoint, a run may begin where no results lie, or where one of the same identity was cut off
        before its first checkpoint."""
        made = sorted(path.name for pattern in MADE for path in self.out_dir.glob(pattern))
        begun = not made
        if set(made) <= {"flags.txt", "config.json", "metrics.jsonl"}:
            with contextlib.suppress(UserError):
                last = read_config(self.out_dir)
                lines = read_metrics(self.out_dir / "metrics.jsonl")
                unsaved = all(line["step"] <= last["flags"]["save_interval"] for line in lines)
                ended = any("ended" in line for line in lines)
                begun = begun or (unsaved and not ended and identity(last) == self.identity)
        if not begun:
            raise UserError(f"{self.out_dir} holds {', '.join(made)}, but no ckpt.pt to continue from; bring it back, "
                            "or choose another --out_dir: a start removes nothing")

    def plan(self):
        """What is about to be done, in a line."""
        n_params, steps, machine = self.config["n_params"], self.args.max_steps, self.machine
        tokens = self.tokens_per_step * steps
        memory = 16 * n_params / machine.local_world_size / 1e9  # weights, gradients and two moments in float32
        after = f", after step {self.checkpoint['step']}" if self.checkpoint else ""
        return (f"{self.out_dir.name}: {n_params:,} parameters, {steps:,} steps of {self.tokens_per_step:,} tokens "
                f"({tokens:.3g} tokens, {tokens * self.flops_per_token:.2g} FLOPs), {machine.world_size} x "
                f"{machine.device}, {self.config['flags']['dtype']}, {memory:.2g} GB and activations on each{after}")

    # ---- every step ----

    def all_reduce(self, sums):
        """Sum (n, K) over the ranks.  A last row takes along how many of them were asked to stop."""
        if self.machine.world_size == 1:
            return sums
        wish = sums.new_full((1, sums.size(1)), float(self.signal > 0))
        total = self.machine.all_reduce(torch.cat([sums, wish]))
        self.wishes = [*self.wishes[-1:], ranks.Fetched(total[-1, 0])]
        return total[:-1]

    def record(self, step, **tensors):
        """Keep what has to be finite, on the device; nothing waits for it before the next log line or checkpoint."""
        self.last = tensors
        self.progress.update()

    def is_due(self, step, interval):
        return step % interval == 0 or step == self.args.max_steps

    def stops_after(self, step):
        """Whether to save and stop now.  Ranks decide on what they knew one step ago: that has arrived on the host of
        all of them, while the device is busy with this step."""
        if self.machine.world_size == 1:
            return self.signal > 0
        return len(self.wishes) == 2 and self.wishes[0].value() > 0

    def request_stop(self, number, frame):
        """Finish the step and save.  A signal 5 seconds later ends the process: sooner ones are copies of the first,
        since terminals and Slurm signal the ranks and torchrun, which passes it on."""
        if self.signal and time.monotonic() > self.asked + 5:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.signal:
            self.signal, self.asked = number, time.monotonic()

    # ---- what is written ----

    def log(self, step, **values):
        """Append a line of this step's values and the speed since the last line.  values: numbers, tensors of one
        number, or {name: number}."""
        self.check_finite(step)
        if not self.main:
            return
        seconds = self.elapsed()
        speed = (step - self.mark[0]) * self.tokens_per_step / (seconds - self.mark[1])
        self.mark = step, seconds
        mfu = speed * self.flops_per_token / self.peak if self.peak else None
        self.write({"step": step, **values, "tokens_per_second": speed, "mfu": mfu})
        self.loss = float(values["loss"])
        text = f"loss {self.loss:.3f}, {speed / 1e3:.1f}k tokens/s"
        self.progress.set_postfix_str(text)
        if self.progress.disable:
            left = (self.args.max_steps - step) * self.tokens_per_step / speed
            print(f"{self.out_dir.name}: step {step:,} of {self.args.max_steps:,}, {text}, "
                  f"{tqdm.format_interval(left)} left", flush=True)

    def log_evaluation(self, step, **values):
        if self.main:
            self.write({"step": step, "tokens": step * self.tokens_per_step, "seconds": self.elapsed(),
                        "eval_windows": self.args.eval_windows, **values})
            numbers = [f"{name} {value:.4f}" for name, value in values.items() if isinstance(value, float)]
            tqdm.write(f"{self.out_dir.name}, step {step}: {', '.join(numbers)}")
        self.mark = step, self.elapsed()

    def write(self, line):
        line = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in line.items()}
        bad = [name for name, value in line.items() if isinstance(value, float) and not math.isfinite(value)]
        line |= dict.fromkeys(bad)  # JSON has neither NaN nor infinity
        self.append(json.dumps(line) + "\n")
        if self.wandb:
            self.wandb.log(slashed(line), step=line["step"])

    def append(self, text):
        """Add to metrics.jsonl; "" makes sure that what was added is on the disk."""
        try:
            self.metrics.write(text)
            self.metrics.flush()
            if not text:
                os.fsync(self.metrics.fileno())
        except OSError as error:
            raise UserError(f"{self.metrics.name} could not be written ({error.strerror}); free space, then continue "
                            f"with: {continuing(self.stage, self.out_dir)}") from None

    def check_finite(self, step):
        """Raise UserError where the last step was not finite; since parameters stay so, no earlier one was missed."""
        bad = [name for name, tensor in self.last.items() if not tensor.isfinite().all()]
        if bad:
            raise UserError(f"step {step}: the {' and '.join(bad)} is not finite; nothing is saved since the last "
                            "checkpoint. Lower --learning_rate, or look at the data of the steps since the last line")

    def save(self, step, state):
        """Write ckpt.pt: a kill at any moment leaves the old one or the new one, whole.  All ranks wait for it.

        state: what the loop needs to go on, CPU tensors and numbers; only that of rank 0 is written.
        """
        self.check_finite(step)
        self.machine.from_main(lambda: self.write_checkpoint(step, state))
        self.mark = step, self.elapsed()

    def write_checkpoint(self, step, state):
        with contextlib.suppress(OSError):
            if not os.path.samestat(os.stat(self.lock.name), os.fstat(self.lock.fileno())):
                raise UserError(f"{self.out_dir} was removed, and another run has begun there; this one cannot save")
        self.append("")
        checkpoint = {"format": FORMAT, "stage": self.stage, "identity": self.identity, "step": step,
                      "seconds": self.elapsed(), **state}
        write_atomically(self.out_dir / "ckpt.pt", lambda file: torch.save(checkpoint, file))

    def close(self, step, following):
        """Say how the run ended and what to do now.  Exit with 128 + signal if it was stopped: that is no finished run.

        following: the command of the next stage.
        """
        self.progress.close()
        stopped = step < self.args.max_steps
        if self.main:
            ended, seconds = "stopped" if stopped else "finished", self.elapsed()
            self.append(json.dumps({"step": step, "ended": ended, "seconds": seconds}) + "\n")
            self.metrics.close()
            if self.wandb:
                self.wandb.finish()
            loss = f", loss {self.loss:.4f}" if self.loss == self.loss else ""
            print(f"{self.out_dir}: {ended} after step {step:,} of {self.args.max_steps:,}, {seconds:.0f} s{loss}; "
                  f"next: {continuing(self.stage, self.out_dir) if stopped else following}", flush=True)
        self.machine.wait_for_all()
        if self.lock:
            self.lock.close()
        if stopped:
            sys.exit(128 + (self.signal or signal.SIGTERM))

    def elapsed(self):
        """Seconds since the start of the run, over all of its resumptions."""
        return self.seconds + time.perf_counter() - self.clock


def continuing(stage, out_dir):
    """The command that continues a run where its directory is now."""
    script = "train_doremi.py" if stage == "proxy" else f"train_{stage}.py"
    at = shlex.quote(str(out_dir))
    return f"python {script} @{at}/flags.txt --out_dir={at} --resume"


def start_wandb(out_dir, mode, config):
    """Log to the project WANDB_PROJECT, else nanodoremi, under config["wandb_id"].  Raises UserError."""
    import wandb

    try:
        return wandb.init(project=os.environ.get("WANDB_PROJECT", "nanodoremi"), dir=out_dir, mode=mode, resume="allow",
                          id=config["wandb_id"], name=out_dir.name, job_type=config["stage"], config=config)
    except Exception as error:  # wandb has many kinds
        raise UserError(f"--wandb={mode}: {error}; check 'wandb login' and the variables WANDB_*, or leave --wandb "
                        "out") from None


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

    --resume compares it, and the ranks, and whoever takes several runs for seeds of one experiment. Every flag is in it
    but for NOT_COMPARED, and everything that a loop puts into `config` but for the paths in it.
    """
    flat = {name: value for name, value in config["flags"].items() if name not in NOT_COMPARED}
    for name, value in config.items():
        if name in ("data", "reference"):
            flat |= {f"{name}.{key}": item for key, item in value.items() if key not in ("out_dir", "data_dir")}
        elif name not in ("format", "flags", "versions", "device", "world_size", "wandb_id"):
            flat[name] = value
    return flat


# ---- reading a run ----


def read_config(out_dir):
    """config.json of a run.  Raises UserError."""
    path = Path(out_dir) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected the directory of a training run") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{path} is no config.json of a run of this version; expected the directory of a training run")
    return config


def read_metrics(path):
    """The lines of metrics.jsonl.  A kill may have cut off the last one: it is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def open_metrics(path, checkpoint):
    """Open metrics.jsonl for appending after the checkpoint; later lines, and how the run ended, are dropped."""
    step = checkpoint["step"] if checkpoint else 0
    kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step and "ended" not in line]
    write_atomically(path, "".join(kept))
    return open(path, "a")


def load_checkpoint(out_dir, mapped=False):
    """The checkpoint of a run, on the CPU, or None if there is none.  Raises UserError if it cannot be read.

    mapped: parameters that nobody asks for are never read. The file then stays open for as long as one of them lives.
    """
    path = Path(out_dir) / "ckpt.pt"
    if not os.path.lexists(path):
        return None
    checkpoint = None
    if mapped:
        with contextlib.suppress(Exception):  # a disk may refuse to map what it can read
            checkpoint = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    if checkpoint is None:
        checkpoint = read_whole(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of this version; choose another --out_dir")
    return checkpoint


def read_whole(path):
    """Read a checkpoint.  Only one that was read to its end, and makes no sense, is called corrupt."""
    try:
        with open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError) as error:
        raise UserError(f"{path} cannot be read ({error}); try again when the disk or the memory is there") from None
    except Exception as error:  # torch.load raises whatever broken bytes lead it to
        if "alloc" in str(error):
            raise UserError(f"{path} does not fit into memory; use a machine with more") from None
        raise UserError(f"{path} is corrupt, or no checkpoint ({type(error).__name__}); bring back a copy, or choose "
                        "another --out_dir") from None


def load_finished(out_dir, stages):
    """(config, checkpoint) of a run that has reached its last step.  Raises UserError.  stages: the ones accepted."""
    config = read_config(out_dir)
    if config["stage"] not in stages:
        raise UserError(f"{out_dir} is a {config['stage']} run; expected a {' or '.join(stages)} run")
    checkpoint, planned = load_checkpoint(out_dir, mapped=True), config["flags"]["max_steps"]
    if checkpoint is None:
        raise UserError(f"{out_dir} has no ckpt.pt: it was removed, or the run was cut off before its first; bring it "
                        "back, or train again in another --out_dir")
    if checkpoint["step"] < planned:
        raise UserError(f"{out_dir} is unfinished ({checkpoint['step']} of {planned} steps): continue it with: "
                        f"{continuing(config['stage'], out_dir)}")
    check_same([f"{out_dir}/config.json", f"{out_dir}/ckpt.pt"], [identity(config), checkpoint["identity"]],
               "they are of two runs, or one was edited: train again")
    return config, checkpoint
