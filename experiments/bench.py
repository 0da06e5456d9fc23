"""Measure how fast the scripts are, side by side with something else, as ratios.

    python experiments/bench.py step proxy micro --shape=30M --ranks=2
    python experiments/bench.py step sampler save --shape=30M --against=DIR     DIR: another checkout of this project
    python experiments/bench.py step --shape=gpt2 --nanogpt=DIR                 DIR: github.com/karpathy/nanoGPT

row      measures                                                  against
step     tokens per second of train_reference.py, share of peak    --against, --nanogpt
compile  the same with torch.compile                               eager
proxy    a step of train_doremi.py, one micro-batch                a step of the reference
micro    a step of train_doremi.py in four micro-batches           one micro-batch
sampler  tokens per second, 512 x 1,024 tokens of 22 domains       --against
save     seconds that the loop stands still for a checkpoint       --against

The real scripts run for --steps steps on random tokens, in turn: A B A B. Each repetition gives one ratio. A line shows
the median and, in brackets, the least and the most. Training rows also compare the processor time of a step, which
depends less on what else the machine does. On CUDA they show the peak memory, and how often a step waits for it.
"""

import argparse
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import numpy as np

HERE = Path(__file__).resolve().parent.parent
SHAPES = {  # vocabulary, flags
    "toy": (4096, "--block_size=256 --n_layer=2 --n_head=2 --n_kv_head=1 --n_embd=64 --n_ffn=192 --batch_size=16"),
    "4M": (4096, "--block_size=256 --n_layer=4 --n_head=4 --n_kv_head=4 --n_embd=256 --n_ffn=704 --batch_size=32"),
    "30M": (4096, "--block_size=256 --n_layer=8 --n_head=8 --n_kv_head=8 --n_embd=512 --n_ffn=1536 --batch_size=8"),
    "50M": (8192, "--block_size=128 --n_layer=8 --n_head=8 --n_kv_head=8 --n_embd=640 --n_ffn=1792 --batch_size=4"),
    "gpt2": (50304, "--block_size=1024 --n_layer=12 --n_head=12 --n_kv_head=12 --n_embd=768 --n_ffn=2048 "
                    "--batch_size=16"),
    "paper_280m": (256_000, f"@{HERE}/configs/paper_280m.txt --batch_size=512"),
}


def probe(out, root, script, *flags):
    """Run a script of the checkout `root` in this process, and note in the file `out` what its metrics do not say."""
    sys.path[:0], sys.argv = [root], [script, *flags]
    import torch

    import runtime

    noted, waits, start = {"save": []}, [], time.perf_counter
    save, record, cpu = runtime.Run.save, runtime.Run.record, []

    def timed_save(run, *args, **kwargs):
        runtime.synchronize(run.machine.device)
        begin = start()
        save(run, *args, **kwargs)
        noted["save"].append(start() - begin)

    def counted_record(run, *args, **kwargs):
        record(run, *args, **kwargs)
        waits.append(len(caught))
        cpu.append(time.process_time())

    runtime.Run.save, runtime.Run.record = timed_save, counted_record
    with warnings.catch_warnings(record=True) as caught:
        if torch.cuda.is_available():
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        runpy.run_path(f"{root}/{script}", run_name="__main__")
    noted["waits"] = float(np.median(np.diff(waits)))  # of most steps, which write no line
    noted["cpu"] = float(np.median(np.diff(cpu)))  # seconds of this rank's processor per step
    noted["peak_memory"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    if int(os.environ.get("RANK", 0)) == 0:
        Path(out).write_text(json.dumps(noted))


def sampler_speed(root, data, seconds=1.0):
    """Print the tokens per second of batches of 512 x 1,024 tokens, as the checkout `root` gathers them."""
    sys.path.insert(0, root)
    from sampler import Sampler, load_dataset

    warnings.simplefilter("ignore")  # domains are repeated
    dataset = load_dataset(data, 1024)
    sampler, batches = Sampler(dataset, np.full(22, 1 / 22), 512, seed=1), 0
    state = sampler.gather(sampler.state).state
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        state, batches = sampler.gather(state).state, batches + 1
    print(batches * 512 * 1024 / (time.perf_counter() - start))
    sampler.close()


class Bench:
    def __init__(self, args, folder):
        self.args, self.folder = args, folder
        self.vocab_size, flags = SHAPES[args.shape]
        self.flags = flags.split()
        self.compile = "--compile" if args.compile else "--no-compile"
        self.last = {}  # what the last training run noted

    def batch_size(self):
        return int(re.search(r"--batch_size=(\d+)", " ".join(self.flags))[1])

    def data(self, n_tokens, vocab_size):
        """A data set of 22 domains of random tokens."""
        folder, rng = self.folder / f"data-{n_tokens}-{vocab_size}", np.random.default_rng(0)
        counts = {"train_tokens": n_tokens, "val_tokens": 2000, "train_documents": 1, "val_documents": 1,
                  "train_bytes": n_tokens, "val_bytes": 2000}
        dtype = "uint16" if vocab_size <= 2**16 else "uint32"
        meta = {"tokenizer": "random", "tokenizer_sha256": "", "vocab_size": vocab_size, "eot_token": 0, "dtype": dtype,
                "domains": {f"domain{i:02}": counts for i in range(22)}}
        if not folder.exists():
            for name in meta["domains"]:
                (folder / name).mkdir(parents=True)
                for split in ("train", "val"):
                    ids = rng.integers(vocab_size, size=counts[f"{split}_tokens"]).astype(dtype)
                    ids.tofile(folder / name / f"{split}.bin")
            (folder / "meta.json").write_text(json.dumps(meta))
        return folder

    def python(self, *command, cwd=None):
        done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd)
        if done.returncode:
            sys.exit(f"{' '.join(map(str, command))}: {done.stderr[-2000:]}")
        return done.stdout

    def train(self, stage, *more, root=HERE):
        """Return tokens per second in steady state.  Keep what the run noted in self.last."""
        script = "train_doremi.py" if stage == "proxy" else "train_reference.py"
        flags = [f"--reference={self.folder}/reference"] if stage == "proxy" else \
            [*self.flags, f"--data_dir={self.data(100_000, self.vocab_size)}", f"--dtype={self.args.dtype}",
             f"--device={self.args.device}"]
        out, never = self.folder / stage, self.args.steps
        shutil.rmtree(out, ignore_errors=True)
        ranks = self.args.ranks
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        self.python(*launcher, __file__, "probe", self.folder / "noted.json", root, script, *flags, self.compile,
                    f"--out_dir={out}", f"--max_steps={never}", "--warmup_steps=1", "--log_interval=5",
                    f"--eval_interval={never}", "--eval_windows=1", f"--save_interval={never}", *more)
        lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "loss" in line][2:]
        noted = json.loads((self.folder / "noted.json").read_text())
        self.last = {**noted, "mfu": median(line["mfu"] for line in lines)}
        return median(line["tokens_per_second"] for line in lines)

    def nanogpt(self):
        """Tokens per second of nanoGPT's train.py at the same shape, in its default dtype."""
        copy, data = self.folder / "nanogpt", self.data(100_000, self.vocab_size)
        if not copy.exists():
            shutil.copytree(self.args.nanogpt, copy)
            (copy / "data/ours").mkdir()
            for split in ("train", "val"):
                ids = [np.fromfile(path, np.uint16) for path in sorted(data.glob(f"*/{split}.bin"))]
                np.concatenate(ids).tofile(copy / f"data/ours/{split}.bin")
        ours = dict(flag.lstrip("-").split("=") for flag in self.flags)
        same = [f"--{name}={ours[name]}" for name in ("block_size", "batch_size", "n_layer", "n_head", "n_embd")]
        out = self.python("train.py", *same, "--dataset=ours", f"--device={self.args.device}", "--log_interval=1",
                          f"--compile={self.args.compile}", f"--max_iters={self.args.steps}", "--eval_interval=999999",
                          "--gradient_accumulation_steps=1", "--eval_iters=1", "--dropout=0.0", "--bias=False",
                          cwd=copy)
        milliseconds = [float(ms) for ms in re.findall(r"time ([\d.]+)ms", out)][10:]
        return 1000 * int(ours["batch_size"]) * int(ours["block_size"]) / median(milliseconds)

    def alternate(self, a, b=None):
        """Call a and b in turn.  Return a list of (value, what the run noted) for each, one per repetition."""
        found = [], []
        for _, (call, values) in itertools.product(range(self.args.repeats), zip((a, b), found)):
            if call:
                self.last = {}
                values.append((call(), self.last))
        return found

    def show(self, name, a, b, unit):
        """Print the median of a, and of its ratios to b, where there is a b."""
        def spread(values):
            return f"{median(values):.4g} ({min(values):.4g} to {max(values):.4g})"

        print(f"{name}: {spread([value for value, _ in a])} {unit}")
        if b:
            ratios = [x / y for (x, _), (y, _) in zip(a, b)]
            print(f"    the other: {spread([value for value, _ in b])}; ratio {spread(ratios)}")
        noted = a[-1][1]
        if "cpu" in noted:
            share = median(n["mfu"] for _, n in a)
            print(f"    processor time of a step: {noted['cpu']:.3g} s a rank; {share:.0%} of peak")
        if b and "cpu" in b[-1][1]:
            print(f"    ratio of processor times: {spread([x['cpu'] / y['cpu'] for (_, x), (_, y) in zip(a, b)])}")
        if noted.get("peak_memory"):
            print(f"    {noted['peak_memory'] / 1e9:.2f} GB at the peak, {noted['waits']:.0f} waits a step")
        sys.stdout.flush()

    def run(self, row):
        args, other = self.args, self.args.against and Path(self.args.against).resolve()
        title = f"{row}, {args.shape}, {args.ranks} ranks, {'compiled' if args.compile else 'eager'}"
        if row == "step":
            others = [("against", lambda: self.train("reference", root=other))] if other else []
            others += [("nanoGPT", self.nanogpt)] if args.nanogpt else []
            for what, call in others or [("alone", None)]:
                self.show(f"{title}, {what}", *self.alternate(lambda: self.train("reference"), call), "tokens/s")
        elif row == "compile":
            pair = [lambda flag=flag: self.train("reference", flag) for flag in ("--compile", "--no-compile")]
            self.show(title, *self.alternate(*pair), "tokens/s")
        elif row in ("proxy", "micro"):
            self.train("reference")
            parts = [f"--micro_batch_size={self.batch_size() // args.ranks // 4}"] if row == "micro" else []
            base = "reference" if row == "proxy" else "proxy"
            pair = self.alternate(lambda: self.train("proxy", *parts), lambda: self.train(base))
            self.show(title, *pair, "tokens/s")
        elif row == "save":
            def stop(root):
                self.train("reference", "--save_interval=5", root=root)
                return median(self.last["save"])

            self.show(title, *self.alternate(lambda: stop(HERE), other and (lambda: stop(other))), "s")
        else:
            def speed(root):
                return float(self.python(__file__, "sampler_speed", root, self.data(3_000_000, 50304)))

            self.show(row, *self.alternate(lambda: speed(HERE), other and (lambda: speed(other))), "tokens/s")


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
    parser.add_argument("--against", help="another checkout of this project")
    parser.add_argument("--nanogpt", help="a checkout of github.com/karpathy/nanoGPT")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        for row in args.rows:
            bench.run(row)


if __name__ == "__main__":
    if sys.argv[1:2] == ["probe"]:
        probe(*sys.argv[2:])
    elif sys.argv[1:2] == ["sampler_speed"]:
        sampler_speed(*sys.argv[2:])
    else:
        main()
