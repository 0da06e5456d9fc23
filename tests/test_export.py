"""export_hf.py: the exported model's losses, text and token ids are the run's; lm-eval's figures are evaluate.py's."""

import importlib
import json
import math
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiktoken
import torch
from conftest import run_script
from test_evaluate import write_texts

import evaluate
import runtime
from cli import UserError
from model import Transformer
from sampler import load_dataset
from tokenizer import PATTERN, data_tokenizer

pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
import export_hf  # noqa: E402

T = 32


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """data: a data set of 300 tokens; run: a finished run on it; hf: the run's export."""
    root = tmp_path_factory.mktemp("export")
    write_texts(root / "texts", ["alpha", "beta"])
    run_script("prepare.py", root / "texts", f"--out_dir={root / 'data'}", "--tokenizer=train:300",
               "--val_fraction=0.2")
    run_script("train_reference.py", f"--data_dir={root / 'data'}", f"--out_dir={root / 'run'}", "--max_steps=20",
               f"--block_size={T}", "--n_layer=2", "--n_head=4", "--n_kv_head=2", "--n_embd=48", "--n_ffn=80",
               "--batch_size=8", "--eval_interval=99", "--no-compile", "--dtype=float32")
    run_script("export_hf.py", root / "run", root / "hf")
    return root


@pytest.fixture(scope="module")
def ours(place):
    config, checkpoint = runtime.load_finished(place / "run", ("reference",))
    return Transformer.load(config, checkpoint["model"], torch.float32)


@pytest.fixture(scope="module")
def theirs(place):
    return transformers.AutoModelForCausalLM.from_pretrained(place / "hf", dtype=torch.float32).eval()


def strings(rng, n):
    """Strings of every kind of Unicode, of what splits words, and of plain letters."""
    marks = [" ", "\n", "\r\n", "\t", "\x85", "\xa0", "\u2028", "\u3000", "a", "1", "23", "4567", "'s", "'LL",
             "'\u017f", "!?", "\u0301", "\u0660", "\u200d", "\U0001f468"]  # fmt: skip
    for i in range(n):
        kinds = ((0, 0x110000), (0, 0x300), (0x370, 0x700), (0x2000, 0x3100))
        low, high = kinds[i % 4]
        letters = [chr(c) for c in rng.choices(range(low, high), k=30) if not 0xD800 <= c < 0xE000]
        yield "".join(letters if i % 3 else rng.choices([*marks, *letters[:4]], k=30))


def characters():
    """Every character, between spaces, letters or digits."""
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for i in range(0, len(every), 100):
        yield " x1"[i // 100 % 3].join(every[i : i + 100])


def ids_of(tokenizer, texts):
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def test_losses_and_greedy_text_are_the_runs_own(place, ours, theirs):
    dataset = load_dataset(place / "data", T)
    tokens = torch.from_numpy(np.concatenate(dataset.val).astype(np.int64))
    with torch.no_grad():
        logits = theirs(tokens[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        assert losses.shape == (len(tokens), T) and losses.std() > 0.1
        assert (losses - ours(tokens)).abs().max() < 1e-4
        text = tokens[:2, :8]
        for _ in range(8):  # the next token is the one of least loss
            candidates = torch.cat([text.repeat_interleave(300, 0), torch.arange(300).repeat(2)[:, None]], dim=1)
            best = ours(candidates)[:, -1].view(2, 300).argmin(dim=1)
            text = torch.cat([text, best[:, None]], dim=1)
    found = theirs.generate(tokens[:2, :8], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(found, text)


def test_ids_are_the_data_sets(place):
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "hf")
    encode = data_tokenizer(load_dataset(place / "data", T)).encode
    documents = [json.loads(line)["text"] for path in (place / "texts").iterdir() for line in path.open()]
    texts = [*strings(random.Random(0), 3000), *characters(), *documents]
    assert ids_of(tokenizer, texts) == [encode(text.encode()).tolist() for text in texts]
    assert tokenizer.decode(ids_of(tokenizer, documents[:1])[0]) == documents[0]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (299, 299, T)
    assert tokenizer("ab")["input_ids"] == [299, *encode(b"ab").tolist()]


def test_patterns_that_mean_something_else_to_the_other_engine():
    """{1,3}+ and $, as in the patterns of tiktoken's own encodings."""
    pattern = PATTERN.replace("{1,3}", "{1,3}+").replace(r"|\s*[\r\n]", r"|\s++$|\s*[\r\n]")
    assert pattern.count("+$") == pattern.count("{1,3}+") == 1
    tokens = [*(bytes([b]) for b in range(256)), b"00", b"0000", b"\n\n", b"  ", b"    ", b" \n", b"  \n"]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    expected = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode
    rng = random.Random(0)
    texts = ["".join(rng.choices("00 \n\ra", k=rng.randint(1, 12))) for _ in range(5000)]
    found = export_hf.from_ranks(ranks, pattern, len(ranks))
    assert [found.encode(text).ids for text in texts] == [expected(text) for text in texts]


def test_other_tokenizers(place, tmp_path):
    """Bytes, and a tokenizer.json whose end-of-text token has a name of its own."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["ab abab baba"] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=alphabet, special_tokens=["<stop>"]))
    made.save(str(tmp_path / "their.json"))
    texts = [*strings(random.Random(1), 300), "abab baba"]
    for spec, name in (("bytes", "<|endoftext|>"), (tmp_path / "their.json", "<stop>")):
        out_dir = tmp_path / name.strip("<|>")
        run_script("prepare.py", place / "texts", f"--out_dir={out_dir}", f"--tokenizer={spec}", "--val_fraction=0.2",
                   *(["--eot_token=<stop>"] if spec != "bytes" else []))
        dataset = load_dataset(out_dir, T)
        exported, found = export_hf.hf_tokenizer(dataset)
        encode = data_tokenizer(dataset).encode
        assert found == name
        for text in texts:
            assert exported.encode(text).ids == [dataset.meta["eot_token"], *encode(text.encode()).tolist()]


def test_what_cannot_be_exported(place, tmp_path, monkeypatch):
    shutil.copytree(place / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["flags"]["max_steps"] = 99
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    before = sorted(place.rglob("*"))
    with pytest.raises(UserError, match=r"unfinished \(20 of 99 steps\)"):
        export_hf.main([str(tmp_path / "run"), str(tmp_path / "new")])
    result = run_script("export_hf.py", place / "run", place / "hf", check=False)
    assert result.returncode == 2 and "exists already" in result.stderr and result.stderr.count("\n") == 1
    assert sorted(place.rglob("*")) == before and not (tmp_path / "new").exists()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.delitem(sys.modules, "export_hf")
    without = importlib.import_module("export_hf")
    with pytest.raises(UserError, match=r"needs the package safetensors.*pip install"):
        without.main([str(place / "run"), str(tmp_path / "new")])


ROLLING = """
task: own_documents
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{answer}}"
metric_list: [{metric: bits_per_byte}]
"""
ANSWERS = """
task: own_answers
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: perplexity}]
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("lm_eval"), reason="needs the command lm_eval: pip install lm_eval")
def test_lm_eval_finds_the_same_bits_per_byte(place, tmp_path):
    """A document is an answer without a context; lm-eval puts the end-of-text token before it by itself."""
    documents = [json.loads(line)["text"] for path in (place / "texts").iterdir() for line in path.open()][:40]
    words = [text.split(" ") for text in documents]
    rows = {"own_documents": [{"context": "", "answer": text} for text in documents],
            "own_answers": [{"context": " ".join(w[:4]), "answer": " " + " ".join(w[4:8])} for w in words]}
    found = {}
    for task, yaml, bos in (("own_documents", ROLLING, False), ("own_answers", ANSWERS, True)):
        data = tmp_path / f"{task}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[task]))
        (tmp_path / f"{task}.yaml").write_text(yaml.replace("FILE", str(data)))
        model = f"pretrained={place / 'hf'},add_bos_token={bos}"
        command = ["lm_eval", "--model", "hf", "--model_args", model, "--tasks", task, "--include_path", tmp_path,
                   "--device", "cpu", "--output_path", tmp_path / task]
        subprocess.run(command, check=True, env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
        result, = (tmp_path / task).rglob("results*.json")
        found[task] = json.loads(result.read_text())["results"][task]
    evaluate.main([str(place / "run"), *(f"--task_file={tmp_path / task}.jsonl" for task in rows)])
    ours = json.loads((place / "run" / "evaluation.jsonl").read_text().splitlines()[-1])["tasks"]
    size = np.mean([len(row["answer"].encode()) for row in rows["own_answers"]])
    theirs = {"own_documents": found["own_documents"]["bits_per_byte,none"],
              "own_answers": math.log2(found["own_answers"]["perplexity,none"]) / size}
    print({task: (ours[task]["bpb"], theirs[task]) for task in rows})
    for task in rows:
        assert ours[task]["bpb"] == pytest.approx(theirs[task], rel=0.02)
