"""Do the tests notice?  Breaks one promise at a time in a copy of the project, and runs the tests there.

    python tests/mutate.py                all of them; exit status 1 where one survives
    python tests/mutate.py smoothing      those whose name holds the word

Each mutation is a few edits of one file, whose old text must be there exactly once, and the tests that should fail.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "checkpoints", "data", "shared", "wandb", "*.egg-info")
EXACTNESS, RESUME, SHARDING = "tests/test_exactness.py", "tests/test_resume.py", "tests/test_sharding.py"
SAMPLER, DATASET, BAD_INPUT = "tests/test_sampler.py", "tests/test_dataset.py", "tests/test_bad_input.py"
PRETENDED = "tests/test_pretended.py"


def group(file, tests, *mutations):
    """[(name, file, tests, [(old, new)])] of mutations of one file: a name, old, new, old, new.."""
    return [(name, file, tests, list(zip(texts[::2], texts[1::2]))) for name, *texts in mutations]


UPDATE = "alpha = update_alpha(alpha, excess, args.step_size, args.smoothing)"
EXCESS = "clipped_excess = (proxy_loss.detach() - reference_loss).clamp(min=0)"
LAMBDA = "excess = torch.where(count > 0, excess_sum / count.clamp(min=1), excess)"
SUMS = "sums += domain_sums(domain, K, machine.sum_dtype, proxy_loss.detach(), clipped_excess)"
RATE = "lr = set_learning_rate(optimizer, step, args)"
BACKWARD = "(token_weight[domain] * token_loss.sum(dim=1)).sum().backward()"

MUTATIONS = [
    *group("train_doremi.py", EXACTNESS,
    ("alpha is never updated", UPDATE, UPDATE.removeprefix("alpha = ")),
    ("the loss is weighted with the last step's alpha", "token_weight = (alpha /",
     "token_weight = ((alpha_history[step - 2] if step > 1 else torch.full_like(alpha, 1 / K)) /"),
    ("the loss is weighted with alpha per token, not per domain", "token_weight = (alpha / count.clamp(min=1))",
     "token_weight = (alpha * K / count.sum())"),
    ("not clipped", EXCESS, EXCESS.removesuffix(".clamp(min=0)")),
    ("the gradient is of the clipped excess", BACKWARD,
     BACKWARD.replace("token_loss", "(token_loss - reference_forward(tokens)).clamp(min=0)")),
    ("smoothed by c instead of c / K", "+ smoothing / len(alpha)", "+ smoothing"),
    ("alpha_0 is in the history, alpha_T is not", UPDATE, "before = alpha; " + UPDATE,
     "alpha_history[step - 1] = alpha", "alpha_history[step - 1] = before"),
    ("lambda is a mean of the micro-batches' means", SUMS,
     "part = domain_sums(domain, K, machine.sum_dtype, proxy_loss.detach(), clipped_excess); "
     "part[1] = part[1] / part[2].clamp(min=1) * part[2].max(); sums += part"),
    ("an absent domain's lambda is 0", LAMBDA, LAMBDA.replace(", excess)", ", 0.0)")),
    ("batches are drawn with alpha", UPDATE, UPDATE + "; sampler.weights = alpha.cpu().numpy()")),
    *group("train_doremi.py", RESUME,
    ("alpha is not restored", "alpha.copy_(alpha_history[run.start - 1])", "pass"),
    ("excess is not restored", 'excess.copy_(run.checkpoint["excess"])', "pass"),
    ("the weight history is not restored", 'alpha_history[: run.start] = run.checkpoint["alpha_history"]',
     'alpha_history[run.start - 1] = run.checkpoint["alpha_history"][-1]'),
    ("the sampler is not restored", 'sampler.load_state_dict(run.checkpoint["sampler"])', "pass"),
    ("the parameters are not restored", "ranks.load(model, optimizer, run.checkpoint, machine)",
     "ranks.load(Transformer(model_config, machine.dtype), optimizer, run.checkpoint, machine)"),
    ("the schedule is off by one on resumption", RATE, RATE.replace("step,", "step - bool(run.start),")),
    ("a signal writes no checkpoint", "if run.is_due(step, args.save_interval) or stop:",
     "if run.is_due(step, args.save_interval):")),
    *group("train_reference.py", SHARDING,
    ("the loss of a micro-batch is its mean", "(token_loss.sum() / tokens_per_step).backward()",
     "token_loss.mean().backward()")),
    *group("train_reference.py", EXACTNESS,
    ("norms' weights decay", '"weight_decay": 0.0}', '"weight_decay": args.weight_decay}')),
    *group("sampler.py", f"{SAMPLER} {EXACTNESS}",
    ("all ranks take the same sequences", "domain[self.rank :: self.world_size], window[self.rank :: self.world_size]",
     "domain[:: self.world_size], window[:: self.world_size]")),
    *group("sampler.py", SAMPLER,
    ("every epoch has the same order", "keys = round_keys(seed, domain, epoch)", "keys = round_keys(seed, domain, 0)"),
    ("counts are independent draws", "counts = systematic_counts(self.weights, self.batch_size, generator.random())",
     "counts = generator.multinomial(self.batch_size, self.weights)")),
    *group("sampler.py", DATASET,
    ("ranks evaluate the same windows", "index[start + rank : start + batch_size * world_size : world_size]",
     "index[start : start + batch_size * world_size : world_size]")),
    *group("sampler.py", f"{RESUME} {SAMPLER}",
    ("the state saved is that of the batch ahead",
     'return {"step": self.state["step"], "drawn": list(self.state["drawn"])}',
     "return dict(self.ahead.result().state if self.ahead else self.state)")),
    *group("common/ranks.py", SHARDING,
    ("ranks may differ", "self.gather_objects(values), remedy)", "[values], remedy)"),
    ("gradients are averaged over ranks", "module.set_gradient_divide_factor(1.0)", "pass"),
    ("gradients do not cross between nodes", "model.set_requires_all_reduce(last)",
     "model.set_requires_all_reduce(False)"),
    ("the rotary table is rounded", "cast_forward_inputs=False", "cast_forward_inputs=True"),
    ("the root is gathered in the compute dtype", "None if module is model or machine.dtype == exact",
     "None if machine.dtype == exact"),
    ("groups of nodes wait ten minutes", "across, _ = dist.new_subgroups_by_enumeration(grid.T.tolist(), "
     "timeout=machine.timeout)", "across, _ = dist.new_subgroups_by_enumeration(grid.T.tolist())")),
    *group("common/ranks.py", f"{EXACTNESS} {SHARDING}",
    ("the gradient is not clipped", "grad_clip or math.inf", "math.inf"),
    ("gradients are summed in the compute dtype",
     "exact = torch.float64 if machine.dtype == torch.float64 else torch.float32", "exact = torch.float32")),
    *group("common/run.py", PRETENDED,
    ("card: every step reads the gradient's norm", "self.last = tensors",
     "self.last = tensors; self.check_finite(step)")),
    *group("common/ranks.py", PRETENDED,
    ("card: a checkpoint's tensors stay there", "cpu_offload=True", "cpu_offload=False"),
    ("card: the domain is not there", "batch.domain.to(self.device, non_blocking=asynchronous)", "batch.domain"),
    ("card: a batch is waited for", "batch.tokens.to(self.device, non_blocking=asynchronous)",
     "batch.tokens.to(self.device)")),
    *group("train_reference.py", PRETENDED,
    ("card: numpy reads its memory", "machine.all_reduce(sums).cpu()", "machine.all_reduce(sums)"),
    ("card: NCCL gets a tensor of the CPU", "machine.all_reduce(sums).cpu()", "machine.all_reduce(sums.cpu())")),
    *group("train_doremi.py", PRETENDED,
    ("card: the sums are not there", "sums = torch.zeros(3, K, dtype=machine.sum_dtype, device=machine.device)",
     "sums = torch.zeros(3, K, dtype=machine.sum_dtype)")),
    *group("model.py", PRETENDED,
    ("card: the rotary table is not there", "self.make_rotary().to(device)", "self.make_rotary()")),
    *group("common/run.py", RESUME,
    ("metrics behind the checkpoint are kept", 'if line["step"] <= step and "ended" not in line]',
     'if "ended" not in line]'),
    ("a stopped run exits 0", "sys.exit(128 + (self.signal or signal.SIGTERM))", "pass")),
    *group("common/run.py", BAD_INPUT,
    ("what is not finite is saved", "if not tensor.isfinite().all()]", "if False]"),
    ("a run is resumed under other flags", '[checkpoint["identity"], self.identity],',
     "[self.identity, self.identity],")),
]


def judge(mutant):
    """Run the mutant's tests in a copy of the project.  Return the first that fails, or None."""
    _, file, tests, _ = mutant
    with tempfile.TemporaryDirectory(prefix="mutant") as directory:
        folder = shutil.copytree(ROOT, Path(directory) / "copy", ignore=LEFT_OUT)
        if file:
            (folder / file).write_text(edited(mutant))
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": directory}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode > 1 or (done.returncode and not failed):
        raise RuntimeError(f"pytest broke, rather than a test: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed[0] if failed else None


def edited(mutant):
    """The mutant's file.  Every old text must be there exactly once."""
    name, file, _, edits = mutant
    text = (ROOT / file).read_text()
    for old, new in edits:
        if text.count(old) != 1:
            sys.exit(f"{name}: {file} has {text.count(old)} times: {old}")
        text = text.replace(old, new)
    compile(text, file, "exec")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="", help="only mutations whose name holds it")
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTATIONS if args.word in mutant[0]]
    list(map(edited, chosen))  # every text is there
    tests = " ".join({test: None for mutant in chosen for test in mutant[2].split()})
    if failed := judge(("unbroken", "", tests, [])):  # what kills a mutant is its mutation
        sys.exit(f"fails without any mutation: {failed}")
    killed = 0
    with ThreadPoolExecutor(2) as pool:
        for mutant, killer in zip(chosen, pool.map(judge, chosen)):
            print(f"{mutant[0]:60} {killer or 'SURVIVED'}"[:240], flush=True)
            killed += bool(killer)
    print(f"{killed} of {len(chosen)} mutations killed")
    sys.exit(killed < len(chosen))


if __name__ == "__main__":
    main()
