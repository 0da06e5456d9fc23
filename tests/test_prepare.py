"""prepare.py: what goes in comes out, on the right side of the split, or not at all."""

import base64
import collections
import hashlib
import json
import random
import resource
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_tools import EOT, TEXTS, contents, prepare_in, prose, read_set, sides, write_rows, write_texts

import prepare
import tokenizer

ROOT = Path(__file__).resolve().parent.parent


def test_known_numbers(tmp_path):
    """Two documents, worked out by hand: blake2b sends 'e' to train and 'b' to val at a fraction of a third."""
    write_texts(tmp_path / "raw/x.jsonl", ["e", "b", "e"])
    assert prepare_in(tmp_path, "raw --tokenizer=bytes --val_fraction=0.3333333")[0] == 0
    assert (tmp_path / "data/raw/x/train.bin").read_bytes() == b"\x00\x01e\x00\x00\x01e\x00"  # 256, 101, 256, 101
    assert (tmp_path / "data/raw/x/val.bin").read_bytes() == b"\x00\x01b\x00"
    assert json.loads((tmp_path / "data/raw/meta.json").read_text())["domains"] == {
        "x": {"train_tokens": 4, "val_tokens": 2, "train_documents": 2, "val_documents": 1,
              "train_bytes": 2, "val_bytes": 1}
    }


@pytest.mark.parametrize("spec, vocab_size", [("bytes", 257), ("train:300", 300)])
def test_round_trip(tmp_path, spec, vocab_size):
    write_texts(tmp_path / "raw/jsonl.jsonl")
    write_texts(tmp_path / "raw/gzip.jsonl.gz", TEXTS[::-1])
    write_texts(tmp_path / "raw/xz.jsonl.xz")
    for number, text in enumerate(TEXTS):
        path = tmp_path / f"elsewhere/{number % 3}/{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (tmp_path / "elsewhere/.hidden").write_bytes(b"\xff")
    (tmp_path / "raw/folder").symlink_to(tmp_path / "elsewhere")  # raw data often lies on another disk
    status, out, err = prepare_in(tmp_path, f"raw --tokenizer={spec}")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "next: python train_reference.py --data_dir=data/raw --out_dir=checkpoints/reference"

    meta, texts = read_set(tmp_path / "data/raw")
    assert (meta["vocab_size"], meta["eot_token"], meta["dtype"]) == (vocab_size, vocab_size - 1, "uint16")
    assert meta["tokenizer"] == spec and len(meta["tokenizer_sha256"]) == 64
    assert list(texts) == ["folder", "gzip", "jsonl", "xz"]
    val = {text for text in TEXTS if prepare.text_hash(text.encode()) < 0.05}
    assert 0 < len(val) < 20
    for found in texts.values():  # neither order, nor format, nor domain moves a document across
        assert sides(found) == sorted(TEXTS) and set(found["val"]) == val
    assert texts["jsonl"]["train"] == [text for text in TEXTS if text not in val]  # in their order


def test_split_is_blake2b():
    digest = hashlib.blake2b(b"abc", digest_size=7).digest()
    assert prepare.text_hash(b"abc") == sum(byte * 256**place for place, byte in enumerate(digest)) / 256**7
    share = np.mean([prepare.text_hash(b"%d" % number) < 0.05 for number in range(20_000)])
    assert share == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / 20_000) ** 0.5)  # four standard deviations


def test_duplicates_never_straddle(tmp_path):
    write_texts(tmp_path / "raw/a.jsonl", TEXTS * 3)
    write_texts(tmp_path / "raw/b.jsonl", TEXTS[50:] + TEXTS)
    assert prepare_in(tmp_path, "raw --tokenizer=bytes --val_fraction=0.3")[0] == 0
    _, texts = read_set(tmp_path / "data/raw")
    train, val = ({text for found in texts.values() for text in found[side]} for side in ("train", "val"))
    assert not train & val and train | val == set(TEXTS)
    assert collections.Counter(texts["a"]["val"]) == dict.fromkeys(val, 3)


def test_text_file_with_marks(tmp_path):
    (tmp_path / "raw").mkdir()
    parts = [text.replace(EOT, "").strip() for text in TEXTS]
    (tmp_path / "raw/a.txt").write_bytes(f"\n{EOT}\n".join(parts).encode() + f"\n{EOT}\n".encode())
    assert prepare_in(tmp_path, "raw --tokenizer=bytes")[:2][0] == 0
    assert sides(read_set(tmp_path / "data/raw")[1]["a"]) == sorted(parts)


@pytest.mark.parametrize("gap", ["\n\n", "\r\n\r\n", "\n", " ", ""])
def test_text_file_without_marks(tmp_path, gap):
    (tmp_path / "raw").mkdir()
    text = gap.join(f"{number:06d}é" * 30 for number in range(3000))
    (tmp_path / "raw/a.txt").write_bytes(text.encode())
    assert prepare_in(tmp_path, "raw --tokenizer=bytes")[0] == 0
    texts = read_set(tmp_path / "data/raw")[1]["a"]
    pieces = texts["train"] + texts["val"]
    assert sum(map(len, pieces)) == len(text) and max(len(piece.encode()) for piece in pieces) <= prepare.PIECE
    assert sum(piece.endswith(gap) for piece in pieces) >= len(pieces) - 1


@settings(max_examples=100, deadline=None)
@given(st.text("a é😀\n\r", max_size=400), st.integers(8, 40))
def test_cut(text, size):
    data = text.encode()
    ends = [0, *tokenizer.cut(data, size)]
    pieces = [data[a:b] for a, b in pairwise(ends)]
    assert b"".join(pieces) == data and "".join(piece.decode() for piece in pieces) == text  # no character is cut
    assert all(size / 2 <= len(piece) + 3 and len(piece) <= size for piece in pieces[:-1])


def test_domain_key(tmp_path):
    rows = [{"text": text, "meta": {"set": f"Set ({number % 2})"}} for number, text in enumerate(TEXTS)]
    write_rows(tmp_path / "raw/0.jsonl.gz", rows[:60])
    write_rows(tmp_path / "raw/deep/1.jsonl", rows[60:])
    write_rows(tmp_path / "one.jsonl.xz", rows)
    for source in ("raw", "one.jsonl.xz"):
        assert prepare_in(tmp_path, f"{source} --domain_key=meta.set --tokenizer=bytes --val_fraction=0.2")[0] == 0
    _, texts = read_set(tmp_path / "data/raw")
    assert sides(texts["Set (0)"]) == sorted(TEXTS[::2]) and sides(texts["Set (1)"]) == sorted(TEXTS[1::2])
    assert contents(tmp_path / "data/raw") == contents(tmp_path / "data/one")


def test_names_with_slashes_numbers_and_many_domains(tmp_path):
    """400 domains would be 800 open files; the limit here is 256."""
    texts = [f"{text} {copy}" for copy in range(10) for text in TEXTS[:40]]
    rows = [{"body": text, "id": domain, "name": f"topic/{domain}: ä"} for domain in range(300) for text in texts[:40]]
    write_rows(tmp_path / "rows.jsonl", rows)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        flags = "rows.jsonl --text_key=body --tokenizer=bytes --val_fraction=0.3"
        assert prepare_in(tmp_path, f"{flags} --domain_key=id --out_dir=ids")[0] == 0
        assert prepare_in(tmp_path, f"{flags} --domain_key=name --out_dir=names")[0] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    ids, names = (read_set(tmp_path / name)[1] for name in ("ids", "names"))
    assert set(ids) == {str(number) for number in range(300)}
    assert (tmp_path / "names/topic%2F7%3A %C3%A4/train.bin").exists() and names["topic/7: ä"] == ids["7"]


def test_max_bytes_keeps_proportions(tmp_path):
    for name, share in (("a", 1), ("b", 4), ("c/0", 2), ("c/1", 3)):
        write_texts(tmp_path / f"raw/{name}.jsonl", [prose(200, number) for number in range(60 * share)])
    assert prepare_in(tmp_path, "raw --tokenizer=bytes --max_bytes=200_000 --val_fraction=0.3")[0] == 0
    domains = read_set(tmp_path / "data/raw")[0]["domains"]
    size = {name: entry["train_bytes"] + entry["val_bytes"] for name, entry in domains.items()}
    assert 200_000 <= sum(size.values()) < 202_000  # at most one document too many
    assert size == pytest.approx({"a": 20_000, "b": 80_000, "c": 100_000}, abs=2000)


def test_documentation_and_empty_documents_are_skipped(tmp_path):
    write_texts(tmp_path / "raw/a.jsonl", [*TEXTS, "", " \n"])
    (tmp_path / "raw/README.md").write_text("about")
    (tmp_path / "raw/LICENSES.txt").write_text("about")
    status, out, _ = prepare_in(tmp_path, "raw --tokenizer=bytes")
    assert status == 0 and "LICENSES.txt" in out and "README.md" in out and "a: skipped 2 empty documents" in out
    entry = read_set(tmp_path / "data/raw")[0]["domains"]
    assert list(entry) == ["a"] and entry["a"]["train_documents"] + entry["a"]["val_documents"] == len(TEXTS)


def test_runs_agree_to_the_byte_whatever_the_workers(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        write_texts(tmp_path / f"raw/{name}.jsonl", [prose(300, seed * 1000 + number) for number in range(300)])
    for workers in (1, 2, 5):
        assert prepare_in(tmp_path, f"raw --out_dir=out{workers} --tokenizer=train:320 --workers={workers}")[0] == 0
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2") == contents(tmp_path / "out5")


def test_sample_is_balanced_and_independent_of_order(monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLE", 30_000)
    found = [("large", prose(100, number).encode()) for number in range(400)]
    found += [("middle", prose(100, number).encode()) for number in range(400, 500)]
    found += [("small", b"only this one " * 20)]
    sample = list(prepare.sample_texts(iter(found), 0.0))
    domain_of, chars = {data.decode(): domain for domain, data in found}, collections.Counter()
    for text in sample:
        chars[domain_of[text]] += len(text)
    longest = max(map(len, sample))
    assert 10_000 <= chars["large"] < 10_000 + longest and 10_000 <= chars["middle"] < 10_000 + longest
    assert chars["small"] == 14 * 20
    random.Random(0).shuffle(found)
    assert sample == list(prepare.sample_texts(iter(found), 0.0))
    held_out = {data.decode() for _, data in found if prepare.text_hash(data) < 0.2}
    assert held_out and not held_out & set(prepare.sample_texts(iter(found), 0.2))


# ---- all or nothing


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_interrupted_run_leaves_no_data_set(tmp_path, number):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.txt").write_text(prose(200_000) * 30)
    lines = (base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256))
    (tmp_path / "slow.tiktoken").write_bytes(b"\n".join(lines))
    flags = "raw --tokenizer=slow.tiktoken --workers=1 --out_dir=x/set".split()
    command = [sys.executable, ROOT / "prepare.py", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tmp_path)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("x/set.tmp/a/train.bin")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number) and err == b""
    assert [path.name for path in (tmp_path / "x").iterdir()] == (["set.tmp"] if number == signal.SIGKILL else [])
    status, _, err = prepare_in(tmp_path, "raw --tokenizer=bytes --out_dir=x/set")
    if number == signal.SIGKILL:
        assert status == 2 and "x/set.tmp: exists already; delete it, unless another run is writing it" in err
    else:
        assert status == 0 and sides(read_set(tmp_path / "x/set")[1]["a"])


def test_full_disk(tmp_path):
    write_texts(tmp_path / "raw/a.jsonl", [prose(300, number) for number in range(300)])
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    command = [sys.executable, ROOT / "prepare.py", "raw", "--tokenizer=bytes"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "File too large" in done.stderr
    assert not contents(tmp_path / "data")
