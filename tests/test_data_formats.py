"""Data and tokenizers as other tools make them: Parquet, zstd, the hub, tokenizer.json, and files of token ids."""

import functools
import json
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import zstandard
from conftest import (
    TEXTS,
    TINY,
    prepare_in,
    read_metrics,
    read_set,
    refused,
    run_here,
    sides,
    write_dataset,
    write_texts,
)

import sampler
from common.tokenizer import load_tokenizer

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


def as_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)


def as_zst(path, rows):
    data = [json.dumps(row).encode() + b"\n" for row in rows]
    path.write_bytes(zstandard.compress(b"".join(data[:50])) + zstandard.compress(b"".join(data[50:])))  # two frames


@pytest.mark.parametrize("write, name", [(as_parquet, "raw.parquet"), (as_zst, "raw.jsonl.zst"), (as_parquet, "hf")])
def test_pile_and_slimpajama_rows(tmp_path, write, name):
    """The nested names of The Pile and SlimPajama, and numbers; "hf" is the hub's reader on a local folder."""
    rows = [{"text": text, "meta": {"pile_set_name": f"Set {n % 2}", "n": n % 2}} for n, text in enumerate(TEXTS)]
    write(tmp_path / name / "part.parquet" if name == "hf" else tmp_path / name, rows)
    flags = f"{'hf:hf' if name == 'hf' else name} --tokenizer=bytes --val_fraction=0.2"
    for key, out_dir in (("meta.pile_set_name", "names"), ("meta.n", "numbers")):
        prepare_in(tmp_path, f"{flags} --domain_key={key} --out_dir={out_dir}")
    names, numbers = (read_set(tmp_path / out_dir)[1] for out_dir in ("names", "numbers"))
    assert sides(names["Set 0"]) == sorted(TEXTS[::2]) and sides(names["Set 1"]) == sorted(TEXTS[1::2])
    assert {f"Set {name}": found for name, found in numbers.items()} == names


EOT, WINDOW = 256, 16  # of --tokenizer=bytes: one byte per id
CORPUS = {name: [np.append(np.random.default_rng(n).integers(0, 255, size=40 + n % 30), EOT) for n in numbers]
          for name, numbers in (("a", range(200)), ("b", range(200, 300)))}
STREAM = {name: np.concatenate(documents) for name, documents in CORPUS.items()}
VAL = {name: next(i for i in range(len(ids) - len(ids) // 20, len(ids)) if ids[i] == EOT)  # where val begins
       for name, ids in STREAM.items()}


def megatron(folder, name, dtype="<u2", code=8, version=1):
    STREAM[name].astype(dtype).tofile(folder / f"{name}_text_document.bin")
    lengths = np.array([len(ids) for ids in CORPUS[name]], "<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", version, code, len(lengths), len(lengths) + 1)
    index = head + lengths.tobytes() + pointers.tobytes() + np.arange(len(lengths) + 1, dtype="<i8").tobytes()
    (folder / f"{name}_text_document.idx").write_bytes(index)


def datatrove(folder, name, dtype="<u2"):
    STREAM[name].astype(dtype).tofile(folder / f"{name}.ds")
    np.cumsum([len(ids) for ids in CORPUS[name]]).astype("<u8").tofile(folder / f"{name}.ds.index")
    (folder / f"{name}.ds.metadata").write_text(f"gpt2\n{len(STREAM[name])}\n12.3 kT")


def nanogpt_pair(folder, name):
    (folder / name).mkdir()
    for side, ids in (("train", STREAM[name][: VAL[name]]), ("val", STREAM[name][VAL[name] :])):
        ids.astype("<u2").tofile(folder / name / f"{side}.bin")


def llm_c(folder, name):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(STREAM[name])
    (folder / f"{name}.bin").write_bytes(header.tobytes() + STREAM[name].astype("<u2").tobytes())


def packed_rows(folder, name):
    (folder / name).mkdir()
    for shard, ids in enumerate((STREAM[name][:3200], STREAM[name][3200:])):
        parts = [ids[start : start + 64] for start in range(0, len(ids), 64)]
        pq.write_table(pa.table({"input_ids": parts}), folder / f"{name}/{shard}.parquet")


FORMATS = {
    "megatron uint16": megatron, "megatron int32": functools.partial(megatron, dtype="<i4", code=4),
    "datatrove": datatrove, "nanogpt": lambda folder, name: STREAM[name].astype("<u2").tofile(folder / f"{name}.bin"),
    "nanogpt pair": nanogpt_pair, "llm.c": llm_c, "packed rows": packed_rows}


def link(tmp_path, write, *names):
    (tmp_path / "raw").mkdir()
    for name in names:
        write(tmp_path / "raw", name)
    prepare_in(tmp_path, "raw --tokenizer=bytes", script="tools/link.py")
    return sampler.load_dataset(tmp_path / "data/raw", WINDOW)


def test_rows_of_documents_get_their_end_of_text(tmp_path):
    link(tmp_path, lambda folder, name: pq.write_table(
        pa.table({"input_ids": [ids[:-1] for ids in CORPUS[name]]}), folder / f"{name}.parquet"), "a")
    parts = [np.fromfile(tmp_path / f"data/raw/a/{side}.bin", "<u2") for side in ("train", "val")]
    assert np.array_equal(np.concatenate(parts), np.append(EOT, STREAM["a"])[:-1]) and parts[1][0] == EOT


def losses_on(data, out):
    run_here("train_reference.py", *TINY, "--log_interval=1", f"--data_dir={data}", f"--out_dir={out}")
    return [[line[key] for line in read_metrics(out) if key in line] for key in ("loss", "val_loss")]


@pytest.fixture(scope="module")
def ordinary_losses(tmp_path_factory):
    """Of a small model that is trained on the same tokens as ordinary bins."""
    folder = tmp_path_factory.mktemp("ordinary")
    data = write_dataset(folder / "data", {name: (ids[: VAL[name]], ids[VAL[name] :]) for name, ids in STREAM.items()},
                         vocab_size=257)
    return losses_on(data, folder / "run")


@pytest.mark.parametrize("form", FORMATS)
def test_token_files_give_the_windows_and_losses_of_ordinary_bins(tmp_path, ordinary_losses, form):
    """The losses of a model that is trained on them, linked or copied: to the bit."""
    data = link(tmp_path, FORMATS[form], "a", "b")
    for i, (name, ids) in enumerate(STREAM.items()):
        entry, end = data.meta["domains"][name], VAL[name]
        for found, part in ((data.train[i], ids[:end]), (data.val[i], ids[end:])):
            assert np.array_equal(found, [part[j : j + WINDOW + 1] for j in range(0, len(part) - WINDOW, WINDOW)])
        held_out = int((ids[end:] == EOT).sum()) - 1
        assert (entry["train_tokens"], entry["val_tokens"]) == (end, len(ids) - end)
        assert (entry["train_documents"], entry["val_documents"]) == (len(CORPUS[name]) - held_out, held_out)
        assert entry["val_bytes"] == len(ids) - end - held_out - 1  # a byte per id
        linked = (tmp_path / f"data/raw/{name}/train.bin").is_symlink()
        assert linked == (form not in ("llm.c", "packed rows")) and linked == ("train_file_bytes" in entry)
    found = losses_on(tmp_path / "data/raw", tmp_path / "run")
    assert found == ordinary_losses and len(found[0]) == 12 and len(found[1]) == 2


def test_a_linked_file_that_changed_is_noticed(tmp_path):
    link(tmp_path, megatron, "a")
    with open(tmp_path / "raw/a_text_document.bin", "ab") as file:
        file.write(b"xx")
    refused(tmp_path, ["a/train.bin"], "train_reference.py", *TINY, f"--data_dir={tmp_path}/data/raw",
            f"--out_dir={tmp_path}/run")


@pytest.mark.parametrize("write, named", [
    (lambda folder: megatron(folder, "a", version=2), ["a_text_document.idx"]),
    (lambda folder: megatron(folder, "a", code=7), ["a_text_document.idx"]),  # floats
    (lambda folder: (megatron(folder, "a"), STREAM["a"][:-1].astype("<u2").tofile(folder / "a_text_document.bin")),
     ["a_text_document.bin"]),
    (lambda folder: (folder / "a.bin").write_bytes(b"x" * 4001), ["a.bin"]),
    (lambda folder: np.full(999, 60000, "<u2").tofile(folder / "a.bin"), ["a.bin", "60000"]),
    (lambda folder: np.full(999, 7, "<u2").tofile(folder / "a.bin"), ["a.bin", "256"]),  # no end of text
    (lambda folder: (megatron(folder, "a"), datatrove(folder, "b", "<u4")), ["b.ds"]),  # two types
    (lambda folder: as_parquet(folder / "a.parquet", [{"text": "a"}]), ["a.parquet"]),
    (lambda folder: (folder / "a.parquet").write_bytes(b"PAR1"), ["a.parquet"]),
    (lambda folder: (folder / "a.npy").write_bytes(b""), ["a.npy"]),
    (lambda folder: (folder / "a.bin").write_bytes(b""), ["a.bin"])])
def test_bad_token_files(tmp_path, write, named):
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw")
    refused(tmp_path / "raw", named, "tools/link.py", "raw", "--tokenizer=bytes", cwd=tmp_path)
    assert not list(tmp_path.glob("data/*"))
