"""A run's directory: flags, identity, checkpoint, metrics, wandb, progress, and how a run stops.

Everything here would be the same in any project. It knows neither models nor domains: the loops say what is logged and
saved. Skip this file and you miss nothing of DoReMi.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import sys
import time
import uuid
from pathlib import Path

import filelock
import numpy as np
import torch
from tqdm import tqdm

from common import cli
from common.cli import UserError, flag_lines, shown
from common.files import count, finite, json_lines, misfit, positive_count, read_json, write_atomically

MACHINE_FLAGS = ("resume", "device", "compile", "micro_batch_size", "activation_checkpointing", "log_interval",
                 "eval_interval", "save_interval", "timeout", "wandb")
PATH_FLAGS = ("out_dir", "data_dir", "sampling_weights", "reference")
PRODUCTS = ("metrics.jsonl", "doremi_domain_weights_*.pt", "weights.json", "weights.png", "compare.png",
            "evaluation.png", "evaluation", "moved")
TEMPORARY = (f".*.{'[0-9a-f]' * 8}.tmp",)  # of write_atomically


def add_machine_flags(parser, out_dir, inherited=False):
    """Flags that do not change what is computed (up to the order of floating-point sums), except --dtype.

    inherited: the help says that the defaults are what the reference's run used."""
    group = parser.add_argument_group("machine")

    def add(name, default, meaning, shown_default="%(default)s", **options):
        if inherited and name not in ("--out_dir", "--resume"):
            shown_default = "the reference's"
        meaning = f"{meaning} (default: {shown_default})" if shown_default else meaning
        group.add_argument(name, default=default, help=meaning, **options)

    add("--out_dir", out_dir, "the run's directory")
    add("--resume", False, "continue from the run's last checkpoint, if it has one", None, action="store_true")
    add("--device", "auto", "cpu, cuda, cuda:N or mps", "cuda if there is one, else cpu")
    add("--dtype", "auto", "of the computation", "bfloat16 on GPUs that multiply it, else float32",
        choices=["auto", "bfloat16", "float32", "float64"])
    add("--compile", None, "torch.compile", "on CUDA; on a CPU if the run is long enough to win its half minute back",
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

    config: what config.json says of the run besides its flags, as JSON values.  A checkpoint is resumed only under the
    same identity, see `identity`.  checkpoint: the last one or None; parameters and moments are on rank 0 alone.
    start: the step it was saved at.
    """

    def __init__(self, args, machine, config, tokens_per_step, flops_per_token):
        self.args, self.machine, self.main = args, machine, machine.rank == 0
        self.out_dir, self.stage = Path(args.out_dir), config["stage"]
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        self.config = {**config, "flags": vars(args), "versions": versions, "device": str(machine.device),
                       "world_size": machine.world_size}
        self.identity = identity(self.config)
        identities = machine.gather_objects(self.identity)
        check_same([f"rank {i}" for i in range(len(identities))], identities,
                   "start every rank with the same flags, weights and data")
        self.lock = filelock.FileLock(self.out_dir / ".lock")  # for as long as this process lives
        self.checkpoint, self.metrics, self.wandb = None, None, None
        small = machine.from_main(self.open)
        if not self.main:
            self.checkpoint = small
        self.start = self.checkpoint["step"] if self.checkpoint else 0
        self.seconds = self.checkpoint["seconds"] if self.checkpoint else 0.0
        self.peak = machine.peak()
        self.pending = []  # (step, {name: tensor}) since the last look, still on the device
        self.signal = 0  # that asked the run to stop
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.request_stop)
        self.progress = tqdm(initial=self.start, total=args.max_steps, unit="step", desc=self.out_dir.name,
                             mininterval=1, dynamic_ncols=True, disable=None if self.main else True)
        self.clock = time.perf_counter()
        self.mark = self.start, self.elapsed()  # step and seconds from which the speed of the next line is counted

    def open(self):
        """Take the directory, read its checkpoint, and write what is known before the first step.  Rank 0 only.

        Return the checkpoint without parameters and moments, or None.  Raises UserError and leaves nothing behind.
        """
        new = not self.out_dir.exists()
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(blocking=False)
        except filelock.Timeout:
            raise UserError(f"{self.out_dir}: another process is training there; wait for it, stop it, or choose "
                            "another --out_dir") from None
        except OSError as error:
            raise UserError(f"--out_dir={self.out_dir} cannot be written to ({error.strerror}); choose another one") \
                from None
        try:
            if self.args.resume:
                self.checkpoint = load_checkpoint(self.out_dir, self.stage, self.identity)
            elif (self.out_dir / "ckpt.pt").exists():
                raise UserError(f"{self.out_dir} already holds a run: --resume it, choose another --out_dir, or delete "
                                "it")
            self.config["wandb_id"] = self.last_wandb_id() or uuid.uuid4().hex[:8]
            if self.args.wandb != "disabled":
                self.wandb = start_wandb(self.out_dir, self.args.wandb, self.config)
            remove(self.out_dir, TEMPORARY)
            older = (self.out_dir / "config.json").exists() and (self.out_dir / "flags.txt").exists()
            if older and not self.checkpoint:  # nothing else is removed from a directory that is no run's
                remove(self.out_dir, PRODUCTS)
            write_atomically(self.out_dir / "flags.txt", flag_lines(self.args))
            write_atomically(self.out_dir / "config.json", json.dumps(self.config, indent=2) + "\n")
            self.metrics = open_metrics(self.out_dir / "metrics.jsonl", self.checkpoint)
        except UserError:
            self.lock.release()
            if new:
                shutil.rmtree(self.out_dir, ignore_errors=True)
            raise
        after = f", after step {self.checkpoint['step']}" if self.checkpoint else ""
        tqdm.write(f"{self.out_dir.name}: {self.config['n_params']:,} parameters, {self.args.max_steps:,} steps of "
                   f"{self.tokens_per_step:,} tokens on {self.machine.world_size} x {self.machine.device}, "
                   f"{self.args.dtype}{after}")
        if self.checkpoint is None:
            return None
        return {name: value for name, value in self.checkpoint.items() if name not in ("model", "optimizer")}

    def last_wandb_id(self):
        """The id under which this run was logged before it was cut off, with or without a checkpoint."""
        try:
            last = read_config(self.out_dir) if self.args.resume else None
        except UserError:
            return None
        return last.get("wandb_id") if last and identity(last) == self.identity else None

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
            self.signal = int(self.machine.all_reduce(signals, torch.distributed.ReduceOp.MAX))
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
        finite_steps = torch.stack([torch.stack([t.isfinite().all() for t in tensors.values()])
                                    for _, tensors in pending])
        for (step, tensors), row in zip(pending, finite_steps.tolist()):
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
        mfu = speed * self.flops_per_token / self.peak if self.peak else None
        self.write({"step": step, **values, "tokens_per_second": speed, "mfu": mfu})
        text = f"loss {float(values['loss']):.3f}, {speed / 1e3:.1f}k tokens/s"
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
        line = {name: finite(value) if isinstance(value, float) else value for name, value in line.items()}
        try:
            self.metrics.write(json.dumps(line) + "\n")
            self.metrics.flush()
        except OSError as error:
            raise UserError(f"{self.metrics.name} could not be written ({error.strerror}); free space, then continue "
                            "with --resume") from None
        if self.wandb:
            self.wandb.log(slashed(line), step=line["step"])

    def save(self, step, state):
        """Write ckpt.pt: a kill at any moment leaves the old one or the new one, whole.

        state: what the loop needs to go on, CPU tensors and numbers; only that of rank 0 is written.
        """
        self.check_finite()
        if self.main:
            os.fsync(self.metrics.fileno())
            checkpoint = {"stage": self.stage, "identity": self.identity, "step": step, "seconds": self.elapsed(),
                          **state}
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
        self.lock.release()
        if stopped:
            sys.exit(128 + self.signal)


def start_wandb(out_dir, mode, config):
    """Log to the project WANDB_PROJECT, else nanodoremi, under config["wandb_id"].  Raises UserError without a key."""
    import wandb

    try:
        return wandb.init(project=os.environ.get("WANDB_PROJECT", "nanodoremi"), dir=out_dir, mode=mode, resume="allow",
                          id=config["wandb_id"], name=out_dir.name, job_type=config["stage"], config=config)
    except wandb.errors.Error as error:
        raise UserError(f"--wandb={mode}: {error}; run 'wandb login', or use --wandb=offline") from None


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
        elif name not in ("flags", "versions", "device", "world_size", "wandb_id"):
            flat[name] = value
    return flat


def check_same(runs, found, remedy):
    """Raise UserError where {name: value} of a run is not that of the first run.  found: of each run."""
    for run, values in zip(runs, found):
        for name in sorted(values.keys() | found[0].keys()):
            if (here := values.get(name)) != (there := found[0].get(name)):
                raise UserError(f"{run}: {name} is {shown(here)}, but {shown(there)} in {runs[0]}; {remedy}")


FLAGS = {"seed": count, "max_steps": positive_count, "batch_size": positive_count, "eval_windows": count,
         "learning_rate": float}
SHAPE = dict.fromkeys(("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_ffn"), positive_count)
DATA = {"data_dir": str, "tokenizer": str, "tokenizer_sha256": str, "sample_sha256": str, "vocab_size": positive_count,
        "train_tokens": {str: positive_count}}
REFERENCE = {"out_dir": str, "sampling_weights": {str: float}, "fingerprint": str, "seed": count,
             "max_steps": positive_count, "batch_size": positive_count}
CONFIG = {"model": SHAPE, "n_params": positive_count, "domains": [str], "sampling_weights": {str: float}, "data": DATA,
          "flags": FLAGS}
CHECKPOINT = {"stage": str, "identity": dict, "step": count, "seconds": float, "model": {str: torch.Tensor},
              "optimizer": dict, "sampler": {"step": count, "drawn": [count]}}


def read_config(out_dir):
    """config.json of a run.  Raises UserError."""
    path, remedy = Path(out_dir) / "config.json", "expected the directory of a training run of this version"
    stage = read_json(path, {"stage": str}, remedy)["stage"]
    config = read_json(path, {**CONFIG, "reference": REFERENCE} if stage == "proxy" else CONFIG, remedy)
    for where, names in ("sampling_weights", config["sampling_weights"]), ("data", config["data"]["train_tokens"]):
        if list(names) != config["domains"]:
            raise UserError(f"{path}: the names under {where} are not those under domains; {remedy}")
    return config


def load_checkpoint(out_dir, stage=None, expected=None):
    """The checkpoint of a run, on the CPU, or None if there is none yet.

    Raises UserError if it cannot be read, is of another stage, or differs from the identity `expected`.
    """
    path = Path(out_dir) / "ckpt.pt"
    if not path.exists():
        return None
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give this user the right to read it") from None
    try:
        # Mapped: parameters that nobody asks for are never read
        checkpoint = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises whatever the broken bytes lead it to
        raise UserError(f"{path} cannot be read ({type(error).__name__}): it is corrupt, or no checkpoint of this "
                        "project; delete it to start again") from None
    if fault := misfit(checkpoint, CHECKPOINT):
        raise UserError(f"{path}: {fault}; it was written by another version: delete it to start again")
    if checkpoint["step"] > checkpoint["identity"].get("max_steps", 0):
        raise UserError(f"{path}: step {checkpoint['step']} is past the run's end; delete it to start again")
    if stage and checkpoint["stage"] != stage:
        raise UserError(f"{path} is the checkpoint of a {checkpoint['stage']} run; expected a {stage} run")
    for name in sorted((expected or {}).keys() | checkpoint["identity"].keys() if expected else ()):
        before, now = checkpoint["identity"].get(name), expected.get(name)
        if before != now:
            raise UserError(f"{path}: the run was started with {name} {shown(before)}, now it is {shown(now)}; "
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
    check_same([f"{out_dir}/config.json", f"{out_dir}/ckpt.pt"], [identity(config), checkpoint["identity"]],
               "they are of two runs, or one was edited: train again")
    return config, checkpoint


def open_metrics(path, checkpoint):
    """Open metrics.jsonl for appending after the checkpoint; later lines, and whatever is no line, are dropped."""
    kept, step = [], checkpoint["step"] if checkpoint else 0
    if path.exists():
        lines = [line for _, line in json_lines(path) if misfit(line, {"step": count}) is None]
        kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= step]
    write_atomically(path, "".join(kept))
    return open(path, "a")


def remove(out_dir, patterns):
    """Remove what a killed run left half-written; of an older run also what could be taken for the new one's."""
    for pattern in patterns:
        for path in out_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def fingerprint(model):
    """Hex digest of a model's parameters as they are stored."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
