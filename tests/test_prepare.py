"""prepare.py: what goes in comes out, on the right side of the split, or not at all."""

import base64
import collections
import errno
import gzip
import hashlib
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import corpus  # noqa: E402
import documents  # noqa: E402
import prepare  # noqa: E402

EOT = "<|endoftext|>"
TEXTS = [
    f"Document {number}: naïve café — 漢字 😀 {EOT} is text.\r\n\n\tIt costs {number * 37} and ends in spaces.   \n"
    for number in range(120)
]
WORDS = "the of and to in is that for it as was with be by on not he his but at are this have from or had an".split()


def prose(words, seed=0):
    source = random.Random(seed)
    return " ".join(source.choice(WORDS) + (".\n" if source.random() < 0.1 else "") for _ in range(words))


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run prepare.py in this process and in tmp_path; returns its exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, argv)])
        status = 0
        try:
            prepare.run(prepare.main)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))


def write_texts(path, texts=TEXTS):
    write_rows(path, [{"text": text} for text in texts])


def read_set(folder):
    """Decode a data set. Returns meta.json and {domain: {side: texts}}; counts are checked on the way."""
    meta = json.loads((folder / "meta.json").read_text())
    eot = meta["eot_token"]
    if meta["tokenizer"] == "bytes":
        decode = lambda ids: bytes(ids.tolist())  # noqa: E731
    else:
        lines = (folder / "tokenizer.tiktoken").read_text().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
        decode = tiktoken.Encoding(
            "test", pat_str=prepare.PATTERN, mergeable_ranks=ranks, special_tokens={}
        ).decode_bytes
    texts = {}
    for domain, entry in meta["domains"].items():
        texts[domain] = {}
        for side in ("train", "val"):
            ids = np.fromfile(folder / domain / f"{side}.bin", "<u2" if meta["dtype"] == "uint16" else "<u4")
            assert ids[0] == eot and ids.max() < meta["vocab_size"]
            found = [decode(part[1:]) for part in np.split(ids, np.flatnonzero(ids == eot)[1:])]
            assert entry[f"{side}_tokens"] == len(ids)
            assert entry[f"{side}_documents"] == len(found)
            assert entry[f"{side}_bytes"] == sum(map(len, found))
            texts[domain][side] = [text.decode() for text in found]
    return meta, texts


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what goes in comes out


@pytest.mark.parametrize("tokenizer, vocab_size", [("bytes", 257), ("train:300", 300)])
def test_round_trip(run, tmp_path, tokenizer, vocab_size):
    write_texts(tmp_path / "raw/jsonl.jsonl")
    write_texts(tmp_path / "raw/gzip.jsonl.gz", TEXTS[::-1])
    write_texts(tmp_path / "raw/xz.jsonl.xz")
    for number, text in enumerate(TEXTS):
        path = tmp_path / f"raw/folder/{number % 3}/{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (tmp_path / "raw/folder/.hidden").write_bytes(b"\xff")
    status, out, err = run("raw", f"--tokenizer={tokenizer}")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1].startswith("next: python train_reference.py --data_dir=data/raw ")

    meta, texts = read_set(tmp_path / "data/raw")
    assert (meta["vocab_size"], meta["eot_token"], meta["dtype"]) == (vocab_size, vocab_size - 1, "uint16")
    assert meta["tokenizer"] == tokenizer and len(meta["tokenizer_sha256"]) == 64
    assert list(texts) == ["folder", "gzip", "jsonl", "xz"]
    assert (tmp_path / "data/raw/tokenizer.tiktoken").exists() == (tokenizer != "bytes")
    val = {text for text in TEXTS if prepare.text_hash(text.encode()) < 0.05}
    assert 0 < len(val) < 20
    for sides in texts.values():  # neither order, nor format, nor domain moves a document across
        assert sorted(sides["train"] + sides["val"]) == sorted(TEXTS)
        assert set(sides["val"]) == val
    assert texts["jsonl"]["train"] == [text for text in TEXTS if text not in val]  # in their order


def test_split_is_blake2b():
    digest = hashlib.blake2b(b"abc", digest_size=7).digest()
    assert prepare.text_hash(b"abc") == sum(byte * 256**place for place, byte in enumerate(digest)) / 256**7
    share = np.mean([prepare.text_hash(b"%d" % number) < 0.05 for number in range(20_000)])
    assert share == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / 20_000) ** 0.5)  # four standard deviations


def test_duplicates_never_straddle(run, tmp_path):
    write_texts(tmp_path / "raw/a.jsonl", TEXTS * 3)
    write_texts(tmp_path / "raw/b.jsonl", TEXTS[50:] + TEXTS)
    assert run("raw", "--tokenizer=bytes", "--val_fraction=0.3")[0] == 0
    _, texts = read_set(tmp_path / "data/raw")
    train, val = ({text for sides in texts.values() for text in sides[side]} for side in ("train", "val"))
    assert not train & val and train | val == set(TEXTS)
    assert collections.Counter(texts["a"]["val"]) == dict.fromkeys(val, 3)


def test_text_file_with_marks(run, tmp_path):
    (tmp_path / "raw").mkdir()
    parts = [text.replace(EOT, "").strip() for text in TEXTS]
    (tmp_path / "raw/a.txt").write_bytes(f"\n{EOT}\n".join(parts).encode() + f"\n{EOT}\n".encode())
    assert run("raw", "--tokenizer=bytes")[0] == 0
    _, texts = read_set(tmp_path / "data/raw")
    assert sorted(texts["a"]["train"] + texts["a"]["val"]) == sorted(parts)


@pytest.mark.parametrize("gap", ["\n\n", "\r\n\r\n", "\n", " ", ""])
def test_text_file_without_marks(run, tmp_path, gap):
    (tmp_path / "raw").mkdir()
    text = gap.join(f"{number:06d}é" * 30 for number in range(20_000))[: 3 << 20]  # blocks cut characters in two
    (tmp_path / "raw/a.txt").write_bytes(text.encode())
    assert run("raw", "--tokenizer=bytes")[0] == 0
    _, texts = read_set(tmp_path / "data/raw")
    pieces = texts["a"]["train"] + texts["a"]["val"]
    assert sum(map(len, pieces)) == len(text) and sorted(pieces) == sorted(documents.cut([text]))
    assert sum(piece.endswith(gap) for piece in pieces) >= len(pieces) - 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("a \n\r", max_size=40)), st.integers(2, 30))
def test_cut_does_not_depend_on_blocks(blocks, size):
    pieces = list(documents.cut(blocks, size))
    assert "".join(pieces) == "".join(blocks)
    assert all(size // 2 <= len(piece) <= size for piece in pieces[:-1])
    assert pieces == list(documents.cut(["".join(blocks)], size))


def test_domain_key(run, tmp_path):
    rows = [{"text": text, "meta": {"set": f"Set ({number % 2})"}} for number, text in enumerate(TEXTS)]
    write_rows(tmp_path / "raw/0.jsonl.gz", rows[:60])
    write_rows(tmp_path / "raw/deep/1.jsonl", rows[60:])
    write_rows(tmp_path / "one.jsonl.xz", rows)
    for source in ("raw", "one.jsonl.xz"):
        assert run(source, "--domain_key=meta.set", "--tokenizer=bytes", "--val_fraction=0.2")[0] == 0
    _, texts = read_set(tmp_path / "data/raw")
    assert sorted(texts["Set (0)"]["train"] + texts["Set (0)"]["val"]) == sorted(TEXTS[::2])
    assert sorted(texts["Set (1)"]["train"] + texts["Set (1)"]["val"]) == sorted(TEXTS[1::2])
    assert contents(tmp_path / "data/raw") == contents(tmp_path / "data/one")


def test_documentation_is_left_out_and_empty_documents_counted(run, tmp_path):
    write_texts(tmp_path / "raw/a.jsonl", [*TEXTS, "", " \n"])
    (tmp_path / "raw/README.md").write_text("about")
    (tmp_path / "raw/LICENSES.txt").write_text("about")
    status, out, _ = run("raw", "--tokenizer=bytes")
    assert status == 0 and "LICENSES.txt, README.md" in out and "a: left out 2 empty documents" in out
    meta, _ = read_set(tmp_path / "data/raw")
    entry = meta["domains"]["a"]
    assert list(meta["domains"]) == ["a"] and entry["train_documents"] + entry["val_documents"] == len(TEXTS)


# ---- tokenizers


def test_runs_agree_to_the_byte_whatever_the_workers(run, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        write_texts(tmp_path / f"raw/{name}.jsonl", [prose(300, seed * 1000 + number) for number in range(300)])
    for workers in (1, 2, 5):
        assert run("raw", f"--out_dir=out{workers}", "--tokenizer=train:320", f"--workers={workers}")[0] == 0
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2") == contents(tmp_path / "out5")


def test_trained_tokenizer_serves_again(run, tmp_path):
    write_texts(tmp_path / "raw/a.jsonl", [prose(300, number) for number in range(100)])
    assert run("raw", "--tokenizer=train:320", "--out_dir=first")[0] == 0
    assert run("raw", "--tokenizer=first/tokenizer.tiktoken", "--out_dir=second")[0] == 0
    first, second = (json.loads((tmp_path / name / "meta.json").read_text()) for name in ("first", "second"))
    assert first.pop("tokenizer") == "train:320" and second.pop("tokenizer") == "tokenizer.tiktoken"
    assert first == second
    assert (tmp_path / "first/a/train.bin").read_bytes() == (tmp_path / "second/a/train.bin").read_bytes()


def test_uint32_past_65536_tokens(run, tmp_path):
    ranks = [bytes([byte]) for byte in range(256)] + [b"%06d" % number for number in range(65_536 - 256)]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(ranks)]
    (tmp_path / "at.tiktoken").write_bytes(b"\n".join(lines[:-1]))
    (tmp_path / "past.tiktoken").write_bytes(b"\n".join(lines))
    write_texts(tmp_path / "raw/a.jsonl")
    for name, dtype, size in (("at", "uint16", 65_536), ("past", "uint32", 65_537)):
        assert run("raw", f"--tokenizer={name}.tiktoken", f"--out_dir={name}")[0] == 0
        meta, texts = read_set(tmp_path / name)
        assert (meta["dtype"], meta["vocab_size"]) == (dtype, size)
        assert sorted(texts["a"]["train"] + texts["a"]["val"]) == sorted(TEXTS)


def test_long_documents_are_encoded_in_spans():
    encoding = prepare.make_encoding("test", {bytes([byte]): byte for byte in range(256)} | {b"  ": 256})
    encode = prepare.encoder(encoding, np.dtype("<u2"))
    for text in (" " * 1_000_001, "é" * 1_000_001, f"{EOT}\n" * 100_000):  # one of them overflows tiktoken's stack
        ids = encode(text)
        assert ids[0] == 257 and encoding.decode(ids[1:].tolist()) == text


def test_sample_is_balanced_and_independent_of_order(monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLE", 30_000)
    found = [("large", prose(100, number)) for number in range(400)]
    found += [("middle", prose(100, number)) for number in range(400, 500)] + [("small", "only this one " * 20)]
    sample = list(prepare.sample_texts(iter(found), 0.0))
    chars = collections.Counter()
    domain_of = {text: domain for domain, text in found}
    for text in sample:
        chars[domain_of[text]] += len(text)
    longest = max(map(len, sample))
    assert 10_000 <= chars["large"] < 10_000 + longest and 10_000 <= chars["middle"] < 10_000 + longest
    assert chars["small"] == 14 * 20
    random.Random(0).shuffle(found)
    assert sample == list(prepare.sample_texts(iter(found), 0.0))
    held_out = {text for _, text in found if prepare.text_hash(text.encode()) < 0.2}
    assert held_out and not held_out & set(prepare.sample_texts(iter(found), 0.2))


# ---- all or nothing


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_interrupted_run_leaves_no_data_set(run, tmp_path, number):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.txt").write_text(prose(200_000) * 30)
    lines = (base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256))
    (tmp_path / "slow.tiktoken").write_bytes(b"\n".join(lines))
    command = [
        sys.executable,
        ROOT / "prepare.py",
        "raw",
        "--tokenizer=slow.tiktoken",
        "--workers=1",
        "--out_dir=x/set",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("x/set.tmp-*/a/train.bin")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number) and err == b""
    assert not (tmp_path / "x/set").exists()
    assert (tmp_path / "x").exists() == (number == signal.SIGKILL)

    (tmp_path / "raw/a.txt").unlink()
    write_texts(tmp_path / "raw/a.jsonl")
    assert run("raw", "--tokenizer=bytes", "--out_dir=x/set")[0] == 0
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["set"]
    read_set(tmp_path / "x/set")


def test_full_disk(run, tmp_path, monkeypatch):
    write_texts(tmp_path / "raw/a.jsonl")

    def write(self, ids, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(prepare.Bin, "write", write)
    status, _, err = run("raw", "--tokenizer=bytes")
    assert status == 2 and err.count("\n") == 1 and "No space left" in err
    assert not (tmp_path / "data").exists()


def good(tmp_path):
    write_texts(tmp_path / "raw/good.jsonl")


def put(name, data):
    """Set-up of a bad input: the good domain, and a file beside it."""

    def setup(tmp_path):
        good(tmp_path)
        path = tmp_path / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    return setup


def twice(tmp_path):
    good(tmp_path)
    write_texts(tmp_path / "raw/good.jsonl.gz")


def no_file(tmp_path):
    good(tmp_path)
    (tmp_path / "raw/hollow").mkdir()


RAW, KEY = "raw --tokenizer=bytes", " --domain_key=meta.set"
BAD = {
    "no input": (good, "nowhere", ["nowhere", "no such file"]),
    "one file": (good, "raw/good.jsonl", ["raw/good.jsonl", "--domain_key"]),
    "empty directory": (lambda tmp_path: (tmp_path / "raw").mkdir(), RAW, ["raw", "no domain"]),
    "empty folder": (no_file, RAW, ["hollow", "no file"]),
    "unknown type": (put("b.docx", b"x"), RAW, ["raw/b.docx", "unknown file type", ".jsonl"]),
    "two entries": (twice, RAW, ["'good'", "good.jsonl and good.jsonl.gz"]),
    "invalid UTF-8 in a document": (put("b/x.py", b"abc\xff"), RAW, ["raw/b/x.py", "UTF-8 at byte 3"]),
    "invalid UTF-8 in a text": (put("b.txt", b"a" * (1 << 20) + b"\xc3("), RAW, ["raw/b.txt", f"at byte {1 << 20}"]),
    "cut UTF-8 over blocks": (put("b.txt", b"a" * ((1 << 20) - 1) + b"\xc3("), RAW, [f"at byte {(1 << 20) - 1}"]),
    "invalid UTF-8 in a line": (put("b.jsonl", b'{"text": ""}\n{"text": "\xff"}'), RAW, ["b.jsonl, line 2", "byte 10"]),
    "invalid JSON": (put("b.jsonl", b'{"text": "a"}\n\n{"text": \n'), RAW, ["raw/b.jsonl, line 3", "invalid JSON"]),
    "deep JSON": (put("b.jsonl", b"[" * 200_000), RAW, ["raw/b.jsonl, line 1", "invalid JSON"]),
    "not an object": (put("b.jsonl", b"[1]\n"), RAW, ["raw/b.jsonl, line 1", "'text'"]),
    "no text field": (put("b.jsonl", b'{"txt": "a"}\n'), RAW, ["raw/b.jsonl, line 1", "'text'"]),
    "text of another type": (put("b.jsonl", b'{"text": 5}\n'), RAW, ["raw/b.jsonl, line 1", "int", "string"]),
    "half a surrogate": (put("b.jsonl", b'{"text": "\\ud800"}\n'), RAW, ["raw/b.jsonl, line 1", "surrogate"]),
    "not gzip": (put("b.jsonl.gz", b'{"text": "a"}\n'), RAW, ["raw/b.jsonl.gz", "corrupt"]),
    "short gzip": (put("b.jsonl.gz", gzip.compress(str(3**4000).encode())[:99]), RAW, ["raw/b.jsonl.gz", "corrupt"]),
    "short xz": (put("b.jsonl.xz", lzma.compress(b" " * 99)[:50]), RAW, ["raw/b.jsonl.xz", "corrupt"]),
    "not xz": (put("b.jsonl.xz", b"x"), RAW, ["raw/b.jsonl.xz", "corrupt"]),
    "only empty documents": (put("b.jsonl", b'{"text": ""}\n' * 3), RAW, ["'b'", "all of its 3 documents are empty"]),
    "empty text file": (put("b.txt", b""), RAW, ["raw/b.txt", "no document"]),
    "empty rows": (put("b.jsonl", b"\n"), RAW, ["raw/b.jsonl", "no document"]),
    "no rows": (lambda tmp_path: write_rows(tmp_path / "raw/b.jsonl", []), RAW + KEY, ["raw/b.jsonl", "no document"]),
    "no train": (put("b.jsonl", b'{"text": "a"}\n'), RAW, ["'b'", "none of its 1", "in train"]),
    "no val": (put("b.jsonl", b'{"text": "b"}\n' * 2), RAW, ["'b'", "none of its 2", "in val", "--val_fraction=0.05"]),
    "no domain key": (put("b.jsonl", b'{"text": "a"}\n'), RAW + KEY, ["raw/b.jsonl, line 1", "'meta.set'"]),
    "escape": (put("a.jsonl", b'{"text": "a", "meta": {"set": "../x"}}\n'), RAW + KEY, ["line 1", "'../x'"]),
    "absolute": (put("a.jsonl", b'{"text": "a", "meta": {"set": "/x"}}\n'), RAW + KEY, ["line 1", "'/x'"]),
    "nameless": (put("a.jsonl", b'{"text": "a", "meta": {"set": ""}}\n'), RAW + KEY, ["line 1", "''"]),
    "key without input": (good, KEY, ["--domain_key", "INPUT"]),
    "val_fraction": (good, RAW + " --val_fraction=1", ["--val_fraction=1.0", "between 0 and 1"]),
    "val_fraction nan": (good, RAW + " --val_fraction=nan", ["--val_fraction=nan"]),
    "workers": (good, RAW + " --workers=0", ["--workers=0"]),
    "flag": (good, RAW + " --out=x", ["--out=x"]),
    "too small": (good, "raw --tokenizer=train:256", ["--tokenizer=train:256", "257"]),
    "no number": (good, "raw --tokenizer=train:4k", ["--tokenizer=train:4k", "whole number"]),
    "too large": (good, "raw --tokenizer=train:60000", ["--tokenizer=train:60000", "no more than"]),
    "unknown tokenizer": (good, "raw --tokenizer=gpt9", ["--tokenizer=gpt9", "gpt2"]),
    "no tokenizer file": (good, "raw --tokenizer=x.tiktoken", ["x.tiktoken", "No such file"]),
    "bad tokenizer file": (put("../x.tiktoken", b"abc\n"), "raw --tokenizer=x.tiktoken", ["not a tiktoken file"]),
    "gap in ranks": (put("../x.tiktoken", b"YQ== 1\n"), "raw --tokenizer=x.tiktoken", ["x.tiktoken", "ranks"]),
    "existing set": (good, RAW + " --out_dir=raw", ["raw", "exists already"]),
    "out_dir under a file": (good, RAW + " --out_dir=raw/good.jsonl/x", ["--out_dir", "not a directory"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(run, tmp_path, name):
    setup, arguments, words = BAD[name]
    setup(tmp_path)
    before = contents(tmp_path)
    status, _, err = run(*arguments.split())
    assert status == 2 and err.count("\n") == 1 and err.startswith("prepare.py: error: ")
    assert all(word in err for word in words), err
    assert contents(tmp_path) == before and not (tmp_path / "data").exists()


@pytest.mark.parametrize("name, start", [("a/x.txt", b""), ("b.jsonl", b"{"), ("c.txt", EOT.encode())])
def test_document_too_long(run, tmp_path, monkeypatch, name, start):
    monkeypatch.setattr(documents, "LONGEST", 1 << 20)
    put(name, start + b" " * (3 << 20))(tmp_path)
    status, _, err = run("raw", "--tokenizer=bytes")
    assert status == 2 and err.count("\n") == 1 and "1 MiB" in err and f"raw/{name}" in err
    assert not (tmp_path / "data").exists()


def test_too_many_domains(run, tmp_path):
    write_rows(tmp_path / "ids.jsonl", [{"text": "a", "id": str(number)} for number in range(200)])
    status, _, err = run("ids.jsonl", "--domain_key=id", "--tokenizer=bytes")
    assert status == 2 and err.count("\n") == 1 and "--domain_key=id" in err
    assert not (tmp_path / "data").exists()


def test_no_network(tmp_path):
    write_texts(tmp_path / "raw/a.jsonl")
    closed = "http://127.0.0.1:9"
    env = os.environ | {"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"), "HTTPS_PROXY": closed, "https_proxy": closed}
    command = [sys.executable, ROOT / "prepare.py", "raw", "--tokenizer=gpt2"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--tokenizer=gpt2" in done.stderr and "TIKTOKEN_CACHE_DIR" in done.stderr and "train:4096" in done.stderr
    assert not (tmp_path / "data").exists()


# ---- the embedded corpus


@pytest.fixture(scope="module")
def embedded():
    return list(corpus.documents())


@pytest.mark.parametrize(
    "what",
    [
        "[*corpus._files('networkx', ('.py',), 1), *corpus._tables(), *corpus._manual(), *corpus._arithmetic()]",
        pytest.param("list(corpus.documents())", marks=pytest.mark.slow),
    ],
)
def test_embedded_corpus_is_the_same_everywhere(what):
    code = f"import corpus, hashlib; print(hashlib.sha256(ascii({what}).encode()).hexdigest())"
    env = os.environ | {"PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Tokyo", "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen([sys.executable, "-c", code], env=env, cwd="/", stdout=subprocess.PIPE, text=True)
    here = hashlib.sha256(ascii(eval(what)).encode()).hexdigest()
    assert other.communicate()[0].strip() == here


def test_embedded_corpus(embedded):
    sizes, val = collections.Counter(), collections.Counter()
    for domain, text in embedded:
        data = text.encode()
        assert 100 < len(text) <= documents.PIECE
        sizes[domain] += len(data)
        val[domain] += len(data) * (prepare.text_hash(data) < 0.05)
    assert len(sizes) == 10 and max(sizes.values()) > 10 * min(sizes.values())
    assert 20e6 < sum(sizes.values()) < 60e6 and min(sizes.values()) > 500_000
    assert min(val.values()) > 30_000
    assert len({text for _, text in embedded}) == len(embedded)  # no duplicates, within domains or across


def test_embedded_corpus_is_clean(embedded):
    lines = collections.Counter(line.strip() for _, text in embedded for line in set(text.split("\n")))
    licence = sum(count for line, count in lines.items() if "licensed under the" in line.lower())
    assert licence < 30  # files carry them by the thousand
    assert not any(str(ROOT) in text for _, text in embedded)


def test_arithmetic_is_right(embedded):
    sums = 0
    for domain, text in embedded:
        for line in text.split("\n") if domain == "arithmetic" else ():
            if " = " in line and "x" not in line:
                left, right = line.split(" = ")
                assert eval(left) == eval(right)
                sums += 1
    assert sums > 10_000


def test_split_python():
    text = (
        '# Copyright of X\n\n"""Module\n\n>>> 1 + 1\n2\n"""\n\ndef f():\n    """'
        + "Says. " * 40
        + '"""\n    x = """:\n"""\n'
    )
    code, words, sessions = corpus.split_python(corpus.strip_legal(text).replace("Module", "Module " * 30))
    assert "Says" not in code and "Module" not in code and 'x = """:\n"""' in code
    assert words.split() == ["Module"] * 30 + ["Says."] * 40 and sessions == ">>> 1 + 1\n2"
