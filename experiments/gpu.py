"""Ten minutes on one GPU: is DoReMi right there, and how fast?  Prints a line of JSON per result, as it comes.

    python -m experiments.gpu --nanogpt=DIR | tee experiments/results/gpu-CARD.jsonl
    python tests/pretend.py -m experiments.gpu --quick          tiny, without a card: does the script itself work?

part      what it says                                                                                 seconds at most
tests     tests/test_cuda.py: the oracle's alpha, checkpoints, kill and resume, nothing that waits                 300
nanogpt   GPT-2's shape, compiled: tokens per second, share of peak, and the ratio to nanoGPT's                    240
configs   official_120m and paper_280m: steps of reference and proxy, their ratio, memory                          240
demo      seconds of the demo's stages 1 and 2, and how far its answer is from a CPU's                             120
profile   kernels of a compiled step by their time, and the largest that is no matrix product                       90

The parts come in the order of their worth. One that passes its limit is ended, and the next one starts; nothing starts
after --seconds. Parts can be named: python -m experiments.gpu demo profile. The demo needs a directory where ./demo.sh
has run on a CPU: --demo. DIR: a checkout of github.com/karpathy/nanoGPT; without the flag it is left out.
"""

import argparse
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from average_weights import total_variation
from experiments.bench import ROOT, SHAPES, python, random_data, run, run_nanogpt, shape_flags

PRODUCTS = re.compile("gemm|nvjet|cutlass|xmma|flash|fmha|attention|::mm|::addmm|mkldnn|dot", re.I)
TINY = ["--block_size=32", "--n_layer=1", "--n_head=2", "--n_kv_head=2", "--n_embd=32", "--n_ffn=64", "--batch_size=4"]


def say(part, **values):
    print(json.dumps({"part": part, **values}), flush=True)


def tests(args, folder):
    """The outcome of every test of tests/test_cuda.py when it ends; the rest of pytest's words on stderr."""
    chosen = ["-k", "oracles and float32 or needs_no_card"] if args.quick else []
    command = [sys.executable, "-u", "-m", "pytest", "tests/test_cuda.py", "-vv", "-s", "-rN", *chosen]
    name, outcomes = None, []
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        found = re.match(r"(?:tests/test_cuda\.py::(\S+) ?)?(PASSED|FAILED|ERROR|SKIPPED)?", line)
        name = found[1] or name
        if found[2]:
            outcomes.append(found[2])
            say("tests", test=name, outcome=found[2].lower())
        elif re.match(r"float\d\d, |.*, to the bit: ", line):
            say("tests", test=name, deviations=line.strip())
        else:
            print(line, end="", file=sys.stderr, flush=True)
    say("tests", all_passed=process.wait() == 0 and set(outcomes) == {"PASSED"})


def nanogpt(args, folder):
    data, steps = random_data(folder / "data", args.vocab_size or SHAPES["gpt2"][0]), 15 if args.quick else 60
    flags = [*(TINY if args.quick else shape_flags("gpt2")), f"--data_dir={data}", "--compile"]
    for turn in (1, 2):
        speed, mfu, peak = measured("train_reference.py", folder / f"run{turn}", flags, steps)
        say("nanogpt", turn=turn, tokens_per_second=speed, mfu=mfu, peak_gb=peak)
        if args.nanogpt:
            theirs = run_nanogpt(args.nanogpt, folder, data, "gpt2", steps, "cuda", True)
            say("nanogpt", turn=turn, their_tokens_per_second=theirs, ratio=speed / theirs)


def measured(script, out_dir, flags, steps):
    """Tokens per second, share of peak, and GB that the card's allocator held at most."""
    peak = out_dir.with_suffix(".peak")
    command = ["-m", "experiments.gpu", "--noting", peak, script, "--device=cuda"]
    speed, mfu = run(ROOT, command, out_dir, flags, steps)
    return speed, mfu, float(peak.read_text()) / 1e9


def note_peak(path, script, *flags):
    """Run a script of this checkout in this process, then write the peak of its memory on the card, in bytes."""
    sys.argv = [script, *flags]
    runpy.run_path(str(ROOT / script), run_name="__main__")
    Path(path).write_text(str(torch.cuda.max_memory_allocated()))


def configs(args, folder):
    """A reference's and a proxy's step at the micro-batch of the configuration."""
    for name in ("official_120m", "paper_280m"):
        text = (ROOT / f"configs/{name}.txt").read_text()
        vocab_size = args.vocab_size or int(re.search(r"parameters with ([\d,]+) tokens", text)[1].replace(",", ""))
        b = 4 if args.quick else int(re.search(r"--micro_batch_size=(\d+)", text)[1])
        data, reference = random_data(folder / name / "data", vocab_size), folder / name / "reference"
        flags = [f"@configs/{name}.txt", f"--batch_size={b}", f"--data_dir={data}", "--compile", *TINY * args.quick]
        speed, mfu, peak = measured("train_reference.py", reference, flags, 15)
        say("configs", config=name, micro_batch_size=b, tokens_per_second=speed, mfu=mfu, peak_gb=peak)
        proxy, _, peak = measured("train_doremi.py", folder / name / "proxy", [f"--reference={reference}"], 15)
        say("configs", config=name, proxy_tokens_per_second=proxy, peak_gb=peak, proxy_to_reference_time=speed / proxy)
        shutil.rmtree(folder / name)


def demo(args, folder):
    """Stages 1 to 3 on the data set of a demo that ran on a CPU, and the distance to its answer."""
    data = random_data(folder / "data", args.vocab_size) if args.quick else args.demo / "data/demo"
    for script, flags in [("train_reference.py", [f"--data_dir={data}", *["--max_steps=20"] * args.quick]),
                          ("train_doremi.py", [f"--reference={folder}/train_reference.py"])]:
        start = time.perf_counter()
        python(script, *flags, f"--out_dir={folder}/{script}", "--device=cuda", cwd=ROOT)
        say("demo", script=script, seconds=time.perf_counter() - start)
    python("average_weights.py", folder / "train_doremi.py", cwd=ROOT)
    answer = json.loads((folder / "train_doremi.py/weights.json").read_text())["domain_weights"]
    say("demo", answer=answer)
    if not args.quick:
        stored = json.loads((args.demo / "checkpoints/proxy/weights.json").read_text())["domain_weights"]
        here, cpu = (np.array([weights[name] for name in stored]) for weights in (answer, stored))
        say("demo", total_variation=float(total_variation(here, cpu)))


def profile(args, folder):
    """Five steps of train_reference.py under torch.profiler, once its code is compiled."""
    from common.run import Run

    cuda, cpu = torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU
    real = cuda in torch.profiler.supported_activities()
    profiler, record = torch.profiler.profile(activities=[cuda if real else cpu]), Run.record

    def noted(self, step, **tensors):
        record(self, step, **tensors)
        if step == 12:
            profiler.start()
        if step == 17:
            profiler.stop()

    Run.record = noted
    data = random_data(folder / "data", args.vocab_size or SHAPES["gpt2"][0])
    sys.argv = ["train_reference.py", *(TINY if args.quick else shape_flags("gpt2")), f"--data_dir={data}",
                f"--out_dir={folder}/run", "--device=cuda", "--compile", "--max_steps=18", "--eval_windows=1",
                "--log_interval=99"]
    runpy.run_path(str(ROOT / "train_reference.py"), run_name="__main__")
    seconds = {}
    for event in profiler.key_averages():
        time_of = event.self_device_time_total if real else event.self_cpu_time_total
        seconds[event.key] = seconds.get(event.key, 0) + time_of / 1e6 / 5
    total = sum(seconds.values())
    ranking = sorted(seconds.items(), key=lambda item: -item[1])
    say("profile", milliseconds_per_step=total * 1e3,
        kernels=[[name[:80], round(value / total, 3)] for name, value in ranking[:12]])
    name, value = next(item for item in ranking if not PRODUCTS.search(item[0]))
    say("profile", largest_that_is_no_product=name[:200], share=value / total)


PARTS = {"tests": (tests, 300), "nanogpt": (nanogpt, 240), "configs": (configs, 240), "demo": (demo, 120),
         "profile": (profile, 90)}  # seconds at most


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=600, help="for all parts together (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few steps")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--demo", type=Path, default=ROOT, help="with data/demo and checkpoints/proxy (default: here)")
    parser.add_argument("--here", help=argparse.SUPPRESS)  # the part that this process runs itself
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"unknown part {min(unknown)}; choose from {', '.join(PARTS)}")
    args.vocab_size = 256 if args.quick else None
    if args.here:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[args.here][0](args, Path(folder))
        return
    end = time.monotonic() + args.seconds
    say("machine", card=torch.cuda.get_device_name(), torch=torch.__version__, cores=os.cpu_count())
    for part in args.parts or PARTS:
        limit = min(PARTS[part][1], end - time.monotonic())
        if limit <= 0:
            say(part, error="no time was left")
            continue
        child = subprocess.Popen([sys.executable, "-m", "experiments.gpu", *sys.argv[1:], f"--here={part}"], cwd=ROOT,
                                 start_new_session=True)
        try:
            if child.wait(limit):
                say(part, error=f"ended with status {child.returncode}")
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            say(part, error=f"ended after its limit of {limit:.0f} seconds")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--noting"]:
        note_peak(*sys.argv[2:])
    else:
        main()
