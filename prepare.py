"""Stage 0 of DoReMi: text to one memory-mapped token bin per domain.

reads   INPUT, one of
          a directory with one entry per domain:
            DOMAIN/                           each file within, at any depth, is a document (JSON lines: one a line)
            DOMAIN.txt                        documents between <|endoftext|> marks; a text without them is cut into
                                              pieces of 4 to 8 thousand characters, at blank lines where there are any
            DOMAIN.jsonl[.gz|.xz|.zst]        the "text" field of each line (DOMAIN.parquet: of each row)
          with --domain_key, a file or directory of mixed JSON lines or Parquet; hf:OWNER/NAME, a data set of the hub
          nothing: the embedded corpus (corpus.py), which needs no download
writes  OUT_DIR/{meta.json, DOMAIN/train.bin, DOMAIN/val.bin}, and tokenizer.tiktoken where the tokenizer was trained
next    python train_reference.py --data_dir=OUT_DIR --out_dir=checkpoints/reference --domain_weights=uniform

A bin is the token ids of its documents, little-endian, each document after one end-of-text token. Whether a document
is in train or in val depends on a hash of its text alone: duplicates never straddle the split, and neither the order,
the domain nor the file format matters. OUT_DIR appears when all is written, or not at all.
"""

import base64
import contextlib
import glob
import hashlib
import heapq
import json
import os
import re
import shutil
import signal
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken
from tqdm import tqdm

import corpus
from cli import ArgumentParser, UserError, run
from documents import cut, find_inputs, read_documents

EOT = "<|endoftext|>"
# How text is split into words before byte pairs are merged within them: GPT-4's pattern. A .tiktoken file does not
# hold its pattern, so those that are trained here and those that are read share this one.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPAN = 1 << 17  # characters encoded at once: the regular expressions' stack overflows on long runs of one kind
GROUP = 1 << 18  # characters of small documents handed to a thread at once
SAMPLE = 32 << 20  # characters that a tokenizer is trained on, over all domains


# ---- tokenizers ----------------------------------------------------------------------------------------------------


def get_encoding(spec, sample):
    """The tiktoken.Encoding that --tokenizer asks for.

    sample: called for texts where the tokenizer is to be trained.
    """
    if spec == "bytes":
        return make_encoding("bytes", {bytes([byte]): byte for byte in range(256)})
    if spec.startswith("train:"):
        size = spec.removeprefix("train:")
        if not size.isdecimal() or not 257 <= int(size) <= 1_000_000:
            raise UserError(
                f"--tokenizer={spec}: the number of tokens must be a whole number from 257 (256 bytes and end of text) "
                "to 1,000,000"
            )
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(sample(), int(size) - 1, pattern=PATTERN)
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        if len(ranks) + 1 < int(size):
            raise UserError(f"--tokenizer={spec}: the text makes no more than {len(ranks) + 1} tokens; ask for fewer")
        return make_encoding(spec, ranks)
    if spec.endswith(".tiktoken"):
        return make_encoding(Path(spec).name, load_ranks(Path(spec)))
    if spec not in tiktoken.list_encoding_names():
        names = ", ".join(tiktoken.list_encoding_names())
        raise UserError(f"--tokenizer={spec}: unknown; expected train:N, bytes, FILE.tiktoken, or one of {names}")
    try:
        return tiktoken.get_encoding(spec)
    except OSError as error:  # those of requests are among them
        raise UserError(
            f"--tokenizer={spec}: tiktoken cannot fetch it ({type(error).__name__}); connect to the network "
            "once, set TIKTOKEN_CACHE_DIR to a directory that holds it, or train one: --tokenizer=train:4096"
        ) from None


def make_encoding(name, ranks):
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


def load_ranks(path):
    """Read a .tiktoken file. Not by tiktoken.load, which keeps a copy by path and would miss that the file changed."""
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except OSError as error:
        raise UserError(f"--tokenizer={path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"--tokenizer={path}: not a tiktoken file: lines of a base64 token and its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError(f"--tokenizer={path}: its ranks must be 0, 1, 2 ... and all 256 bytes among them")
    return ranks


def ranks_file(encoding):
    """The contents of the .tiktoken file of an encoding: base64 token, space, rank."""
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)


def tokenizer_sha256(encoding):
    """What tells tokenizers apart whatever they are called: the ordered ranks, the special tokens and the pattern."""
    specials = sorted(encoding._special_tokens.items(), key=lambda item: item[1])
    rest = json.dumps([specials, encoding._pat_str]).encode()
    return hashlib.sha256(ranks_file(encoding) + rest).hexdigest()


def text_hash(data):
    """Of a document's UTF-8 bytes: a number in [0, 1), uniform, that decides on which side of the split it falls."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "little") / 2**56


def sample_texts(found, val_fraction):
    """A sample of the train documents to train a tokenizer on: the same number of characters of each domain.

    Each of K domains gives SAMPLE / K characters, or all it has: its documents of least hash, each cut off at 64
    thousand characters. So the sample is a function of the set of documents, and a large domain does not crowd out a
    small one. It is drawn in one pass and bounded memory: the share of a domain only shrinks as more come to light.
    """
    heaps, sizes = {}, {}  # of a domain: its sample, the greatest hash first; that sample's characters
    for domain, text in found:
        order = text_hash(text.encode())
        heap = heaps.setdefault(domain, [])
        if order >= val_fraction:
            text = text[: 1 << 16]
            heapq.heappush(heap, (-order, text))
            sizes[domain] = sizes.get(domain, 0) + len(text)
            shrink(heap, sizes, domain, SAMPLE // len(heaps))
    for domain in sorted(sizes):
        shrink(heaps[domain], sizes, domain, SAMPLE // len(heaps))
        yield from (text for _, text in sorted(heaps[domain], reverse=True))


def shrink(heap, sizes, domain, share):
    while sizes[domain] - len(heap[0][1]) >= share:
        sizes[domain] -= len(heapq.heappop(heap)[1])


# ---- writing -------------------------------------------------------------------------------------------------------


class Bin:
    """One side of one domain: its file and what it holds."""

    def __init__(self, path):
        path.parent.mkdir(exist_ok=True)
        self.file = open(path, "wb")  # noqa: SIM115 (outlives this call)
        self.tokens = self.documents = self.bytes = 0

    def write(self, ids, size):
        self.file.write(ids)
        self.tokens += len(ids)
        self.documents += 1
        self.bytes += size

    def close(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


@contextlib.contextmanager
def staged(out_dir):
    """A directory beside out_dir that becomes out_dir when the block ends, and goes if it fails or is interrupted."""
    made = [parent for parent in out_dir.parents if not parent.exists()]
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--out_dir={out_dir}: {out_dir.parent} is not a directory; choose another") from None
    for stale in out_dir.parent.glob(f"{glob.escape(out_dir.name)}.tmp-*"):
        if not is_running(stale.name.rpartition("-")[2]):
            shutil.rmtree(stale)  # a run that was killed could not remove it
    staging = out_dir.with_name(f"{out_dir.name}.tmp-{os.getpid()}")
    try:
        staging.mkdir()
        yield staging
        staging.rename(out_dir)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def is_running(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, PermissionError):  # not of our making, or another user's
        return True
    return int(pid) != os.getpid()


def encoder(encoding, dtype):
    """A function from a text to its token ids, (n,) of dtype, the end-of-text token first."""
    eot = np.array([encoding.eot_token], dtype)

    def encode(text):
        if encoding.name == "bytes":
            return np.concatenate([eot, np.frombuffer(text.encode(), np.uint8)], dtype=dtype)
        # No special token is allowed, so that their names within a text are text. Releases the GIL.
        spans = (encoding.encode_to_numpy(span, disallowed_special=()) for span in cut([text], SPAN))
        return np.concatenate([eot, *spans], dtype=dtype, casting="unsafe")

    return encode


def write_bins(found, folder, encode, val_fraction, workers):
    """Encode documents in threads and write them in their order.

    Returns {domain: {"train": Bin, "val": Bin}} and {domain: number of empty documents, which are left out}. What is
    read ahead of the writing is bounded by workers * 2 * GROUP characters and the longest document.
    """
    bins, empty = {}, {}
    waiting, ahead = deque(), 0

    def encode_group(group):
        encoded = ((domain, text.encode(), encode(text)) for domain, text in group)
        return [(domain, text_hash(data) < val_fraction, len(data), ids) for domain, data, ids in encoded]

    def groups():
        group, size = [], 0
        for domain, text in found:
            if domain not in bins:
                bins[domain] = {side: Bin(folder / domain / f"{side}.bin") for side in ("train", "val")}
                empty[domain] = 0
            if not text.strip():
                empty[domain] += 1
                continue
            group.append((domain, text))
            size += len(text)
            if size >= GROUP:
                yield group, size
                group, size = [], 0
        yield group, size

    def write_first():
        future, size = waiting.popleft()
        for domain, is_val, count, ids in future.result():
            bins[domain]["val" if is_val else "train"].write(ids, count)
        return size

    with ThreadPoolExecutor(workers) as pool:
        for group, size in groups():
            waiting.append((pool.submit(encode_group, group), size))
            ahead += size
            while ahead > 2 * GROUP * workers:
                ahead -= write_first()
        while waiting:
            write_first()
    for sides in bins.values():
        for side in sides.values():
            side.close()
    return bins, empty


def describe(bins, empty, val_fraction):
    """The "domains" of meta.json, sorted by name. A domain without a document on one side is refused."""
    domains = {}
    for domain, sides in sorted(bins.items()):
        counts = {side: sides[side].documents for side in sides}
        if not sum(counts.values()):
            raise UserError(f"domain {domain!r}: all of its {empty[domain]} documents are empty; fill or remove it")
        for side, count in counts.items():
            if not count:
                raise UserError(
                    f"domain {domain!r}: none of its {sum(counts.values())} documents falls in {side} at "
                    f"--val_fraction={val_fraction}; give it more or shorter documents, or change that fraction"
                )
        domains[domain] = {
            f"{side}_{unit}": getattr(sides[side], unit)
            for unit in ("tokens", "documents", "bytes")
            for side in ("train", "val")
        }
    return domains


def print_table(domains):
    width, total = max(map(len, (*domains, "domain"))), sum(entry["train_tokens"] for entry in domains.values())
    columns = {"documents": 24, "bytes": 27, "tokens": 27}
    heads = "".join(f"{unit + ' train / val':>{size}}" for unit, size in columns.items())
    print(f"{'domain':{width}}{heads}   share  bytes/token")
    for domain, entry in domains.items():
        pairs = ((f"{entry['train_' + unit]:,} / {entry['val_' + unit]:,}", size) for unit, size in columns.items())
        density = (entry["train_bytes"] + entry["val_bytes"]) / (entry["train_tokens"] + entry["val_tokens"])
        cells = "".join(f"{pair:>{size}}" for pair, size in pairs)
        print(f"{domain:{width}}{cells}  {entry['train_tokens'] / total:6.2%}  {density:11.2f}")


def parse_args():
    parser = ArgumentParser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("input", nargs="?", metavar="INPUT", help="see above (default: the embedded corpus)")
    data.add_argument("--out_dir", type=Path, help="the data set to make (default: data/NAME, after INPUT; data/demo)")
    data.add_argument("--domain_key", help="dotted field that names the domain of a row, such as meta.pile_set_name")
    data.add_argument("--val_fraction", type=float, default=0.05, help="share of documents held out (default: 0.05)")
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument(
        "--tokenizer",
        default="train:2048",
        help="train:N trains one of N tokens, end of text included; a tiktoken name such as gpt2; FILE.tiktoken; bytes "
        "(default: train:2048, small, for small models)",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--workers", type=int, default=os.cpu_count(), help="threads (default: one per core)")
    args = parser.parse_args()
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction={args.val_fraction}: expected a number between 0 and 1, such as 0.05")
    if args.workers < 1:
        raise UserError(f"--workers={args.workers}: expected a whole number of threads, 1 or more")
    if args.domain_key and not args.input:
        raise UserError("--domain_key: needs an INPUT; the embedded corpus has its own domains")
    if args.out_dir is None:
        name = re.sub(r"\.(jsonl|parquet)(\.\w+)?$", "", Path(args.input).resolve().name) if args.input else "demo"
        args.out_dir = Path("data", name)
    return args


def main():
    args = parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))  # so that staged() tidies up
    if args.out_dir.exists():
        raise UserError(f"{args.out_dir}: exists already; delete it, or choose another --out_dir")
    if args.input:
        inputs = find_inputs(args.input, args.domain_key)
        total = sum(os.path.getsize(path) for _, path, _ in inputs) if not args.input.startswith("hf:") else None
    else:
        if corpus.missing():
            print(f"not installed, so left out of the demo's text: {', '.join(corpus.missing())}")
        texts = list(corpus.documents())
        total = sum(len(text) for _, text in texts)

    def found(doing):
        """A pass over all documents."""
        with tqdm(desc=doing, total=total, unit="B", unit_scale=True, disable=None) as bar:  # off without a terminal
            if args.input:
                yield from read_documents(inputs, args.domain_key, bar)
            else:
                for domain, text in texts:
                    yield domain, text
                    bar.update(len(text))

    encoding = get_encoding(
        args.tokenizer, lambda: sample_texts(found("sampling for the tokenizer"), args.val_fraction)
    )
    dtype = np.dtype("<u2" if encoding.n_vocab <= 1 << 16 else "<u4")
    with staged(args.out_dir) as folder:
        encode = encoder(encoding, dtype)
        bins, empty = write_bins(found("tokenizing"), folder, encode, args.val_fraction, args.workers)
        meta = {
            "tokenizer": encoding.name,
            "tokenizer_sha256": tokenizer_sha256(encoding),
            "vocab_size": encoding.n_vocab,
            "eot_token": encoding.eot_token,
            "dtype": dtype.name,
            "domains": describe(bins, empty, args.val_fraction),
        }
        if args.tokenizer.startswith("train:") or args.tokenizer.endswith(".tiktoken"):
            (folder / "tokenizer.tiktoken").write_bytes(ranks_file(encoding))
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    for domain, count in empty.items():
        if count:
            print(f"{domain}: left out {count:,} empty documents")
    print_table(meta["domains"])
    flags = f"--data_dir={args.out_dir} --out_dir=checkpoints/reference --domain_weights=uniform"
    print(f"next: python train_reference.py {flags}")


if __name__ == "__main__":
    run(main)
