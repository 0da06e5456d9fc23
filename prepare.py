"""Stage 0 of DoReMi: turn text into one memory-mapped file of token ids per domain.

reads   INPUT, one of
          a directory with one entry per domain:
            DOMAIN/                       each file is a document, or of JSON lines and Parquet, each row
            DOMAIN.txt                    documents between <|endoftext|> marks; without marks, pieces of 4 to 8 KB
            DOMAIN.jsonl[.gz|.xz|.zst]    one document per line (.ndjson and .json are read as the same)
            DOMAIN.parquet                one document per row
          with --domain_key, a file or directory of mixed rows (JSON lines or Parquet)
          hf:OWNER/NAME[:CONFIG[:SPLIT]], a data set of the Hugging Face hub, streamed
writes  OUT_DIR/{meta.json, DOMAIN/train.bin, DOMAIN/val.bin}, and the tokenizer if it was trained or came from a file
next    python train_reference.py --data_dir=OUT_DIR --out_dir=checkpoints/reference

A .bin file holds little-endian token ids; each document begins with the end-of-text token. A hash of its text sends a
document to train or val, so duplicates never straddle the split. Hidden files are no data, nor is a README or LICENSE
beside rows or domains. A file counts once, however many links lead to it. Rows without usable text are skipped and
counted. OUT_DIR appears when everything is written, or not at all. For data that is already tokenized: tools/link.py.
"""

import contextlib
import gzip
import hashlib
import heapq
import io
import json
import lzma
import mmap
import os
import re
import shlex
import unicodedata
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common import cli
from common.cli import UserError
from common.files import DATA_FORMAT, folder_name, parse_lines, sample_sha256, shorter, staged
from common.tokenizer import EOT, EOT_NAMES, load_tokenizer, optional, split_text, tokenizer_name

GROUP = 1 << 20  # bytes of documents handed to a thread at once, and written at once
SAMPLE = 32 << 20  # bytes that a tokenizer is trained on, over all domains; it is tried on a sixteenth
MEASURED = 4 << 20  # bytes of a file of rows from which the size of all its text is estimated
PIECE = 8 << 10  # bytes: longest piece of a .txt file without marks

ROWS = re.compile(r"(?i)\.((jsonl|ndjson|json)(\.(gz|xz|zst))?|parquet)$")
SUFFIX = re.compile(rf"(?i)\.txt$|{ROWS.pattern[4:]}")
HIDDEN = re.compile(r"\.|_(SUCCESS|temporary|delta_log|(common_)?metadata|(committed|started)_\w+)$")  # dots; Spark's
ABOUT = re.compile(r"(?i)((readme|licen[cs]es?|notice|copying|citation|changelog)(\.(txt|md|rst|cff))?|"
                   r"dataset_infos?\.json)$")
HELD_OUT = re.compile(r"(?i)(?<![a-z])(val|valid|validation|dev|test|testing|eval|evaluation|h[eo]ld[-_]?out)(?![a-z])")
TRAINING = re.compile(r"(?i)(?<![a-z])train(ing)?(?![a-z])")
AWAY = "remove it, or begin its name with a dot"


# ---- which files belong to which domain ----------------------------------------------------------------------------


class Input(NamedTuple):
    path: Path | str  # hf:...
    domain: str | None  # None: each row names its own
    kind: str  # rows, pieces (DOMAIN.txt), or document (a file of text in a domain's folder)


def domain_entries(root):
    """List the Inputs of a directory with one entry per domain.  Raises UserError for what in it is no data."""
    inputs = []
    for domain, entry, paths in files_by_domain(root, SUFFIX):
        if any(ROWS.search(path.name) for path in paths):
            paths = only_rows(paths)
        refuse_held_out(entry, paths)
        if not SUFFIX.search(entry.name) and not entry.is_dir():
            raise UserError(f"{entry}: unknown type; expected a folder, .txt, .jsonl[.gz|.xz|.zst] or .parquet; {AWAY}")
        for path in paths:
            text = "pieces" if path == entry else "document"
            inputs.append(Input(path, domain, "rows" if ROWS.search(path.name) else text))
    return inputs


def mixed_rows(root):
    """List the Inputs at or below a path, of which every row names its domain.  Raises UserError as above."""
    paths = only_rows(sorted(walk(root, {}), key=str))
    refuse_held_out(root, paths)
    if not paths:
        raise UserError(f"{root}: holds no documents; add some, or remove it")
    return [Input(path, None, "rows") for path in paths]


def only_rows(paths):
    """Leave out what describes the rows beside it.  Raises UserError for other files that are no rows."""
    rows = [path for path in paths if not ABOUT.match(path.name)]
    for path in rows:
        if not ROWS.search(path.name):
            raise UserError(f"{path}: is no .jsonl[.gz|.xz|.zst] or .parquet, as the rows beside it are; {AWAY}")
    return rows


def files_by_domain(root, suffix, beside=None):
    """Yield (domain, entry, its files) of a directory with one entry per domain, sorted.

    suffix: pattern of what is no part of a domain's name; beside: pattern of files that belong to others.
    """
    entries = sorted(visible(root))
    splits = any(TRAINING.search(entry.name) for entry in entries)
    domains, earlier = {}, {}
    for entry in entries:
        if (ABOUT.match(entry.name) and entry.is_file()) or (beside and beside.search(entry.name)):
            continue
        domain = domain_name(entry.name if entry.is_dir() else suffix.sub("", entry.name))
        refuse_look_alike(domain, entry, domains)
        if HELD_OUT.fullmatch(domain) or (splits and HELD_OUT.search(domain)):
            raise UserError(f"{entry}: is named as held-out text, which would be a domain; rename it, or remove it")
        seen = {}
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


def domain_name(text):
    """A domain's name: one for all spellings in Unicode, without spaces around it or characters that do not show."""
    shown = "".join(character for character in text if character.isprintable() or character.isspace())
    return unicodedata.normalize("NFC", " ".join(shown.split()))


def refuse_look_alike(name, place, domains):
    """Add {what the name looks like: (name, place)} to domains.  Raises UserError if another looks the same."""
    other, where = domains.setdefault(unicodedata.normalize("NFKC", name).casefold(), (name, place))
    if (other, where) != (name, place):
        raise UserError(f"domain {name!r} of '{place}' and {other!r} of '{where}' look alike; rename one")


def refuse_held_out(folder, paths):
    """Raise UserError if a path below a folder is named as held-out text, which would be trained on."""
    names = {path: path.relative_to(folder).parts for path in paths if path != folder}
    training = {TRAINING.sub("*", parts[0]) for parts in names.values()}
    for path, parts in names.items():
        if ROWS.search(path.name):
            held_out = any(HELD_OUT.search(part) for part in parts)
        else:  # text, only beside its like for training, as test.txt beside train.txt: code may well have a test.py
            plain = len(parts) > 1 or path.suffix in ("", ".txt", ".raw")
            held_out = plain and HELD_OUT.search(parts[0]) and HELD_OUT.sub("*", parts[0]) in training
        if held_out:
            raise UserError(f"{path}: is named as held-out text, which would be trained on; {AWAY}")


def visible(folder):
    """List what lies in a folder by name, links last, without what is hidden."""
    try:
        entries = [entry for entry in os.scandir(folder) if not HIDDEN.match(entry.name)]
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); see --domain_key for mixed rows") from None
    return [Path(entry.path) for entry in sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))]


def walk(path, seen):
    """Yield the files at and below a path but those in `seen`, {(device, inode): path}, which is added to."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {AWAY}") from None
    identity = status.st_dev, status.st_ino
    if identity in seen:
        return
    seen[identity] = path
    if path.is_dir():
        for entry in visible(path):
            yield from walk(entry, seen)
    else:
        yield path


# ---- the documents in them -----------------------------------------------------------------------------------------


def read_rows(each, text_key, domain_key, skipped):
    """Yield (domain, UTF-8 bytes) of the rows of an Input.  Count those without usable text, if they are not half."""
    good, bad, fault = 0, 0, None
    for place, row, _ in find_rows(each.path, [key for key in (text_key, domain_key) if key]):
        try:
            data = value_at(row, text_key).encode()
            domain = each.domain or domain_name(value_at(row, domain_key))
            if not domain:
                raise ValueError(f"field {domain_key!r} names the domain ''")
        except ValueError as error:
            bad += 1
            fault = fault or f"{place}: {error}"
            skipped[f"rows of {each.path}, the first is {fault}"] += 1
            if bad >= max(good, 1000):
                break
        else:
            good += 1
            yield domain, data
    if bad and bad >= good:
        raise UserError(f"{fault}; {bad:,} of {good + bad:,} rows have no usable text")


def read_texts(each, text_key, _, skipped):
    """Yield (domain, UTF-8 bytes) of the documents in a file of text.  Count files in folders that are none."""
    rows = re.compile(rb'\{[^\n]*"%s":' % re.escape(text_key.encode()))
    documents = [each.path.read_bytes()] if each.kind == "document" else read_pieces(each.path)
    for number, data in enumerate(documents, 1):
        if rows.match(data):
            raise UserError(f"{each.path}, document {number}: holds rows, not text; end its name in .jsonl")
        try:
            data.decode()
            yield each.domain, data
        except UnicodeDecodeError as error:
            if each.kind == "pieces":
                raise UserError(f"{each.path}, document {number}: {error}; convert or remove it") from None
            skipped[f"files of domain {each.domain!r}, which are no text in UTF-8; convert them"] += 1


def find_rows(path, keys):
    """Yield (place, for messages; row; part of the file that was read).  Raises UserError for a damaged file."""
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
        raise UserError(f"{place}: cannot be read further: {shorter(error)}") from None


def json_rows(path):
    with open(path, "rb") as raw:
        lines, size = raw, path.stat().st_size
        if path.suffix.lower() == ".zst":  # pyarrow reads every frame, and notices a missing end
            lines = io.BufferedReader(optional("pyarrow", path).CompressedInputStream(raw, "zstd"), 1 << 20)
        elif path.suffix.lower() in (".gz", ".xz"):
            lines = {".gz": gzip, ".xz": lzma}[path.suffix.lower()].open(raw)
        for number, row in parse_lines(lines):
            yield f"{path}, line {number}", row, raw.tell() / size


def parquet_rows(path, keys):
    file = optional("pyarrow.parquet", path).ParquetFile(path)
    columns = [name for name in file.schema_arrow.names if any(f"{key}.".startswith(f"{name}.") for key in keys)]
    rows = (row for batch in file.iter_batches(256, columns=columns) for row in batch.to_pylist())
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row, number / file.metadata.num_rows


def hub_rows(source):
    """The rows of hf:OWNER/NAME[:CONFIG[:SPLIT]]."""
    _, name, config, split, *_ = [*source.split(":"), "", ""]
    rows = optional("datasets", source).load_dataset(name, config or None, split=split or "train", streaming=True)
    for number, row in enumerate(rows, 1):
        yield f"{source}, row {number}", row, 0.0


def value_at(row, key):
    """Return the string or whole number at a key of a row, or else at a dotted path.  Raises ValueError."""
    if not isinstance(row, dict):
        what = f" ({row})" if isinstance(row, ValueError) else ""
        raise ValueError(f"is no JSON object{what}; expected one on each line, not an array or one over several")
    value = row
    for name in [key] if key in row else key.split("."):
        if isinstance(value, str):  # that holds JSON, as RedPajama's meta does
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"has no field {key!r}; name one that it has with --text_key or --domain_key")
        value = value[name]
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"field {key!r} is of type {type(value).__name__}; expected a string")
    return str(value)


def read_pieces(path):
    """Yield the documents of DOMAIN.txt as bytes."""
    if path.stat().st_size == 0:  # it cannot be mapped
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data.find(EOT.encode()) < 0:
            yield from (data[a:b] for a, b in pairwise((0, *split_text(data, PIECE))))
            return
        start = 0
        for match in re.finditer(re.escape(EOT.encode()) + rb"|\Z", data):
            if document := data[start : match.start()].strip(b"\r\n"):
                yield document
            start = match.end()


def text_size(each, text_key):
    """Return the bytes of text in an Input; of a large file of rows, an estimate from its beginning."""
    size, total = each.path.stat().st_size, 0
    if each.kind != "rows":
        return size
    for _, row, done in find_rows(each.path, [text_key]):
        with contextlib.suppress(ValueError):
            total += len(value_at(row, text_key).encode())
        if done * size >= MEASURED:
            return total / done
    return total


def share_out(inputs, text_key, max_bytes):
    """Return the bytes to take of each Input, in proportion to their text."""
    if not max_bytes or len(inputs) == 1:
        return [max_bytes or np.inf] * len(inputs)
    sizes = [text_size(each, text_key) for each in inputs]
    return [max_bytes * size / max(sum(sizes), 1) for size in sizes]


def read_documents(inputs, shares, text_key, domain_key, skipped):
    """Yield (domain, UTF-8 bytes) of each document, from the beginning of each Input until its share is taken."""
    names, alike, taken, budget = set(), {}, 0, 0
    for each, share in zip(inputs, shares):
        budget += share
        if taken >= budget:
            continue
        read = read_rows if each.kind == "rows" else read_texts
        for domain, data in read(each, text_key, domain_key, skipped):
            if not data.strip():
                skipped[f"empty documents of domain {domain!r}"] += 1
                continue
            if domain not in names:
                refuse_look_alike(domain, each.path, alike)
                names.add(domain)
            data = data.removeprefix(b"\xef\xbb\xbf")  # what some editors write before the text
            yield domain, data
            taken += len(data)
            if taken >= budget:
                break
    for each in inputs:
        if each.domain not in names and (each.domain or not names):
            raise UserError(f"{each.path}: gives no text in UTF-8; add some, remove it, or raise --max_bytes")


def text_hash(data):
    """Map a document's bytes to a uniform number in [0, 1): its side of the split."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "little") / 2**56


def sample_documents(documents, val_fraction, size):
    """Yield (domain, bytes) of training documents, whatever their order: of each of K domains those of least hash.

    They have size / K bytes, or all there are, and are cut off at 64 KB. Only what may still be used is in memory.
    """
    heaps, sizes = defaultdict(list), Counter()  # per domain: (-hash, document), and their bytes

    def shorten(domain):
        heap = heaps[domain]
        while sizes[domain] - len(heap[0][1]) >= size // len(heaps):  # without the document of greatest hash
            sizes[domain] -= len(heapq.heappop(heap)[1])

    for domain, data in documents:
        hashed = text_hash(data)
        if hashed >= val_fraction:
            heapq.heappush(heaps[domain], (-hashed, data[: 1 << 16]))
            sizes[domain] += len(data[: 1 << 16])
            shorten(domain)
    for domain in sorted(heaps):
        shorten(domain)
        yield from ((domain, data) for _, data in sorted(heaps[domain], reverse=True))


def check_characters(tokenizer, documents):
    """Tell what encoding and decoding loses of documents.  Raises UserError if it is above a hundredth of a domain."""
    total, lost = Counter(), defaultdict(Counter)
    for domain, data in documents:
        text = data.decode(errors="ignore")
        decoded = tokenizer.decode(tokenizer.encode(text.encode()).tolist()).decode()
        before, after = (unicodedata.normalize("NFKC", each) for each in (text, decoded))  # other forms are no loss
        total[domain] += len(before)
        lost[domain] += Counter(before) - Counter(after)
    for domain, characters in lost.items():
        if characters:
            share, example = characters.total() / total[domain], max(characters, key=characters.get)
            words = f"domain {domain!r}: {tokenizer.name} loses {share:.2%} of the characters, such as {example!r}"
            if share > 0.01:
                raise UserError(f"{words}; choose a tokenizer that has them, or one with byte fallback")
            print(words)


# ---- writing -------------------------------------------------------------------------------------------------------


@dataclass
class Bins:
    """A domain's train.bin while it is written, and what goes into val.bin at the end: `max_val_tokens` in memory."""
    folder: Path
    limit: float  # documents of smaller hash are held out
    train: Counter = field(default_factory=Counter)  # tokens, documents, bytes of text
    held_out: list = field(default_factory=list)  # (hash, ids, bytes of text)
    val_tokens: int = 0  # of these

    def add(self, documents, args):
        """Add documents, (bytes, ids) pairs.  train.bin is open only meanwhile, for there may be many domains."""
        with open(self.folder / "train.bin", "ab") as file:
            for data, ids in documents:
                hashed = text_hash(data)
                if hashed >= args.val_fraction:
                    file.write(ids.data)
                    self.train.update(tokens=len(ids), documents=1, bytes=len(data))
                elif hashed < self.limit:
                    self.held_out.append((hashed, ids, len(data)))
                    self.val_tokens += len(ids)
        while self.val_tokens > args.max_val_tokens and len(self.held_out) > 1:
            # What this leaves out goes nowhere: in train.bin it could be a copy of what another domain holds out
            self.limit /= 2
            self.held_out = [document for document in self.held_out if document[0] < self.limit]
            self.val_tokens = sum(len(ids) for _, ids, _ in self.held_out)

    def finish(self, domain, args):
        """Write val.bin, and return the domain's entry in meta.json.  Raises UserError for an empty side."""
        train, held_out = self.train["documents"], len(self.held_out)
        if not train or not held_out:
            raise UserError(f"domain {domain!r}: of its documents {train} are in train and {held_out} in val at "
                            f"--val_fraction={args.val_fraction}; give it more or shorter ones, or change the fraction")
        if self.limit < args.val_fraction:
            print(f"{domain}: --max_val_tokens={args.max_val_tokens} holds out {self.limit:.3g} of its "
                  f"documents; train on most of the others with --val_fraction={self.limit:.3g}")
        np.concatenate([ids for _, ids, _ in self.held_out]).tofile(self.folder / "val.bin")
        return {"train_tokens": self.train["tokens"], "val_tokens": self.val_tokens,
                "train_documents": train, "val_documents": held_out,
                "train_bytes": self.train["bytes"], "val_bytes": sum(size for _, _, size in self.held_out)}


def write_bins(documents, folder, tokenizer, dtype, args):
    """Encode documents, (domain, bytes) pairs, and write them in order.  Return the "domains" of meta.json."""
    bins = {}
    for group in encode_documents(documents, tokenizer, dtype, args.workers):
        for domain, part in group.items():
            if domain not in bins:
                bins[domain] = Bins(folder / folder_name(domain), args.val_fraction)
                bins[domain].folder.mkdir()
            bins[domain].add(part, args)
    return {domain: bins[domain].finish(domain, args) for domain in sorted(bins)}


def encode_documents(documents, tokenizer, dtype, workers):
    """Yield {domain: [(bytes, ids)]} in the order of the documents.  At most 2 * workers of these are read ahead."""
    def encode(group):
        by_domain = defaultdict(list)
        for domain, data in group:
            by_domain[domain].append((data, np.append(tokenizer.eot, tokenizer.encode(data)).astype(dtype)))
        return by_domain

    with ThreadPoolExecutor(workers) as pool:
        waiting, group, size = deque(), [], 0
        for domain, data in documents:
            group.append((domain, data))
            size += len(data)
            if size >= GROUP:
                waiting.append(pool.submit(encode, group))
                group, size = [], 0
            while len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        waiting.append(pool.submit(encode, group))
        while waiting:
            yield waiting.popleft().result()


def write_meta(folder, tokenizer, dtype, domains):
    """Write the tokenizer's file, and meta.json last.  domains: {domain: its entry}, to which hashes are added."""
    if tokenizer.file:
        (folder / tokenizer.file[0]).write_bytes(tokenizer.file[1])
    for domain, entry in domains.items():
        for side in "train", "val":
            path = folder / folder_name(domain) / f"{side}.bin"
            entry[f"{side}_sha256"] = sample_sha256(path, entry[f"{side}_tokens"] * dtype.itemsize)
    meta = {"format": DATA_FORMAT, "tokenizer": tokenizer.name, "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size, "eot_token": tokenizer.eot, "dtype": dtype.name, "domains": domains}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def print_table(domains, out_dir):
    width, total = max(map(len, (*domains, "domain"))), sum(entry["train_tokens"] for entry in domains.values())
    print(f"{'domain':{width}}  train documents    train tokens    val tokens   share  bytes/token")
    for domain, entry in domains.items():
        counts = f"{entry['train_documents']:17,}{entry['train_tokens']:16,}{entry['val_tokens']:14,}"
        density = entry["val_bytes"] / entry["val_tokens"]
        print(f"{domain:{width}}{counts}  {entry['train_tokens'] / total:6.2%}  {density:11.2f}")
    print(f"next: python train_reference.py --data_dir={shlex.quote(str(out_dir))} "
          "--out_dir=checkpoints/reference")


def main():
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument
    add("input", metavar="INPUT", type=cli.path, help="see above")
    add("--out_dir", type=cli.path, help="the data set to make (default: data/NAME, after INPUT)")
    add("--text_key", default="text", help="field of a row that holds its text, or dotted path (default: %(default)s)")
    add("--domain_key", help="field of a row that names its domain, or dotted path, such as meta.pile_set_name")
    add("--max_bytes", type=cli.positive, help="bytes of text to take in all, from the beginning of each file, in "
        "proportion to their text (default: all)")
    add("--val_fraction", type=cli.fraction, default=0.05, help="share of documents held out (default: %(default)s)")
    add("--max_val_tokens", type=cli.positive, default=10_000_000, help="tokens that a domain holds out at most: its "
        "fraction is halved until it does (default: %(default)s)")
    add("--tokenizer", type=tokenizer_name, default="train:512", help="train:N trains one of N tokens, end of text "
        "included, on equal parts of all domains; a tiktoken name such as gpt2; FILE.tiktoken, which always splits "
        "words by GPT-4's rule: its owner's rule is not in it, and may give other ids; a tokenizer.json; bytes "
        "(default: %(default)s, which suits the demo's small models)")
    add("--eot_token", help=f"end-of-text token of a tokenizer.json (default: the one of {', '.join(EOT_NAMES)})")
    add("--workers", type=cli.positive, default=os.cpu_count(), help="threads (default: one per core)")
    args = parser.parse_args()
    args.out_dir = args.out_dir or Path("data", ROWS.sub("", Path(args.input).resolve().name))
    if args.input.startswith("hf:"):
        inputs = [Input(args.input, None if args.domain_key else Path(args.input).name, "rows")]
    else:
        inputs = mixed_rows(Path(args.input)) if args.domain_key else domain_entries(Path(args.input))
    skipped = Counter()  # {what is left out: number}

    with staged(args.out_dir) as folder:
        shares = share_out(inputs, args.text_key, args.max_bytes)

        def documents(doing):
            skipped.clear()
            with tqdm(desc=doing, total=args.max_bytes, unit="B", unit_scale=True, disable=None) as bar:
                for domain, data in read_documents(inputs, shares, args.text_key, args.domain_key, skipped):
                    yield domain, data
                    bar.update(len(data))

        def sample(size):
            return sample_documents(documents("sampling for the tokenizer"), args.val_fraction, size)

        tokenizer = load_tokenizer(args.tokenizer, args.eot_token,
                                   lambda: (data.decode(errors="ignore") for _, data in sample(SAMPLE)))
        if tokenizer.encoding is None:  # a tokenizer.json: all others bring back every byte
            check_characters(tokenizer, sample(SAMPLE // 16))
        dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        domains = write_bins(documents("tokenizing"), folder, tokenizer, dtype, args)
        write_meta(folder, tokenizer, dtype, domains)
    for what, number in skipped.items():
        print(f"skipped {number:,} {what}")
    print_table(domains, args.out_dir)


if __name__ == "__main__":
    cli.run(main)
