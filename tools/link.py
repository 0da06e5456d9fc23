"""Stage 0 for data that is already tokenized: link it as a data set, without copying it.

reads   INPUT, a directory with one entry per domain:
            DOMAIN.bin and DOMAIN.idx    Megatron; "_text_document" is no part of the name
            DOMAIN.ds                    datatrove, with its .ds.index and .ds.metadata
            DOMAIN.bin                   bare ids, like nanoGPT's; or with the header of llm.c and modded-nanogpt
            DOMAIN.parquet               rows of input_ids
            DOMAIN/                      one or several of these, of which those named val are held out, test left out
writes  OUT_DIR/{meta.json, DOMAIN/train.bin, DOMAIN/val.bin}, and the tokenizer if it came from a file
next    python train_reference.py --data_dir=OUT_DIR --out_dir=checkpoints/reference

--tokenizer must be the one that made the ids. A domain of one file of uint16 or (u)int32 ids is linked; several files,
headers, rows, and documents without end of text are copied. Nothing is guessed: an index, metadata or a header tells
the type of the ids; bare ids are of the widest type in which all of a domain's are tokens. Unless a file named val is,
the last documents of a domain are held out: val.bin is a copy of them. A linked train.bin still has them at its end, so
meta.json says how many of its tokens are for training (train_tokens) and how many bytes the file must have
(train_file_bytes). train_bytes is null: counting it would mean decoding everything.
"""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.cli import ArgumentParser, UserError, positive, print_anywhere, run
from common.files import folder_name, staged
from common.tokenizer import load_tokenizer
from prepare import HELD_OUT, check_domain_name, files_by_domain, print_table, visible, write_meta
from tools.token_files import BLOCK, inspect, read_blocks, settle

DATA = re.compile(r"((_text)?(_document|_sentence))?\.(bin|ds|parquet)$")
BESIDE = re.compile(r"\.idx$|\.ds\.(index|metadata|loss)$")  # files that tell of others
VAL = re.compile(r"(?i)val|dev")  # of what HELD_OUT finds


# ---- where documents begin -------------------------------------------------------------------------------------------


def lacks_marks(domain, sources, eot):
    """Tell whether documents lack an end-of-text token that must be inserted, for index and rows know where they begin.

    Raises UserError if it is unclear whether rows are documents or packed: all of one length, with such tokens inside.
    """
    documents = begin = end = total = 0
    packed = True
    for source in sources:
        known = [np.empty(0, np.int64)]
        for ids, lengths in read_blocks(source):
            if lengths is None:
                break
            lengths = lengths[lengths > 0]
            ends = np.cumsum(lengths)
            begin += int((ids[ends - lengths] == eot).sum())
            end += int((ids[ends - 1] == eot).sum())
            total += int((ids == eot).sum())
            known.append(lengths)
        lengths = np.concatenate(known)
        documents += len(lengths)
        packed &= source.lengths is None and (lengths[:-1] == lengths[:1]).all()  # the last may be shorter
    if documents in (begin, end) or (packed and total):
        return False
    if total or packed:
        raise UserError(f"domain {domain!r}: of {documents:,} documents or rows {begin:,} begin and {end:,} end with "
                        f"id {eot}, end of text, which occurs {total:,} times; check --tokenizer, then say whether to "
                        "insert one where they have none (--insert_eot) or to take them as they are (--no-insert_eot)")
    return True


def marked_blocks(sources, eot, insert):
    """Yield ids, (n,) integers at a time; insert: with end of text between documents that have none there."""
    ended = False
    for source in sources:
        for ids, lengths in read_blocks(source):
            if insert and lengths is not None:
                starts = (np.cumsum(lengths) - lengths)[lengths > 0]
                marked = (ids[starts] == eot) | np.append(ended, ids[starts[1:] - 1] == eot)[: len(starts)]
                ids = np.insert(ids.astype("<i8"), starts[~marked], eot)
            if len(ids):
                ended = ids[-1] == eot
                yield source.path, ids


# ---- writing ---------------------------------------------------------------------------------------------------------


@dataclass
class Domain:
    name: str
    train: list  # of Sources
    val: list
    insert_eot: bool

    def linked_type(self):
        """The type of ids in the file that can be linked, or None."""
        source = self.train[0]
        plain = len(self.train) == 1 and source.dtype in (np.dtype("<u2"), np.dtype("<u4")) and not source.offset
        return source.dtype if plain and not self.insert_eot else None


def read_domain(name, entry, paths, tokenizer, args):
    """Find out which of a domain's files are for training, and what they are.  Returns a Domain."""
    train, val = [], []
    for path in paths:
        if BESIDE.search(path.name):
            refuse_orphan(path)
            continue
        if not DATA.search(path.name):
            raise UserError(f"{path}: unknown file type; expected .bin, .ds or .parquet; remove it, or begin its name "
                            "with a dot")
        held_out = [found for part in path.relative_to(entry).parts for found in HELD_OUT.findall(part)]
        if not held_out:
            train.append(inspect(path, args.dtype))
        elif VAL.match(held_out[0]):
            val.append(inspect(path, args.dtype))
        else:
            print_anywhere(f"leaving out {path}: it is named as test data")
    if not train:
        raise UserError(f"{entry}: holds no file for training; add one, or rename what is for training")
    settle(train + val, tokenizer.vocab_size)
    insert = args.insert_eot
    if insert is None:
        insert = lacks_marks(name, train + val, tokenizer.eot)
    return Domain(name, train, val, insert)


def refuse_orphan(path):
    owner = path.with_suffix(".bin") if path.suffix == ".idx" else path.with_suffix("")
    if not owner.exists():
        raise UserError(f"{path}: tells of {owner.name}, which is missing; bring it, or remove this one")


def copy(sources, file_name, tokenizer, dtype, insert):
    with open(file_name, "wb") as file:
        for path, ids in marked_blocks(sources, tokenizer.eot, insert):
            check_ids(ids, tokenizer, path)  # before a narrower type could wrap them around
            file.write(ids.astype(dtype).data)


def check_ids(ids, tokenizer, path):
    """Raise UserError for an id that is none of the vocabulary."""
    for start in range(0, len(ids), BLOCK):
        block = ids[start : start + BLOCK]
        for found in int(block.min()), int(block.max()):
            if not 0 <= found < tokenizer.vocab_size:
                raise UserError(f"{path}: holds id {found}, but {tokenizer.name} has {tokenizer.vocab_size} tokens; "
                                "name the tokenizer that made the data with --tokenizer, and the type of the ids with "
                                "--dtype")


def count_documents(ids, eot):
    count = int(ids[0] != eot) - int(ids[-1] == eot)
    return count + sum(int((ids[start : start + BLOCK] == eot).sum()) for start in range(0, len(ids), BLOCK))


def link_domain(domain, folder, tokenizer, dtype, max_val_tokens):
    """Make one domain's train.bin and val.bin; returns its entry in meta.json."""
    folder.mkdir()
    train_path, val_path, eot = folder / "train.bin", folder / "val.bin", tokenizer.eot
    linked = domain.linked_type() == dtype
    if linked:
        train_path.symlink_to(domain.train[0].path.resolve())
        check_ids(domain.train[0].ids(), tokenizer, domain.train[0].path)
    else:
        copy(domain.train, train_path, tokenizer, dtype, domain.insert_eot)
    copy(domain.val, val_path, tokenizer, dtype, domain.insert_eot)
    for path, sources in (train_path, domain.train), (val_path, domain.val):
        if sources and path.stat().st_size < 2 * dtype.itemsize:
            raise UserError(f"{sources[0].path}: holds no tokens; add some, or remove it")
    ids = np.memmap(train_path, dtype, mode="r")
    end = len(ids)
    if not domain.val:
        tail = end - max(1, min(max_val_tokens, end // 20))
        begins = np.flatnonzero(ids[tail:-1] == eot)
        if not len(begins):
            raise UserError(f"{domain.train[-1].path}: no document begins in its last {end - tail:,} tokens: none is "
                            f"end of text, id {eot}; check --tokenizer, give more data, or raise --max_val_tokens")
        end = tail + int(begins[0])
        ids[end:].tofile(val_path)
    val = np.memmap(val_path, dtype, mode="r")
    entry = {"train_tokens": end, "val_tokens": len(val), "train_documents": count_documents(ids[:end], eot),
             "val_documents": count_documents(val, eot), "train_bytes": None, "val_bytes": 0}  # fmt: skip
    for text in np.split(val, np.flatnonzero(val == eot)):
        try:
            entry["val_bytes"] += len(tokenizer.decode(text[text != eot].tolist()))
        except KeyError as error:
            raise UserError(f"domain {domain.name!r}: holds id {error}, which {tokenizer.name} lacks; check "
                            "--tokenizer") from None
    if linked:
        entry["train_file_bytes"] = train_path.stat().st_size
    else:
        with open(train_path, "r+b") as file:
            file.truncate(end * dtype.itemsize)
    return entry


def main():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("input", metavar="INPUT", type=Path, help="see above")
    add("--out_dir", type=Path, help="the data set to make (default: data/NAME, after INPUT)")
    add("--tokenizer", required=True, help="what made the ids: a tiktoken name, FILE.tiktoken or a tokenizer.json")
    add("--eot_token", help="end-of-text token of a tokenizer.json (default: the usual one that it has)")
    add("--dtype", choices=["uint16", "uint32", "uint64"], help="type of ids in files that do not tell it, whether "
        "signed or not (default: the widest in which all are tokens)")  # fmt: skip
    add("--insert_eot", action=argparse.BooleanOptionalAction, help="put an end-of-text token between documents of an "
        "index or rows that have none there (default: if there are none at all)")  # fmt: skip
    add("--max_val_tokens", type=positive, default=10_000_000, help="tokens to hold out at the end of each domain, at "
        "most a twentieth of it (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer, args.eot_token)
    for path in visible(args.input):
        if BESIDE.search(path.name):
            refuse_orphan(path)
    domains = []
    for name, entry, paths in files_by_domain(args.input, DATA, BESIDE):
        check_domain_name(name, entry)
        domains.append(read_domain(name, entry, paths, tokenizer, args))
    types = {domain.linked_type() for domain in domains} - {None}
    dtype = types.pop() if len(types) == 1 else np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    if tokenizer.vocab_size - 1 > np.iinfo(dtype).max:
        raise UserError(f"{args.input}: its ids are of {dtype}, too narrow for the {tokenizer.vocab_size} tokens of "
                        f"{tokenizer.name}; check --tokenizer")
    out_dir = args.out_dir or Path("data", args.input.resolve().name)
    entries = {}
    with staged(out_dir) as folder:
        for domain in tqdm(domains, desc="linking", unit="domain", disable=None):
            entries[domain.name] = link_domain(domain, folder / folder_name(domain.name), tokenizer, dtype,
                                               args.max_val_tokens)
        write_meta(folder, tokenizer, dtype, entries)
    print_table(entries, out_dir)


if __name__ == "__main__":
    run(main)
