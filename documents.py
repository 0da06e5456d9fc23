"""Reading INPUT: which files make which domain, and the documents in them.

Memory is bounded by the longest document, LONGEST. Whatever is wrong with a file is a UserError that names the file and
the line or the byte.
"""

import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import re
import zlib
from pathlib import Path

from tqdm import tqdm

from cli import UserError

MARK = "<|endoftext|>"  # between the documents of DOMAIN.txt
PIECE = 8 << 10  # characters: longest piece of a text that is cut into documents
LONGEST = 64 << 20  # bytes: longest document; the memory that a run needs grows with it
MOST_DOMAINS = 100  # each holds two files open while it is written
ROWS = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet")
ABOUT = re.compile(r"(?i)(readme|licen[cs]es?|notice|copying|citation|changelog)(\.(txt|md|rst|cff))?$")


class CountedFile(io.FileIO):
    """A file that moves a progress bar by the bytes that are read from it."""

    def __init__(self, path, bar):
        super().__init__(path)
        self.bar = bar

    def readinto(self, buffer):
        count = super().readinto(buffer)
        self.bar.update(count)
        return count


@contextlib.contextmanager
def opened(path, bar):
    """The bytes of a file, decompressed; failures to read become a UserError that names it."""
    corrupt = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
    try:
        file = io.BufferedReader(CountedFile(path, bar), 1 << 20)
        if path.suffix == ".gz":
            file = gzip.GzipFile(fileobj=file)
        elif path.suffix == ".xz":
            file = lzma.LZMAFile(file)  # noqa: SIM115 (closed below)
        elif path.suffix == ".zst":
            zstandard = optional("zstandard", path)
            corrupt += (zstandard.ZstdError,)
            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            file = io.BufferedReader(reader, 1 << 20)
        with file:
            yield file
    except corrupt as error:
        raise UserError(f"{path}: corrupt or cut short ({error}); fetch or compress it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def optional(package, what):
    try:
        return __import__(package)
    except ImportError:
        raise UserError(f"{what}: reading it needs the package {package}: pip install {package}") from None


def read_document(path, bar):
    """Yield a whole file as one text."""
    with opened(path, bar) as file:
        data = file.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise UserError(
            f"{path}: a document of more than {LONGEST >> 20} MiB; split it, or make it a domain of its own, "
            "DOMAIN.txt, which is cut into documents"
        )
    try:
        yield data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: invalid UTF-8 at byte {error.start}; convert it, or take it out") from None


def read_blocks(path, bar):
    """Yield a file as texts of about 1 MB."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    with opened(path, bar) as file:
        while True:
            block = file.read(1 << 20)
            pending = len(decoder.getstate()[0])  # bytes of a character that the last block cut
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = position - pending + error.start
                raise UserError(f"{path}: invalid UTF-8 at byte {at}; convert it, or take it out") from None
            if not block:
                return
            position += len(block)


def read_text(path, bar):
    """Yield the documents of DOMAIN.txt."""
    if not has_mark(path):
        yield from cut(read_blocks(path, bar))
        return
    rest = ""
    for block in read_blocks(path, bar):
        *texts, rest = (rest + block).split(MARK)
        yield from (text.strip("\r\n") for text in texts)
        if len(rest) > LONGEST:
            raise UserError(f"{path}: a document of more than {LONGEST >> 20} MiB between two {MARK}; split it")
    if rest.strip():  # a mark at the end of the file closes the last document and opens none
        yield rest.strip("\r\n")


def has_mark(path):
    tail = b""
    with opened(path, tqdm(disable=True)) as file:
        while block := file.read(1 << 20):
            if MARK.encode() in tail + block:
                return True
            tail = block[-len(MARK) :]
    return False


def cut(blocks, size=PIECE):
    """Cut a text that comes in blocks into pieces of size / 2 to size characters, the last one excepted.

    A piece ends after the last blank line that fits, else after the last line, the last word, or where it must.
    """
    rest = ""
    for block in blocks:
        rest, start = rest + block, 0
        while len(rest) - start > size:
            for mark in ("\n\n", "\n\r\n", "\n", " ", ""):
                at = rest.rfind(mark, start + size // 2, start + size)
                if at >= 0:
                    break
            yield rest[start : at + len(mark)]
            start = at + len(mark)
        rest = rest[start:]
    if rest:
        yield rest


def read_rows(path, bar):
    """Yield (place, row) for each line of JSON lines, or each row of Parquet or of a data set of the hub."""
    if str(path).startswith("hf:") or path.suffix == ".parquet":
        load = optional("datasets", path).load_dataset
        try:
            if str(path).startswith("hf:"):
                rows = load(path[3:], split="train", streaming=True)
            else:
                rows = load("parquet", data_files=str(path), split="train", streaming=True)
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
        return
    with opened(path, bar) as file:
        number = 0
        while line := file.readline(LONGEST + 1):
            number += 1
            place = f"{path}, line {number}"
            if len(line) > LONGEST:
                raise UserError(f"{place}: longer than {LONGEST >> 20} MiB; split its text into several documents")
            try:
                if line.strip():
                    yield place, json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise UserError(f"{place}: invalid UTF-8 at byte {error.start} of the line") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place}: invalid JSON: {error}") from None


def field(row, key, place):
    """The string at a dotted key of a row."""
    for part in key.split("."):
        if not isinstance(row, dict) or part not in row:
            raise UserError(f"{place}: no field {key!r}; expected a JSON object with a string there")
        row = row[part]
    if not isinstance(row, str):
        raise UserError(f"{place}: field {key!r} is of type {type(row).__name__}; expected a string")
    try:
        row.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: field {key!r} holds half a surrogate pair, which is no text") from None
    return row


def read_documents(inputs, domain_key, bar):
    """Yield (domain, text) for each document of the inputs, in their order.

    inputs: (domain or None, path, reader) triples; a domain of None is read from each row's domain_key.
    """
    known = set()
    for domain, path, read in inputs:
        if read is not read_rows:
            found = ((path, domain, text) for text in read(path, bar))
        elif domain is not None:
            found = ((place, domain, field(row, "text", place)) for place, row in read(path, bar))
        else:
            found = (
                (place, field(row, domain_key, place), field(row, "text", place)) for place, row in read(path, bar)
            )
        for place, name, text in found:
            if name not in known:
                check_domain(name, place)
                known.add(name)
                if len(known) > MOST_DOMAINS:
                    raise UserError(f"{place}: more than {MOST_DOMAINS} domains; is --domain_key={domain_key} right?")
            yield name, text
    for domain, path, _ in inputs:
        if domain not in known and (domain is not None or not known):
            raise UserError(f"{path}: holds no document; give it some, or take it out")


def check_domain(name, place):
    if not name.strip() or name.startswith(".") or re.search(r"[/\\\x00-\x1f\x7f]", name) or len(name.encode()) > 200:
        raise UserError(
            f"{place}: {name!r} cannot name a domain, because it names a directory: it must not be empty, begin with a "
            "dot, or hold a slash or a control character"
        )


def find_inputs(source, domain_key):
    """List INPUT as sorted (domain or None, path, reader) triples. Hidden files are left out, unknown ones refused."""
    if source.startswith("hf:"):
        return [(None if domain_key else source.split("/")[-1], source, read_rows)]
    root = Path(source)
    if not root.exists():
        raise UserError(f"{root}: no such file or directory; INPUT is a directory with one entry per domain")
    if domain_key or root.is_file():
        if not domain_key:
            raise UserError(f"{root}: is one file; give a directory with one entry per domain, or --domain_key")
        inputs = [(None, path, read_rows) for path in (visible_files(root) if root.is_dir() else [root])]
    else:
        inputs = []
        for path in sorted(root.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                files = visible_files(path)
                if not files:
                    raise UserError(f"domain {path.name!r}: {path} holds no file; give it documents or remove it")
                inputs += [(path.name, file, read_rows if is_rows(file) else read_document) for file in files]
            elif not path.name.startswith("."):
                name = re.sub(r"(\.txt|\.jsonl(\.\w+)?|\.parquet)$", "", path.name)
                inputs.append((name, path, read_text if path.suffix == ".txt" else read_rows))
    about = [path for _, path, read in inputs if path.parent == root and ABOUT.match(path.name)]
    if about:
        print(f"left out, because they tell about the data: {', '.join(path.name for path in about)}")
    inputs = [entry for entry in inputs if entry[1] not in about]
    if not inputs:
        raise UserError(f"{root}: holds no domain; expected a folder, .txt or .jsonl[.gz|.xz|.zst] for each")
    entries = {}
    for domain, path, read in inputs:
        if read is read_rows and not is_rows(path):
            expected = ", ".join(ROWS if domain_key else ("a folder", ".txt", *ROWS))
            raise UserError(f"{path}: unknown file type; expected {expected}; take it out, or hide it behind a dot")
        if not path.is_file():
            raise UserError(f"{path}: is not a regular file; take it out")
        top = path.relative_to(root).parts[0] if path != root else path.name
        if domain is not None and entries.setdefault(domain, top) != top:
            raise UserError(f"domain {domain!r}: has two entries, {entries[domain]} and {top}; rename or merge them")
    return inputs


def visible_files(root):
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(files)


def is_rows(path):
    return path.name.endswith(ROWS)
