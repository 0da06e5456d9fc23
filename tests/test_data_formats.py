"""Data and tokenizers as other tools make them: Parquet, zstd, the hub, tokenizer.json, and files of token ids."""

import json
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import zstandard
from prepare_tools import TEXTS, contents, prepare_in, prose, read_set, sides, write_texts

import link
import sampler
import tokenizer as tokens
from cli import UserError

UNICODE = [
    *("", " ", "\n\n \t\r\n", "naïve café", "漢字かな交じり文", "e\u0301 vs é", "עברית العربية"),
    *("\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308", "x" * 5000),
    *("don't I'LL", "def f(x):\n\treturn x ** 2  # ok\n", "\U0001d518\U0001d52b \ufb01 ½", "\x00\x07\x7f"),
    *("\u200b\ufeff\u2028", "Жизнь", "12345678901234567890"),
]


@pytest.fixture(scope="module")
def hf_tokenizer(tmp_path_factory):
    """A folder with a byte-level BPE tokenizer as transformers saves it; end of text is id 0."""
    transformers = pytest.importorskip("transformers")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([prose(3000), *TEXTS], vocab_size=400, special_tokens=["<|endoftext|>", "<pad>"])
    folder = tmp_path_factory.mktemp("hf")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    return folder


def test_tokenizer_json_has_the_ids_of_transformers(hf_tokenizer):
    ours = tokens.load_tokenizer(str(hf_tokenizer / "tokenizer.json"))
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(hf_tokenizer)
    for text in [*UNICODE, *(text.replace("<|endoftext|>", "") for text in TEXTS)]:
        assert ours.encode(text.encode()).tolist() == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text.encode()).tolist()).decode() == text
    assert (ours.vocab_size, ours.eot, len(theirs)) == (400, 0, 400)
    assert 0 not in ours.encode(b"<|endoftext|>").tolist()  # a text cannot forge the border of a document


def test_tokenizer_json_makes_a_data_set_that_keeps_it(tmp_path, hf_tokenizer):
    write_texts(tmp_path / "raw/a.jsonl")
    assert prepare_in(tmp_path, f"raw --tokenizer={hf_tokenizer}/tokenizer.json")[0] == 0
    meta, texts = read_set(tmp_path / "data/raw")
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot_token"]) == ("tokenizer.json", 400, 0)
    assert sides(texts["a"]) == sorted(TEXTS)
    assert (tmp_path / "data/raw/tokenizer.json").read_bytes() == (hf_tokenizer / "tokenizer.json").read_bytes()
    status, _, err = prepare_in(tmp_path, f"raw --tokenizer={hf_tokenizer}/tokenizer.json --eot_token=</s> --out_dir=b")
    assert status == 2 and "has no token </s>" in err and "--eot_token" in err


def test_trained_tokenizer_serves_again(tmp_path):
    write_texts(tmp_path / "raw/a.jsonl", [prose(300, number) for number in range(100)])
    assert prepare_in(tmp_path, "raw --tokenizer=train:320 --out_dir=first")[0] == 0
    assert prepare_in(tmp_path, "raw --tokenizer=first/tokenizer.tiktoken --out_dir=second")[0] == 0
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    metas = [json.loads(files.pop(Path("meta.json"))) for files in (first, second)]
    assert [meta.pop("tokenizer") for meta in metas] == ["train:320", "tokenizer.tiktoken"]
    assert metas[0] == metas[1] and first == second


def test_long_documents_are_encoded_in_spans():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"  ": 256}
    tokenizer = tokens.from_ranks("test", ranks)
    for text in (b" " * 1_000_001, "é".encode() * 500_001, b"<|endoftext|>\n" * 100_000):  # they would overflow a stack
        ids = tokenizer.encode(text)
        assert ids.max() < 257 and tokenizer.decode(ids.tolist()) == text


# ---- rows


def as_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)


def as_zst(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = [json.dumps(row).encode() + b"\n" for row in rows]
    packed = [zstandard.compress(b"".join(part)) for part in (data[:50], data[50:])]  # two frames
    path.write_bytes(b"".join(packed))


@pytest.mark.parametrize("write, name", [(as_parquet, "raw.parquet"), (as_zst, "raw.jsonl.zst"), (as_parquet, "hf")])
def test_pile_and_slimpajama_rows(tmp_path, write, name):
    """The nested names of The Pile and SlimPajama, and numbers; "hf" is the hub's reader on a local folder."""
    rows = [{"text": text, "meta": {"pile_set_name": f"Set {n % 2}", "n": n % 2}} for n, text in enumerate(TEXTS)]
    write(tmp_path / name / "part.parquet" if name == "hf" else tmp_path / name, rows)
    source = "hf:hf" if name == "hf" else name
    flags = f"{source} --tokenizer=bytes --val_fraction=0.2"
    for key, out_dir in (("meta.pile_set_name", "names"), ("meta.n", "numbers")):
        status, _, err = prepare_in(tmp_path, f"{flags} --domain_key={key} --out_dir={out_dir}")
        assert status == 0, err
    names, numbers = (read_set(tmp_path / out_dir)[1] for out_dir in ("names", "numbers"))
    assert sides(names["Set 0"]) == sorted(TEXTS[::2]) and sides(names["Set 1"]) == sorted(TEXTS[1::2])
    assert {f"Set {name}": found for name, found in numbers.items()} == names


def test_cut_zst_and_parquet_are_refused(tmp_path):
    as_zst(tmp_path / "a/x.jsonl.zst", [{"text": prose(300, n)} for n in range(200)])
    as_parquet(tmp_path / "b/x.parquet", [{"body": text} for text in TEXTS])
    as_parquet(tmp_path / "c/x.parquet", [{"text": text} for text in TEXTS])
    for path in (tmp_path / "a/x.jsonl.zst", tmp_path / "c/x.parquet"):
        path.write_bytes(path.read_bytes()[:-40])
    messages = {"a": "x.jsonl.zst", "b": "x.parquet, row 1: has no field 'text'", "c": "x.parquet: cannot be read"}
    for folder, words in messages.items():
        status, _, err = prepare_in(tmp_path, f"{folder} --tokenizer=bytes")
        assert status == 2 and err.count("\n") == 1 and words in err, err
        assert not (tmp_path / "data" / folder).exists()


# ---- tokens


EOT, VOCAB, WINDOW = 50256, 50257, 16
CORPUS = [np.append(np.random.default_rng(n).integers(0, 255, size=40 + n % 30), EOT) for n in range(200)]
STREAM = np.concatenate(CORPUS)
VAL = next(i for i in range(len(STREAM) - len(STREAM) // 20, len(STREAM)) if STREAM[i] == EOT)  # where val begins


@pytest.fixture
def gpt2(monkeypatch):
    """A tokenizer of GPT-2's size that needs no download: one byte per id."""
    decode = lambda ids: bytes(ids)  # noqa: E731
    monkeypatch.setattr(link, "load_tokenizer", lambda *_: tokens.Tokenizer("gpt2", "s", VOCAB, EOT, None, decode))


def megatron(folder, dtype="<u2", code=8, version=1):
    STREAM.astype(dtype).tofile(folder / "a_text_document.bin")
    lengths = np.array([len(ids) for ids in CORPUS], "<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", version, code, len(CORPUS), len(CORPUS) + 1)
    index = head + lengths.tobytes() + pointers.tobytes() + np.arange(len(CORPUS) + 1, dtype="<i8").tobytes()
    (folder / "a_text_document.idx").write_bytes(index)


def datatrove(folder):
    STREAM.astype("<u2").tofile(folder / "a.ds")
    np.cumsum([len(ids) for ids in CORPUS]).astype("<u8").tofile(folder / "a.ds.index")
    (folder / "a.ds.metadata").write_text(f"gpt2\n{len(STREAM)}\n12.3 kT")


def llm_c(folder):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(STREAM)
    (folder / "a.bin").write_bytes(header.tobytes() + STREAM.astype("<u2").tobytes())


def rows(folder):
    pq.write_table(pa.table({"input_ids": [ids[:-1] for ids in CORPUS]}), folder / "a.parquet")  # no end of text: added


def packed_rows(folder):
    (folder / "a").mkdir()
    for shard, ids in enumerate((STREAM[:6400], STREAM[6400:])):
        parts = [ids[start : start + 64] for start in range(0, len(ids), 64)]
        pq.write_table(pa.table({"input_ids": parts}), folder / f"a/{shard}.parquet")


FORMATS = {
    "megatron uint16": megatron,
    "megatron int32": lambda folder: megatron(folder, "<i4", 4),
    "datatrove": datatrove,
    "nanogpt": lambda folder: STREAM.astype("<u2").tofile(folder / "a.bin"),
    "llm.c": llm_c,
    "packed rows": packed_rows,
}


@pytest.mark.parametrize("name", FORMATS)
def test_token_files_give_the_windows_of_the_stream(tmp_path, gpt2, name):
    (tmp_path / "raw").mkdir()
    FORMATS[name](tmp_path / "raw")
    status, _, err = prepare_in(tmp_path, "raw --tokenizer=gpt2", main=link.main)
    assert status == 0, err
    data = sampler.load_dataset(tmp_path / "data/raw", WINDOW)
    for found, part in ((data.train[0], STREAM[:VAL]), (data.val[0], STREAM[VAL:])):
        windows = [part[i : i + WINDOW + 1] for i in range(0, len(part) - WINDOW, WINDOW)]
        assert np.array_equal(found, windows)
    entry = data.meta["domains"]["a"]
    held_out = int((STREAM[VAL:] == EOT).sum()) - 1
    assert (entry["train_tokens"], entry["val_tokens"]) == (VAL, len(STREAM) - VAL)
    assert (entry["train_documents"], entry["val_documents"]) == (200 - held_out, held_out)
    assert entry["val_bytes"] == len(STREAM) - VAL - held_out - 1  # a byte per id
    linked = (tmp_path / "data/raw/a/train.bin").is_symlink()
    assert linked == (name not in ("llm.c", "packed rows")) and linked == ("train_file_bytes" in entry)


def test_rows_of_documents_get_their_end_of_text(tmp_path, gpt2):
    (tmp_path / "raw").mkdir()
    rows(tmp_path / "raw")
    assert prepare_in(tmp_path, "raw --tokenizer=gpt2", main=link.main)[0] == 0
    parts = [np.fromfile(tmp_path / f"data/raw/a/{side}.bin", "<u2") for side in ("train", "val")]
    assert np.array_equal(np.concatenate(parts), np.append(EOT, STREAM)[:-1]) and parts[1][0] == EOT


def test_nanogpt_pair_keeps_its_split(tmp_path, gpt2):
    (tmp_path / "raw/owt").mkdir(parents=True)
    for side, ids in (("train", STREAM[:9000]), ("val", STREAM[9000:])):
        ids.astype("<u2").tofile(tmp_path / f"raw/owt/{side}.bin")
    assert prepare_in(tmp_path, "raw --tokenizer=gpt2", main=link.main)[0] == 0
    assert (tmp_path / "data/raw/owt/train.bin").is_symlink()
    data = sampler.load_dataset(tmp_path / "data/raw", 9)
    assert np.array_equal(data.train[0][:, :-1].ravel(), STREAM[: len(data.train[0]) * 9])
    assert np.array_equal(data.val[0][:, :-1].ravel(), STREAM[9000:][: len(data.val[0]) * 9])


@pytest.mark.parametrize("change", ["grown", "gone"])
def test_a_linked_file_that_changed_is_noticed(tmp_path, gpt2, change):
    (tmp_path / "raw").mkdir()
    megatron(tmp_path / "raw")
    assert prepare_in(tmp_path, "raw --tokenizer=gpt2", main=link.main)[0] == 0
    path = tmp_path / "raw/a_text_document.bin"
    path.write_bytes(path.read_bytes() + b"xx") if change == "grown" else path.unlink()
    with pytest.raises(UserError, match=r"a/train\.bin"):
        sampler.load_dataset(tmp_path / "data/raw", WINDOW)


def shorten(folder):
    megatron(folder)
    path = folder / "a_text_document.bin"
    path.write_bytes(path.read_bytes()[:-2])


BAD = {
    "another version": (lambda folder: megatron(folder, version=2), ["a_text_document.idx", "version 2"]),
    "floats": (lambda folder: megatron(folder, code=7), ["a_text_document.idx", "dtype 7"]),
    "cut short": (shorten, ["a_text_document.bin", f"{len(STREAM):,} tokens"]),
    "half a token": (lambda folder: (folder / "a.bin").write_bytes(b"x" * 4001), ["a.bin", "4,001 bytes"]),
    "past the vocabulary": (lambda folder: np.full(999, 60000, "<u2").tofile(folder / "a.bin"), ["a.bin", "60000"]),
    "no end of text": (lambda folder: np.full(999, 7, "<u2").tofile(folder / "a.bin"), ["a.bin", "id 50256"]),
    "two types": (lambda folder: (megatron(folder), STREAM.astype("<u4").tofile(folder / "b.ds"),
                                  np.array([len(STREAM)], "<u8").tofile(folder / "b.ds.index")), ["b.ds", "uint32"]),
    "text": (lambda folder: as_parquet(folder / "a.parquet", [{"text": "a"}]), ["a.parquet", "input_ids"]),
    "unknown": (lambda folder: (folder / "a.npy").write_bytes(b""), ["a.npy", ".ds"]),
    "empty": (lambda folder: (folder / "a.bin").write_bytes(b""), ["a.bin", "no tokens"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_token_files(tmp_path, gpt2, name):
    setup, words = BAD[name]
    (tmp_path / "raw").mkdir()
    setup(tmp_path / "raw")
    status, _, err = prepare_in(tmp_path, "raw --tokenizer=gpt2", main=link.main)
    assert status == 2 and err.count("\n") == 1 and all(word in err for word in words), err
    assert not list(tmp_path.glob("data/*"))


def test_folder_names_are_injective_and_safe():
    names = ["a/b", "a%2Fb", "a b", "Wikipedia (en)", "ä", "a\\b", "a:b"]
    folders = [sampler.folder_name(name) for name in names]
    assert len(set(folders)) == len(names) and folders[2:4] == names[2:4] and not set("/\\:") & set("".join(folders))
