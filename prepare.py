"""Stage 0 of DoReMi: turn text into one memory-mapped file of token ids per domain.

reads   INPUT, one of
          a directory with one entry per domain:
            DOMAIN/                       each file is a document; of a .jsonl or .parquet file, each row
            DOMAIN.txt                    documents between <|endoftext|> marks; without marks, pieces of 4 to 8 KB
            DOMAIN.jsonl[.gz|.xz|.zst]    one document per line
            DOMAIN.parquet                one document per row
          with --domain_key, a file or directory of mixed rows (.jsonl or .parquet)
          hf:OWNER/NAME[:CONFIG[:SPLIT]], a data set of the Hugging Face hub, streamed
writes  OUT_DIR/{meta.json, DOMAIN/train.bin, DOMAIN/val.bin}, and the tokenizer if it was trained or came from a file
next    python train_reference.py --data_dir=OUT_DIR --out_dir=checkpoints/reference

A .bin file holds little-endian token ids; each document begins with the end-of-text token. A hash of its text sends a
document to train or val. Duplicates therefore never straddle the split, and order, domain and format do not matter.
OUT_DIR appears when everything is written, or not at all. For data that is already tokenized see link.py.
"""

import gzip
import hashlib
import heapq
import io
import json
import lzma
import mmap
import os
import re
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.cli import ArgumentParser, UserError, fraction, positive, run
from common.files import staged
from common.tokenizer import EOT, EOT_NAMES, cut, load_tokenizer, optional
from sampler import folder_name

MARK = EOT.encode()  # between the documents of a .txt file
ROWS = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet")
ABOUT = re.compile(r"(?i)(readme|licen[cs]es?|notice|copying|citation|changelog)(\.(txt|md|rst|cff))?$")
PIECE = 8 << 10  # bytes: longest piece of a .txt file without marks
GROUP = 1 << 20  # bytes of documents handed to a thread at once, and written at once
SAMPLE = 32 << 20  # bytes that a tokenizer is trained on, over all domains
MOST_DOMAINS = 2000
SIDES = ("train", "val")


# ---- reading -------------------------------------------------------------------------------------------------------


def find_inputs(source, domain_key):
    """List INPUT as sorted (domain, path) pairs; the domain is None where each row names its own."""
    if source.startswith("hf:"):
        return [(None if domain_key else source.split(":")[1].split("/")[-1], source)]
    root = Path(source)
    if not root.exists() or (root.is_file() and not domain_key):
        found = "is one file" if root.exists() else "no such file or directory"
        raise UserError(f"{root}: {found}; give a directory with one entry per domain, or rows and --domain_key")
    inputs, entries = [], {}
    folder, names = (root.parent, [root.name]) if root.is_file() else (root, glob("**", root_dir=root, recursive=True))
    for path in (folder / name for name in sorted(names)):  # glob leaves out what begins with a dot
        top, *below = path.relative_to(folder).parts
        if path.is_dir():
            if not below and not domain_key:
                entries[top] = None  # to be found empty, or not
        elif not below and ABOUT.match(top):
            print(f"skipping {path}: it describes the data")
        elif not path.name.endswith(ROWS) and (domain_key or not (below or path.suffix == ".txt")):
            raise UserError(f"{path}: unknown file type; expected {'' if domain_key else 'a folder, .txt, '}"
                            f"{', '.join(ROWS)}; remove it, or begin its name with a dot")
        else:
            name = None if domain_key else top if below else re.sub(r"(\.txt|\.jsonl(\.\w+)?|\.parquet)$", "", top)
            if name and (entries.get(name) or top) != top:
                raise UserError(f"domain {name!r}: has two entries, {entries[name]} and {top}; rename one")
            entries[name] = top
            inputs.append((name, path))
    if not inputs or None in entries.values():
        empty = ", ".join(f"{root / name}" for name in entries if not entries[name])
        raise UserError(f"{empty or root}: holds no documents; add some, or remove it")
    return inputs


def read_documents(inputs, text_key, domain_key, max_bytes=None):
    """Yield (domain, UTF-8 bytes) of each document.

    max_bytes is shared out over the files by their size: a sample takes from every file and keeps their proportions.
    """
    sizes = [1 if str(path).startswith("hf:") else os.path.getsize(path) for _, path in inputs]
    seen, taken, budget = set(), 0, 0
    for (domain, path), size in zip(inputs, sizes):
        budget += max_bytes * size / max(sum(sizes), 1) if max_bytes else np.inf
        documents = read_file(domain, path, text_key, domain_key) if taken < budget else ()
        for name, data in documents:
            if name not in seen:
                seen.add(name)
                if name[:1] in (" ", ".", "") or not name.isprintable() or len(folder_name(name)) > 200:
                    raise UserError(f"{path}: {name!r} cannot name a domain, for it names a folder; choose another key")
                if len(seen) > MOST_DOMAINS:
                    raise UserError(f"{path}: more than {MOST_DOMAINS} domains; is --domain_key={domain_key} right?")
            yield name, data
            taken += len(data)
            if taken >= budget:
                break
    for domain, path in inputs:
        if domain not in seen and (domain or not seen):
            more = f", or raise --max_bytes={max_bytes}" if max_bytes else ""
            raise UserError(f"{path}: gives no document; add some, or remove it{more}")


def read_file(domain, path, text_key, domain_key):
    """Yield (domain, UTF-8 bytes) of each document of one file."""
    place = path
    try:
        if str(path).endswith(ROWS) or str(path).startswith("hf:"):
            for number, row in enumerate(read_rows(path, [key for key in (text_key, domain_key) if key]), 1):
                place = f"{path}, {'line' if isinstance(row, bytes) else 'row'} {number}"
                if isinstance(row, bytes):
                    if not (row := row.strip()):
                        continue
                    row = json.loads(row)
                yield domain or field(row, domain_key, place), field(row, text_key, place).encode()
        else:
            whole = path.name != f"{domain}.txt" or path.parent.name == domain
            for number, data in enumerate([path.read_bytes()] if whole else read_pieces(path), 1):
                place = path if whole else f"{path}, document {number}"
                data.decode()  # raises where it is not UTF-8
                yield domain, data
    except (OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{place}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_rows(path, keys):
    """Yield the lines of JSON lines, or the rows of Parquet or of a data set of the hub."""
    if str(path).startswith("hf:"):
        name, config, split, *_ = *path[3:].split(":"), "", ""
        load_dataset = optional("datasets", path).load_dataset
        try:
            yield from load_dataset(name, config or None, split=split or "train", streaming=True)
        except Exception as error:  # what fails here is the network, the name or the data
            raise UserError(f"{path}: cannot be loaded: {type(error).__name__}: {error}") from None
    elif path.suffix == ".parquet":
        file = optional("pyarrow.parquet", path).ParquetFile(path)
        for batch in file.iter_batches(256, columns=[key.split(".")[0] for key in keys]):
            yield from batch.to_pylist()
    elif path.suffix == ".zst":  # pyarrow reads every frame, and notices a missing end
        yield from io.BufferedReader(optional("pyarrow", path).input_stream(str(path)), 1 << 20)
    else:
        with {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "rb") as file:
            yield from file


def field(row, key, place):
    """Return the string at a dotted key of a row; a whole number counts as one."""
    value = row
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise UserError(f"{place}: has no field {key!r}; name one that it has with --text_key or --domain_key")
        value = value[part]
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserError(f"{place}: field {key!r} is of type {type(value).__name__}; expected a string")
    return str(value)


def read_pieces(path):
    """Yield the documents of DOMAIN.txt as bytes."""
    if path.stat().st_size == 0:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data.find(MARK) < 0:
            yield from (data[a:b] for a, b in pairwise((0, *cut(data, PIECE))))
            return
        start = 0
        for match in re.finditer(re.escape(MARK) + rb"|\Z", data):
            if document := data[start : match.start()].strip(b"\r\n"):
                yield document
            start = match.end()


def text_hash(data):
    """Map a document's bytes to a uniform number in [0, 1), which decides its side of the split."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "little") / 2**56


def sample_texts(documents, val_fraction):
    """Yield training documents to train a tokenizer on, the same number of bytes from each domain.

    Each of K domains gives SAMPLE / K bytes, or all it has: its documents of least hash, each cut off at 64 KB. So the
    sample is a function of the set of documents. One pass and bounded memory suffice: a share only shrinks as K grows.
    """
    heaps, sizes = defaultdict(list), Counter()  # per domain: (-hash, document), and their bytes

    def shrink(domain):
        while sizes[domain] - len(heaps[domain][0][1]) >= SAMPLE // len(heaps):
            sizes[domain] -= len(heapq.heappop(heaps[domain])[1])

    for domain, data in documents:
        if (order := text_hash(data)) >= val_fraction:
            heapq.heappush(heaps[domain], (-order, data[: 1 << 16]))
            sizes[domain] += len(data[: 1 << 16])
            shrink(domain)
    for domain in sorted(heaps):
        shrink(domain)
        yield from (data.decode(errors="ignore") for _, data in sorted(heaps[domain], reverse=True))


# ---- writing -------------------------------------------------------------------------------------------------------


def write_bins(documents, folder, tokenizer, dtype, val_fraction, workers):
    """Encode documents in threads and write them in their order.

    documents: (domain, bytes) pairs. Returns the "domains" of meta.json. At most 2 * workers groups are read ahead.
    """
    domains, empty, waiting = {}, Counter(), deque()

    def encode(group):
        return [(name, data, np.append(tokenizer.eot, tokenizer.encode(data)).astype(dtype)) for name, data in group]

    def write(future):
        bins = defaultdict(list)
        for domain, data, ids in future.result():
            side = "val" if text_hash(data) < val_fraction else "train"
            for unit, count in ("tokens", len(ids)), ("documents", 1), ("bytes", len(data)):
                domains[domain][f"{side}_{unit}"] += count
            bins[domain, side].append(ids)
        for (domain, side), parts in bins.items():  # open only while it is appended to: there may be many
            with open(folder / folder_name(domain) / f"{side}.bin", "ab") as file:
                file.write(np.concatenate(parts).data)

    with ThreadPoolExecutor(workers) as pool:
        group, size = [], 0
        for domain, data in documents:
            if domain not in domains:
                (folder / folder_name(domain)).mkdir()
                domains[domain] = {f"{side}_{unit}": 0 for unit in ("tokens", "documents", "bytes") for side in SIDES}
            if not data.strip():
                empty[domain] += 1
                continue
            group.append((domain, data))
            size += len(data)
            if size >= GROUP:
                waiting.append(pool.submit(encode, group))
                group, size = [], 0
            while len(waiting) > 2 * workers:
                write(waiting.popleft())
        for future in (*waiting, pool.submit(encode, group)):
            write(future)
    for domain, count in empty.items():
        print(f"{domain}: skipped {count:,} empty documents")
    for domain, entry in domains.items():
        for side in SIDES:
            if not entry[f"{side}_documents"]:
                total = entry["train_documents"] + entry["val_documents"]
                raise UserError(f"domain {domain!r}: none of its {total} documents falls in {side} at --val_fraction="
                                f"{val_fraction}; give it more or shorter documents, or change the fraction")
    return dict(sorted(domains.items()))


def write_meta(folder, tokenizer, dtype, domains):
    """Write the tokenizer's file, and meta.json last."""
    if tokenizer.file:
        (folder / tokenizer.file[0]).write_bytes(tokenizer.file[1])
    meta = {"tokenizer": tokenizer.name, "tokenizer_sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size,
            "eot_token": tokenizer.eot, "dtype": dtype.name, "domains": domains}  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def print_table(domains, out_dir):
    width, total = max(map(len, (*domains, "domain"))), sum(entry["train_tokens"] for entry in domains.values())
    print(f"{'domain':{width}}{'train documents':>17}{'train tokens':>16}{'val tokens':>14}   share  bytes/token")
    for domain, entry in domains.items():
        counts = f"{entry['train_documents']:17,}{entry['train_tokens']:16,}{entry['val_tokens']:14,}"
        density = entry["val_bytes"] / entry["val_tokens"]
        print(f"{domain:{width}}{counts}  {entry['train_tokens'] / total:6.2%}  {density:11.2f}")
    print(f"next: python train_reference.py --data_dir={out_dir} --out_dir=checkpoints/reference")


def parse_args():
    parser = ArgumentParser(__doc__)
    data = parser.add_argument_group("data").add_argument
    data("input", metavar="INPUT", help="see above")
    data("--out_dir", type=Path, help="the data set to make (default: data/NAME, after INPUT)")
    data("--text_key", default="text", help="dotted field of a row that holds its text (default: %(default)s)")
    data("--domain_key", help="dotted field of a row that names its domain, such as meta.pile_set_name")
    data("--max_bytes", type=positive, help="bytes of text to take in all, shared out over the files (default: all)")
    data("--val_fraction", type=fraction, default=0.05, help="share of documents held out (default: %(default)s)")
    tokens = parser.add_argument_group("tokens").add_argument
    tokens("--tokenizer", default="train:512", help="train:N trains one of N tokens, end of text included, on equal "
           "parts of all domains; a tiktoken name such as gpt2; FILE.tiktoken; a tokenizer.json; bytes (default: "
           "%(default)s, which suits the demo's small models)")  # fmt: skip
    tokens("--eot_token", help=f"end-of-text token of a tokenizer.json (default: the first of {', '.join(EOT_NAMES)})")
    machine = parser.add_argument_group("machine").add_argument
    machine("--workers", type=positive, default=os.cpu_count(), help="threads (default: one per core)")
    args = parser.parse_args()
    if not args.val_fraction:
        raise UserError("--val_fraction=0: expected a number between 0 and 1, such as 0.05")
    if args.out_dir is None:
        source = args.input.split(":")[1] if args.input.startswith("hf:") else Path(args.input).resolve().name
        args.out_dir = Path("data", re.sub(r"\.(jsonl|parquet)(\.\w+)?$", "", source.split("/")[-1]))
    return args


def main():
    args = parse_args()
    inputs = find_inputs(args.input, args.domain_key)

    def documents(doing):
        with tqdm(desc=doing, total=args.max_bytes, unit="B", unit_scale=True, disable=None) as bar:
            for domain, data in read_documents(inputs, args.text_key, args.domain_key, args.max_bytes):
                yield domain, data
                bar.update(len(data))

    with staged(args.out_dir) as folder:
        tokenizer = load_tokenizer(args.tokenizer, args.eot_token,
                                   lambda: sample_texts(documents("sampling for the tokenizer"), args.val_fraction))
        dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        domains = write_bins(documents("tokenizing"), folder, tokenizer, dtype, args.val_fraction, args.workers)
        write_meta(folder, tokenizer, dtype, domains)
    print_table(domains, args.out_dir)


if __name__ == "__main__":
    run(main)
