"""Data and tokenizers as other tools make them: Parquet, zstd, the hub, tokenizer.json, and files of token ids."""

import functools
import json
import shutil
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import zstandard
from conftest import TEXTS, prepare_in, read_set, refused, sides, write_rows, write_texts

import sampler
from common.cli import UserError
from common.tokenizer import data_tokenizer, load_tokenizer

UNICODE = ["", "\n\n \t\r\n", "naïve café", "漢字かな交じり文", "e\u0301 vs é", "עברית", "x" * 5000, "don't I'LL",
           "\x00\x7f", "\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f", "\U0001d518 ½", "\u200b\ufeff\u2028", "1234"]


@pytest.fixture(scope="module")
def hf_tokenizer(tmp_path_factory):
    """tokenizer.json of a byte-level BPE tokenizer; end of text is id 0."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=300, special_tokens=["<|endoftext|>", "<pad>"])
    bpe.save(str(path := tmp_path_factory.mktemp("hf") / "tokenizer.json"))
    return path


def test_tokenizer_json_has_the_ids_of_transformers(hf_tokenizer):
    ours = load_tokenizer(str(hf_tokenizer))
    theirs = pytest.importorskip("transformers").PreTrainedTokenizerFast(tokenizer_file=str(hf_tokenizer))
    for text in [*UNICODE, *(text.replace("<|endoftext|>", "") for text in TEXTS)]:
        assert ours.encode(text.encode()).tolist() == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text.encode()).tolist()).decode() == text
    assert (ours.vocab_size, ours.eot, len(theirs)) == (300, 0, 300)
    assert 0 not in ours.encode(b"<|endoftext|>").tolist()  # a text cannot forge the border of a document


def test_tokenizers_are_kept_beside_the_data_and_serve_again(tmp_path, hf_tokenizer):
    write_texts(tmp_path / "raw/a.jsonl")
    for spec, out_dir in ((hf_tokenizer, "json"), ("train:300", "first"),
                          ("first/tokenizer.tiktoken", "second")):
        prepare_in(tmp_path, f"raw --tokenizer={spec} --out_dir={out_dir}")
    (json_meta, texts), (first, _), (second, _) = (read_set(tmp_path / name) for name in ("json", "first", "second"))
    assert (json_meta["tokenizer"], json_meta["vocab_size"], json_meta["eot_token"]) == ("tokenizer.json", 300, 0)
    assert sides(texts["a"]) == sorted(TEXTS)
    assert (tmp_path / "json/tokenizer.json").read_bytes() == hf_tokenizer.read_bytes()
    assert (first.pop("tokenizer"), second.pop("tokenizer")) == ("train:300", "tokenizer.tiktoken") and first == second
    assert (tmp_path / "first/a/train.bin").read_bytes() == (tmp_path / "second/a/train.bin").read_bytes()
    refused(tmp_path / "raw", ["</s>"], "prepare.py", "raw", f"--tokenizer={hf_tokenizer}", "--eot_token=</s>",
            cwd=tmp_path)
    for path in tmp_path / "json/tokenizer.json", tmp_path / "first/tokenizer.tiktoken":
        data = sampler.load_dataset(path.parent, 16)
        assert data_tokenizer(data).sha256 == data.meta["tokenizer_sha256"]
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(UserError, match=r"damaged|made with"):
            data_tokenizer(data)
        path.unlink()
        with pytest.raises(UserError, match="is gone"):
            data_tokenizer(data)


@pytest.mark.parametrize("special, ordinary, expected", [
    (["</s>"], ["<|endoftext|>"], 0),  # the special one, not the first of the usual names
    (["<s>"], ["<eos>"], 1), (["<|endoftext|>", "</s>"], [], None), (["<s>"], ["<|endoftext|>", "</s>"], None)])
def test_end_of_text_token_of_a_tokenizer_json(tmp_path, special, ordinary, expected):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: n for n, name in enumerate(special + ordinary)}))
    made.add_special_tokens(special)
    made.save(path := str(tmp_path / "tokenizer.json"))
    if expected is None:
        with pytest.raises(UserError, match="--eot_token"):
            load_tokenizer(path)
    else:
        assert load_tokenizer(path).eot == expected
    assert load_tokenizer(path, special[0]).eot == 0


def test_a_tokenizer_json_with_dropout_gives_one_answer(tmp_path, hf_tokenizer):
    content = json.loads(hf_tokenizer.read_text())
    content["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    expected = load_tokenizer(str(hf_tokenizer)).encode(TEXTS[0].encode()).tolist()
    dropping = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert all(dropping.encode(TEXTS[0].encode()).tolist() == expected for _ in range(9))


@pytest.mark.parametrize("unknown", [None, "<|endoftext|>", "[UNK]"])
def test_characters_that_a_tokenizer_json_lacks(tmp_path, unknown):
    """It has those of ASCII alone: text in others is refused, however it stands for them, and a few are let pass."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=unknown, fuse_unk=True))
    names = ["<|endoftext|>", *([unknown] if unknown and unknown.startswith("[") else [])]
    bpe.train_from_iterator([chr(i) for i in range(10, 127)], tokenizers.trainers.BpeTrainer(special_tokens=names))
    bpe.save(str(tmp_path / "tokenizer.json"))
    for name, word in ("few", "plain " * 40), ("many", ""):
        write_texts(tmp_path / name / "good.jsonl", [f"plain {n}" for n in range(200)])
        write_texts(tmp_path / name / "web.jsonl", [f"{word}{n} 漢字" for n in range(200)])
    assert "'web': tokenizer.json loses 0.8" in prepare_in(tmp_path, "few --tokenizer=tokenizer.json")
    refused(tmp_path / "many", ["'web'", "tokenizer.json loses"], "prepare.py", "many", "--tokenizer=tokenizer.json",
            cwd=tmp_path)


def test_a_home_directory_and_remote_addresses(tmp_path, monkeypatch, hf_tokenizer):
    """The shell leaves ~ alone behind =."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_texts(tmp_path / "raw/a.jsonl")
    shutil.copy(hf_tokenizer, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    prepare_in(tmp_path / "elsewhere", "~/raw --out_dir=~/data/set --tokenizer=~/tokenizer.json")
    assert (tmp_path / "data/set/meta.json").exists() and not list((tmp_path / "elsewhere").iterdir())
    for flags in ["s3://a/raw"], ["raw", "--out_dir=gs://a/b"], ["raw", "--tokenizer=https://a/tokenizer.json"]:
        refused(tmp_path, [flags[-1].split("=")[-1], "remote"], "prepare.py", *flags, cwd=tmp_path)


def as_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)


def as_zst(path, rows):
    data = [json.dumps(row).encode() + b"\n" for row in rows]
    path.write_bytes(zstandard.compress(b"".join(data[:50])) + zstandard.compress(b"".join(data[50:])))  # two frames


@pytest.mark.parametrize("write, name", [(as_parquet, "raw.parquet"), (as_zst, "raw.jsonl.zst"), (as_parquet, "hf/0"),
                                         (write_rows, "raw.jsonl.xz"), (write_rows, "raw/deep/0.jsonl.gz")])
def test_rows_that_name_their_domain(tmp_path, write, name):
    """By a path or, if it is one, a key; "hf" is the hub's reader on a local folder."""
    rows = [{"text": text, "meta": {"set": f"a/{n % 2}: ä", "n": "path"}, "meta.n": n % 2}
            for n, text in enumerate(TEXTS)]
    write(tmp_path / f"{name}.parquet" if name == "hf/0" else tmp_path / name, rows)
    for key in "set", "n":
        source = "hf:hf" if name == "hf/0" else name.split("/")[0]
        prepare_in(tmp_path, f"{source} --tokenizer=bytes --val_fraction=0.2 --domain_key=meta.{key} --out_dir={key}")
    names, numbers = (read_set(tmp_path / key)[1] for key in ("set", "n"))
    assert sides(numbers["0"]) == sorted(TEXTS[::2]) and sides(numbers["1"]) == sorted(TEXTS[1::2])
    assert {f"a/{n}: ä": found for n, found in numbers.items()} == names


EOT, WINDOW = 256, 16  # of --tokenizer=bytes: one byte per id
CORPUS = {name: [np.append(np.random.default_rng(n).integers(0, 255, size=40 + n % 30), EOT) for n in numbers]
          for name, numbers in (("a", range(200)), ("b", range(200, 300)))}
STREAM = {name: np.concatenate(documents) for name, documents in CORPUS.items()}
VAL = {name: next(i for i in range(len(ids) - len(ids) // 20, len(ids)) if ids[i] == EOT)  # where val begins
       for name, ids in STREAM.items()}


def megatron(folder, name, dtype="<u2", code=8, version=1, magic=b"MMIDIDX\0\0", documents=None):
    """Each document is two sequences, like sentences."""
    documents = documents or CORPUS[name]
    np.concatenate(documents).astype(dtype).tofile(folder / f"{name}_text_document.bin")
    lengths = np.array([n for ids in documents for n in (5, len(ids) - 5)], "<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    head = struct.pack("<9sQBQQ", magic, version, code, len(lengths), len(documents) + 1)
    borders = 2 * np.arange(len(documents) + 1, dtype="<i8")
    index = head + lengths.tobytes() + pointers.tobytes() + borders.tobytes()
    (folder / f"{name}_text_document.idx").write_bytes(index)


def datatrove(folder, name, dtype="<u2"):
    STREAM[name].astype(dtype).tofile(folder / f"{name}.ds")
    np.cumsum([len(ids) for ids in CORPUS[name]]).astype("<u8").tofile(folder / f"{name}.ds.index")
    (folder / f"{name}.ds.metadata").write_text("gpt2")


def bare(folder, file, ids=STREAM["a"], dtype="<u2", head=b""):
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(head + ids.astype(dtype).tobytes())


def nanogpt_pair(folder, name):
    """Like fineweb's, and with test data, which is left out."""
    bare(folder, f"{name}/{name}_train_000001.bin", STREAM[name][: VAL[name]])
    bare(folder, f"{name}/{name}_val_000000.bin", STREAM[name][VAL[name] :])
    bare(folder, f"{name}/test.bin", STREAM[name])


FORMATS = {
    "megatron uint16": megatron, "megatron int32": functools.partial(megatron, dtype="<i4", code=4),
    "megatron int64": functools.partial(megatron, dtype="<i8", code=5), "datatrove": datatrove,
    "datatrove uint32": functools.partial(datatrove, dtype="<u4"),
    **{f"bare {dtype}": lambda folder, name, dtype=dtype: bare(folder, f"{name}.bin", STREAM[name], dtype)
       for dtype in ("<u2", "<i4", "<i8")},
    "two types": lambda folder, name: bare(folder, f"{name}.bin", STREAM[name], "<u4" if name == "a" else "<u2"),
    "train and val": nanogpt_pair}  # fmt: skip
COPIED = ("megatron int64", "bare <i8")


def link(tmp_path, write, flags=""):
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw")
    prepare_in(tmp_path, f"raw --tokenizer=bytes {flags}", script="tools/link.py")
    return sampler.load_dataset(tmp_path / "data/raw", WINDOW)


DOCUMENTS = [np.random.default_rng(n).integers(0, 255, size=40 + n % 30) for n in range(2100)]
LONE = [*DOCUMENTS[:7], np.insert(DOCUMENTS[7], 9, EOT), *DOCUMENTS[8:]]  # one has end of text inside
ENDED = [np.append(ids, EOT) for ids in DOCUMENTS]
PADDED = [np.append(ids, np.full(80 - len(ids), EOT)) for ids in DOCUMENTS]


@pytest.mark.parametrize("documents", [ENDED, [np.append(EOT, ids) for ids in DOCUMENTS]])
def test_documents_are_marked(tmp_path, documents):
    entry = link(tmp_path, lambda folder: megatron(folder, "a", documents=documents)).meta["domains"]["a"]
    train, val = (np.fromfile(tmp_path / f"data/raw/a/{side}.bin", "<u2")[: entry[f"{side}_tokens"]]
                  for side in ("train", "val"))
    ids = np.concatenate([train, val])
    assert entry["train_documents"] + entry["val_documents"] == (ids == EOT).sum() == 2100 and val[0] == EOT
    assert sorted(ids[ids != EOT].tolist()) == sorted(np.concatenate(DOCUMENTS))


@pytest.mark.parametrize("form", FORMATS)
def test_token_files_give_the_windows_of_ordinary_bins(tmp_path, form):
    data = link(tmp_path, lambda folder: [FORMATS[form](folder, name) for name in CORPUS])
    for i, (name, ids) in enumerate(STREAM.items()):
        entry, end = data.meta["domains"][name], VAL[name]
        for found, part in ((data.train[i], ids[:end]), (data.val[i], ids[end:])):
            assert np.array_equal(found, [part[j : j + WINDOW + 1] for j in range(0, len(part) - WINDOW, WINDOW)])
        held_out = int((ids[end:] == EOT).sum()) - 1
        assert (entry["train_tokens"], entry["val_tokens"]) == (end, len(ids) - end)
        assert (entry["train_documents"], entry["val_documents"]) == (len(CORPUS[name]) - held_out, held_out)
        assert entry["val_bytes"] == len(ids) - end - held_out - 1  # a byte per id
        linked = (tmp_path / f"data/raw/{name}/train.bin").is_symlink()
        assert linked == (form not in COPIED and (form, name) != ("two types", "a"))
        assert linked == ("train_file_bytes" in entry)


def test_a_linked_file_that_changed_is_noticed(tmp_path):
    link(tmp_path, lambda folder: megatron(folder, "a"))
    with open(tmp_path / "raw/a_text_document.bin", "ab") as file:
        file.write(b"xx")
    with pytest.raises(UserError, match=r"a/train\.bin"):
        sampler.load_dataset(tmp_path / "data/raw", WINDOW)
    (tmp_path / "raw").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"{tmp_path}/raw/a_text_document.bin, which is gone"):
        sampler.load_dataset(tmp_path / "data/raw", WINDOW)


@pytest.mark.parametrize("write, named", [
    (lambda folder: megatron(folder, "a", magic=b"TNTIDX\0\0\0"), ["a_text_document.idx"]),
    (lambda folder: megatron(folder, "a", code=7), ["a_text_document.idx"]),  # floats
    (lambda folder: (megatron(folder, "a"), bare(folder, "a_text_document.bin", STREAM["a"][:-1])),
     ["a_text_document.bin"]),
    (lambda folder: (megatron(folder, "a"), (folder / "a_text_document.bin").rename(folder / "b.bin")),
     ["a_text_document.idx", "missing"]),
    (lambda folder: (datatrove(folder, "a"), bare(folder, "a.ds", STREAM["a"][:-9])), ["a.ds"]),
    (lambda folder: (datatrove(folder, "a"), (folder / "a.ds").unlink()), ["a.ds.index", "missing"]),
    (lambda folder: bare(folder, "a.bin", head=np.eye(1, 256, dtype="<i4").tobytes()), ["a.bin", "header"]),  # llm.c
    (lambda folder: bare(folder, "a.bin", head=b"\x93NUMPY\x01\0"), ["a.bin", "header"]),
    (lambda folder: bare(folder, "a.bin", dtype=">u2"), ["a.bin", "65024"]),
    (lambda folder: (folder / "a.bin").write_bytes(b"x" * 4001), ["a.bin"]),
    (lambda folder: bare(folder, "a.bin", np.full(999, 60000)), ["a.bin", "60000"]),
    (lambda folder: bare(folder, "a.bin", np.full(999, 7)), ["a.bin", "256"]),  # no end of text
    (lambda folder: bare(folder, "a/test.bin"), ["raw/a"]),
    (lambda folder: (bare(folder, "train.bin"), bare(folder, "val.bin")), ["val.bin"]),
    (lambda folder: (bare(folder, "a/x.bin"), bare(folder, "a/x.npy")), ["x.npy", ".bin"]),
    (lambda folder: bare(folder, "a.bin", np.concatenate(PADDED)), ["padding"]),
    (lambda folder: megatron(folder, "a", documents=DOCUMENTS), ["--append-eod"]),
    (lambda folder: megatron(folder, "a", documents=LONE), ["--append-eod"]),
    (lambda folder: megatron(folder, "a", documents=DOCUMENTS[9:] + ENDED[:9]), ["--append-eod"]),
    (lambda folder: megatron(folder, "a", "<i4", 4, documents=[*ENDED[:99], np.full(6, -1)]), ["4294967295"]),
    (lambda folder: megatron(folder, "a", "<i8", 5, documents=[*ENDED[:99], np.full(6, 2**32 + 5)]), ["4294967301"]),
    (lambda folder: as_parquet(folder / "a.parquet", [{"text": "a"}]), ["a.parquet", "prepare.py"])])
def test_bad_token_files(tmp_path, write, named):
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw")
    refused(tmp_path / "raw", named, "tools/link.py", "raw", "--tokenizer=bytes", cwd=tmp_path)
    assert not list(tmp_path.glob("data/*"))


def test_an_empty_shard_and_a_type_by_flag(tmp_path):
    """Every second id is 0, which --dtype says are ids, too; one shard has none."""
    ids = np.stack([STREAM["a"], np.zeros_like(STREAM["a"])], axis=1).ravel()
    def shards(folder):
        bare(folder, "a/0.bin", ids)
        bare(folder, "a/1.bin", np.arange(0))

    entry = link(tmp_path, shards, "--dtype=uint16").meta["domains"]["a"]
    assert entry["train_tokens"] + entry["val_tokens"] == 2 * len(STREAM["a"])
