"""prepare.py, wrong inputs: one line, exit status 2, nothing left behind and nothing touched."""

import gzip
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prepare_tools import contents, prepare_in, write_rows, write_texts

import prepare

ROOT = Path(__file__).resolve().parent.parent
RAW, KEY = "raw --tokenizer=bytes", " --domain_key=meta.set"


def put(name, data):
    """Return a set-up: the file beside a good domain."""

    def setup(tmp_path):
        path = tmp_path / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    return setup


def row(domain):
    return put("a.jsonl", b'{"text": "a", "meta": {"set": %s}}\n' % domain)


def good(tmp_path):
    """The good domain alone."""


BAD = {
    "no input": (good, "nowhere", ["nowhere", "no such file"]),
    "one file": (good, "raw/good.jsonl", ["raw/good.jsonl", "--domain_key"]),
    "empty folder": (lambda tmp_path: (tmp_path / "raw/hollow").mkdir(), RAW, ["raw/hollow", "no documents"]),
    "unknown type": (put("b.docx", b"x"), RAW, ["raw/b.docx", "unknown file type", ".jsonl"]),
    "two entries": (put("good.jsonl.gz", b""), RAW, ["'good'", "good.jsonl and good.jsonl.gz"]),
    "invalid UTF-8 in a file": (put("b/x.py", b"abc\xff"), RAW, ["raw/b/x.py", "position 3"]),
    "invalid UTF-8 in a text": (put("b.txt", b"a " * 8000 + b"\xc3("), RAW, ["raw/b.txt, document 2"]),
    "invalid UTF-8 in a line": (put("b.jsonl", b'{"text": ""}\n{"text": "\xff"}'), RAW, ["b.jsonl, line 2"]),
    "invalid JSON": (put("b.jsonl", b'{"text": "a"}\n\n{"text": \n'), RAW, ["raw/b.jsonl, line 3"]),
    "deep JSON": (put("b.jsonl", b"[" * 200_000), RAW, ["raw/b.jsonl, line 1"]),
    "not an object": (put("b.jsonl", b"[1]\n"), RAW, ["raw/b.jsonl, line 1", "'text'"]),
    "no text field": (put("b.jsonl", b'{"txt": "a"}\n'), RAW, ["raw/b.jsonl, line 1", "'text'", "--text_key"]),
    "text of another type": (put("b.jsonl", b'{"text": null}\n'), RAW, ["raw/b.jsonl, line 1", "NoneType", "string"]),
    "half a surrogate": (put("b.jsonl", b'{"text": "\\ud800"}\n'), RAW, ["raw/b.jsonl, line 1", "surrogate"]),
    "not gzip": (put("b.jsonl.gz", b'{"text": "a"}\n'), RAW, ["raw/b.jsonl.gz", "cannot be read"]),
    "short gzip": (put("b.jsonl.gz", gzip.compress(str(3**4000).encode())[:99]), RAW, ["b.jsonl.gz", "cannot be read"]),
    "short xz": (put("b.jsonl.xz", lzma.compress(b" " * 99)[:50]), RAW, ["raw/b.jsonl.xz", "cannot be read"]),
    "not xz": (put("b.jsonl.xz", b"x"), RAW, ["raw/b.jsonl.xz", "cannot be read"]),
    "only empty documents": (put("b.jsonl", b'{"text": ""}\n' * 3), RAW, ["'b'", "none of its 0 documents"]),
    "empty text file": (put("b.txt", b""), RAW, ["raw/b.txt", "gives no document"]),
    "empty rows": (put("b.jsonl", b"\n"), RAW, ["raw/b.jsonl", "gives no document"]),
    "nothing in train": (put("b.jsonl", b'{"text": "a"}\n'), RAW, ["'b'", "none of its 1", "in train"]),
    "nothing in val": (put("b.jsonl", b'{"text": "b"}\n' * 2), RAW, ["'b'", "none of its 2", "in val", "0.05"]),
    "sample too small": (put("z.jsonl", b'{"text": "b"}\n' * 9), RAW + " --max_bytes=2", ["z.jsonl", "--max_bytes=2"]),
    "no domain key": (put("b.jsonl", b'{"text": "a"}\n'), RAW + KEY, ["raw/b.jsonl, line 1", "'meta.set'"]),
    "fraction of a domain": (row(b"1.5"), RAW + KEY, ["raw/a.jsonl, line 1", "float"]),
    "hidden name": (row(b'"../x"'), RAW + KEY, ["raw/a.jsonl", "'../x'"]),
    "nameless": (row(b'""'), RAW + KEY, ["raw/a.jsonl", "''"]),
    "control character": (row(b'"a\\n"'), RAW + KEY, ["raw/a.jsonl", "'a\\n'"]),
    "val_fraction": (good, RAW + " --val_fraction=1", ["--val_fraction"]),
    "val_fraction 0": (good, RAW + " --val_fraction=0", ["--val_fraction"]),
    "val_fraction nan": (good, RAW + " --val_fraction=nan", ["--val_fraction"]),
    "workers": (good, RAW + " --workers=0", ["--workers"]),
    "flag": (good, RAW + " --out=x", ["--out=x"]),
    "too small": (good, "raw --tokenizer=train:256", ["--tokenizer=train:256", "257"]),
    "no number": (good, "raw --tokenizer=train:4k", ["--tokenizer=train:4k", "whole number"]),
    "too large": (good, "raw --tokenizer=train:60000", ["--tokenizer=train:60000", "yields only"]),
    "unknown tokenizer": (good, "raw --tokenizer=gpt9", ["--tokenizer=gpt9", "gpt2"]),
    "no tokenizer file": (good, "raw --tokenizer=x.tiktoken", ["x.tiktoken", "No such file"]),
    "bad tokenizer file": (put("../x.tiktoken", b"abc\n"), "raw --tokenizer=x.tiktoken", ["not a .tiktoken file"]),
    "gap in ranks": (put("../x.tiktoken", b"YQ== 1\n"), "raw --tokenizer=x.tiktoken", ["x.tiktoken", "ranks"]),
    "not a tokenizer.json": (put("../t.json", b"{}"), "raw --tokenizer=t.json", ["t.json", "not a tokenizer.json"]),
    "existing set": (good, RAW + " --out_dir=raw", ["raw", "exists already"]),
    "out_dir under a file": (good, RAW + " --out_dir=raw/good.jsonl/x", ["--out_dir", "raw/good.jsonl"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(tmp_path, name):
    setup, arguments, words = BAD[name]
    write_texts(tmp_path / "raw/good.jsonl")
    setup(tmp_path)
    before = contents(tmp_path)
    status, _, err = prepare_in(tmp_path, arguments)
    assert status == 2 and err.count("\n") == 1 and err.startswith("prepare.py: error: ")
    assert all(word in err for word in words), err
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob("data/*"))


def test_too_many_domains(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MOST_DOMAINS", 50)
    write_rows(tmp_path / "ids.jsonl", [{"text": "a", "id": number} for number in range(51)])
    status, _, err = prepare_in(tmp_path, "ids.jsonl --domain_key=id --tokenizer=bytes")
    assert status == 2 and err.count("\n") == 1 and "--domain_key=id" in err
    assert not list(tmp_path.glob("data/*"))


@pytest.mark.parametrize("flags, words", [
    ("raw --tokenizer=gpt2", ["--tokenizer=gpt2", "TIKTOKEN_CACHE_DIR", "train:4096"]),
    ("hf:nobody/nothing --tokenizer=bytes", ["hf:nobody/nothing: cannot be loaded"]),
])  # fmt: skip
def test_no_network(tmp_path, flags, words):
    write_texts(tmp_path / "raw/a.jsonl")
    closed = "http://127.0.0.1:9"
    env = os.environ | {"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"), "HTTPS_PROXY": closed, "https_proxy": closed}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, ROOT / "prepare.py", *flags.split()]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert not list(tmp_path.glob("data/*"))


@pytest.mark.parametrize("name, package", [("b.parquet", "pyarrow"), ("b.jsonl.zst", "pyarrow"),
                                           ("../t.json", "tokenizers")])  # fmt: skip
def test_missing_package_is_named(tmp_path, monkeypatch, name, package):
    write_texts(tmp_path / "raw/a.jsonl")
    put(name, b"{}")(tmp_path)
    for module in [package, *(module for module in sys.modules if module.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    status, _, err = prepare_in(tmp_path, "raw --tokenizer=" + ("t.json" if "t.json" in name else "bytes"))
    assert status == 2 and err.count("\n") == 1 and f"needs the package {package}" in err and "[hub]" in err
