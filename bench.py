"""How fast this code is, against what, and what keeps it from being faster.

    python bench.py                                      every row that can be measured here
    python bench.py step sampler --nanogpt=../nanoGPT    two of them, against a checkout of Karpathy's nanoGPT

row         measures                                                      against           aim
step        training step, 4.3M parameters, 32 x 256 tokens, compiled     nanoGPT           >= 2 x
gpt2        the same at GPT-2's shape, 16 x 1,024 tokens (CUDA)           nanoGPT, peak     >= 1.2 x, >= 50%
paper_280m  steps of configs/paper_280m.txt, its reference and proxy      peak (CUDA)       >= 55%
proxy       the proxy's step, one micro-batch                             reference's step  <= 1.36 x
cached      the proxy's step, the reference's losses all in the cache     reference's step  <= 1.03 x
micro       the proxy's step in four micro-batches, no cache              in one            <= 1.27 x
startup     from process start to the first step's line                                     <= 12 s, cold <= 40 s
sampler     batches of 512 x 1,024 tokens of 22 domains                   nanoGPT, memcpy   >= 20 x, >= 0.5 x
windows     opening 1e9 windows                                                             <= 0.1 s, <= 50 MB
prepare     text to bins                                                  tiktoken          >= 0.9 x
checkpoint  how long the loop stands still for a save                     torch.save        <= 0.1 x
sync        waits for the device per step between log lines (CUDA)                          0

Ours and the other run in turn, A B A B; each repetition gives one ratio, the table their median (least to most), so
that a machine that slows down meanwhile does not show. Training is measured in steady state, through the real scripts.
"limit" is what bounds a row here, and how near it is: arithmetic at the speed of a large matrix product (peak), bytes
at that of a large copy. Run nothing beside it: two busy processes can slow OpenMP tenfold. OMP_NUM_THREADS is
honoured. Everything lies in a temporary directory (TMPDIR: a real disk, for the checkpoint), which goes at the end.
"""

import ast
import itertools
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np
import torch

import cli
import corpus
import prepare as stage_0
import runtime
from bench_tools import (
    HERE,
    WARM_UP,
    Bench,
    Failed,
    K,
    NotMeasured,
    compare,
    in_child,
    kernel_bytes,
    line,
    rate,
    si,
    timed,
    write_dataset,
)
from sampler import Sampler, load_dataset

DEMO = f"@{HERE}/configs/demo_small.txt"
MEDIUM = ("--block_size=256 --n_layer=4 --n_head=4 --n_kv_head=4 --n_embd=256 --n_ffn=704 --batch_size=32 "
          "--max_steps=30").split()  # 4,262,144 parameters with 4,096 tokens, as many as nanoGPT has at this width
GPT2 = ("--block_size=1024 --n_layer=12 --n_head=12 --n_kv_head=12 --n_embd=768 --n_ffn=2048 --batch_size=16 "
        "--max_steps=60").split()


# ---- the rows: each takes the Bench and returns its lines ----------------------------------------------------------


def step(bench, shape=MEDIUM, vocab_size=4096, aim=">= 2"):
    data, theirs = bench.data(100_000, vocab_size), []
    dtypes = dict.fromkeys([bench.args.dtype, *(["float32"] if bench.device.type == "cpu" else [])])  # nanoGPT's there
    ours = {dtype: lambda dtype=dtype: bench.train("step", *shape, data=data, dtype=dtype) for dtype in dtypes}
    speed = bench.alternate(nanogpt=lambda: theirs.append(bench.train_nanogpt(data, shape)) or theirs[-1][0], **ours)
    (n_params, flops), their_params = bench.config("step"), theirs[0][1]
    if abs(n_params / their_params - 1) > 0.01:
        raise Failed(f"{n_params:,} parameters against {their_params:,.0f}: not of one size")
    lines = [compare(f"{dtype}, {n_params / 1e6:.2f}M parameters; nanoGPT {their_params / 1e6:.2f}M", speed[dtype],
                     speed["nanogpt"], aim, "tok/s",
                     f"arithmetic: {median(speed[dtype]) * flops / bench.peak[dtype]:.0%} of peak") for dtype in dtypes]
    return lines if shape is not GPT2 else [*lines, share(bench, "reference", speed[bench.args.dtype], flops, ">= 0.5")]


def gpt2(bench):
    bench.need_cuda()
    return step(bench, GPT2, 50304, ">= 1.2")


def paper_280m(bench):
    bench.need_cuda()
    data = bench.data(1_000_000, 256_000)
    shape = [f"@{HERE}/configs/paper_280m.txt", f"--max_steps={WARM_UP + 6}", "--warmup_steps=0"]
    speed = bench.alternate(reference=lambda: bench.train("reference", *shape, data=data),
                            proxy=lambda: bench.train("proxy", "--micro_batch_size=64", reference="reference"))
    flops = bench.config("reference")[1]
    return [share(bench, "reference", speed["reference"], flops, ">= 0.55"),
            share(bench, "proxy", speed["proxy"], flops * 8 / 6, ">= 0.55")]  # 2 of 6 parts more: a forward pass


def share(bench, name, speed, flops, aim):
    values = [tokens_per_second * flops / bench.peak[bench.args.dtype] for tokens_per_second in speed]
    return line(f"{name}, share of peak", values, aim, ours=si(median(speed), "tok/s"), limit="arithmetic")


@cache
def proxy_steps(bench, batch_size, vocab_size, *shape):
    """Seconds per step of the reference and of what the rows that were asked for need: {name: [one a repetition]}."""
    # Four windows a domain: all have been drawn, and their losses cached, when the counting begins
    data = bench.data(4 * 256 + 1, vocab_size)
    flags = {"proxy": [], "cached": ["--cache_reference_losses"], "micro": [f"--micro_batch_size={batch_size // 4}"]}
    wanted = {*bench.args.rows, *(["proxy"] if "micro" in bench.args.rows else [])}
    proxies = {name: lambda more=more: bench.train("proxy", *more, reference="reference")
               for name, more in flags.items() if name in wanted}
    speed = bench.alternate(reference=lambda: bench.train("reference", *shape, data=data), **proxies)
    return {name: [batch_size * 256 / tokens_per_second for tokens_per_second in speed[name]] for name in speed}


def proxy(bench, name="proxy", base="reference", aim="<= 1.36", floor=4 / 3, why="a forward pass more"):
    found = {"demo": proxy_steps(bench, 16, 2048, DEMO, "--max_steps=110"),
             "4.3M": proxy_steps(bench, 32, 4096, *MEDIUM)}
    return [compare(f"{name} / {base}, {shape}", seconds[name], seconds[base], aim, "s",
                    f"arithmetic: {floor:.2f}, {why}", floor) for shape, seconds in found.items()]


def cached(bench):
    return proxy(bench, "cached", "reference", "<= 1.03", 1, "no product more")


def micro(bench):
    return proxy(bench, "micro", "proxy", "<= 1.27", 5 / 4, "alpha needs a forward pass of its own")


def startup(bench):
    data, metrics = bench.data(10_000, 2048), bench.folder / "startup" / "metrics.jsonl"

    def first_line(compiled, flag="--compile"):
        command = [sys.executable, HERE / "train_reference.py", DEMO, "--log_interval=1", flag,
                   *bench.flags("startup", data)]
        env, start = {**bench.env, "TORCHINDUCTOR_CACHE_DIR": str(bench.folder / compiled)}, time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env) as child:
            try:
                while not (metrics.exists() and metrics.stat().st_size):
                    if child.poll() is not None:
                        raise Failed("train_reference.py ended before its first step")
                    time.sleep(0.01)
                return time.perf_counter() - start
            finally:
                child.terminate()  # it stops after the step

    def cold():
        shutil.rmtree(bench.folder / "cold", ignore_errors=True)
        return first_line("cold")

    first_line("warm")
    seconds = bench.alternate(warm=lambda: first_line("warm"), cold=cold, eager=lambda: first_line("", "--no-compile"),
                              torch=lambda: timed(lambda: bench.run("-c", "import torch")))
    limit = f"'import torch' alone: {median(seconds['torch']):.1f} s"
    return [line(f"first step, {what}", seconds[name], aim, "s", si(median(seconds[name]), "s"), limit=limit)
            for name, what, aim in [("warm", "compiled, cache warm", "<= 12"), ("eager", "not compiled", "<= 12"),
                                    ("cold", "compiled, cache cold", "<= 40")]]


def sampler(bench, n_tokens=3_000_000, batch_size=512, block_size=1024, seconds=0.5):
    data = bench.data(n_tokens, 50304)
    ours = Sampler(load_dataset(data, block_size), np.full(K, 1 / K), batch_size, seed=1)
    flat = np.concatenate([np.fromfile(path, np.uint16) for path in data.glob("*/train.bin")])  # warms the page cache
    n, states = batch_size * (block_size + 1), [ours.state]
    parts = itertools.cycle(flat[start : start + n] for start in range(0, len(flat) - n + 1, n))
    measures = {"gather": lambda: states.append(ours.gather(states.pop()).state), "next_batch": ours.next_batch,
                "memcpy": lambda: next(parts).copy()}
    if bench.args.nanogpt:
        # Its own function, lifted out of train.py: to import that file is to train
        tree = ast.parse((bench.nanogpt(data) / "train.py").read_text())
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "get_batch"]
        scope = {"os": os, "np": np, "torch": torch, "data_dir": str(bench.nanogpt(data) / "data" / "ours"),
                 "block_size": block_size, "batch_size": batch_size, "device": "cpu", "device_type": "cpu"}
        exec(compile(tree, "train.py", "exec"), scope)
        measures["nanogpt"] = lambda: scope["get_batch"]("train")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # domains are drawn more than four times
        speed = bench.alternate(**{name: lambda call=call: rate(call, seconds) * batch_size * block_size
                                   for name, call in measures.items()})
    ours.close()
    limit = f"bytes: {si(2 * median(speed['memcpy']), 'B/s')} by memcpy"
    pairs = [("gather", "memcpy", ">= 0.5"), ("next_batch", "memcpy", ">= 0.5"), ("gather", "nanogpt", ">= 20")]
    return [compare(f"{a} / {b}", speed[a], speed[b], aim, "tok/s", limit) if b in speed else
            {"what": f"{a} / {b}", "reason": "needs --nanogpt=DIR"} for a, b, aim in pairs]


def windows(bench, n_windows=10**9, block_size=1024):
    data, n_tokens = write_dataset(bench.folder / "sparse", 1, block_size + 1, 50304), n_windows * block_size + 1
    meta = json.loads((data / "meta.json").read_text())
    meta["domains"]["domain00"]["train_tokens"] = n_tokens
    (data / "meta.json").write_text(json.dumps(meta))
    try:
        os.truncate(data / "domain00" / "train.bin", 2 * n_tokens)  # the rest is a hole, which takes no room
    except OSError as error:
        raise NotMeasured(f"no sparse file of {si(2 * n_tokens, 'B')} in {bench.folder}: {error.strerror}") from None
    found = [in_child(open_windows, data, block_size) for _ in range(bench.args.repeats)]
    shutil.rmtree(data)
    lines, batch = [], f"bytes: {512 * (block_size + 1) * 2 / 1e6:.1f} MB are the batch"
    for what, values, aim, unit in zip(("first batch's order", "allocated", "resident"), zip(*found),
                                       ("<= 0.1", "<= 50", "<= 50"), ("s", "MB", "MB")):
        if None not in values:
            lines.append(line(f"{n_windows:.0e} windows, {what}", values, aim, unit, f"{median(values):.3g} {unit}",
                              limit=batch))
    return lines


def open_windows(data, block_size):
    """Seconds from the files to the order of the first batch of 512; MB that Python and numpy held at most until it was
    gathered; MB that the process grew by, the mapped file not counted, None where the kernel does not say."""
    def start():
        held.append(Sampler(load_dataset(data, block_size), [1.0], 512, seed=1))
        held[-1].slots(held[-1].state)

    held, before = [], kernel_bytes("/proc/self/status", "RssAnon")
    seconds = timed(start)
    held.append(held[-1].gather(held[-1].state))
    grown = before and (kernel_bytes("/proc/self/status", "RssAnon") - before) / 1e6
    tracemalloc.start()
    start()
    held.append(held[-1].gather(held[-1].state))
    return seconds, tracemalloc.get_traced_memory()[1] / 1e6, grown


def prepare(bench, stride=4):
    bench.say("making the embedded corpus, training a tokenizer")
    documents, threads = list(corpus.documents())[::stride], torch.get_num_threads()
    encoding = stage_0.get_encoding("train:2048", lambda: stage_0.sample_texts(iter(documents), 0.05))
    encode, texts = stage_0.encoder(encoding, np.dtype("<u2")), [text for _, text in documents]
    n_bytes = sum(len(text.encode()) for text in texts)

    def ours():
        """All that prepare.py does with documents: encode, hash, split, write, flush."""
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            return n_bytes / timed(lambda: stage_0.write_bins(iter(documents), Path(folder), encode, 0.05, threads))

    speed = bench.alternate(
        ours=ours, tiktoken=lambda: n_bytes / timed(lambda: encoding.encode_ordinary_batch(texts, num_threads=threads)))
    return [compare(f"text to bins / tiktoken to lists, {threads} threads", speed["ours"], speed["tiktoken"], ">= 0.9",
                    "B/s", "tiktoken encodes for both")]


def checkpoint(bench, n_params=281_561_856):
    """The paper's 280M model and its moments, or as much as half of the free memory and disk hold."""
    memory, disk = kernel_bytes("/proc/meminfo", "MemAvailable") or 8 << 30, shutil.disk_usage(bench.folder).free
    n_params = min(n_params, memory // 2 // 28, disk // 2 // 24)  # weight, gradient, moments, copy; old and new file
    parameters = {str(i): torch.nn.Parameter(torch.rand(n_params // 64, device=bench.device)) for i in range(64)}
    optimizer = torch.optim.AdamW(parameters.values(), fused=True)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    state, path = {"model": parameters, "optimizer": optimizer.state_dict()}, bench.folder / "ckpt.pt"
    writer, written = runtime.CheckpointWriter(), []

    def ours():
        runtime.synchronize(bench.device)
        stopped = timed(lambda: writer.save(path, state))
        written.append(stopped + timed(writer.wait))
        return stopped

    def plain():
        return timed(lambda: runtime.write_atomically(path, lambda file: torch.save(state, file)))

    plain()  # all others replace a file
    first = ours()
    seconds = bench.alternate(plain=plain, ours=ours)
    limit = (f"bytes: {12 * n_params / bench.bandwidth:.2f} s to copy; the first save {first:.2f} s, as it allocates; "
             f"on disk after {median(written):.1f} s")
    return [compare(f"stop for a save of {si(12 * n_params, 'B')} / torch.save, fsync", seconds["ours"],
                    seconds["plain"], "<= 0.1", "s", limit)]


def sync(bench):
    bench.need_cuda()

    def waits(script, n, *flags):
        return in_child(count_waits, [str(HERE / script), *flags, f"--max_steps={n}", "--compile",
                                      "--log_interval=999999", *bench.flags(f"{script}-{n}", bench.data(10_000, 2048))])

    def per_step(*script):
        """Two runs begin and end alike: their difference is of the 20 steps between."""
        return lambda: (waits(script[0], 40, *script[1:]) - waits(script[0], 20, *script[1:])) / 20

    found = bench.alternate(reference=per_step("train_reference.py", DEMO), proxy=per_step(
        "train_doremi.py", f"--reference={bench.folder}/train_reference.py-40"))
    return [line(f"{name}, waits per step", found[name], "<= 0", ours=f"{median(found[name]):g}") for name in found]


def count_waits(argv):
    """Runs a script in this process; returns how often CUDA made the host wait."""
    sys.argv = argv
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runpy.run_path(argv[0], run_name="__main__")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


# ---- the command ---------------------------------------------------------------------------------------------------

ROWS = {row.__name__: row for row in (step, gpt2, paper_280m, proxy, cached, micro, startup, sampler, windows, prepare,
                                      checkpoint, sync)}


def parse_args():
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help="rows to measure (default: all)")
    add("--nanogpt", type=Path, help="a checkout of github.com/karpathy/nanoGPT, to compare with")
    add("--device", default="auto", help="cpu, cuda (default: cuda where there is one, else cpu)")
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto",
        help="of our computation (default: bfloat16 where the hardware multiplies it, else float32)")
    add("--repeats", type=cli.positive, default=5, help="repetitions of each comparison (default %(default)s)")
    add("--json", type=Path, help="file for one JSON object per line of the table")
    args = parser.parse_args()
    for name in args.rows:
        if name not in ROWS:
            parser.error(f"no row is called {name}; there are {', '.join(ROWS)}")
    if args.nanogpt and not (args.nanogpt / "train.py").exists():
        raise cli.UserError(f"--nanogpt={args.nanogpt}: holds no train.py; give a checkout of nanoGPT.")
    args.rows = args.rows or list(ROWS)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if runtime.multiplies_bfloat16(args.device) else "float32"
    return args


def show(entry):
    """A line of the table, for the eye."""
    if "reason" in entry:
        why = "failed" if entry.get("failed") else "not measured"
        return f"{entry['row']:<11} {entry['what']:<52} {why}: {entry['reason']}"
    low, high = entry["spread"]
    value = f"{entry['value']:.3g} {entry['unit']} ({low:.3g} to {high:.3g})"
    return (f"{entry['row']:<11} {entry['what']:<52} {entry['ours']:>11} {entry['other']:>11}  {value:<26} "
            f"{entry['target']:<8} {'yes' if entry['met'] else 'no':<4} {entry['limit']}")


def main():
    args, start, table = parse_args(), time.perf_counter(), []
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the folder goes
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, open(args.json or os.devnull, "w") as file:
        bench = Bench(args, folder)
        print("\n".join(f"{name}: {value}" for name, value in bench.machine.items()), flush=True)
        for number, name in enumerate(args.rows, 1):
            bench.row = f"{name}, row {number} of {len(args.rows)}"
            try:
                lines = ROWS[name](bench)
            except (NotMeasured, Failed) as error:
                lines = [{"what": "", "reason": str(error), "failed": isinstance(error, Failed)}]
            table += [{"row": name, **entry, "machine": bench.machine} for entry in lines]
            file.writelines(json.dumps(entry) + "\n" for entry in table[-len(lines) :])
            file.flush()
            bench.say(f"done after {time.perf_counter() - start:.0f} s")
    print(f"\n{'row':<11} {'what':<52} {'ours':>11} {'other':>11}  {'median (range)':<26} {'aim':<8} met  limit")
    print("\n".join(map(show, table)))
    sys.exit(any(entry.get("failed") for entry in table))


if __name__ == "__main__":
    cli.run(main)
