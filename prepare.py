"""Stage 0 of DoReMi: turn text into one memory-mapped file of token ids per domain.

reads   INPUT, one of
          a directory with one entry per domain:
            DOMAIN/                       each file is a document; of JSON lines and Parquet, each row
            DOMAIN.txt                    documents between <|endoftext|> marks; without marks, pieces of 4 to 8 KB
            DOMAIN.jsonl[.gz|.xz|.zst]    one document per line (.ndjson and .json are read as the same)
            DOMAIN.parquet                one document per row
          with --domain_key, a file or directory of mixed rows (JSON lines or Parquet)
          hf:OWNER/NAME[:CONFIG[:SPLIT]], a data set of the Hugging Face hub, streamed
writes  OUT_DIR/{meta.json, DOMAIN/train.bin, DOMAIN/val.bin}, and the tokenizer if it was trained or came from a file
next    python train_reference.py --data_dir=OUT_DIR --out_dir=checkpoints/reference

A .bin file holds little-endian token ids; each document begins with the end-of-text token. A hash of its text sends a
document to train or val. Duplicates therefore never straddle the split, and order, domain and format do not matter.
Hidden files are no data, and a file counts once, however many links lead to it. OUT_DIR appears when everything is
written, or not at all. For data that is already tokenized see tools/link.py.
"""

import errno
import functools
import gzip
import hashlib
import io
import json
import lzma
import mmap
import os
import re
import stat
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common.cli import ArgumentParser, UserError, fraction, positive, print_anywhere, run
from common.files import folder_name, parse_lines, sample_sha256, staged
from common.tokenizer import EOT, EOT_NAMES, load_tokenizer, optional, split_text

GROUP = 1 << 20  # bytes of documents handed to a thread at once, and written at once
SAMPLE = 32 << 20  # bytes that a tokenizer is trained on, over all domains
MOST_DOMAINS = 2000
SIDES = ("train", "val")
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


# ---- reading -------------------------------------------------------------------------------------------------------


def find_inputs(source, domain_key):
    """List INPUT.  Raises UserError for whatever in it is no data, before anything is read."""
    if source.startswith("hf:"):
        return [Input(source, None if domain_key else hub_name(source), "rows")]
    root = Path(source)
    if domain_key:
        return mixed_rows(root)
    if root.is_file():
        raise UserError(f"{root}: is one file; give a directory with one entry per domain, or rows and --domain_key")
    inputs = domain_entries(root)
    for each in inputs:
        check_domain_name(each.domain, each.path)
    return inputs


def hub_name(source):
    return source.split(":")[1].split("/")[-1]


def check_domain_name(name, place):
    own = name.lower() == "meta.json" or name.lower().startswith("tokenizer.")  # files in OUT_DIR
    if own or name[:1] in (" ", ".", "") or not name.isprintable() or len(folder_name(name)) > 200:
        raise UserError(f"{place}: {name!r} cannot name a domain, for it names a folder in OUT_DIR; choose another")


def read_documents(inputs, text_key, domain_key, max_bytes=None):
    """Yield (domain, UTF-8 bytes) of each document.

    max_bytes is shared out over the files by the text in them: a sample takes the beginning of every file and keeps
    their proportions.
    """
    sizes = [text_size(each, text_key) if max_bytes and len(inputs) > 1 else 1 for each in inputs]
    seen, taken, budget = set(), 0, 0
    for each, size in zip(inputs, sizes):
        budget += max_bytes * size / max(sum(sizes), 1) if max_bytes else np.inf
        documents = read_input(each, text_key, domain_key) if taken < budget else ()
        for domain, data in documents:
            if domain not in seen:
                seen.add(domain)
                check_domain_name(domain, each.path)
                if len(seen) > MOST_DOMAINS:
                    raise UserError(f"{each.path}: more than {MOST_DOMAINS} domains; is --domain_key={domain_key} "
                                    "right?")
            yield domain, data
            taken += len(data)
            if taken >= budget:
                break
    for each in inputs:
        if each.domain not in seen and (each.domain or not seen):
            more = f", or raise --max_bytes={max_bytes}" if max_bytes else ""
            raise UserError(f"{each.path}: gives no document; add some, or remove it{more}")


def text_hash(data):
    """Map a document's bytes to a uniform number in [0, 1), which decides its side of the split."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "little") / 2**56


def sample_texts(documents, val_fraction):
    """Yield training documents to train a tokenizer on, the same number of bytes from each domain.

    Each of K domains gives SAMPLE / K bytes, or all it has: its documents of least hash, each cut off at 64 KB. So the
    sample is a function of the set of documents. Only what may still be in it is kept in memory.
    """
    kept, sizes = defaultdict(list), Counter()  # per domain: (hash, document), and their bytes

    def shorten(domain):
        kept[domain].sort()
        sizes[domain] = 0
        for number, (_, data) in enumerate(kept[domain], 1):
            sizes[domain] += len(data)
            if sizes[domain] >= SAMPLE // len(kept):
                del kept[domain][number:]
                break

    for domain, data in documents:
        order = text_hash(data)
        if order >= val_fraction:
            kept[domain].append((order, data[: 1 << 16]))
            sizes[domain] += len(data[: 1 << 16])
            if sizes[domain] >= 2 * (SAMPLE // len(kept)):
                shorten(domain)
    for domain in sorted(kept):
        shorten(domain)
        yield from (data.decode(errors="ignore") for _, data in kept[domain])


# ---- writing -------------------------------------------------------------------------------------------------------


def write_bins(documents, folder, tokenizer, dtype, val_fraction, max_val_tokens, workers):
    """Encode documents in threads and write them in their order.

    documents: (domain, bytes) pairs. Returns the "domains" of meta.json. At most 2 * workers groups are read ahead.
    """
    domains, empty, waiting = {}, Counter(), deque()
    held_out = defaultdict(list)  # per domain: (hash, tokens, bytes) of each document in val.bin

    def encode(group):
        return [(domain, data, encode_document(tokenizer, data, dtype)) for domain, data in group]

    def write(future):
        bins = defaultdict(list)
        for domain, data, ids in future.result():
            order = text_hash(data)
            side = "val" if order < val_fraction else "train"
            for unit, count in ("tokens", len(ids)), ("documents", 1), ("bytes", len(data)):
                domains[domain][f"{side}_{unit}"] += count
            if side == "val":
                held_out[domain].append((order, len(ids), len(data)))
            bins[domain, side].append(ids)
        for (domain, side), parts in bins.items():  # open only while it is appended to: there may be many
            with open(folder / folder_name(domain) / f"{side}.bin", "ab") as file:
                file.writelines(part.data for part in parts)

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
    for domain, entry in domains.items():
        if empty[domain]:
            print_anywhere(f"{domain}: skipped {empty[domain]:,} empty documents")
        for side in SIDES:
            if not entry[f"{side}_documents"]:
                total = entry["train_documents"] + entry["val_documents"]
                raise UserError(f"domain {domain!r}: none of its {total} documents falls in {side} at --val_fraction="
                                f"{val_fraction}; give it more or shorter documents, or change the fraction")
        if entry["val_tokens"] > max_val_tokens:
            shorten_val(folder / folder_name(domain) / "val.bin", domain, entry, held_out[domain], dtype,
                        max_val_tokens)
    return dict(sorted(domains.items()))


def encode_document(tokenizer, data, dtype):
    ids = tokenizer.encode(data)
    document = np.empty(len(ids) + 1, dtype)
    document[0] = tokenizer.eot
    document[1:] = ids
    return document


def shorten_val(path, domain, entry, documents, dtype, max_val_tokens):
    """Keep in val.bin the documents of least hash that have at most max_val_tokens (one at least), and count them anew.

    The others go nowhere: in train.bin they could be copies of what another domain holds out.
    documents: (hash, tokens, bytes) of each, in their order in val.bin.
    """
    order, tokens, size = np.array(documents).T
    tokens, size = tokens.astype(np.int64), size.astype(np.int64)
    by_hash = np.argsort(order, kind="stable")
    count = max(1, int((np.cumsum(tokens[by_hash]) <= max_val_tokens).sum()))
    kept = np.sort(by_hash[:count])
    ids, ends = np.memmap(path, dtype, mode="r"), np.cumsum(tokens)
    parts = [ids[ends[i] - tokens[i] : ends[i]] for i in kept]
    np.concatenate(parts).tofile(path.with_name("val.part"))
    path.with_name("val.part").replace(path)
    entry |= {"val_tokens": int(tokens[kept].sum()), "val_documents": count, "val_bytes": int(size[kept].sum())}
    print_anywhere(f"{domain}: left out {len(documents) - count:,} documents that --max_val_tokens={max_val_tokens} "
                   f"has no room for; train on most of them with a lower --val_fraction")


def write_meta(folder, tokenizer, dtype, domains):
    """Write the tokenizer's file, and meta.json last."""
    if tokenizer.file:
        (folder / tokenizer.file[0]).write_bytes(tokenizer.file[1])
    for domain, entry in domains.items():
        for side in SIDES:
            path = folder / folder_name(domain) / f"{side}.bin"
            entry[f"{side}_sha256"] = sample_sha256(path, entry[f"{side}_tokens"] * dtype.itemsize)
    meta = {"tokenizer": tokenizer.name, "tokenizer_sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size,
            "eot_token": tokenizer.eot, "dtype": dtype.name, "domains": domains}  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def print_table(domains, out_dir):
    width, total = max(map(len, (*domains, "domain"))), sum(entry["train_tokens"] for entry in domains.values())
    print(f"{'domain':{width}}{'train documents':>17}{'train tokens':>16}{'val tokens':>14}   share  bytes/token")
    for domain, entry in domains.items():
        counts = f"{entry['train_documents']:17,}{entry['train_tokens']:16,}{entry['val_tokens']:14,}"
        density = entry["val_bytes"] / entry["val_tokens"]
        print_anywhere(f"{domain:{width}}{counts}  {entry['train_tokens'] / total:6.2%}  {density:11.2f}")
    print_anywhere(f"next: python train_reference.py --data_dir={out_dir} --out_dir=checkpoints/reference")


def parse_args():
    parser = ArgumentParser(__doc__)
    data = parser.add_argument_group("data").add_argument
    data("input", metavar="INPUT", help="see above")
    data("--out_dir", type=Path, help="the data set to make (default: data/NAME, after INPUT)")
    data("--text_key", default="text", help="field of a row that holds its text, or dotted path (default: %(default)s)")
    data("--domain_key", help="field of a row that names its domain, or dotted path, such as meta.pile_set_name")
    data("--max_bytes", type=positive, help="bytes of text to take in all, from the beginning of each file and in "
         "proportion to their text (default: all)")
    data("--val_fraction", type=fraction, default=0.05, help="share of documents held out (default: %(default)s)")
    data("--max_val_tokens", type=positive, default=10_000_000, help="tokens that a domain holds out at most (default: "
         "%(default)s)")  # fmt: skip
    tokens = parser.add_argument_group("tokens").add_argument
    tokens("--tokenizer", default="train:512", help="train:N trains one of N tokens, end of text included, on equal "
           "parts of all domains; a tiktoken name such as gpt2; FILE.tiktoken; a tokenizer.json; bytes (default: "
           "%(default)s, which suits the demo's small models)")  # fmt: skip
    tokens("--eot_token", help=f"end-of-text token of a tokenizer.json (default: the one of {', '.join(EOT_NAMES)})")
    machine = parser.add_argument_group("machine").add_argument
    machine("--workers", type=positive, default=os.cpu_count(), help="threads (default: one per core)")
    args = parser.parse_args()
    if not args.val_fraction:
        raise UserError("--val_fraction=0: expected a number between 0 and 1, such as 0.05")
    if args.out_dir is None:
        name = hub_name(args.input) if args.input.startswith("hf:") else Path(args.input).resolve().name
        args.out_dir = Path("data", ROWS.sub("", name))
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
        domains = write_bins(documents("tokenizing"), folder, tokenizer, dtype, args.val_fraction,
                             args.max_val_tokens, args.workers)
        write_meta(folder, tokenizer, dtype, domains)
    print_table(domains, args.out_dir)


if __name__ == "__main__":
    run(main)
