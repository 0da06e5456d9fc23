"""Stage 0 for data that is already tokenized: link it as a data set, without copying it.

reads   INPUT, a directory with one entry per domain:
            DOMAIN.bin and DOMAIN.idx    Megatron; "_text_document" is no part of the name
            DOMAIN.ds                    datatrove, with its .ds.index
            DOMAIN.bin                   bare ids, like nanoGPT's
            DOMAIN/                      one or several of these, of which those named val are held out, test left out
writes  OUT_DIR/{meta.json, DOMAIN/train.bin, DOMAIN/val.bin}, and the tokenizer if it came from a file
next    python train_reference.py --data_dir=OUT_DIR --out_dir=checkpoints/reference

--tokenizer must be the one that made the ids, with end of text before or after each document. A domain of one file of
uint16 or (u)int32 ids is linked; several files and int64 are copied. An index tells the type of the ids; bare ids
are of the widest type in which all of a domain's are tokens. Unless a file named val is, the last documents of a domain
are held out: val.bin is a copy of them. A linked train.bin still has them at its end: in meta.json, train_tokens are
for training, and train_file_bytes is the size that it must have. train_bytes, which would take decoding, is null.
"""

import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import cli
from common.cli import UserError
from common.files import folder_name, staged
from common.tokenizer import load_tokenizer, tokenizer_name
from prepare import HELD_OUT, files_by_domain, print_table, walk, write_meta

DATA = re.compile(r"((_text)?(_document|_sentence))?\.(bin|ds)$")
BESIDE = re.compile(r"\.idx$|\.ds\.(index|metadata|loss)$")  # files that tell of others
VAL = re.compile(r"(?i)val|dev")  # of what HELD_OUT finds
MAGIC = re.compile(rb"[\x80-\xff]?[A-Z]{3}[A-Z0-9]|PK\x03\x04|\x1f\x8b\x08|\x28\xb5\x2f\xfd|\xfd7zXZ|(.{8})?\{\"", re.S)
MEGATRON = {4: "<u4", 5: "<u8", 8: "<u2"}  # its codes: type; ids are not negative, so int32 is read as uint32
BLOCK = 1 << 22  # tokens read at once


@dataclass
class Source:
    path: Path
    dtype: np.dtype | None = None  # of its ids; None: not known yet
    documents: int = 0  # if an index tells

    def ids(self):
        size = self.path.stat().st_size
        if size % self.dtype.itemsize:
            raise UserError(f"{self.path}: {size:,} bytes are not whole ids of {self.dtype}; see --dtype")
        return np.memmap(self.path, self.dtype, mode="r") if size else np.empty(0, self.dtype)

    def fits(self, vocab_size):
        whole = self.path.stat().st_size % self.dtype.itemsize == 0
        return whole and all(ids.max() < vocab_size for ids in blocks_of(self.ids()))


def blocks_of(ids):
    return (ids[start : start + BLOCK] for start in range(0, len(ids), BLOCK))


def inspect(path, bare):
    """Find out a file's format.  bare: the type of ids of which nothing tells, if --dtype names it."""
    if path.suffix == ".bin" and path.with_suffix(".idx").exists():
        return megatron(path, path.with_suffix(".idx"))
    if path.suffix == ".ds" and Path(f"{path}.index").exists() and path.stat().st_size:
        ends = np.fromfile(f"{path}.index", "<u8")  # of documents, in tokens
        width = path.stat().st_size / max(int(ends[-1:].sum()), 1)
        if width not in (2, 4):
            raise UserError(f"{path}: is cut short: its index tells of ids of {width:g} bytes, not 2 or 4")
        return Source(path, np.dtype(f"<u{width:.0f}"), len(ends))
    with open(path, "rb") as file:
        head = file.read(1024)
    if not bare and (MAGIC.match(head) or bytes(128) in head):
        raise UserError(f"{path}: begins with a header: {head[:12]}; cut it off, or if these are ids, name --dtype")
    return Source(path, np.dtype(bare).newbyteorder("<") if bare else None)


def megatron(path, index):
    with open(index, "rb") as file:
        magic, version, code, sequences, documents = struct.unpack("<9sQBQQ", file.read(34).ljust(34, b"\0"))
        if magic != b"MMIDIDX\0\0" or version != 1 or code not in MEGATRON:
            raise UserError(f"{index}: begins with {magic}, {version}, {code}; expected a Megatron index of integers")
        lengths = np.fromfile(file, "<i4", sequences)
        pointers = np.fromfile(file, "<i8", sequences)
    dtype, ends = np.dtype(MEGATRON[code]), np.append(0, np.cumsum(lengths, dtype=np.int64))
    if not np.array_equal(pointers, ends[:-1] * dtype.itemsize):
        raise UserError(f"{index}: is cut short, or does not list its documents in their order; merge the data again")
    if path.stat().st_size != ends[-1] * dtype.itemsize:
        raise UserError(f"{path}: its size is not that of the {ends[-1]:,} ids of {dtype} that its index tells of")
    return Source(path, dtype, documents - 1)


def settle(sources, vocab_size):
    """Give the bare files of a domain their type: the widest in which all their ids are below vocab_size."""
    bare = [source for source in sources if source.dtype is None]
    for dtype in ("<u8", "<u4", "<u2") if vocab_size <= 1 << 16 else ("<u8", "<u4"):
        for source in bare:
            source.dtype = np.dtype(dtype)
        if all(source.fits(vocab_size) for source in bare):
            return


def read_domain(entry, paths, tokenizer, bare):
    """Find out which of a domain's files are for training and validation.  Returns two lists of Sources."""
    train, val = [], []
    for path in paths:
        if BESIDE.search(path.name):
            continue
        if not DATA.search(path.name):
            raise UserError(f"{path}: unknown file type; expected .bin (ids without a header) or .ds; text: prepare.py")
        held_out = [found for part in path.relative_to(entry).parts for found in HELD_OUT.findall(part)]
        if not held_out:
            train.append(inspect(path, bare))
        elif VAL.match(held_out[0]):
            val.append(inspect(path, bare))
        else:
            print(f"leaving out {path}: it is named as test data")
    if not train:
        raise UserError(f"{entry}: holds no file for training; add one, or rename it")
    settle(train + val, tokenizer.vocab_size)
    return train, val


def linked_type(train):
    """The type of ids in the one file of a domain that can be linked, or None."""
    return train[0].dtype if len(train) == 1 and train[0].dtype in (np.dtype("<u2"), np.dtype("<u4")) else None


def copy(sources, file_name, tokenizer, dtype):
    with open(file_name, "wb") as file:
        for source in sources:
            for ids in blocks_of(source.ids()):
                check_ids(ids, tokenizer, source.path)  # before a narrower type could wrap them around
                file.write(ids.astype(dtype).data)


def check_ids(ids, tokenizer, path):
    for block in blocks_of(ids):
        for found in int(block.min()), int(block.max()):
            if not 0 <= found < tokenizer.vocab_size:
                raise UserError(f"{path}: holds id {found}, but {tokenizer.name} has {tokenizer.vocab_size} tokens; "
                                "see --tokenizer and --dtype")


def check_marks(ids, sources, eot):
    """Raise UserError where end of text is missing between documents, or is padding."""
    marks = twice = 0
    for block in blocks_of(ids):
        mark = block == eot
        marks += int(mark.sum())
        twice += int((mark[1:] & mark[:-1]).sum())
    documents = sum(source.documents for source in sources)
    if marks < 0.99 * documents:
        raise UserError(f"{sources[0].path}: end of text, id {eot}, occurs {marks:,} times in {documents:,} documents; "
                        "check --tokenizer, or tokenize again with --append-eod")
    if twice > marks / 2:
        raise UserError(f"{sources[0].path}: {twice:,} of {marks:,} ends of text, id {eot}, follow another; cut off "
                        "the padding")


def count_documents(ids, eot):
    marks = sum(int((block == eot).sum()) for block in blocks_of(ids))
    return marks + int(ids[0] != eot) - int(ids[-1] == eot)


def count_bytes(ids, tokenizer):
    """Return the bytes of the text of some ids, without marks."""
    texts = np.split(ids, np.flatnonzero(ids == tokenizer.eot))
    return sum(len(tokenizer.decode(text[text != tokenizer.eot].tolist())) for text in texts)


def link_domain(train, val, folder, tokenizer, dtype, max_val_tokens):
    """Make one domain's train.bin and val.bin.  Return its entry in meta.json."""
    folder.mkdir()
    train_path, val_path, eot = folder / "train.bin", folder / "val.bin", tokenizer.eot
    linked = linked_type(train) == dtype
    if linked:
        train_path.symlink_to(train[0].path.resolve())
        check_ids(train[0].ids(), tokenizer, train[0].path)
    else:
        copy(train, train_path, tokenizer, dtype)
    ids = np.memmap(train_path, dtype, mode="r")
    end = len(ids)
    check_marks(ids, train, eot)
    if val:
        copy(val, val_path, tokenizer, dtype)
        check_marks(np.memmap(val_path, dtype, mode="r"), val, eot)
    else:
        tail = end - max(1, min(max_val_tokens, end // 20))
        begins = np.flatnonzero(ids[tail:-1] == eot)
        if not len(begins):
            raise UserError(f"{train[-1].path}: none of its last {end - tail:,} tokens is end of text, id {eot}; check "
                            "--tokenizer, give more data, or raise --max_val_tokens")
        end = tail + int(begins[0])
        ids[end:].tofile(val_path)
    held_out = np.memmap(val_path, dtype, mode="r")
    entry = {"train_tokens": end, "val_tokens": len(held_out), "train_documents": count_documents(ids[:end], eot),
             "val_documents": count_documents(held_out, eot), "train_bytes": None,
             "val_bytes": count_bytes(held_out, tokenizer)}  # fmt: skip
    if linked:
        entry["train_file_bytes"] = train_path.stat().st_size
    else:
        with open(train_path, "r+b") as file:
            file.truncate(end * dtype.itemsize)
    return entry


def main():
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument
    add("input", metavar="INPUT", type=cli.path, help="see above")
    add("--out_dir", type=cli.path, help="the data set to make (default: data/NAME, after INPUT)")
    add("--tokenizer", type=tokenizer_name, required=True, help="a tiktoken name, FILE.tiktoken or a tokenizer.json")
    add("--eot_token", help="end-of-text token of a tokenizer.json (default: the usual one that it has)")
    add("--dtype", choices=["uint16", "uint32", "uint64"], help="of bare ids (default: widest in which all are tokens)")
    add("--max_val_tokens", type=cli.positive, default=10_000_000, help="tokens to hold out at the end of each domain, "
        "at most a twentieth of it (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    root = Path(args.input)
    tokenizer = load_tokenizer(args.tokenizer, args.eot_token)
    for path in walk(root, {}):
        owner = path.with_suffix(".bin" if path.suffix == ".idx" else "")
        if BESIDE.search(path.name) and not owner.exists():
            raise UserError(f"{path}: tells of {owner.name}, which is missing; bring it, or remove this one")
    domains = {domain: read_domain(entry, paths, tokenizer, args.dtype)
               for domain, entry, paths in files_by_domain(root, DATA, BESIDE)}
    types = {linked_type(train) for train, _ in domains.values()} - {None}
    dtype = types.pop() if len(types) == 1 else np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    if tokenizer.vocab_size - 1 > np.iinfo(dtype).max:
        raise UserError(f"{root}: {dtype} is too narrow for --tokenizer={args.tokenizer}; check that it made the ids")
    out_dir = args.out_dir or Path("data", root.resolve().name)
    with staged(out_dir) as staging:
        entries = {domain: link_domain(*sources, staging / folder_name(domain), tokenizer, dtype, args.max_val_tokens)
                   for domain, sources in tqdm(domains.items(), desc="linking", unit="domain", disable=None)}
        write_meta(staging, tokenizer, dtype, entries)
    print_table(entries, out_dir)


if __name__ == "__main__":
    cli.run(main)
