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

import hashlib
import json
import os
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.cli import ArgumentParser, UserError, fraction, positive, print_anywhere, run
from common.corpus import ROWS, Input, domain_entries, mixed_rows, read_input, text_size
from common.files import sample_sha256, staged
from common.tokenizer import EOT_NAMES, load_tokenizer
from sampler import folder_name

GROUP = 1 << 20  # bytes of documents handed to a thread at once, and written at once
SAMPLE = 32 << 20  # bytes that a tokenizer is trained on, over all domains
MOST_DOMAINS = 2000
SIDES = ("train", "val")


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
