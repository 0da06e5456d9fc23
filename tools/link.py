"""Stage 0 for data that is already tokenized: link it as a data set, without copying it.

reads   INPUT, a directory with one entry per domain:
            DOMAIN.bin and DOMAIN.idx    Megatron: uint16 or int32; "_text_document" is no part of the name    linked
            DOMAIN.ds                    datatrove, with its DOMAIN.ds.index if there is one                  linked
            DOMAIN.bin                   bare token ids, like nanoGPT's                                       linked
            DOMAIN.bin                   with the header of llm.c and modded-nanogpt                          copied
            DOMAIN.parquet               rows of input_ids                                                    copied
            DOMAIN/                      train.bin and val.bin, like nanoGPT's; or one of the above;
                                         or several of them                       copied, one after another
writes  OUT_DIR/{meta.json, DOMAIN/train.bin, DOMAIN/val.bin}, and the tokenizer if it came from a file
next    python train_reference.py --data_dir=OUT_DIR --out_dir=checkpoints/reference

--tokenizer must be the one that made the ids. The last documents of a domain are held out: val.bin is a copy of them. A
linked train.bin still has them at its end, so meta.json says how many of its tokens are for training (train_tokens) and
how many bytes the file must have (train_file_bytes). train_bytes is null: counting it would mean decoding everything.
"""

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common.cli import ArgumentParser, UserError, positive, run
from common.corpus import ABOUT
from common.files import staged
from common.tokenizer import load_tokenizer, optional
from prepare import print_table, write_meta
from sampler import folder_name

KINDS = (".bin", ".ds", ".parquet")
BESIDE = (".idx", ".index", ".metadata", ".loss")
BLOCK = 1 << 22  # tokens read at once
HEADERS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # llm.c's magic number and version (GPT-2, Llama 3): dtype


class Source(NamedTuple):
    path: Path
    dtype: np.dtype  # None: rows of input_ids
    offset: int = 0  # bytes before the first id


def find_domains(root):
    """Return {domain: paths}, sorted."""
    domains = {}
    for entry in sorted(root.glob("*")):
        if entry.name.startswith(".") or ABOUT.match(entry.name) or entry.suffix in BESIDE:
            continue
        paths = [path for path in sorted(entry.iterdir()) if path.suffix in KINDS] if entry.is_dir() else [entry]
        if not paths or paths[0].suffix not in KINDS:
            raise UserError(f"{entry}: holds no token ids; expected {', '.join(KINDS)} or a folder of such files")
        name = entry.name if entry.is_dir() else entry.stem.removesuffix("_text_document")
        if name in domains:
            raise UserError(f"domain {name!r}: has two entries, {domains[name][0]} and {paths[0]}; rename one")
        domains[name] = paths
    if not domains:
        raise UserError(f"{root}: no such directory, or it holds no domain: {', '.join(KINDS)}, or a folder of such")
    return domains


def inspect(path, vocab_size):
    """Find out a file's format. Raises UserError if the file and its index do not agree."""
    size = path.stat().st_size
    index, ends = path.with_suffix(".idx"), path.with_name(f"{path.name}.index")
    dtype, offset, expected = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4"), 0, None
    if path.suffix == ".parquet":
        return Source(path, None)
    if index.exists():
        with open(index, "rb") as file:
            magic, version, code, sequences, _ = struct.unpack("<9sQBQQ", file.read(34).ljust(34, b"\0"))
            if magic != b"MMIDIDX\0\0" or version != 1 or code not in (4, 8):
                raise UserError(f"{index}: not a Megatron index of version 1 with int32 or uint16 ids: its first bytes "
                                f"are {magic}, version {version}, dtype {code}")
            expected = int(np.fromfile(file, "<i4", sequences).sum(dtype=np.int64))
        dtype = np.dtype("<u2" if code == 8 else "<u4")  # ids are not negative, so int32 reads as uint32
    elif ends.exists():
        expected = int(np.fromfile(ends, "<u8")[-1:].sum())
        dtype = np.dtype("<u4" if size == 4 * expected else "<u2")
    elif size >= 1024 and tuple((header := np.fromfile(path, "<i4", 3).tolist())[:2]) in HEADERS:
        dtype, offset, expected = np.dtype(HEADERS[tuple(header[:2])]), 1024, header[2]
    if size % dtype.itemsize or (expected is not None and size != offset + expected * dtype.itemsize):
        raise UserError(f"{path}: {size:,} bytes are not {f'{expected:,}' if expected else 'whole'} tokens of "
                        f"{dtype.itemsize} bytes; it is cut short, or its index belongs to another file")
    return Source(path, dtype, offset)


def is_pair(sources):
    return [source.path.name for source in sources] == ["train.bin", "val.bin"]


def linkable(sources):
    return (len(sources) == 1 or is_pair(sources)) and sources[0].dtype is not None and not sources[0].offset


def read_blocks(source, eot):
    """Yield the ids of a source, (n,) integers at a time."""
    if source.dtype is None:
        lengths_of = optional("pyarrow.compute", source.path).list_value_length
        try:
            file = optional("pyarrow.parquet", source.path).ParquetFile(source.path)
        except (OSError, ValueError) as error:
            raise UserError(f"{source.path}: cannot be read: {error}") from None
        if "input_ids" not in file.schema_arrow.names:
            raise UserError(f"{source.path}: has no column input_ids; for text use prepare.py")
        for batch in file.iter_batches(1024, columns=["input_ids"]):
            ids, lengths = batch.column(0).flatten().to_numpy(), lengths_of(batch.column(0)).to_numpy()
            # Rows without any end-of-text token are documents; other rows were packed
            yield ids if (ids == eot).any() else np.insert(ids, np.cumsum(lengths) - lengths, eot)
    else:
        ids = np.memmap(source.path, source.dtype, mode="r", offset=source.offset)
        yield from (ids[start : start + BLOCK] for start in range(0, len(ids), BLOCK))


def check_ids(ids, tokenizer, path):
    """Count the documents of ids (n,); raise UserError for an id past the vocabulary."""
    count = int(ids[0] != tokenizer.eot) - int(ids[-1] == tokenizer.eot) if len(ids) else 0
    for start in range(0, len(ids), BLOCK):
        block = ids[start : start + BLOCK]
        if (largest := int(block.max())) >= tokenizer.vocab_size:
            raise UserError(f"{path}: holds id {largest}, but {tokenizer.name} has {tokenizer.vocab_size} tokens; "
                            "name the tokenizer that made the data with --tokenizer")
        count += int(np.count_nonzero(block == tokenizer.eot))
    return count


def link_domain(domain, sources, folder, tokenizer, dtype, val_tokens):
    """Make one domain's train.bin and val.bin; returns its entry in meta.json."""
    folder.mkdir()
    train, path, eot, linked = folder / "train.bin", sources[0].path, tokenizer.eot, linkable(sources)
    *sources, given = sources if is_pair(sources) else [*sources, None]
    if linked:
        train.symlink_to(path.resolve())
    else:
        with open(train, "wb") as file:
            for block in (block for source in sources for block in read_blocks(source, eot)):
                check_ids(block.astype("<u4"), tokenizer, path)  # before a narrower type could wrap them around
                file.write(block.astype(dtype).data)
    size = train.stat().st_size
    if size < 2 * dtype.itemsize:
        raise UserError(f"{path}: holds no tokens; add some, or remove it")
    ids = np.memmap(train, dtype, mode="r")
    if given:
        end, val = len(ids), np.concatenate(list(read_blocks(given, eot))).astype(dtype)
    else:
        tail = len(ids) - max(1, min(val_tokens, len(ids) // 20))
        check_ids(ids[tail:], tokenizer, path)
        end = next((tail + int(i) for i in np.flatnonzero(ids[tail:-1] == eot)), None)
        if end is None:
            raise UserError(f"{path}: no document begins in its last {len(ids) - tail:,} tokens: none is end of text, "
                            f"id {eot}; check --tokenizer, give more data, or raise --val_tokens")
        val = np.array(ids[end:])
    entry = {"train_tokens": end, "val_tokens": len(val), "train_documents": check_ids(ids[:end], tokenizer, path),
             "val_documents": check_ids(val, tokenizer, path), "train_bytes": None}  # fmt: skip
    val.tofile(folder / "val.bin")
    if not linked:
        with open(train, "r+b") as file:
            file.truncate(end * dtype.itemsize)
    try:
        texts = (part[part != eot].tolist() for part in np.split(val, np.flatnonzero(val == eot)))
        entry["val_bytes"] = sum(len(tokenizer.decode(text)) for text in texts)
    except KeyError as error:
        raise UserError(f"{path}: holds id {error}, which {tokenizer.name} lacks; check --tokenizer") from None
    return entry | ({"train_file_bytes": size} if linked else {})


def main():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("input", metavar="INPUT", type=Path, help="see above")
    add("--out_dir", type=Path, help="the data set to make (default: data/NAME, after INPUT)")
    add("--tokenizer", required=True, help="what made the ids: a tiktoken name, FILE.tiktoken or a tokenizer.json")
    add("--eot_token", help="end-of-text token of a tokenizer.json (default: the first usual name)")
    add("--val_tokens", type=positive, default=10_000_000, help="tokens to hold out at the end of each domain, at most "
        "a twentieth of it (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    out_dir = args.out_dir or Path("data", args.input.resolve().name)
    domains, tokenizer = find_domains(args.input), load_tokenizer(args.tokenizer, args.eot_token)
    sources = {name: [inspect(path, tokenizer.vocab_size) for path in paths] for name, paths in domains.items()}
    kinds = {found[0].dtype: found[0].path for found in sources.values() if linkable(found)}
    if len(kinds) > 1:
        (first, one), (second, other), *_ = kinds.items()
        raise UserError(f"{one} holds {first} ids and {other} {second}; all domains of a data set need one type")
    dtype = next(iter(kinds), np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"))
    if tokenizer.vocab_size - 1 > np.iinfo(dtype).max:
        raise UserError(f"{kinds[dtype]}: holds {dtype} ids, too narrow for the {tokenizer.vocab_size} tokens of "
                        f"{tokenizer.name}; check --tokenizer")
    with staged(out_dir) as folder:
        bar = tqdm(sources.items(), desc="linking", unit="domain", disable=None)
        entries = {name: link_domain(name, found, folder / folder_name(name), tokenizer, dtype, args.val_tokens)
                   for name, found in bar}  # fmt: skip
        write_meta(folder, tokenizer, dtype, entries)
    print_table(entries, out_dir)


if __name__ == "__main__":
    run(main)
