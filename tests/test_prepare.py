"""prepare.py: what goes in comes out, on the right side of the split, or not at all."""

import hashlib
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import EOT, TEXTS, contents, prepare_in, prose, read_set, refused, sides, write_rows, write_texts

import prepare


def test_known_numbers(tmp_path):
    """Two documents, worked out by hand: blake2b sends 'e' to train and 'b' to val at a fraction of a third."""
    write_texts(tmp_path / "raw/x.jsonl", ["e", "b", "e"])
    prepare_in(tmp_path, "raw --tokenizer=bytes --val_fraction=0.3333333")
    assert (tmp_path / "data/raw/x/train.bin").read_bytes() == b"\x00\x01e\x00\x00\x01e\x00"  # 256, 101, 256, 101
    assert (tmp_path / "data/raw/x/val.bin").read_bytes() == b"\x00\x01b\x00"
    assert json.loads((tmp_path / "data/raw/meta.json").read_text())["domains"] == {
        "x": {"train_tokens": 4, "val_tokens": 2, "train_documents": 2, "val_documents": 1,
              "train_bytes": 2, "val_bytes": 1,
              "train_sha256": hashlib.sha256(b"8" + b"\x00\x01e\x00\x00\x01e\x00").hexdigest(),
              "val_sha256": hashlib.sha256(b"4" + b"\x00\x01b\x00").hexdigest()}}


@pytest.mark.parametrize("spec, vocab_size", [("bytes", 257), ("train:300", 300)])
def test_round_trip(tmp_path, spec, vocab_size):
    write_texts(tmp_path / "raw/jsonl.jsonl", [*TEXTS, "", " \n"])  # empty ones are skipped
    write_texts(tmp_path / "raw/gzip.jsonl.gz", TEXTS[::-1])
    write_texts(tmp_path / "raw/xz.jsonl.xz")
    for number, text in enumerate(TEXTS):
        path = tmp_path / f"elsewhere/{number % 3}/{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (tmp_path / "raw/folder").symlink_to(tmp_path / "elsewhere")  # raw data often lies on another disk
    prepare_in(tmp_path, f"raw --tokenizer={spec}")
    meta, texts = read_set(tmp_path / "data/raw")
    assert (meta["vocab_size"], meta["eot_token"], meta["dtype"]) == (vocab_size, vocab_size - 1, "uint16")
    assert meta["tokenizer"] == spec and len(meta["tokenizer_sha256"]) == 64
    assert list(texts) == ["folder", "gzip", "jsonl", "xz"]
    for found in texts.values():  # neither order, nor format, nor domain moves a document across
        assert sides(found) == sorted(TEXTS) and set(found["val"]) == set(texts["jsonl"]["val"])
    assert texts["jsonl"]["train"] == [text for text in TEXTS if text in texts["jsonl"]["train"]]  # in their order


def test_hash_split(tmp_path):
    """The text's blake2b hash alone decides, so duplicates never straddle the split."""
    texts = [f"{number}" for number in range(2000)]
    write_texts(tmp_path / "raw/a.jsonl", [*texts, *texts[:100]])
    write_texts(tmp_path / "raw/b.jsonl", texts[::-1])
    prepare_in(tmp_path, "raw --tokenizer=bytes")
    found = read_set(tmp_path / "data/raw")[1]
    train, val = (set(found["a"][side]) for side in ("train", "val"))
    hashes = (int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little") for text in texts)
    assert val == {text for text, number in zip(texts, hashes) if number / 256**7 < 0.05} and train == {*texts} - val
    assert (train, val) == tuple(set(found["b"][side]) for side in ("train", "val"))


@pytest.mark.parametrize("gap", ["\n\n", "\r\n\r\n", "\n", " ", ""])
def test_text_files(tmp_path, gap):
    """Without marks, pieces of at most 8 KB, cut at the largest gap that there is, and never within a character."""
    (tmp_path / "raw").mkdir()
    text = gap.join(f"{number:06d}é" * 30 for number in range(3000))
    parts = [f"{number} {gap}x" for number in range(99)]
    (tmp_path / "raw/a.txt").write_bytes(text.encode())
    (tmp_path / "raw/marked.txt").write_bytes(f"\n{EOT}\n".join([*parts, ""]).encode())
    prepare_in(tmp_path, "raw --tokenizer=bytes")
    found = read_set(tmp_path / "data/raw")[1]
    assert sides(found["marked"]) == sorted(parts)
    pieces = found["a"]["train"] + found["a"]["val"]
    assert sum(map(len, pieces)) == len(text) and max(len(piece.encode()) for piece in pieces) <= 8192
    assert sum(piece.endswith(gap) for piece in pieces) >= len(pieces) - 1


def test_max_bytes_keeps_proportions(tmp_path):
    """Of the text, whatever the format, the compression and the other fields of a row."""
    texts = [prose(200, number) for number in range(360)]
    rows = [{"text": text, "other": "x" * 5000} for text in texts]
    write_texts(tmp_path / "raw/a.jsonl", texts[:60])
    write_rows(tmp_path / "raw/b.jsonl.gz", rows[:240])
    pq.write_table(pa.Table.from_pylist(rows[:120]), tmp_path / "raw/c0.parquet")
    write_rows(tmp_path / "raw/c/0.jsonl.xz", rows[120:240])
    write_rows(tmp_path / "raw/c/1.json", rows[:60])
    (tmp_path / "raw/d.txt").write_text(EOT.join(texts[:60]))
    prepare_in(tmp_path, "raw --tokenizer=bytes --max_bytes=200_000 --val_fraction=0.3")
    domains = read_set(tmp_path / "data/raw")[0]["domains"]
    size = {name: entry["train_bytes"] + entry["val_bytes"] for name, entry in domains.items()}
    assert 200_000 <= sum(size.values()) < 202_000  # at most one document too many
    parts = {"a": 60, "b": 240, "c": 180, "c0": 120, "d": 60}
    assert size == pytest.approx({name: 200_000 * part / 660 for name, part in parts.items()}, abs=2000)


def test_max_bytes_estimates_large_files(tmp_path, monkeypatch):
    """From the beginning: here from a tenth, to a tenth."""
    monkeypatch.setattr("prepare.MEASURED", 200_000)
    texts = [prose(200, number) for number in range(2000)]
    write_texts(tmp_path / "a.jsonl", texts)
    write_texts(tmp_path / "a.jsonl.gz", texts)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        found = prepare.text_size(prepare.Input(path, "a", "rows"), "text")
        assert found == pytest.approx(sum(map(len, texts)), rel=0.1) and found != sum(map(len, texts))


def test_max_val_tokens(tmp_path):
    """The fraction held out is halved until it fits; the others are in neither file; train.bin is the same."""
    write_texts(tmp_path / "raw/a.jsonl", [*TEXTS, *TEXTS[:30]])
    prepare_in(tmp_path, "raw --tokenizer=bytes --val_fraction=0.5 --out_dir=all")
    said = prepare_in(tmp_path, "raw --tokenizer=bytes --val_fraction=0.5 --max_val_tokens=2000 --out_dir=some")
    (_, every), (meta, some) = (read_set(tmp_path / name) for name in ("all", "some"))
    expected = [text for text in every["a"]["val"] if prepare.text_hash(text.encode()) < 0.125]
    assert some["a"]["val"] == expected and "0.125" in said
    tokens = [sum(len(text.encode()) + 1 for text in every["a"]["val"] if prepare.text_hash(text.encode()) < limit)
              for limit in (0.125, 0.25)]
    assert tokens[0] == meta["domains"]["a"]["val_tokens"] <= 2000 < tokens[1]
    assert some["a"]["train"] == every["a"]["train"]


def test_runs_agree_to_the_byte_whatever_the_workers(tmp_path):
    for name in "ab":
        write_texts(tmp_path / f"raw/{name}.jsonl", [prose(300, f"{name}{number}") for number in range(300)])
    found = []
    for workers in (1, 2, 5):
        prepare_in(tmp_path, f"raw --tokenizer=train:320 --workers={workers}")
        found.append(contents(tmp_path / "data"))
        shutil.rmtree(tmp_path / "data")
    assert found[0] == found[1] == found[2]


RAW, KEY = "raw --tokenizer=bytes", "raw --tokenizer=bytes --domain_key=meta.set"
BAD = [  # a file beside the good domain (name, bytes), arguments, what is named
    (None, "nowhere", ["nowhere"]),
    (None, "raw/good.jsonl", ["raw/good.jsonl", "--domain_key"]),
    (("b.txt", b""), RAW, ["raw/b.txt", "gives no text"]),
    (("z.jsonl", b'{"text": "b"}\n' * 9), RAW + " --max_bytes=2", ["z.jsonl", "--max_bytes"]),
    (("b.jsonl", b'{"text": "a"}\n'), RAW, ["'b'", "train"]),
    (("b.jsonl", b'{"text": "b"}\n' * 2), RAW, ["'b'", "val"]),
    (("b.jsonl", b'{"text": "a"}\n'), KEY, ["raw/b.jsonl, line 1", "'meta.set'"]),
    (("a.jsonl", b'{"text": "a", "meta": {"set": ""}}'), KEY, ["raw/a.jsonl, line 1", "''"]),
    *((None, f"{RAW} {flag}", [flag.split("=")[0]]) for flag in (
        "--val_fraction=1", "--val_fraction=0", "--val_fraction=nan", "--workers=0", "--eot_token=x")),
    *((None, f"{RAW} --out_dir={path}", [path]) for path in (".", "link", "raw/good.jsonl/x", "raw")),
    *((None, f"raw --tokenizer={spec}", [f"--tokenizer={spec}"]) for spec in (
        "train:256", "train:4k", "train:60000", "gpt9", "gpt2", "x.tiktoken")),
    (("../x.tiktoken", b"YQ== 1\n"), "raw --tokenizer=x.tiktoken", ["x.tiktoken"]),
    (("../t.json", b"{}"), "raw --tokenizer=t.json", ["t.json", "not a tokenizer.json"]),
]  # fmt: skip


@pytest.mark.parametrize("file, arguments, named", BAD)
def test_bad_input(tmp_path, monkeypatch, file, arguments, named):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network for gpt2
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    (tmp_path / "link").symlink_to("nowhere")
    write_texts(tmp_path / "raw/good.jsonl")
    if file:
        (tmp_path / "raw" / file[0]).parent.mkdir(exist_ok=True)
        (tmp_path / "raw" / file[0]).write_bytes(file[1])
    refused(tmp_path / "raw", named, "prepare.py", *arguments.split(), cwd=tmp_path)
    assert not list(tmp_path.glob("data/*"))
