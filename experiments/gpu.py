"""Ten minutes on one GPU: is DoReMi right there, and how fast?  Prints a line of JSON per result, as it comes.

    python -m experiments.gpu --nanogpt=DIR --twelve=data/twelve | tee experiments/results/gpu-CARD.jsonl
    python -m experiments.gpu --device=cpu --quick          tiny, without a card: does the script itself work?

part      what it says                                                                                       seconds
tests     tests/test_cuda.py: the oracle's alpha, checkpoints, kill and resume, nothing that waits               150
demo      minutes of the demo's stages 0 to 3, its answer, and how far it is from the answer on the CPU          150
gpt2      GPT-2's shape: tokens per second and share of peak, eager, compiled, and nanoGPT in the same run       120
profile   kernels of a compiled step by their time, and the largest that is no matrix product                     60
configs   official_120m and paper_280m: steps of reference and proxy, their ratio, share of the loss             120
twelve    a reference and a proxy of 30M parameters on the data set --twelve, for the rest of the ten minutes

A part that passes its limit is ended, and the next one starts. Parts can be named: python -m experiments.gpu gpt2.
DIR: a checkout of github.com/karpathy/nanoGPT; without the flag it is left out.
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
from model import ModelConfig, TokenLoss, chunk_gradients, chunk_loss

TOTAL = 600  # seconds
PRODUCTS = re.compile("gemm|nvjet|cutlass|xmma|flash|fmha|attention|::mm|::addmm|mkldnn|dot", re.I)
TINY = ["--block_size=32", "--n_layer=1", "--n_head=2", "--n_kv_head=2", "--n_embd=32", "--n_ffn=64", "--batch_size=4"]


def say(part, **values):
    print(json.dumps({"part": part, **values}), flush=True)


def tests(args, folder):
    """The outcome of every test of tests/test_cuda.py."""
    chosen = ["-k", "oracles and 24 and float64 or needs_no_card"] if args.quick else []
    command = [sys.executable, "-m", "pytest", "tests/test_cuda.py", f"--device={args.device}", "-rA", "-q", *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED) (\S.*)", done.stdout, re.M)
    for outcome, name in found:
        say("tests", outcome=outcome.lower(), test=name.removeprefix("tests/test_cuda.py::")[:200])
    for deviations in re.findall(r"^float\d\d, .*|.*, to the bit: .*", done.stdout, re.M):
        say("tests", deviations=deviations)
    say("tests", all_passed=done.returncode == 0 and all(outcome == "PASSED" for outcome, _ in found))


def demo(args, folder):
    """Stages 0 to 3 on the device; then stages 1 to 3 again on the CPU."""
    start = time.perf_counter()
    python("demo/corpus.py", folder / "text", cwd=ROOT)
    python("prepare.py", folder / "text", f"--out_dir={folder}/data", *["--tokenizer=bytes"] * args.quick, cwd=ROOT)
    say("demo", stage=0, minutes=(time.perf_counter() - start) / 60)
    answers = []
    for device in (args.device, "cpu"):
        start, runs, short = time.perf_counter(), folder / f"runs{len(answers)}", ["--max_steps=20"] * args.quick
        python("train_reference.py", f"--data_dir={folder}/data", f"--out_dir={runs}/reference", f"--device={device}",
               *short, cwd=ROOT)
        python("train_doremi.py", f"--reference={runs}/reference", f"--out_dir={runs}/proxy", f"--device={device}",
               cwd=ROOT)
        python("average_weights.py", runs / "proxy", cwd=ROOT)
        answers.append(json.loads((runs / "proxy/weights.json").read_text())["domain_weights"])
        say("demo", device=device, minutes=(time.perf_counter() - start) / 60, answer=answers[-1])
    here, cpu = (np.array(list(answer.values())) for answer in answers)
    say("demo", total_variation=float(total_variation(here, cpu)))


def gpt2(args, folder):
    data, steps = random_data(folder / "data", args.vocab_size or SHAPES["gpt2"][0]), 15 if args.quick else 60
    ours = {}
    for compiled in (False, True):
        flags = [*(TINY if args.quick else shape_flags("gpt2")), f"--data_dir={data}", f"--device={args.device}",
                 "--compile" if compiled else "--no-compile"]
        speed, mfu, peak = measured("train_reference.py", folder / f"run{compiled}", flags, steps)
        ours[compiled] = speed
        say("gpt2", compiled=compiled, tokens_per_second=speed, mfu=mfu, peak_gb=peak)
    for compiled in (False, True) if args.nanogpt else ():
        speed = run_nanogpt(args.nanogpt, folder, data, "gpt2", steps, args.device, compiled)
        say("gpt2", nanogpt=True, compiled=compiled, tokens_per_second=speed, ours_to_theirs=ours[compiled] / speed)


def measured(script, out_dir, flags, steps):
    """Tokens per second, share of peak, and GB that the card's allocator held at most (on a CPU: null)."""
    peak = out_dir.with_suffix(".peak")
    speed, mfu = run(ROOT, ["-m", "experiments.gpu", "--noting", peak, script], out_dir, flags, steps)
    return speed, mfu, float(peak.read_text()) / 1e9 or None


def note_peak(path, script, *flags):
    """Run a script of this checkout in this process, then write the peak of its memory on the card, in bytes."""
    sys.argv = [script, *flags]
    runpy.run_path(str(ROOT / script), run_name="__main__")
    Path(path).write_text(str(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0))


def profile(args, folder):
    """Five steps of train_reference.py under torch.profiler, once its code is compiled."""
    from common.run import Run

    seconds, steps = {}, [0]
    on_card = args.device.startswith("cuda")
    activity = torch.profiler.ProfilerActivity.CUDA if on_card else torch.profiler.ProfilerActivity.CPU
    profiler, record = torch.profiler.profile(activities=[activity]), Run.record

    def noted(self, step, **tensors):
        record(self, step, **tensors)
        steps[0] = step
        if step == 12:
            profiler.start()
        if step == 17:
            profiler.stop()

    Run.record = noted
    data = random_data(folder / "data", args.vocab_size or SHAPES["gpt2"][0])
    sys.argv = ["train_reference.py", *(TINY if args.quick else shape_flags("gpt2")), f"--data_dir={data}",
                f"--out_dir={folder}/run", f"--device={args.device}", "--compile", "--max_steps=18", "--eval_windows=1",
                "--log_interval=99"]
    runpy.run_path(str(ROOT / "train_reference.py"), run_name="__main__")
    for event in profiler.key_averages():
        time_of = event.self_device_time_total if on_card else event.self_cpu_time_total
        seconds[event.key] = seconds.get(event.key, 0) + time_of / 1e6 / 5
    total = sum(seconds.values())
    ranking = sorted(seconds.items(), key=lambda item: -item[1])
    say("profile", milliseconds_per_step=total * 1e3,
        kernels=[[name[:80], round(value / total, 3)] for name, value in ranking[:12]])
    name, value = next(item for item in ranking if not PRODUCTS.search(item[0]))
    say("profile", largest_that_is_no_product=name[:200], share=value / total)


def configs(args, folder):
    """A reference's and a proxy's step at the micro-batch of the configuration."""
    for name in ("official_120m", "paper_280m"):
        text = (ROOT / f"configs/{name}.txt").read_text()
        vocab_size = args.vocab_size or int(re.search(r"parameters with ([\d,]+) tokens", text)[1].replace(",", ""))
        b = 4 if args.quick else int(re.search(r"--micro_batch_size=(\d+)", text)[1])
        data, steps = random_data(folder / name / "data", vocab_size), 15
        flags = [f"@configs/{name}.txt", f"--batch_size={b}", f"--data_dir={data}", f"--device={args.device}",
                 *TINY * args.quick]
        reference, mfu, peak = measured("train_reference.py", folder / name / "reference", flags, steps)
        proxy, _, proxy_peak = measured("train_doremi.py", folder / name / "proxy",
                                        [f"--reference={folder}/{name}/reference", f"--device={args.device}"], steps)
        config = json.loads((folder / name / "reference/config.json").read_text())
        tokens = b * config["model"]["block_size"]
        loss = seconds_of_loss(config, b, args.device)
        say("configs", config=name, micro_batch_size=b, tokens_per_second=reference, mfu=mfu, peak_gb=peak,
            proxy_tokens_per_second=proxy, proxy_peak_gb=proxy_peak, proxy_to_reference_time=reference / proxy,
            share_of_loss=loss * reference / tokens)
        shutil.rmtree(folder / name)


def seconds_of_loss(config, b, device, repeats=5):
    """Forward and backward pass of TokenLoss alone, at the shapes of a run, compiled as there."""
    shape, dtype = ModelConfig(**config["model"]), getattr(torch, config["flags"]["dtype"])
    weight = torch.randn(shape.vocab_size, shape.n_embd, device=device).mul_(0.02).requires_grad_()
    x = torch.randn(b, shape.block_size, shape.n_embd, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(shape.vocab_size, (b, shape.block_size), device=device)
    loss, gradients = (torch.compile(f, dynamic=False) for f in (chunk_loss, chunk_gradients))
    for i in range(repeats + 3):
        if i == 3:
            synchronize(device)
            start = time.perf_counter()
        TokenLoss.apply(x, weight, targets, loss, gradients).sum().backward()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def synchronize(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def twelve(args, folder):
    """As many steps as fit into the seconds left: the reference takes 3 parts of them, the proxy 4."""
    if not args.twelve:
        return
    shape = TINY if args.quick else ["--block_size=256", "--n_layer=8", "--n_head=8", "--n_kv_head=8", "--n_embd=512",
                                     "--n_ffn=1536", "--batch_size=64"]
    flags = [*shape, f"--data_dir={args.twelve}", f"--device={args.device}", "--learning_rate=1e-3"]
    speed, _ = run(ROOT, ["train_reference.py"], folder / "try", flags, 30)
    tokens = json.loads((folder / "try/config.json").read_text())["flags"]
    steps = int(speed / (tokens["batch_size"] * tokens["block_size"]) * (args.seconds - 60) * 3 / 7 * 0.8)
    if steps < 100:
        return say("twelve", error=f"{args.seconds:.0f} seconds are left, too few for 100 steps")
    python("train_reference.py", *flags, f"--out_dir={folder}/reference", f"--max_steps={steps}", cwd=ROOT)
    python("train_doremi.py", f"--reference={folder}/reference", f"--out_dir={folder}/proxy", f"--device={args.device}",
           cwd=ROOT)
    python("average_weights.py", folder / "proxy", cwd=ROOT)
    for name in ("reference", "proxy"):
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        say("twelve", run=name, steps=steps, last_evaluation=[line for line in lines if "val_loss" in line][-1])
    say("twelve", answer=json.loads((folder / "proxy/weights.json").read_text()),
        sampling_weights=json.loads((folder / "reference/config.json").read_text())["sampling_weights"])


PARTS = {"tests": (tests, 150), "demo": (demo, 150), "gpt2": (gpt2, 120), "profile": (profile, 60),
         "configs": (configs, 120), "twelve": (twelve, TOTAL)}  # seconds at most


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few steps")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--twelve", type=Path, help="a data set of prepare.py")
    parser.add_argument("--here", help=argparse.SUPPRESS)  # the part that this process runs itself
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)  # its limit
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"unknown part {min(unknown)}; choose from {', '.join(PARTS)}")
    args.vocab_size = 256 if args.quick else None
    if args.here:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[args.here][0](args, Path(folder))
        return
    start = time.monotonic()
    card = torch.cuda.get_device_name() if args.device.startswith("cuda") else "none"
    say("machine", card=card, torch=torch.__version__, python=sys.version.split()[0], cores=os.cpu_count())
    for part in args.parts or PARTS:
        limit = min(PARTS[part][1], TOTAL - (time.monotonic() - start))
        command = [sys.executable, "-m", "experiments.gpu", *sys.argv[1:], f"--here={part}", f"--seconds={limit}"]
        child = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
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
