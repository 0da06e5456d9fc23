"""A corpus on a disk: which files belong to which domain, and the rows and pieces of text in them."""

import errno
import functools
import gzip
import io
import lzma
import mmap
import os
import re
import stat
import zlib
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from common.cli import UserError, print_anywhere
from common.files import parse_lines
from common.tokenizer import EOT, optional, split_text

ROWS = re.compile(r"(?i)\.((jsonl|ndjson|json)(\.(gz|xz|zst))?|parquet)$")
BINARY = re.compile(r"(?i)\.(gz|tgz|xz|zst|zstd|bz2|lz4|zip|tar|7z|arrow|feather|orc|avro|np[yz]|bin|idx|ds|pdf|docx)$")
KINDS = ".txt, .jsonl[.gz|.xz|.zst], .parquet"
ABOUT = re.compile(r"(?i)(readme|licen[cs]es?|notice|copying|citation|changelog)(\.(txt|md|rst|cff))?$")
HELD_OUT = re.compile(r"(?i)(?<![a-z])(val|valid|validation|dev|test|testing|eval|evaluation|h[eo]ld[-_]?out)(?![a-z])")
TRAINING = re.compile(r"(?i)(?<![a-z])train(ing)?(?![a-z])")
AWAY = "remove it, or begin its name with a dot"
BOM = b"\xef\xbb\xbf"  # what some editors write before the text
MEASURED = 4 << 20  # bytes of a file of rows from which the size of all its text is estimated
PIECE = 8 << 10  # bytes: longest piece of a .txt file without marks


# ---- which files belong to which domain ----------------------------------------------------------------------------


class Input(NamedTuple):
    path: Path | str  # hf:...
    domain: str | None  # None: each row names its own
    kind: str  # rows, pieces (DOMAIN.txt), or document (a file of text in a domain's folder)


def domain_entries(root):
    """List a directory with one entry per domain as Inputs."""
    inputs = []
    for domain, entry, paths in files_by_domain(root, re.compile(rf"(?i)\.txt$|{ROWS.pattern[4:]}")):
        refuse_held_out(entry, paths)
        for path in paths:
            if ROWS.search(path.name):
                kind = "rows"
            elif path != entry and not BINARY.search(path.name):
                kind = "document"
            elif path == entry and path.suffix.lower() == ".txt":
                kind = "pieces"
            else:
                raise UserError(f"{path}: unknown file type; expected {'a folder, ' * (path == entry)}{KINDS}; {AWAY}")
            inputs.append(Input(path, domain, kind))
    return inputs


def mixed_rows(root):
    """List the files at or below a path, of which every row names its domain, as Inputs."""
    paths = [path for path in sorted(walk(root, {}), key=str) if path.parent != root or not ABOUT.match(path.name)]
    for path in paths:
        if not ROWS.search(path.name):
            raise UserError(f"{path}: unknown file type; expected {KINDS[6:]}; {AWAY}")
    refuse_held_out(root, paths)
    if not paths:
        raise UserError(f"{root}: holds no documents; add some, or remove it")
    return [Input(path, None, "rows") for path in paths]


def files_by_domain(root, suffix, beside=None):
    """Yield (domain, entry, its files) of a directory with one entry per domain, sorted.

    suffix: pattern of what is no part of a domain's name; beside: pattern of files that belong to others.
    """
    entries = sorted(visible(root))
    splits = any(TRAINING.search(entry.name) for entry in entries)
    domains, earlier = {}, {}
    for entry in entries:
        if ABOUT.match(entry.name) and entry.is_file():
            print_anywhere(f"skipping {entry}: it describes the data")
            continue
        if beside and beside.search(entry.name):
            continue
        domain = entry.name if entry.is_dir() else suffix.sub("", entry.name)
        if HELD_OUT.fullmatch(domain) or (splits and HELD_OUT.search(domain)):
            raise UserError(f"{entry}: is named as held-out text, which would be a domain; put a domain's files into "
                            "one folder, rename it, or remove it")
        if domain in domains:
            raise UserError(f"domain {domain!r}: has two entries, {domains[domain]} and {entry}; rename one")
        domains[domain], seen = entry, {}
        paths = sorted(walk(entry, seen), key=str)
        if not paths:
            raise UserError(f"{entry}: holds no documents; add some, or remove it")
        for identity, path in seen.items():
            if identity in earlier:
                raise UserError(f"{path}: is also {earlier[identity]}, of another domain; remove one")
        earlier |= seen
        yield domain, entry, paths
    if not domains:
        raise UserError(f"{root}: holds no documents; expected one entry per domain, a folder or a file")


def refuse_held_out(folder, paths):
    """Raise UserError if one of the paths below a folder is named as held-out text, which would be trained on.

    Rows are by any part of their name. Text is only beside its like for training, as test.txt beside train.txt is: a
    domain of code may well have a test.py.
    """
    names = {path: path.relative_to(folder).parts for path in paths if path != folder}
    training = {TRAINING.sub("*", parts[0]) for parts in names.values()}
    for path, parts in names.items():
        if ROWS.search(path.name):
            held_out = any(HELD_OUT.search(part) for part in parts)
        else:
            plain = len(parts) > 1 or path.suffix in ("", ".txt", ".raw")
            held_out = plain and HELD_OUT.search(parts[0]) and HELD_OUT.sub("*", parts[0]) in training
        if held_out:
            raise UserError(f"{path}: is named as held-out text, which would be trained on; {AWAY}")


def visible(folder):
    """List what lies in a folder by name, links last, without what is hidden.  Raises UserError if it cannot."""
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); check its name and its rights") from None
    return [Path(entry.path) for entry in sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))]


def walk(path, seen):
    """Yield the files at and below a path, each once, whatever links lead to it; hidden ones never.

    seen: {(device, inode): path} of what was met, which is added to.  Raises UserError for what cannot be read, and for
    what is neither file nor folder.
    """
    try:
        status = path.stat()
        if not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, "permission denied")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {AWAY}") from None
    identity = status.st_dev, status.st_ino
    if identity in seen:
        return
    seen[identity] = path
    if stat.S_ISREG(status.st_mode):
        yield path
    elif stat.S_ISDIR(status.st_mode):
        for entry in visible(path):
            yield from walk(entry, seen)
    else:
        raise UserError(f"{path}: is neither a file nor a folder; {AWAY}")


# ---- the documents in them -----------------------------------------------------------------------------------------


def read_input(each, text_key, domain_key):
    """Yield (domain, UTF-8 bytes) of each document of an Input.  A byte order mark is no part of a document."""
    if each.kind == "rows":
        for place, row, _ in read_rows(each.path, [key for key in (text_key, domain_key) if key]):
            try:
                data = field(row, text_key, place).encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{place}: is no Unicode text ({error}); remove the row") from None
            yield each.domain or field(row, domain_key, place), data.removeprefix(BOM)
        return
    try:
        documents = [each.path.read_bytes()] if each.kind == "document" else read_pieces(each.path)
        for number, data in enumerate(documents, 1):
            data = data.removeprefix(BOM)
            check_text(data, f"{each.path}, document {number}", text_key)
            yield each.domain, data
    except OSError as error:
        raise UserError(f"{each.path}: cannot be read: {error.strerror}") from None


@functools.cache  # asked for the tokenizer's sample, and again for the bins
def text_size(each, text_key):
    """Return the bytes of text in an Input; of a large file of rows, an estimate from its beginning."""
    if each.kind != "rows":
        return each.path.stat().st_size
    total, before, size = 0, 0.0, each.path.stat().st_size
    for place, row, done in read_rows(each.path, [text_key]):
        if done > before and before * size >= MEASURED:  # more was read only now: all text up to `before` is counted
            return total / before
        total += len(field(row, text_key, place).encode(errors="replace"))
        before = done
    return total


def read_rows(path, keys):
    """Yield (place, row, done): where a row is, for messages; an object; the part of the file that was read, 0 to 1."""
    place = path
    try:
        if str(path).startswith("hf:"):
            rows = hub_rows(path)
        elif path.suffix.lower() == ".parquet":
            rows = parquet_rows(path, keys)
        else:
            rows = json_rows(path)
        for place, row, done in rows:
            yield place, row, done
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{place}: cannot be read further: {getattr(error, 'strerror', None) or error}") from None


def json_rows(path):
    """The rows of JSON lines, compressed or not."""
    open_lines = {".gz": gzip.open, ".xz": lzma.open, ".zst": open_zst}.get(path.suffix.lower(), io.BufferedReader)
    size = path.stat().st_size
    with open(path, "rb") as raw:
        for number, row in parse_lines(open_lines(raw)):
            place = f"{path}, line {number}"
            if isinstance(row, ValueError | list):
                fault = "is a JSON array" if isinstance(row, list) else f"is not JSON ({row})"
                raise UserError(f"{place}: {fault}; expected an object on each line, not an array or one over several")
            yield place, row, raw.tell() / size


def open_zst(raw):
    """pyarrow reads every frame, and notices a missing end."""
    return io.BufferedReader(optional("pyarrow", raw.name).CompressedInputStream(raw, "zstd"), 1 << 20)


def parquet_rows(path, keys):
    file = optional("pyarrow.parquet", path).ParquetFile(path)
    columns = [name for name in file.schema_arrow.names if any(f"{key}.".startswith(f"{name}.") for key in keys)]
    number = 0
    for batch in file.iter_batches(256, columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", row, number / file.metadata.num_rows


def hub_rows(source):
    """The rows of hf:OWNER/NAME[:CONFIG[:SPLIT]], of which nobody knows how many there are."""
    parts = source.split(":")[1:]
    name = parts[0]
    config = parts[1] if len(parts) > 1 else None
    split = parts[2] if len(parts) > 2 else "train"
    load_dataset = optional("datasets", source).load_dataset
    try:
        for number, row in enumerate(load_dataset(name, config or None, split=split, streaming=True), 1):
            yield f"{source}, row {number}", row, 0.0
    except Exception as error:  # what fails here is the network, the name or the data
        raise UserError(f"{source}: cannot be loaded: {type(error).__name__}: {error}") from None


def field(row, key, place):
    """Return the string at a key of a row: the whole key, or else a dotted path.  A whole number counts as one."""
    value, rest = row, key
    while rest:
        names = rest.split(".")
        heads = [".".join(names[:n]) for n in range(len(names), 0, -1)]  # the longest first
        head = next((head for head in heads if isinstance(value, dict) and head in value), None)
        if head is None:
            raise UserError(f"{place}: has no field {key!r}; name one that it has with --text_key or --domain_key")
        value, rest = value[head], rest[len(head) + 1 :]
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserError(f"{place}: field {key!r} is of type {type(value).__name__}; expected a string")
    return str(value)


def read_pieces(path):
    """Yield the documents of DOMAIN.txt as bytes."""
    mark = EOT.encode()
    if path.stat().st_size == 0:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data.find(mark) < 0:
            yield from (data[a:b] for a, b in pairwise((0, *split_text(data, PIECE))))
            return
        start = 0
        for match in re.finditer(re.escape(mark) + rb"|\Z", data):
            if document := data[start : match.start()].strip(b"\r\n"):
                yield document
            start = match.end()


def check_text(data, place, text_key):
    """Raise UserError if a document of a text file is not UTF-8, or has rows in it."""
    for start, end in pairwise((0, *split_text(data, 1 << 20))):  # decoded whole, it takes up to four times its size
        try:
            data[start:end].decode()
        except UnicodeDecodeError as error:
            position = start + error.start
            raise UserError(f"{place}: is no text in UTF-8: byte {data[position]:#x} at position {position:,}; convert "
                            "or remove it") from None
    if data.startswith(b"{"):
        for _, row in parse_lines([data.split(b"\n", 1)[0]]):
            if isinstance(row, dict) and text_key in row:
                raise UserError(f"{place}: holds rows, not text; end its name in .jsonl")
