"""Tokenizers: what --tokenizer can name, as one thing that encodes, decodes and is known by a checksum."""

import base64
import hashlib
import importlib
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rustbpe
import tiktoken

from common import cli
from common.cli import UserError
from common.files import shorter

EOT = "<|endoftext|>"
EOT_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>")  # what to look for in a tokenizer.json
# GPT-4's rule for splitting text into words. A .tiktoken file does not hold its rule: all of them share this one here
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}|"
           r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
SPAN = 1 << 17  # bytes encoded at once: tiktoken's regular expressions overflow their stack on longer runs of one kind


class Tokenizer(NamedTuple):
    name: str
    sha256: str  # tells tokenizers apart, whatever they are called
    vocab_size: int
    eot: int  # id of the end-of-text token
    encode: Callable  # UTF-8 bytes -> token ids, (n,) integers
    decode: Callable  # list of token ids -> UTF-8 bytes
    file: tuple = ()  # name and contents of the file that goes beside the data
    encoding: tiktoken.Encoding | None = None  # unless it is a tokenizer.json


def tokenizer_name(text):
    return cli.path(text) if text.endswith((".json", ".tiktoken")) else text


def load_tokenizer(spec, eot_token=None, sample=None):
    """Return the Tokenizer that --tokenizer asks for.  sample: called for the texts that train:N trains on."""
    if eot_token not in (None, EOT) and not spec.endswith(".json"):
        raise UserError(f"--eot_token={eot_token}: --tokenizer={spec} has one end-of-text token; leave the flag out")
    try:
        if spec == "bytes":
            tokenizer = from_merges(spec, {bytes([byte]): byte for byte in range(256)})
            return tokenizer._replace(encode=lambda data: np.frombuffer(data, np.uint8), file=())
        if spec.startswith("train:") and sample:
            return from_merges(spec, train_merges(spec, sample))
        if spec.endswith(".tiktoken"):
            return from_merges(Path(spec).name, read_merges(spec))
        if spec.endswith(".json"):
            return from_json(spec, Path(spec).read_bytes(), eot_token)
        if spec in tiktoken.list_encoding_names():
            return from_tiktoken(tiktoken.get_encoding(spec))
    except (OSError, ValueError) as error:  # of a file, or of tiktoken's download
        raise UserError(f"--tokenizer={spec}: cannot be read ({shorter(error)}); download it again; without a network "
                        "set TIKTOKEN_CACHE_DIR, or use --tokenizer=train:4096") from None
    raise UserError(f"--tokenizer={spec}: unknown; expected bytes, train:N, FILE.tiktoken, FILE.json, or one of "
                    f"{', '.join(tiktoken.list_encoding_names())}")


def data_tokenizer(dataset):
    """The Tokenizer that a data set was made with.  Raises UserError."""
    spec, eot = dataset.meta["tokenizer"], None
    if spec.startswith("train:") or spec.endswith((".json", ".tiktoken")):
        spec = f"{dataset.directory}/tokenizer.{'json' if spec.endswith('.json') else 'tiktoken'}"
        if not Path(spec).exists():
            raise UserError(f"{spec} is gone; put it back")
    if spec.endswith(".json"):
        eot = parse_json(spec, Path(spec).read_bytes()).id_to_token(dataset.meta["eot_token"])
    tokenizer = load_tokenizer(spec, eot)
    if tokenizer.sha256 != dataset.meta["tokenizer_sha256"]:
        raise UserError(f"{spec} is not the tokenizer that {dataset.directory} was made with; put that one back")
    return tokenizer


def train_merges(spec, sample):
    """Return {token: rank}: a pair of tokens whose whole has the least rank is merged first."""
    size = int(spec.removeprefix("train:"))
    if not 257 <= size <= 1_000_000:
        raise UserError(f"--tokenizer={spec}: expected a whole number from 257 (bytes and end of text) to 1000000")
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(sample(), size - 1, pattern=PATTERN)
    merges = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(merges) + 1 < size:
        raise UserError(f"--tokenizer={spec}: the text yields only {len(merges) + 1} tokens; ask for fewer")
    return merges


def read_merges(spec):
    pairs = [line.split() for line in Path(spec).read_bytes().splitlines()]
    merges = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if sorted(merges.values()) != list(range(len(merges))) or not all(bytes([byte]) in merges for byte in range(256)):
        raise ValueError("a damaged .tiktoken file")
    return merges


def merges_file(encoding):
    merges = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in merges)


def from_merges(name, merges):
    encoding = tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=merges, special_tokens={EOT: len(merges)})
    return from_tiktoken(encoding)._replace(file=("tokenizer.tiktoken", merges_file(encoding)))


def from_tiktoken(encoding):
    specials = sorted(encoding._special_tokens.items(), key=lambda item: item[1])
    sha256 = hashlib.sha256(merges_file(encoding) + json.dumps([specials, encoding._pat_str]).encode()).hexdigest()

    def encode(data):  # releases the GIL; names of special tokens are text
        spans = (data[a:b].decode() for a, b in pairwise((0, *split_text(data, SPAN))))
        return np.concatenate([encoding.encode_to_numpy(span, disallowed_special=()) for span in spans])

    return Tokenizer(encoding.name, sha256, encoding.n_vocab, encoding.eot_token, encode, encoding.decode_bytes,
                     encoding=encoding)


def parse_json(spec, data):
    """Return the tokenizers.Tokenizer of a tokenizer.json, without what makes its ids depend on more than the text."""
    tokenizers = optional("tokenizers", f"--tokenizer={spec}")
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises no other class
        raise UserError(f"--tokenizer={spec}: not a tokenizer.json, or a damaged one ({shorter(error)})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # names of special tokens are text
    if hasattr(tokenizer.model, "dropout"):
        tokenizer.model.dropout = None  # it gives other ids each time
    return tokenizer


def from_json(spec, data, eot_token):
    """Return the Tokenizer of a tokenizer.json: the ids of transformers.AutoTokenizer without special tokens."""
    tokenizer = parse_json(spec, data)
    ids = tokenizer.get_vocab()
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    found = [name for name in ([eot_token] if eot_token else EOT_NAMES) if name in ids]
    found = [name for name in found if name in special] or found
    if len(found) != 1:
        raise UserError(f"--tokenizer={spec}: has {' and '.join(found) or 'none'} of {eot_token or EOT_NAMES}; name "
                        "its end-of-text token with --eot_token")
    eot = found[0]
    return Tokenizer(
        Path(spec).name, hashlib.sha256(data + eot.encode()).hexdigest(), max(ids.values()) + 1, ids[eot],
        lambda data: np.array(tokenizer.encode(data.decode(), add_special_tokens=False).ids, np.uint32),
        lambda ids: tokenizer.decode(ids).encode(), ("tokenizer.json", data))


def split_text(data, size):
    """Yield the ends of pieces of size / 2 to size bytes: at the last blank line, or else line, word or character."""
    start = 0
    while len(data) - start > size:
        for mark in (b"\n\n", b"\n\r\n", b"\n", b" "):
            end = data.rfind(mark, start + size // 2, start + size) + len(mark)
            if end >= len(mark):
                break
        else:
            end = start + size
            while data[end] & 0xC0 == 0x80 and end > start + size - 4:  # within a character
                end -= 1
        yield end
        start = end
    yield len(data)


def optional(module, what):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{what}: needs the package {module.split('.')[0]}: pip install '.[hub]'") from None
