"""Measure how fast the scripts are, side by side with something else, as ratios.

    python -m experiments.bench step proxy micro --shape=30M --ranks=2
    python -m experiments.bench step sampler save --shape=30M --against=DIR     DIR: another checkout of this project
    python -m experiments.bench step --shape=gpt2 --nanogpt=DIR                 DIR: github.com/karpathy/nanoGPT

row      measures                                                  against
step     a step of train_reference.py                              --against, --nanogpt
compile  the same with torch.compile                               eager
proxy    a step of train_doremi.py, one micro-batch                a step of the reference
micro    a step of train_doremi.py in four micro-batches           one micro-batch
sampler  512 x 1,024 tokens of 22 domains                          --against
save     seconds that the loop stands still for a checkpoint       --against

The real scripts run for --steps steps on random tokens, in turn: A B A B. Each repetition gives one ratio. A line shows
the median and, in brackets, the least and the most. Processor time depends less on what else the machine does.
"""

import argparse
import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_ffn", "batch_size")
SHAPES = {  # vocabulary, and the flags of NAMES
    "toy": (4096, 256, 2, 2, 1, 64, 192, 16),
    "4M": (4096, 256, 4, 4, 4, 256, 704, 32),
    "30M": (4096, 256, 8, 8, 8, 512, 1536, 8),
    "50M": (8192, 128, 8, 8, 8, 640, 1792, 4),
    "gpt2": (50304, 1024, 12, 12, 12, 768, 2048, 16),
    "paper_280m": (256_000, 1024, 12, 12, 12, 768, 2048, 64),  # a rank's micro-batch
}


def probe(out, root, script, *flags):
    """Run a script of the checkout `root` in this process, and note in the file `out` what its metrics do not say."""
    sys.path[:0], sys.argv = [root], [script, *flags]
    import torch

    from common import ranks
    from common.run import Run

    stops, clock, save, record = [0.0], [], Run.save, Run.record

    def timed_save(run, *args, **kwargs):
        ranks.synchronize(run.machine.device)
        start = time.perf_counter()
        save(run, *args, **kwargs)
        stops.append(time.perf_counter() - start)

    def timed_record(run, *args, **kwargs):
        record(run, *args, **kwargs)
        clock.append(time.process_time())

    Run.save, Run.record = timed_save, timed_record
    runpy.run_path(f"{root}/{script}", run_name="__main__")
    noted = {"processor seconds per step and rank": float(np.median(np.diff(clock))), "seconds to save": stops[-1]}
    if torch.cuda.is_available():
        noted["GB at the peak"] = torch.cuda.max_memory_allocated() / 1e9
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(noted))


def sample(root, data, seconds=1.0):
    """Print the tokens per second of batches of 512 x 1,024 tokens, as the checkout `root` gathers them."""
    sys.path.insert(0, root)
    from sampler import Sampler, load_dataset

    sampler, batches = Sampler(load_dataset(data, 1024), np.full(22, 1 / 22), 512, seed=1), 0
    state, start = sampler.gather(sampler.state).state, time.perf_counter()
    while time.perf_counter() - start < seconds:
        state, batches = sampler.gather(state).state, batches + 1
    print(batches * 512 * 1024 / (time.perf_counter() - start))
    sampler.close()


def random_data(folder, n_tokens, vocab_size):
    """A data set of 22 domains of random tokens."""
    rng, dtype = np.random.default_rng(0), "uint16" if vocab_size <= 2**16 else "uint32"
    tokens = {"train": n_tokens, "val": 2000}
    counts = {f"{side}_{unit}": n for side, n in tokens.items() for unit in ("tokens", "documents", "bytes")}
    meta = {"tokenizer": "random", "tokenizer_sha256": "", "vocab_size": vocab_size, "eot_token": 0, "dtype": dtype,
            "domains": {f"domain{i:02}": counts for i in range(22)}}
    if not folder.exists():
        for name in meta["domains"]:
            (folder / name).mkdir(parents=True)
            for side, n in tokens.items():
                rng.integers(vocab_size, size=n).astype(dtype).tofile(folder / name / f"{side}.bin")
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def python(*command, cwd=None):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {done.stderr[-2000:]}")
    return done.stdout


def train(args, folder, stage, *more, root=ROOT):
    """{what: number} of a stage's steps in steady state."""
    vocab_size, *shape = SHAPES[args.shape]
    flags = [f"--{name}={value}" for name, value in zip(NAMES, shape)]
    flags = [*flags, f"--data_dir={random_data(folder / 'data', 100_000, vocab_size)}", f"--dtype={args.dtype}"]
    flags = [f"--reference={folder}/reference"] if stage == "proxy" else flags
    script = "train_doremi.py" if stage == "proxy" else "train_reference.py"
    shutil.rmtree(folder / stage, ignore_errors=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
    python(*torchrun * (args.ranks > 1), __file__, "probe", folder / "noted.json", root, script, *flags,
           f"--device={args.device}", "--compile" if args.compile else "--no-compile", f"--out_dir={folder / stage}",
           f"--max_steps={args.steps}", "--warmup_steps=1", "--log_interval=5", f"--eval_interval={args.steps}",
           "--eval_windows=1", f"--save_interval={args.steps}", *more)
    lines = [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line][2:]
    return {"tokens per second": median(line["tokens_per_second"] for line in lines),
            "share of peak": median(line["mfu"] for line in lines), **json.loads((folder / "noted.json").read_text())}


def nanogpt(args, folder):
    """The same of nanoGPT's train.py at the same shape, in its default dtype."""
    copy, (vocab_size, *shape) = folder / "nanogpt", SHAPES[args.shape]
    if not copy.exists():
        shutil.copytree(args.nanogpt, copy)
        (copy / "data/ours").mkdir()
        (copy / "data/ours/meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
        for side in ("train", "val"):
            paths = sorted(random_data(folder / "data", 100_000, vocab_size).glob(f"*/{side}.bin"))
            np.concatenate([np.fromfile(path, np.uint16) for path in paths]).tofile(copy / f"data/ours/{side}.bin")
    ours = {name: value for name, value in zip(NAMES, shape) if name not in ("n_kv_head", "n_ffn")}
    out = python("train.py", *(f"--{name}={value}" for name, value in ours.items()), "--dataset=ours",
                 f"--device={args.device}", f"--compile={args.compile}", f"--max_iters={args.steps}",
                 "--log_interval=1", "--eval_interval=999999", "--gradient_accumulation_steps=1", "--eval_iters=1",
                 "--dropout=0.0", "--bias=False", cwd=copy)
    seconds = median(float(ms) for ms in re.findall(r"time ([\d.]+)ms", out)[10:]) / 1000
    return {"tokens per second": ours["batch_size"] * ours["block_size"] / seconds}


def race(title, repeats, one, other=None):
    """Call the two in turn, and print the median of each number, and of its ratios."""
    def spread(values):
        return f"{median(values):.4g} ({min(values):.4g} to {max(values):.4g})"

    found = [(one(), other() if other else {}) for _ in range(repeats)]
    print(title)
    for name in found[0][0]:
        mine, theirs = ([numbers[name] for numbers in column if name in numbers] for column in zip(*found))
        print(f"    {name}: {spread(mine)}", flush=True)
        if theirs:
            print(f"        the other: {spread(theirs)}; ratio {spread([a / b for a, b in zip(mine, theirs)])}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", choices=["step", "compile", "proxy", "micro", "sampler", "save"])
    parser.add_argument("--shape", choices=SHAPES, default="30M", help="(default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="as in training (default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="(default: yes)")
    parser.add_argument("--steps", type=int, default=40, help="of each training run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of github.com/karpathy/nanoGPT")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = random_data(folder / "sampler", 3_000_000, 50304) if "sampler" in args.rows else None
        micro = f"--micro_batch_size={max(1, SHAPES[args.shape][-1] // args.ranks // 4)}"
        calls = {  # what a row measures, of this checkout or of another
            "step": lambda root=ROOT: train(args, folder, "reference", root=root),
            "sampler": lambda root=ROOT: {"tokens per second": float(python(__file__, "sample", root, data))},
            "save": lambda root=ROOT: train(args, folder, "reference", "--save_interval=5", root=root),
            "compile": lambda: train(args, folder, "reference", "--compile"),
            "eager": lambda: train(args, folder, "reference", "--no-compile"),
            "proxy": lambda: train(args, folder, "proxy"), "micro": lambda: train(args, folder, "proxy", micro)}
        others = {"compile": calls["eager"], "proxy": calls["step"], "micro": calls["proxy"]}
        for row in args.rows:
            if row in ("proxy", "micro"):
                calls["step"]()  # their reference
            other = others.get(row) or (args.against and (lambda row=row: calls[row](args.against.resolve())))
            title = f"{row}, {args.shape}, {args.ranks} ranks, {'compiled' if args.compile else 'eager'}"
            race(title, args.repeats, calls[row], other)
            if row == "step" and args.nanogpt:
                race(f"{title}, against nanoGPT", args.repeats, calls[row], lambda: nanogpt(args, folder))


if __name__ == "__main__":
    if sys.argv[1:2] == ["probe"]:
        probe(*sys.argv[2:])
    elif sys.argv[1:2] == ["sample"]:
        sample(*sys.argv[2:])
    else:
        main()
