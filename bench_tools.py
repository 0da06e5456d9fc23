"""What the rows of bench.py share: running things side by side on one machine, and its limits."""

import contextlib
import itertools
import json
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import torch

import runtime
from model import ModelConfig, Transformer

HERE = Path(__file__).resolve().parent
WARM_UP = 10  # steps that do not count: they compile, allocate, and fill the cache
K = 22  # domains, as many as The Pile has


class NotMeasured(Exception):
    """Why a row cannot be measured on this machine."""


class Failed(Exception):
    """Why a row that could be measured was not."""


# ---- numbers -------------------------------------------------------------------------------------------------------


def line(what, values, target, unit="", ours="", other="", limit=""):
    """One line of the table.  values: one for each repetition; target: such as ">= 2", of their median."""
    value, (sign, bound) = median(values), target.split()
    met = value >= float(bound) if sign == ">=" else value <= float(bound)
    return {"what": what, "value": value, "unit": unit, "target": target, "met": met, "repeats": len(values),
            "spread": [min(values), max(values)], "ours": ours, "other": other, "limit": limit}


def compare(what, ours, other, target, unit, limit="", floor=None):
    """The line of ours / other, repetition by repetition: of two runs that followed one another."""
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    limit += f"; {median(ratios) / floor - 1:+.0%}" if floor else ""
    return line(what, ratios, target, "x", si(median(ours), unit), si(median(other), unit), limit)


def si(value, unit):
    """1234567.0 -> '1.23 Mtok/s', 0.0021 -> '2.1 ms'."""
    sizes = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m")]
    size, prefix = next((pair for pair in sizes if value >= pair[0]), sizes[-1])
    return f"{value / size:.3g} {prefix}{unit}"


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def rate(function, seconds):
    """Calls per second, over at least that many seconds."""
    start, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        function()
        calls += 1
    return calls / elapsed


def kernel_bytes(path, name):
    """What Linux says of memory; None elsewhere."""
    with contextlib.suppress(OSError, TypeError):
        return 1024 * int(re.search(rf"{name}:\s*(\d+) kB", Path(path).read_text())[1])


# ---- what the rows share -------------------------------------------------------------------------------------------


def write_dataset(directory, k, n_tokens, vocab_size):
    """Random tokens as a data set of prepare.py: k domains of n_tokens each."""
    generator, dtype = np.random.default_rng(0), np.dtype("uint16" if vocab_size <= 1 << 16 else "uint32")
    meta = {"tokenizer": "random", "tokenizer_sha256": "random", "vocab_size": vocab_size, "eot_token": 0,
            "dtype": dtype.name, "domains": {}}
    for domain in (f"domain{i:02}" for i in range(k)):
        (directory / domain).mkdir(parents=True)
        counts = meta["domains"][domain] = {}
        for split, n in (("train", n_tokens), ("val", 2050)):
            generator.integers(vocab_size, size=n, dtype=dtype).tofile(directory / domain / f"{split}.bin")
            counts.update({f"{split}_{unit}": n for unit in ("tokens", "documents", "bytes")})
    (directory / "meta.json").write_text(json.dumps(meta))
    return directory


class Bench:
    """Flags, a temporary folder, the machine and its limits, and how to run things side by side."""

    def __init__(self, args, folder):
        self.args, self.folder, self.device, self.row = args, Path(folder), torch.device(args.device), ""
        # Compiled code goes where nobody else's lies: warm and cold are then what they are called
        self.env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        n = 2048 if self.device.type == "cpu" else 4096
        self.peak = {dtype: runtime.matmul_peak(self.device, getattr(torch, dtype), n)
                     for dtype in dict.fromkeys([args.dtype, "float32"])}  # FLOP/s
        source, target = torch.ones(2, 1 << 26, device=self.device)
        copy = min(timed(lambda: (target.copy_(source), runtime.synchronize(self.device))) for _ in range(5))
        self.bandwidth = 4 * len(source) / copy  # bytes/s, each counted once
        cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        cpu = re.search(r"model name\s*: (.*)", cpu) or [None, platform.processor() or platform.machine()]
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else args.device
        self.machine = {"cpu": cpu[1], "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": device,
                        "matmul_flops": self.peak, "copy_bytes_per_second": self.bandwidth, **runtime.versions()}

    def say(self, text):
        print(f"[{time.strftime('%H:%M:%S')}] {self.row}: {text}", file=sys.stderr, flush=True)

    def alternate(self, **measures):
        """Calls each in turn, over and over: {name: [a number for each repetition]}."""
        found = {name: [] for name in measures}
        for repeat, name in itertools.product(range(self.args.repeats), measures):
            self.say(f"{name}, {repeat + 1} of {self.args.repeats}")
            found[name].append(measures[name]())
        return found

    @cache  # noqa: B019 (there is one Bench)
    def data(self, n_tokens, vocab_size):
        return write_dataset(self.folder / f"data-{n_tokens}-{vocab_size}", K, n_tokens, vocab_size)

    def run(self, *command, cwd=None):
        """A child to its end; returns what it printed."""
        done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=self.env,
                              cwd=cwd)
        if done.returncode:
            words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise Failed(f"{command[0]}: {words[-1]}")
        return done.stdout

    def flags(self, name, data=None, dtype=None):
        """Those of every run: into a fresh directory `name` of the folder, without evaluations and saves on the way."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return [*([f"--data_dir={data}"] if data else []), f"--out_dir={self.folder / name}",
                f"--device={self.args.device}", f"--dtype={dtype or self.args.dtype}", "--eval_windows=1",
                "--eval_interval=999999", "--save_interval=999999"]

    def train(self, name, *flags, reference=None, **more):
        """Trains into the directory `name` of the folder; returns tokens/s in steady state, the median of its steps."""
        script = ["train_doremi.py", f"--reference={self.folder / reference}"] if reference else ["train_reference.py"]
        self.run(HERE / script[0], *script[1:], *flags, "--compile", "--log_interval=1", *self.flags(name, **more))
        lines = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        return median([entry["tokens_per_second"] for entry in lines if "loss" in entry][WARM_UP:])

    def config(self, name):
        """The parameters of a run's model, and its operations per token and training step."""
        config = json.loads((self.folder / name / "config.json").read_text())
        with torch.device("meta"):
            return config["n_params"], Transformer(ModelConfig(**config["model"])).flops_per_token()

    def need_cuda(self):
        if self.device.type != "cuda":
            raise NotMeasured("needs CUDA")

    @cache  # noqa: B019
    def nanogpt(self, data):
        """A copy of the checkout, and in it our data as one stream without domains."""
        if not self.args.nanogpt:
            raise NotMeasured("needs a checkout of github.com/karpathy/nanoGPT: --nanogpt=DIR")
        copy = self.folder / f"nanogpt-{data.name}"
        shutil.copytree(self.args.nanogpt, copy, ignore=shutil.ignore_patterns(".git", "data", "assets"))
        (copy / "data" / "ours").mkdir(parents=True)
        for split in ("train", "val"):
            bins = [np.fromfile(path, np.uint16) for path in sorted(data.glob(f"*/{split}.bin"))]
            np.concatenate(bins).tofile(copy / "data" / "ours" / f"{split}.bin")
        meta = {"vocab_size": json.loads((data / "meta.json").read_text())["vocab_size"]}
        (copy / "data" / "ours" / "meta.pkl").write_bytes(pickle.dumps(meta))
        return copy

    def train_nanogpt(self, data, shape):
        """Its train.py, at our shape; returns tokens/s in steady state and the number of its parameters."""
        ours = {name: int(value) for name, value in (flag.lstrip("-").split("=") for flag in shape)}
        same = [f"--{name}={ours[name]}" for name in ("block_size", "batch_size", "n_layer", "n_head", "n_embd")]
        out = self.run("train.py", *same, "--dataset=ours", f"--device={self.args.device}", "--compile=True",
                       f"--max_iters={ours['max_steps']}", "--gradient_accumulation_steps=1", "--log_interval=1",
                       "--eval_interval=999999", "--eval_iters=1", "--dropout=0.0", "--bias=False", "--wandb_log=False",
                       cwd=self.nanogpt(data))
        milliseconds = [float(ms) for ms in re.findall(r"^iter \d+: .* time ([\d.]+)ms", out, re.MULTILINE)]
        n_params = 1e6 * float(re.search(r"number of parameters: ([\d.]+)M", out)[1])  # without its positions'
        tokens = ours["batch_size"] * ours["block_size"]
        return 1000 * tokens / median(milliseconds[WARM_UP:]), n_params + ours["block_size"] * ours["n_embd"]


def in_child(function, *arguments):
    """In a fresh process, in which nothing has been freed that could be used again."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except (Exception, SystemExit) as error:
        raise Failed(f"{function.__name__}: {error!r}") from error
