"""Files of token ids as other programs write them: what each says of itself, and what it holds."""

import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.cli import UserError
from common.tokenizer import optional

MAGIC = re.compile(rb"[\x80-\xff]?[A-Z]{3}[A-Z0-9]|PK\x03\x04|\x1f\x8b\x08|\x28\xb5\x2f\xfd|\xfd7zXZ|(.{8})?\{\"", re.S)
HEADERS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # llm.c's magic number and version (GPT-2, Llama 3): type of ids
MEGATRON = {4: "<u4", 5: "<u8", 8: "<u2"}  # its codes: type; ids are not negative, so int32 is read as uint32
KNOWN = {magic for magic, _ in HEADERS}
BLOCK = 1 << 22  # tokens read at once


@dataclass
class Source:
    path: Path
    dtype: np.dtype | None = None  # of its ids; None: rows of Parquet, or not known yet
    offset: int = 0  # bytes before the first id
    lengths: np.ndarray | None = None  # tokens of each document, if an index tells

    def ids(self):
        size = self.path.stat().st_size - self.offset
        if size % self.dtype.itemsize:
            raise UserError(f"{self.path}: {size:,} bytes are not whole ids of {self.dtype.itemsize} bytes; it is cut "
                            "short, or its ids are of another type: see --dtype")
        if not size:
            return np.empty(0, self.dtype)
        return np.memmap(self.path, self.dtype, mode="r", offset=self.offset)

    def fits(self, vocab_size):
        if self.path.stat().st_size % self.dtype.itemsize:
            return False
        ids = self.ids()
        return all(ids[start : start + BLOCK].max() < vocab_size for start in range(0, len(ids), BLOCK))


def inspect(path, bare):
    """Find out a file's format.  bare: the type of ids without a header, if the user names it.  Raises UserError."""
    if path.suffix == ".parquet":
        return Source(path)
    size, index = path.stat().st_size, path.with_suffix(".idx")
    with open(path, "rb") as file:
        head = file.read(1024)
    magic, version, expected = struct.unpack("<iii", head[:12].ljust(12, b"\0"))
    if path.suffix == ".bin" and index.exists():
        source = megatron(path, index)
        expected = source.lengths.sum()
    elif path.suffix == ".ds" and (dtype := datatrove_type(path)):
        ends = Path(f"{path}.index")
        source = Source(path, dtype)
        if ends.exists():
            source.lengths = np.diff(np.fromfile(ends, "<u8").astype(np.int64), prepend=0)
        return source
    elif (magic, version) in HEADERS:
        source = Source(path, np.dtype(HEADERS[magic, version]), 1024)
    elif not bare and (magic in KNOWN or MAGIC.match(head) or bytes(128) in head):
        raise UserError(f"{path}: begins with a header that is not known: {head[:12]}; remove the header, or name the "
                        "type of the ids with --dtype if these are ids")
    else:
        return Source(path, np.dtype(bare).newbyteorder("<") if bare else None)
    if size != source.offset + expected * source.dtype.itemsize:
        raise UserError(f"{path}: {size:,} bytes are not {expected:,} tokens of {source.dtype.itemsize} bytes; it is "
                        "cut short, or its index belongs to another file")
    return source


def megatron(path, index):
    with open(index, "rb") as file:
        magic, version, code, sequences, documents = struct.unpack("<9sQBQQ", file.read(34).ljust(34, b"\0"))
        if magic != b"MMIDIDX\0\0" or version != 1 or code not in MEGATRON:
            raise UserError(f"{index}: not a Megatron index of version 1 with uint16, int32 or int64 ids: its first "
                            f"bytes are {magic}, version {version}, type {code}")
        if index.stat().st_size < 34 + 12 * sequences + 8 * documents:
            raise UserError(f"{index}: is cut short; copy it again")
        lengths = np.fromfile(file, "<i4", sequences)
        pointers = np.fromfile(file, "<i8", sequences)
        borders = np.fromfile(file, "<i8", documents)  # of documents, in sequences
    dtype, ends = np.dtype(MEGATRON[code]), np.append(0, np.cumsum(lengths, dtype=np.int64))
    ordered = (lengths >= 0).all() and (pointers == ends[:-1] * dtype.itemsize).all() and (np.diff(borders) >= 0).all()
    if not ordered or not len(borders) or borders[0] or borders[-1] != sequences:
        raise UserError(f"{index}: does not list its documents one after the other; merge the data again")
    return Source(path, dtype, 0, np.diff(ends[borders]))


def datatrove_type(path):
    """Return the type of a .ds file's ids, or None if nothing beside it tells.  Raises UserError."""
    size, index, metadata = path.stat().st_size, Path(f"{path}.index"), Path(f"{path}.metadata")
    tokens, widths = [], set()
    if index.exists():
        tokens.append(int(np.fromfile(index, "<u8")[-1:].sum()))
    if metadata.exists():  # "tokenizer|bytes of an id", or the tokenizer alone; then the number of tokens
        told = re.match(r".*?(?:\|(\d+))?\n(\d+)", metadata.read_text(errors="replace"))
        tokens.append(int(told[2]) if told else 0)
        widths |= {float(told[1])} if told and told[1] else set()
    if size or any(tokens):
        widths |= {size / max(count, 1) for count in tokens}
    if len(widths) > 1 or not widths <= {2, 4}:
        told = " and ".join(f"{width:g}" for width in sorted(widths))
        raise UserError(f"{path}: its index and metadata tell of ids of {told} bytes; expected 2 or 4, the same by "
                        "both; it is cut short, or they belong to another file")
    return np.dtype(f"<u{widths.pop():.0f}") if widths else None


def settle(sources, vocab_size):
    """Give the bare files of a domain their type: the widest in which all their ids are below vocab_size."""
    bare = [source for source in sources if source.dtype is None and source.path.suffix != ".parquet"]
    for dtype in ("<u8", "<u4", "<u2") if vocab_size <= 1 << 16 else ("<u8", "<u4"):
        for source in bare:
            source.dtype = np.dtype(dtype)
        if all(source.fits(vocab_size) for source in bare):
            return


def read_blocks(source):
    """Yield (ids (n,), lengths (m,)) of m whole documents; lengths is None where nothing tells of documents."""
    if source.path.suffix == ".parquet":
        yield from parquet_blocks(source.path)
    elif source.lengths is None:
        ids = source.ids()
        yield from ((ids[start : start + BLOCK], None) for start in range(0, len(ids), BLOCK))
    else:
        ids, ends, first = source.ids(), np.cumsum(source.lengths), 0
        while first < len(ends):
            start = ends[first] - source.lengths[first]
            last = max(first + 1, np.searchsorted(ends, start + BLOCK))
            yield ids[start : ends[last - 1]], source.lengths[first:last]
            first = last


def parquet_blocks(path):
    list_lengths = optional("pyarrow.compute", path).list_value_length
    try:
        file = optional("pyarrow.parquet", path).ParquetFile(path)
        if "input_ids" not in file.schema_arrow.names:
            raise UserError(f"{path}: has no column input_ids; for text use prepare.py")
        found = file.schema_arrow.field("input_ids").type
        if not re.search(r"list<.*: u?int\d+( not null)?>", str(found)):
            raise UserError(f"{path}: input_ids are of type {found}; expected lists of integers")
        for batch in file.iter_batches(1024, columns=["input_ids"]):
            rows = batch.column(0).drop_null()
            yield rows.flatten().to_numpy(), list_lengths(rows).to_numpy()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
