"""Do the tests notice?  Breaks one promise at a time in a copy of the project, and runs the tests there.

    python tests/mutate.py                all of them; exit status 1 where one survives
    python tests/mutate.py smoothing      those whose name holds the word

Each mutation is a few edits of one file, whose old text must be there exactly once, and the tests that should fail
first; where those pass, all tests are run. `pytest` does not collect this file.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "checkpoints", "data", "shared", "wandb", "*.egg-info")
EXACTNESS, RESUME, SAMPLER = "tests/test_exactness.py", "tests/test_resume.py", "tests/test_sampler.py"
PROXY = "train_doremi.py"
CACHE, CACHE_TESTS = "loss_cache.py", "tests/test_loss_cache.py"


class Mutation(NamedTuple):
    name: str
    file: str
    tests: str
    edits: tuple  # (old, new) pairs


def mutation(name, file, tests, *texts):
    """texts: old, new, old, new.."""
    return Mutation(name, file, tests, tuple(zip(texts[::2], texts[1::2])))


UPDATE = "alpha = update_alpha(alpha, excess, step_size, args.smoothing)"
EXCESS = "clipped_excess = (token_loss.detach() - reference_loss).clamp(min=0)"
LAMBDA = "excess = torch.where(count > 0, excess_sum / count.clamp(min=1), excess)"
SUMS = "excess_totals += domain_sums(clipped_excess, domain, k, machine.sum_dtype)"
RATE = "lr = runtime.set_learning_rate(optimizer, step, args)"
BACKWARD = "(token_weight[domain] * token_loss.sum(dim=1)).sum().backward()"

MUTATIONS = [
    # Algorithm 1
    mutation("alpha is never updated", PROXY, EXACTNESS, UPDATE, UPDATE.removeprefix("alpha = ")),
    mutation("alpha moves a step early", PROXY, "tests/test_profit.py", "step > args.update_after",
             "step >= args.update_after"),
    mutation("alpha starts again from uniform at every step", PROXY, EXACTNESS, UPDATE,
             UPDATE.replace("(alpha,", "(torch.full_like(alpha, 1 / k),")),
    mutation("the loss is weighted with the last step's alpha", PROXY, EXACTNESS, "token_weight = (alpha /",
             "token_weight = ((alpha_history[step - 2] if step > 1 else torch.full_like(alpha, 1 / k)) /"),
    mutation("the loss is weighted with alpha per token, not per domain", PROXY, EXACTNESS,
             "token_weight = (alpha / count.clamp(min=1))", "token_weight = (alpha * k / count.sum())"),
    mutation("clipped at the domain", PROXY, EXACTNESS, EXCESS, EXCESS.removesuffix(".clamp(min=0)"),
             LAMBDA, LAMBDA.replace("excess_sum /", "excess_sum.clamp(min=0) /")),
    mutation("clipped at the sequence", PROXY, EXACTNESS, EXCESS,
             "clipped_excess = (token_loss.detach() - reference_loss).mean(1, keepdim=True).clamp(min=0)"
             ".expand_as(token_loss)"),
    mutation("not clipped", PROXY, EXACTNESS, EXCESS, EXCESS.removesuffix(".clamp(min=0)")),
    mutation("the gradient is of the clipped excess", PROXY, EXACTNESS, BACKWARD,
             BACKWARD.replace("token_loss", "(token_loss - reference_forward(tokens)).clamp(min=0)")),
    mutation("divided by the tokens of positive excess", PROXY, EXACTNESS, SUMS,
             SUMS + "\n            positive = domain_sums((clipped_excess > 0).double(), domain, k, machine.sum_dtype)"
             "\n            totals[1] += positive[0] - positive[1]",
             LAMBDA, LAMBDA.replace("count.clamp", "totals[1].clamp")),
    mutation("no smoothing", PROXY, EXACTNESS, "return (1 - smoothing) * log_alpha.exp() + smoothing / len(alpha)",
             "return log_alpha.exp()"),
    mutation("smoothed by c instead of c / K", PROXY, EXACTNESS, "+ smoothing / len(alpha)", "+ smoothing"),
    mutation("the update overflows", PROXY, EXACTNESS,
             "log_alpha = torch.log_softmax(alpha.log() + step_size * excess, dim=0)",
             "log_alpha = (alpha * (step_size * excess).exp() / (alpha * (step_size * excess).exp()).sum()).log()"),
    mutation("alpha_0 is in the history, alpha_T is not", PROXY, EXACTNESS,
             UPDATE + "\n        alpha_history[step - 1] = alpha",
             "alpha_history[step - 1] = alpha\n        " + UPDATE),
    mutation("every rank has its own lambda", PROXY, EXACTNESS,
             "totals, excess_totals = machine.all_reduce(torch.stack([totals, excess_totals]))",
             "own = excess_totals[0] / excess_totals[1].clamp(min=1)\n        "
             "totals, excess_totals = machine.all_reduce(torch.stack([totals, excess_totals]))",
             LAMBDA, LAMBDA.replace("excess_sum / count.clamp(min=1)", "own")),
    mutation("lambda is a mean of the micro-batches' means", PROXY, EXACTNESS, SUMS,
             "sums = domain_sums(clipped_excess, domain, k, machine.sum_dtype)\n            "
             "excess_totals += torch.stack([sums[0] / sums[1].clamp(min=1), (sums[1] > 0).to(sums)])",
             "excess_sum, count = excess_totals", "(excess_sum, means), count = excess_totals, totals[1]",
             LAMBDA, LAMBDA.replace("count.clamp", "means.clamp")),
    mutation("an absent domain's lambda is 0", PROXY, EXACTNESS, LAMBDA, LAMBDA.replace(", excess)", ", 0.0)")),
    mutation("an absent domain's lambda is log V", PROXY, EXACTNESS, LAMBDA,
             LAMBDA.replace(", excess)", ", float(torch.tensor(float(dataset.vocab_size)).log()))")),
    mutation("an absent domain's lambda is divided by nothing", PROXY, EXACTNESS, LAMBDA,
             "excess = excess_sum / count"),
    mutation("the reference is not loaded", PROXY, EXACTNESS, 'reference.load_state_dict(checkpoint["model"])', "pass"),
    mutation("the reference is trained along", PROXY, EXACTNESS, "        optimizer.zero_grad()\n",
             "        optimizer.zero_grad()\n        for r, p in zip(reference.parameters(), model.parameters()):\n"
             "            r.lerp_(p.detach(), 0.01)\n"),
    mutation("batches are drawn with alpha", PROXY, EXACTNESS, "        alpha_history[step - 1] = alpha\n",
             "        alpha_history[step - 1] = alpha\n        sampler.weights = alpha.cpu().numpy()\n"),
    mutation("the schedule is a step behind", PROXY, EXACTNESS, RATE, RATE.replace("step,", "step - 1,")),

    # Ranks and micro-batches
    mutation("gradients are not summed over ranks", "runtime.py", EXACTNESS, "            dist.all_reduce(flat)\n", ""),
    mutation("gradients are averaged over ranks", "runtime.py", EXACTNESS, "            dist.all_reduce(flat)\n",
             "            dist.all_reduce(flat)\n            flat /= self.world_size\n"),
    mutation("the loss of a micro-batch is its mean", "train_reference.py", "tests/test_runtime.py " + RESUME,
             "(token_loss.sum() / tokens_per_step).backward()", "token_loss.mean().backward()"),
    mutation("all ranks take the same sequences", "sampler.py", f"{SAMPLER} {EXACTNESS}",
             "domain[self.rank :: self.world_size], window[self.rank :: self.world_size]",
             "domain[:: self.world_size], window[:: self.world_size]"),
    mutation("freed memory is handed back", "runtime.py", "tests/test_runtime.py", "libc.mallopt(-1, 2**31 - 1)",
             "pass"),
    mutation("the gradient is not clipped", "runtime.py", EXACTNESS, "grad_clip or math.inf", "math.inf"),
    mutation("norms' weights decay", "runtime.py", "tests/test_model.py", "if p.dim() >= 2]", "if p.dim() >= 1]",
             "if p.dim() < 2]", "if p.dim() < 1]"),
    mutation("ranks evaluate the same windows", "sampler.py", SAMPLER, "for j in range(n)][rank::world_size]",
             "for j in range(n)][::world_size]"),

    # Resumption
    mutation("alpha is not restored", PROXY, RESUME, "alpha, excess = alpha_history[step - 1].clone(), run",
             "alpha, excess = alpha, run"),
    mutation("excess is not restored", PROXY, RESUME, 'clone(), run.checkpoint["excess"].to(alpha)', "clone(), excess"),
    mutation("the weight history is not restored", PROXY, RESUME,
             'alpha_history[:step] = run.checkpoint["alpha_history"]', 'alpha_history[step - 1] = run.checkpoint'
             '["alpha_history"][-1]'),
    mutation("the history of the last checkpoint is not written again", PROXY, RESUME,
             'save_weight_history(run.out_dir, run.checkpoint["alpha_history"])', "pass"),
    mutation("the proxy's optimizer is not restored", PROXY, RESUME,
             'optimizer.load_state_dict(run.checkpoint["optimizer"])', "pass"),
    mutation("the reference's optimizer is not restored", "train_reference.py", RESUME,
             'optimizer.load_state_dict(run.checkpoint["optimizer"])', "pass"),
    mutation("the proxy's sampler is not restored", PROXY, RESUME, 'sampler.load_state_dict(run.checkpoint["sampler"])',
             "pass"),
    mutation("the reference's sampler is not restored", "train_reference.py", RESUME,
             'sampler.load_state_dict(run.checkpoint["sampler"])', "pass"),
    mutation("the proxy's parameters are not restored", PROXY, RESUME, 'model.load_state_dict(run.checkpoint["model"])',
             "pass"),
    mutation("a window is skipped on resumption", "sampler.py", f"{RESUME} {SAMPLER}",
             'self.state, self.ahead = {"step": state["step"], "drawn": list(state["drawn"])}, None',
             'self.state, self.ahead = {"step": state["step"], "drawn": [d + 1 for d in state["drawn"]]}, None'),
    mutation("the state saved is that of the batch ahead", "sampler.py", f"{RESUME} {SAMPLER}",
             'return {"step": self.state["step"], "drawn": list(self.state["drawn"])}',
             "return dict(self.ahead.result().state if self.ahead else self.state)"),
    mutation("the proxy's schedule is off by one on resumption", PROXY, RESUME, RATE,
             RATE.replace("step,", "step - bool(run.checkpoint),")),
    mutation("the reference's schedule is off by one on resumption", "train_reference.py", RESUME, RATE,
             RATE.replace("step,", "step - bool(run.checkpoint),")),
    mutation("metrics behind the checkpoint are kept", "checkpoint.py", RESUME,
             ' and json.loads(line)["step"] <= step:', ' and json.loads(line):'),
    mutation("metrics of the checkpoint's step are dropped", "checkpoint.py", RESUME, '["step"] <= step:',
             '["step"] < step:'),
    mutation("files are written in place", "checkpoint.py", RESUME, 'temporary = path.with_name(f".{path.name}.tmp")',
             "temporary = path"),
    mutation("a checkpoint shares its tensors with the training", "checkpoint.py", "tests/test_runtime.py",
             "return buffer.copy_(value, non_blocking=value.is_cuda)", "return value"),
    mutation("a checkpoint shares its lists with the training", "checkpoint.py", "tests/test_runtime.py",
             "return type(value)([self.snapshot(item, *place, i) for i, item in enumerate(value)])", "return value"),
    mutation("a save does not wait for the last", "checkpoint.py", "tests/test_runtime.py",
             "self.wait()  # the last save", "pass  # the last save"),
    mutation("the history comes before the checkpoint", "checkpoint.py", "tests/test_runtime.py",
             "            first()\n", "            then(saved)\n            first()\n"),
    mutation("a run ends before its checkpoint", "runtime.py", "tests/test_bad_input.py",
             "                self.writer.wait()\n", "                pass\n"),
    mutation("an error of the writer is lost", "checkpoint.py", "tests/test_runtime.py tests/test_bad_input.py",
             "            writing.result()\n", "            writing.exception()\n"),
    mutation("an error of the writer is lost behind another", "checkpoint.py", "tests/test_bad_input.py",
             "        atexit.register(self.report)\n", ""),
    mutation("SIGTERM writes no checkpoint", PROXY, RESUME, "if run.is_due(step, args.save_interval) or stop:",
             "if run.is_due(step, args.save_interval):"),
    mutation("a run is resumed under other flags", "checkpoint.py", "tests/test_bad_input.py", "if before != value:",
             "if False:"),

    # The sampler
    mutation("the permutation is no bijection", "sampler.py", SAMPLER, "outside = x >= np.uint64(size)",
             "x %= np.uint64(size)\n        outside = np.zeros(len(x), dtype=bool)"),
    mutation("counts are independent draws", "sampler.py", SAMPLER,
             "return np.diff(edges, prepend=0.0).astype(np.int64)",
             "return np.random.default_rng(int(u * 2**53)).multinomial(batch_size, np.array(weights) / sum(weights))"),
    mutation("every epoch has the same order", "sampler.py", SAMPLER, 'f"{seed}/{epoch}/{domain}"',
             'f"{seed}/{domain}"'),
    mutation("every seed has the same order", "sampler.py", SAMPLER, 'f"{seed}/{epoch}/{domain}"',
             'f"{epoch}/{domain}"'),
    mutation("every step has the same counts and slots", "sampler.py", SAMPLER,
             'np.random.default_rng([self.seed, state["step"]])', "np.random.default_rng([self.seed])"),
    mutation("slots are not shuffled", "sampler.py", SAMPLER, "generator.permutation(self.batch_size)",
             "np.arange(self.batch_size)"),
    mutation("a block of the order is kept too long", "sampler.py", SAMPLER,
             "if self.permuted.get(i, (None,))[0] != block:", "if i not in self.permuted:"),
    mutation("windows overlap", "sampler.py", SAMPLER, "strides = (block_size * dtype.itemsize, dtype.itemsize)",
             "strides = ((block_size - 1) * dtype.itemsize, dtype.itemsize)"),
    mutation("weights are matched by position", "sampler.py", SAMPLER,
             "return np.array([float(content[name]) for name in domains])",
             "return np.array([float(weight) for weight in content.values()])"),

    # The reference's losses, stored
    mutation("a torn window counts as stored", CACHE, CACHE_TESTS, "return losses, rows.view(np.int16).all(axis=1)",
             "return losses, rows.view(np.int16).any(axis=1)"),
    mutation("a loss just computed is used unrounded", CACHE, CACHE_TESTS,
             "computed = forward(tokens).clamp(min=SMALLEST).half()",
             "exact = forward(tokens).clamp(min=SMALLEST)\n            computed = exact.half()",
             "return losses.float()", "return losses.float() if stored.all() else exact"),
    mutation("a loss of zero is stored as not stored", CACHE, CACHE_TESTS, ".clamp(min=SMALLEST)", ""),
    mutation("another reference's losses are read", PROXY, CACHE_TESTS, 'of = {"fingerprint": fingerprint, ', "of = {"),
    mutation("a renamed file of losses is read", CACHE, CACHE_TESTS, "if found != header:", "if False:"),
    mutation("losses are stored under a neighbour's window", CACHE, CACHE_TESTS, "HEADER + int(j) * row.nbytes",
             "HEADER + (int(j) ^ 1) * row.nbytes"),

    # The rest of the pipeline
    mutation("validation documents are in train, too", "prepare.py", "tests/test_prepare.py",
             'bins[domain]["val" if is_val else "train"].write(ids, count)',
             'for side in ("train", "val") if is_val else ("train",):\n                '
             "bins[domain][side].write(ids, count)"),
    mutation("duplicates straddle the split", "prepare.py", "tests/test_prepare.py",
             "return [(domain, text_hash(data) < val_fraction,",
             "return [(domain, text_hash(data + os.urandom(8)) < val_fraction,"),
    mutation("alpha_0 is averaged in", "average_weights.py", "tests/test_average_weights.py",
             "return np.cumsum(alpha, axis=0) / np.arange(1, len(alpha) + 1)[:, None]",
             "return (1 / alpha.shape[1] + np.cumsum(alpha, axis=0)) / np.arange(2, len(alpha) + 2)[:, None]"),
    mutation("the last alpha is the answer", "average_weights.py", "tests/test_average_weights.py",
             "answers = np.stack([running_average(alpha)[-1] for alpha in averaged])",
             "answers = np.stack([alpha[-1] for alpha in averaged])"),
    mutation("total variation is counted twice", "trust.py", "tests/test_average_weights.py", "return 0.5 * float(",
             "return float("),
    mutation("the proxy's share of the cost is left out", "trust.py", "tests/test_average_weights.py",
             "(6 * reference_tokens + 8 * proxy_tokens)", "(6 * reference_tokens)"),
    mutation("a drift counts as error", "trust.py", "tests/test_average_weights.py",
             "residual = m[L:-L] - (m[: -2 * L] + m[2 * L :]) / 2", "residual = m[L:-L] * 1.5**0.5"),
    mutation("the spread ignores that few seeds were run", "trust.py", "tests/test_average_weights.py",
             "deviation = answers.std(axis=0, ddof=1)", "deviation = answers.std(axis=0)"),
    mutation("the floor is where a domain begins", "trust.py", "tests/test_average_weights.py",
             "alphas[:, 3 * T // 4 :] <= ", "alphas[:, : T // 4] <= "),
    mutation("each round starts where the first did", "rounds.sh", "tests/test_rounds.py", "    weights=$answer\n", ""),
    mutation("a round that was cut off counts as done", "rounds.sh", "tests/test_rounds.py",
             'if record["steps"] < record["max_steps"] else', 'if record["steps"] < 0 else'),
    mutation("rounds go on after convergence", "rounds.sh", "tests/test_rounds.py",
             '[ "$found" != converged ] || break', "true"),
    mutation("rounds pass over other flags", "rounds.sh", "tests/test_rounds.py",
             '!= "$settings" ]; then', '= "" ]; then'),
    mutation("the speed-up is counted at the end", "compare.py", "tests/test_compare.py",
             "return int(reached[0]) if", "return int(reached[-1]) if"),
    mutation("equal losses count as better", "compare.py", "tests/test_compare.py",
             "(run.loss[-1] < baseline.loss[-1])", "(run.loss[-1] <= baseline.loss[-1])"),
    mutation("the seeds of an experiment are not paired", "experiments/profit.py", "tests/test_profit.py",
             "{spread((of['loss'] - base['loss']).mean(axis=1))}",
             "{spread(of['loss'].mean(axis=1) - base['loss'].mean())}"),
    mutation("tokens see the future", "model.py", "tests/test_model.py", "is_causal=True", "is_causal=False"),
    mutation("every query head reads the first key head", "model.py", f"tests/test_model.py {EXACTNESS}",
             "q, k, v = (t.transpose(1, 2) for t in (q, k, v))",
             "q, k, v = (t.transpose(1, 2) for t in (q, k[:, :, :1].expand_as(k), v))"),
]


def judge(mutant):
    """Returns (mutation, what killed it or None, seconds)."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant") as directory:
        copy = Path(directory) / "copy"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        path = copy / mutant.file
        text = path.read_text()
        for old, new in mutant.edits:
            assert text.count(old) == 1, f"{mutant.name}: {mutant.file} has {text.count(old)} times: {old}"
            text = text.replace(old, new)
        if path.suffix == ".py":
            compile(text, str(path), "exec")
        path.write_text(text)
        killer = (mutant.tests and run_tests(copy, mutant.tests.split())) or run_tests(copy, [])
    return mutant, killer, time.monotonic() - start


def run_tests(copy, tests):
    """The first test that fails in the copy, with the first line of its failure, or None."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    temporary = copy.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary),
                   "COLUMNS": "160"}
    try:
        result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        return "a test that never ended"
    if result.returncode == 0:
        return None
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", result.stdout, re.MULTILINE)
    if result.returncode != 1 or not failed:
        raise RuntimeError(f"pytest broke, rather than a test: {result.stdout[-2000:]}{result.stderr[-2000:]}")
    return failed[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="", help="only mutations whose name holds it")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="take it for granted that the unbroken copy passes")
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTATIONS if args.word in mutant.name]
    texts = {mutant.file: (ROOT / mutant.file).read_text() for mutant in chosen}
    stale = [f"{mutant.name}: {mutant.file} has {texts[mutant.file].count(old)} times: {old}"
             for mutant in chosen for old, _ in mutant.edits if texts[mutant.file].count(old) != 1]
    if stale:
        sys.exit("\n".join(stale))

    # Unbroken, the copy passes: what kills a mutant is its mutation
    if not args.quick:
        _, failed, seconds = judge(Mutation("nothing", chosen[0].file, "", ()))
        print(f"{'unbroken':60} {seconds:4.0f} s  {failed or 'passes'}", flush=True)
        if failed:
            sys.exit(1)
    survivors = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, killer, seconds in pool.map(judge, chosen):
            print(f"{mutant.name:60} {seconds:4.0f} s  {killer or 'SURVIVED'}"[:240], flush=True)
            survivors += [] if killer else [mutant.name]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations killed")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
