"""export_hf.py: the exported model's losses and token ids are the run's."""

import random
import resource
import shutil

import numpy as np
import pytest
import tiktoken
import torch
from conftest import edit, prose, refused, run_here, write_texts

from common.run import load_finished
from common.tokenizer import PATTERN, load_tokenizer
from model import Transformer
from sampler import load_dataset
from tools import export_hf

tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
T = 32


def train_and_export(root, *prepare_flags):
    """In root: data, a data set; run, a finished run on it; hf, the run's export."""
    run_here("prepare.py", root / "texts", f"--out_dir={root / 'data'}", "--val_fraction=0.2", *prepare_flags)
    run_here("train_reference.py", f"--data_dir={root / 'data'}", f"--out_dir={root / 'run'}", "--max_steps=20",
             f"--block_size={T}", "--n_layer=2", "--n_head=4", "--n_kv_head=2", "--n_embd=48", "--n_ffn=80",
             "--batch_size=8", "--eval_interval=99", "--no-compile", "--dtype=float32")
    run_here("tools/export_hf.py", root / "run", root / "hf")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    for seed, name in enumerate(("alpha", "beta")):
        write_texts(root / f"texts/{name}.jsonl", [prose(30, 1000 * seed + number) for number in range(60)])
    train_and_export(root, "--tokenizer=train:300")
    return root


def strings(n, seed=0):
    """Strings of every kind of Unicode, of what splits words, and of plain letters."""
    marks = [" ", "\n", "\r\n", "\t", "\x85", "\xa0", "\u2028", "\u3000", "a", "1", "23", "4567", "'s", "'LL",
             "'\u017f", "!?", "\u0301", "\u0660", "\u200d", "\U0001f468"]  # fmt: skip
    rng, kinds = random.Random(seed), ((0, 0x110000), (0, 0x300), (0x370, 0x700), (0x2000, 0x3100))
    for i in range(n):
        letters = [chr(c) for c in rng.choices(range(*kinds[i % 4]), k=30) if not 0xD800 <= c < 0xE000]
        yield "".join(letters if i % 3 else rng.choices([*marks, *letters[:4]], k=30))


def check_ids(place, spec, name, texts):
    """The exported tokenizer gives the ids of ours, after the end-of-text token, which has the right name."""
    exported, ours = transformers.AutoTokenizer.from_pretrained(place / "hf"), load_tokenizer(str(spec), name)
    ids = [ours.encode(text.encode()).tolist() for text in texts]
    assert exported(texts, add_special_tokens=False)["input_ids"] == ids
    assert exported(texts[-1])["input_ids"] == [ours.eot, *ids[-1]] and exported.decode(ids[-1]) == texts[-1]
    assert (exported.eos_token, exported.eos_token_id, exported.model_max_length) == (name, ours.eot, T)


def test_losses_are_the_runs_own(place):
    config, checkpoint = load_finished(place / "run", ("reference",))
    ours = Transformer.load(config, checkpoint["model"], torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place / "hf", dtype=torch.float32).eval()
    tokens = torch.from_numpy(np.concatenate(load_dataset(place / "data", T).val).astype(np.int64))
    with torch.no_grad():
        logits = theirs(tokens[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        assert losses.shape == (len(tokens), T) and losses.std() > 0.1
        assert (losses - ours(tokens)).abs().max() < 1e-4


def test_ids_are_the_data_sets(place, tmp_path):
    """Of a trained tokenizer, of bytes, and of a tokenizer.json whose end-of-text token has a name of its own."""
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]  # between spaces, letters or digits
    characters = [" x1"[i // 100 % 3].join(every[i : i + 100]) for i in range(0, len(every), 100)]
    texts = [*strings(3000), *characters, *(prose(30, number) for number in range(60))]
    check_ids(place, place / "data/tokenizer.tiktoken", "<|endoftext|>", texts)
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(["ab abab baba"] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=made.pre_tokenizer.alphabet(), special_tokens=["<stop>"]))
    made.save(str(tmp_path / "their.json"))
    for spec, name in ("bytes", "<|endoftext|>"), (tmp_path / "their.json", "<stop>"):
        (root := tmp_path / name.strip("<|>")).mkdir()
        (root / "texts").symlink_to(place / "texts")
        train_and_export(root, f"--tokenizer={spec}", *(["--eot_token=<stop>"] if name == "<stop>" else []))
        check_ids(root, spec, name, [*strings(300, seed=1), "abab baba"])


def test_patterns_that_mean_something_else_to_the_other_engine():
    """{1,3}+ and $, as in the patterns of tiktoken's own encodings."""
    pattern = PATTERN.replace("{1,3}", "{1,3}+").replace(r"|\s*[\r\n]", r"|\s++$|\s*[\r\n]")
    tokens = [*(bytes([b]) for b in range(256)), b"00", b"0000", b"\n\n", b"  ", b"    ", b" \n", b"  \n"]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    expected = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode
    found, rng = export_hf.byte_level_bpe(ranks, pattern, len(ranks)), random.Random(0)
    texts = ["".join(rng.choices("00 \n\ra", k=rng.randint(1, 12))) for _ in range(5000)]
    assert [found.encode(text).ids for text in texts] == [expected(text) for text in texts]


def test_what_cannot_be_exported(place, tmp_path):
    run = shutil.copytree(place / "run", tmp_path / "run")
    edit(run / "config.json", lambda config: config["flags"].update(max_steps=99))
    refused(tmp_path, ["unfinished (20 of 99 steps)"], "tools/export_hf.py", run, tmp_path / "new")
    refused(place, [f"{place}/hf"], "tools/export_hf.py", place / "run", place / "hf")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for size in (100, 50_000):  # a disk that is full at the first file, and one within the parameters
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            refused(tmp_path, ["File too large", "free space"], "tools/export_hf.py", place / "run", tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
