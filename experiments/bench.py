"""Race this checkout against another one, or against nanoGPT: A B A B, and the ratio of their tokens per second.

    python -m experiments.bench --against=DIR --shape=30M --ranks=2 --compile       DIR: another checkout
    python -m experiments.bench --nanogpt=DIR --shape=gpt2 --device=cuda            DIR: github.com/karpathy/nanoGPT

train_reference.py trains on random tokens. Other flags are passed on to it. A line gives the median and, in brackets,
the least and the most. Seconds depend on what else the machine does; ratios of runs made in turn do less.
"""

import argparse
import json
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np

from common import cli
from common.cli import UserError
from common.files import sample_sha256

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {  # vocabulary, and flags
    "4M": (4096, {"block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 256, "n_ffn": 704, "batch_size": 32}),
    "30M": (4096, {"block_size": 256, "n_layer": 8, "n_head": 8, "n_embd": 512, "n_ffn": 1536, "batch_size": 8}),
    "gpt2": (50304, {"block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "n_ffn": 2048, "batch_size": 16}),
}


def random_data(folder, vocab_size, n_domains=22, n_tokens=100_000):
    """Write a data set of random tokens, as prepare.py would."""
    rng, dtype = np.random.default_rng(0), "uint16" if vocab_size <= 2**16 else "uint32"
    domains = {f"domain{i:02}": {} for i in range(n_domains)}
    for name, entry in domains.items():
        (folder / name).mkdir(parents=True)
        for side, n in ("train", n_tokens), ("val", 5000):
            path = folder / name / f"{side}.bin"
            rng.integers(vocab_size, size=n).astype(dtype).tofile(path)
            entry |= {f"{side}_tokens": n, f"{side}_documents": 1, f"{side}_bytes": n}
            entry[f"{side}_sha256"] = sample_sha256(path, path.stat().st_size)
    meta = {"format": 1, "tokenizer": "random", "tokenizer_sha256": "", "vocab_size": vocab_size, "eot_token": 0,
            "dtype": dtype, "domains": domains}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def python(*command, cwd):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise UserError(f"{' '.join(map(str, command))}: {done.stderr[-2000:]}")
    return done.stdout


def run(root, out_dir, flags, steps, ranks):
    """Train with the checkout `root`.  Return tokens per second after 10 steps."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    python(*torchrun, "train_reference.py", *flags, f"--out_dir={out_dir}", f"--max_steps={steps}", "--warmup_steps=1",
           "--log_interval=5", "--eval_interval=999999", "--eval_windows=1", "--save_interval=999999", cwd=root)
    lines = [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]
    return median(line["tokens_per_second"] for line in lines if "loss" in line and line["step"] > 10)


def run_nanogpt(source, folder, data, shape, steps, device, compiled):
    """Tokens per second of nanoGPT's train.py in its default dtype, on a data set of random_data."""
    copy, (vocab_size, flags) = shutil.copytree(source, folder / "nanogpt"), SHAPES[shape]
    (copy / "data/ours").mkdir()
    (copy / "data/ours/meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
    for side in ("train", "val"):
        tokens = [np.fromfile(path, np.uint16) for path in sorted(data.glob(f"*/{side}.bin"))]
        np.concatenate(tokens).tofile(copy / f"data/ours/{side}.bin")
    said = python("train.py", *(f"--{name}={value}" for name, value in flags.items() if name != "n_ffn"),
                  "--dataset=ours", f"--device={device}", f"--compile={compiled}", f"--max_iters={steps}",
                  "--log_interval=1", "--eval_interval=999999", "--gradient_accumulation_steps=1", "--eval_iters=1",
                  "--dropout=0.0", "--bias=False", cwd=copy)
    shutil.rmtree(copy)
    seconds = median(float(ms) for ms in re.findall(r"time ([\d.]+)ms", said)[10:]) / 1000
    return flags["batch_size"] * flags["block_size"] / seconds


def main():
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="4M", help="(default: %(default)s)")
    parser.add_argument("--ranks", type=cli.positive, default=1, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="(default: yes)")
    parser.add_argument("--steps", type=cli.positive, default=40, help="of each run (default: %(default)s)")
    parser.add_argument("--repeats", type=cli.positive, default=3, help="(default: %(default)s)")
    other = parser.add_mutually_exclusive_group(required=True)
    other.add_argument("--against", type=cli.path, help="another checkout of this project")
    other.add_argument("--nanogpt", type=cli.path, help="a checkout of nanoGPT")
    args, passed_on = parser.parse_known_args()
    if args.steps < 15:
        parser.error("--steps must be at least 15: the first 10 are not measured")
    compiled = "--compile" if args.compile else "--no-compile"
    vocab_size, shape = SHAPES[args.shape]
    flags = [f"--{name}={value}" for name, value in shape.items()]
    flags += [f"--n_kv_head={shape['n_head']}", f"--device={args.device}", compiled, *passed_on]
    ours, theirs = [], []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            data = random_data(folder / "data", vocab_size)
            call = [folder / "run", [*flags, f"--data_dir={data}"], args.steps, args.ranks]
            ours.append(run(ROOT, *call))
            shutil.rmtree(folder / "run")
            if args.nanogpt:
                theirs.append(run_nanogpt(args.nanogpt, folder, data, args.shape, args.steps, args.device,
                                          args.compile))
            else:
                theirs.append(run(Path(args.against).resolve(), *call))
    for name, values in ("tokens per second", ours), ("the other's", theirs), ("ratio", np.divide(ours, theirs)):
        print(f"{name}: {median(values):.4g} ({min(values):.4g} to {max(values):.4g})")


if __name__ == "__main__":
    cli.run(main)
