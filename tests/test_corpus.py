"""prepare.py: which files of a folder belong to which domain, and what in them is a document."""

import gzip
import json
import os

import pytest
from conftest import TEXTS, prepare_in, read_set, refused, sides, write_rows, write_texts

from common.cli import UserError
from prepare import domain_entries, mixed_rows


def make(root, names):
    """Make files that hold their names; NAME -> TARGET is a link."""
    for name in names.split(","):
        name, _, target = name.strip().partition(" -> ")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(target)
        else:
            path.write_text(name)


@pytest.mark.parametrize("names, expected", [
    ("a.txt, b.jsonl, c/x.py, d/y.jsonl.gz, README.md, .hidden, _SUCCESS",
     "a pieces a.txt, b rows b.jsonl, c document c/x.py, d rows d/y.jsonl.gz"),
    ("a/x.parquet, a/README.md, a/s/_committed_1, a/dataset_infos.json, a/s/_SUCCESS, a/_delta_log/0.json, b/_x, b/x_1",
     "a rows a/x.parquet, b document b/_x, b document b/x_1"),  # what lies beside rows is no document
    ("b/x.json, b/y.NDJSON, b/z.JSONL, c.json.gz, d.Parquet",  # one rule of types at the top and below
     "b rows b/x.json, b rows b/y.NDJSON, b rows b/z.JSONL, c rows c.json.gz, d rows d.Parquet"),
    ("a/a.txt, a/s/a.txt, b.txt", "a document a/a.txt, a document a/s/a.txt, b pieces b.txt"),  # depth decides
    ("a/v1/x, a/latest -> v1, a/y -> v1/x", "a document a/v1/x"),  # each real file once
    ("a/x/1, a/x/up -> .., a/x/deep/up -> ../..", "a document a/x/1"),  # cycles
    ("a/.git/x, a/._y, a/z, a/README.md", "a document a/README.md, a document a/z"),  # hidden files are no data
    ("a/train.py, a/test.py, python_tests.txt", "a document a/test.py, a document a/train.py, python_tests pieces "
                                               "python_tests.txt")])  # fmt: skip
def test_domain_entries(tmp_path, names, expected):
    make(tmp_path, names)
    found = [f"{each.domain} {each.kind} {each.path.relative_to(tmp_path)}" for each in domain_entries(tmp_path)]
    assert found == expected.split(", ")


@pytest.mark.parametrize("names, named", [
    ("a.docx", "a.docx"), ("a/x -> nowhere", "a/x"), ("a -> nowhere", "a: "), ("a/x -> x", "a/x"),
    ("a.txt, a/x", "'a'"), ("a.jsonl, a.jsonl.gz", "'a'"), ("a/x.jsonl, a/notes.py", "notes.py"),
    ("web.txt, web /x", "'web'"), ("Web.txt, web/x", "'Web'"), ("e\u0301.txt, \xe9/x", "alike"),
    ("a/.x", "a: holds no"), (".x", "holds no"),
    ("a/x, b -> a", "b: is also"), ("a/x, b/y -> ../a/x", "b/y: is also"),  # one file in two domains
    # held-out text is not trained on: files of rows, text beside its like, splits in place of domains
    ("a/0.jsonl, a/val.jsonl", "val.jsonl"), ("a/test/0.parquet", "test/0.parquet"),
    ("a/c4-validation.00000-of-00008.json.gz", "validation"), ("a/wiki.train.raw, a/wiki.valid.raw", "wiki.valid.raw"),
    ("a/news-train/1, a/news-test/1", "a/news-test"), ("train.jsonl, test.jsonl", "test.jsonl"), ("dev.txt", "dev.txt"),
    ("train/x, validation/x", "validation")])
def test_folders_that_are_refused(tmp_path, names, named):
    make(tmp_path, names)
    with pytest.raises(UserError) as error:
        domain_entries(tmp_path)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_mixed_rows(tmp_path):
    make(tmp_path, "train/b.jsonl.zst, train/a.parquet, README.md, train/again -> ., train/LICENSE, train/_SUCCESS")
    os.link(tmp_path / "train/a.parquet", tmp_path / "train/same.parquet")
    assert [each.path.name for each in mixed_rows(tmp_path)] == ["a.parquet", "b.jsonl.zst"]
    for name in "val.jsonl.zst", "a.txt", "train/notes.md":
        make(tmp_path, name)
        with pytest.raises(UserError, match=name):
            mixed_rows(tmp_path)
        (tmp_path / name).unlink()


def test_lines_end_at_newlines_and_byte_order_marks_go(tmp_path):
    texts = [f"{text}\u2028and\x85more" for text in TEXTS]
    lines = [json.dumps({"text": "\ufeff" + text}, ensure_ascii=False) for text in texts]
    (tmp_path / "raw/b").mkdir(parents=True)
    (tmp_path / "raw/a.jsonl").write_text("\ufeff" + "\n".join(lines), newline="\n")
    for number, text in enumerate(texts):
        (tmp_path / f"raw/b/{number}.txt").write_text("\ufeff" + text, newline="\n")
    prepare_in(tmp_path, "raw --tokenizer=bytes")
    _, found = read_set(tmp_path / "data/raw")
    assert sides(found["a"]) == sides(found["b"]) == sorted(texts)


GOOD = [{"text": f"{n}", "meta": json.dumps({"set": f"{n % 2}"})} for n in range(200)]  # as RedPajama's


@pytest.mark.parametrize("bad", [{"text": None}, {}, {"text": [1]}, {"text": 1.5}, {"text": "\ud800"}, [], "x",
                                 {"text": "x"}, {"text": "x", "meta": None}, {"text": "x", "meta": {"set": " \u200b"}}])
def test_a_bad_row_is_skipped_and_counted(tmp_path, bad):
    write_rows(tmp_path / "raw/a.jsonl", [bad, *GOOD, bad])
    said = prepare_in(tmp_path, "raw --tokenizer=train:257 --domain_key=meta.set --val_fraction=0.3")
    assert "skipped 2 rows of raw/a.jsonl, the first is raw/a.jsonl, line 1: " in said
    found = read_set(tmp_path / "data/raw")[1]
    assert [sides(found[f"{i}"]) for i in (0, 1)] == [sorted(f"{n}" for n in range(i, 200, 2)) for i in (0, 1)]


def test_a_file_in_another_encoding_is_skipped_and_counted(tmp_path):
    for n, text in enumerate(TEXTS):
        (tmp_path / "raw/a").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"raw/a/{n}.py").write_bytes(text.encode("utf-16" if n in (3, 60) else "utf-8"))
    assert "skipped 2 files of domain 'a'" in prepare_in(tmp_path, "raw --tokenizer=bytes")
    assert sides(read_set(tmp_path / "data/raw")[1]["a"]) == sorted(TEXTS[:3] + TEXTS[4:60] + TEXTS[61:])


@pytest.mark.parametrize("name, data, mentions", [
    ("b.jsonl", b'[{"text": "a"}]', ["b.jsonl, line 1"]),
    ("b/part-00000", b'{"text": "a"}\n{"text": "b"}\n', ["b/part-00000", "rows"]),
    ("b/x.py", b"abc\xff", ["b/x.py", "UTF-8"]), ("b.txt", b"a " * 8000 + b"\xc3(", ["b.txt, document 2", "0xc3"]),
    ("b.jsonl", b'{"text": "a"}\n\n{"text": \n', ["b.jsonl, line 3"]),
    ("b.jsonl", b"[" * 200_000, ["b.jsonl, line 1"]), ("b.jsonl", b'{"text": null}\n', ["b.jsonl, line 1"]),
    ("b.jsonl", b'{"text": "a"}\n' * 1000 + b'{"txt": "a"}\n' * 1000, ["b.jsonl, line 1001", "'text'"]),
    ("b.jsonl.gz", gzip.compress(str(3**4000).encode())[:99], ["b.jsonl.gz"]), ("b.jsonl.xz", b"x", ["b.jsonl.xz"]),
    ("b.jsonl.zst", b"x", ["b.jsonl.zst"]), ("b.parquet", b"x", ["b.parquet"])])
def test_files_that_are_refused(tmp_path, name, data, mentions):
    write_texts(tmp_path / "raw/good.jsonl")
    (tmp_path / "raw" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "raw" / name).write_bytes(data)
    refused(tmp_path / "raw", mentions, "prepare.py", "raw", "--tokenizer=bytes", cwd=tmp_path)
    assert not list(tmp_path.glob("data/*"))
