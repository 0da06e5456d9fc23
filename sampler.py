"""Domains, mixtures and batches: which window of which domain the model sees at which step.

The global batch of step t is a function of (seed, t, sampling weights, how many windows of each domain were drawn
before). It never depends on the number of ranks, on threads or on time, and its whole state is a handful of integers.

Dimensions: K domains, B sequences of the global batch, T tokens of a window (block_size).
"""

import contextlib
import hashlib
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.cli import UserError, check_same, shown
from common.files import DATA_FORMAT, folder_name, read_json, sample_sha256

# ---- the data set: one memory-mapped file of token ids per domain and split ------------------------------------------


@dataclass(frozen=True)
class Dataset:
    directory: str
    meta: dict  # meta.json as prepare.py wrote it
    block_size: int  # T
    domains: tuple  # names; everywhere else a domain is its index in this order
    train: tuple  # per domain: windows (n, T + 1), a read-only view of the memory map with row stride T
    val: tuple

    @property
    def vocab_size(self):
        return self.meta["vocab_size"]

    def token_counts(self):
        """Training tokens of each domain: (K,) float64."""
        return np.array([self.meta["domains"][name]["train_tokens"] for name in self.domains], dtype=np.float64)

    def describe(self, weights):
        """What a run records of its data: JSON values.  weights: (K,) sampling weights."""
        data = {name: self.meta[name] for name in ("tokenizer", "tokenizer_sha256", "vocab_size")}
        data["train_tokens"] = {name: self.meta["domains"][name]["train_tokens"] for name in self.domains}
        entries = [self.meta["domains"][name] for name in sorted(self.domains)]
        samples = [entry[f"{split}_sha256"] for entry in entries for split in ("train", "val")]
        data["sample_sha256"] = hashlib.sha256("".join(samples).encode()).hexdigest()  # tells other text apart
        named = dict(zip(self.domains, np.asarray(weights).tolist()))
        return {"domains": list(self.domains), "sampling_weights": named, "data": {"data_dir": self.directory, **data}}

    def check_tokenizer(self, run, config):
        """Raise UserError unless a run was trained with this tokenizer.  config: its config.json."""
        self.check_same_data(run, config, ("tokenizer_sha256", "vocab_size"))

    def check_same_data(self, run, config, names=("tokenizer_sha256", "vocab_size", "train_tokens", "sample_sha256")):
        """Raise UserError unless a run was trained on this data with this tokenizer.  config: its config.json."""
        both = self.describe(self.token_counts())["data"], config["data"]
        for name in names:
            check_same([self.directory, run], [{name: data[name]} for data in both],
                       "give the data, or the tokenizer, that the run was trained with")

    def bytes_per_token(self):
        """Of the validation text: (K,) float64.  Turns nats per token into bits per byte."""
        counts = [self.meta["domains"][name] for name in self.domains]
        return np.array([count["val_bytes"] / count["val_tokens"] for count in counts])

    def by_name(self, values):
        """{domain: number} of values (K,), without those that are not a number: domains absent from a batch."""
        return {name: value for name, value in zip(self.domains, values.tolist()) if value == value}

    def evaluation(self, val_loss):
        """What a run logs of an evaluation.  val_loss: (K,) nats per token."""
        bpb = val_loss / self.bytes_per_token() / np.log(2)
        return {"val_loss": self.by_name(val_loss), "val_bpb": self.by_name(bpb),
                "val_loss_mean": float(val_loss.mean()), "val_loss_worst": float(val_loss.max())}


def load_dataset(directory, block_size):
    """Map data/NAME as windows of block_size + 1 tokens.  Raises UserError for bins that are not meta.json's."""
    path = Path(directory) / "meta.json"
    if not path.exists():
        raise UserError(f"{path} does not exist: make it with prepare.py, or name the data's place with --data_dir")
    meta = read_json(path, "prepare the data set again")
    if meta.get("format") != DATA_FORMAT:
        raise UserError(f"{path} is of format {meta.get('format')}, not {DATA_FORMAT}; prepare the data set again")
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    allow_open_files(2 * len(meta["domains"]) + 100)  # every map holds one
    splits = {"train": [], "val": []}
    for name, counts in meta["domains"].items():
        for split, windows in splits.items():
            file = path.parent / folder_name(name) / f"{split}.bin"
            n_tokens = counts[f"{split}_tokens"]
            size = counts.get(f"{split}_file_bytes", n_tokens * dtype.itemsize)  # see tools/link.py
            windows.append(map_windows(file, size, n_tokens, dtype, block_size))
            if sample_sha256(file, n_tokens * dtype.itemsize) != counts[f"{split}_sha256"]:
                raise UserError(f"{file} holds other tokens than meta.json describes; prepare the data set again")
    return Dataset(str(directory), meta, block_size, tuple(meta["domains"]), *map(tuple, splits.values()))


def allow_open_files(n):
    """Raise this process's limit of open files to n, as far as the system lets it."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has neither the module nor the limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = n if hard == resource.RLIM_INFINITY else min(n, hard)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def map_windows(path, size, n_tokens, dtype, block_size):
    """Aligned windows of its first n_tokens; the last token of one is the first of the next: (n, T + 1)."""
    if not path.exists():
        cause = f"links to {path.readlink()}, which is gone" if path.is_symlink() else "is missing"
        raise UserError(f"{path} {cause}; put it back, or prepare the data set again (link it, if it was linked)")
    found = path.stat().st_size
    if found != size or n_tokens * dtype.itemsize > found:
        raise UserError(f"{path} has {found:,} bytes where meta.json promises {size:,}; prepare the data set again")
    n = (n_tokens - 1) // block_size
    if n < 1:
        raise UserError(f"{path}: domain '{path.parent.name}' has {n_tokens:,} tokens in {path.name}, fewer than one "
                        f"window of {block_size + 1}; give the domain more text, leave it out, or lower --block_size")
    tokens = np.memmap(path, dtype=dtype, mode="r")
    strides = (block_size * dtype.itemsize, dtype.itemsize)
    return np.lib.stride_tricks.as_strided(tokens, (n, block_size + 1), strides, writeable=False)


def check_vocabulary(rows, vocab_size, path):
    """Raise UserError where a token id has no row in the embedding."""
    if rows.size and int(rows.max()) >= vocab_size:
        raise UserError(f"{path} holds token id {rows.max()}, past the {vocab_size} of meta.json; prepare it again")


# ---- sampling weights ------------------------------------------------------------------------------------------------

NUMBER = r"\s*[-+]?[\d._]+([eE][-+]?\d+)?\s*"
MIXTURE = re.compile(rf"uniform|token_count|(temperature|unimax):{NUMBER}|.+\.json|{NUMBER}(,{NUMBER})*", re.DOTALL)


def split_mixtures(spec):
    """List the mixtures that + joins.  The + of 1e+2,1 or of a path joins none: both of its sides must be mixtures."""
    mixtures = [""]
    for part in spec.split("+"):
        mixtures[-1] += part
        if MIXTURE.fullmatch(mixtures[-1]):
            mixtures.append("")
        else:
            mixtures[-1] += "+"
    whole = os.path.isfile(os.path.expanduser(spec)) or mixtures[-1]
    return [spec] if whole else mixtures[:-1]


def sampling_weights(spec, dataset, planned_tokens):
    """The distribution over domains that batches are drawn from: (K,) float64, sums to 1.  Raises UserError.

    spec: one mixture, or several joined by +, which stands for their mean.
    planned_tokens: of the whole run; only unimax needs it.
    """
    return np.mean([one_mixture(each, dataset, planned_tokens) for each in split_mixtures(spec)], axis=0)


def one_mixture(spec, dataset, planned_tokens):
    counts, k = dataset.token_counts(), len(dataset.domains)
    kind, _, parameter = spec.partition(":")
    try:
        if spec == "uniform":
            weights = np.ones(k)
        elif spec == "token_count":
            weights = counts
        elif kind == "temperature":
            weights = counts ** float(parameter)
        elif kind == "unimax":
            weights = unimax(counts, planned_tokens, float(parameter))
        elif spec.endswith(".json"):
            weights = weights_from_json(Path(os.path.expanduser(spec)), dataset)
        else:
            weights = np.array([float(part) for part in spec.split(",")])
    except ValueError as error:
        raise UserError(f"'{spec}' is no mixture ({error}); expected uniform, token_count, temperature:P, "
                        "unimax:EPOCHS, FILE.json, numbers in meta.json's order, or A+B, a mean of these") from None
    if len(weights) != k:
        raise UserError(f"'{spec}' has {len(weights)} weights, but {dataset.directory} has {k} domains: "
                        f"{', '.join(dataset.domains)}")
    check_weights(spec, dict(zip(dataset.domains, weights.tolist())))
    if not weights.any():
        raise UserError(f"{spec}: the weights sum to 0; at least one domain must have a positive weight")
    return weights / weights.sum()


def weights_from_json(path, dataset):
    """Match {DOMAIN: weight} by name: the file's object, its domain_weights, or the official train_domain_weights."""
    content = read_json(path, "expected an object {DOMAIN: weight} in JSON")
    weights = content.get("domain_weights", content.get("train_domain_weights", content))
    check_weights(path, weights)
    unknown, missing = set(weights) - set(dataset.domains), set(dataset.domains) - set(weights)
    if unknown or missing:
        raise UserError(f"{path}: domains do not match: only in the weights: {quoted(unknown)}; only in the data: "
                        f"{quoted(missing)}. Weights are matched by name; give a domain weight 0 to leave it out")
    provenance = content.get("provenance")
    tokenizer = provenance.get("tokenizer_sha256") if isinstance(provenance, dict) else None
    if tokenizer not in (None, dataset.meta["tokenizer_sha256"]):
        warnings.warn(f"{path} was found with another tokenizer than that of {dataset.directory}; domain weights do "
                      "not carry over between tokenizers.", stacklevel=2)
    return np.array([float(weights[name]) for name in dataset.domains])


def check_weights(path, weights):
    """Raise UserError unless what a user gave is {DOMAIN: weight}, with finite weights >= 0."""
    if not isinstance(weights, dict):
        raise UserError(f"{path}: {shown(weights, 60)} is no object {{DOMAIN: weight}}")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e300:
            raise UserError(f"{path}: the weight of '{name}' is {shown(weight, 60)}; it must be a finite number >= 0")


def quoted(names):
    """Names in a message, which tells even those apart that look alike."""
    return ", ".join(f"{name!r}" if name.isascii() else f"{name!r} ({name!a})" for name in sorted(names)) or "none"


def unimax(counts, budget, epochs):
    """UniMax (Chung et al. 2023, algorithm 1): as uniform as can be with no domain seen more than `epochs` times.

    counts: (K,) tokens; budget: tokens of the run.  Returns tokens per domain, (K,).
    """
    if not 0 < epochs < np.inf:
        raise ValueError(f"{epochs} is no number of epochs")
    tokens, left = np.zeros(len(counts)), float(budget)
    for rank, i in enumerate(np.argsort(counts, kind="stable")):
        tokens[i] = min(left / (len(counts) - rank), epochs * counts[i])
        left -= tokens[i]
    return tokens


# ---- randomness without memory ---------------------------------------------------------------------------------------

BLOCK = 1 << 10  # windows whose order is worked out at once


def round_keys(seed, domain, epoch):
    """Keys of the permutation's eight rounds, from the seed, the domain's *name* and the epoch: (8,) uint64."""
    return np.frombuffer(hashlib.blake2b(f"{seed}/{epoch}/{domain}".encode(), digest_size=64).digest(), dtype="<u8")


@lru_cache(maxsize=4096)
def order(seed, domain, epoch, size, block):
    """A block of the order in which an epoch of a domain of `size` windows is drawn: (up to BLOCK,) int64.

    A few windows are shuffled, since `permute` reaches even permutations only. The cache only saves time.
    """
    keys = round_keys(seed, domain, epoch)
    if size <= BLOCK:
        return np.random.default_rng(keys.tolist()).permutation(size)
    return permute(np.arange(block * BLOCK, min((block + 1) * BLOCK, size)), size, keys)


def permute(index, size, keys):
    """A keyed bijection of range(size), evaluated at index: O(1) memory and start-up for any size up to 2**62.

    index (n,) integers in [0, size); keys (8,) uint64.  Returns (n,) int64.  A Feistel network permutes the next power
    of four; values outside the range are sent through again until they are inside (cycle walking, Black and Rogaway
    2002), which keeps a bijection.
    """
    bits = int(size - 1).bit_length()
    half = np.uint64(max(1, (bits + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    x = np.array(index, dtype=np.uint64)
    outside = np.ones(len(x), dtype=bool)
    while outside.any():
        left, right = x[outside] >> half, x[outside] & mask
        for key in keys:
            left, right = right, left ^ (scramble(right + key) & mask)
        x[outside] = (left << half) | right
        outside = x >= np.uint64(size)
    return x.astype(np.int64)


def scramble(z):
    """The finalizer of splitmix64 (Steele et al. 2014): every input bit reaches every output bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def systematic_counts(weights, batch_size, u):
    """How many of batch_size sequences each domain gets, from one uniform number u in [0, 1): (K,) int64.

    Systematic sampling: counts sum to batch_size, are within one of batch_size * weight, and have that mean over u.
    """
    cumulative = np.cumsum(weights)
    edges = np.floor(cumulative / cumulative[-1] * batch_size + u)
    edges = np.minimum(edges, batch_size)  # batch_size + u may round up where u is a hair below 1
    return np.diff(edges, prepend=0.0).astype(np.int64)


# ---- batches ---------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    tokens: torch.Tensor  # (b, T + 1) in the bins' dtype, b sequences of this rank; the model widens them on the device
    domain: torch.Tensor  # (b,) int64
    state: dict  # the sampler's state after this batch


class Sampler:
    """Batches of this rank, forever: step t is a function of (seed, t, weights, windows drawn before t).

    weights: (K,), normalised; batch_size: B over all ranks, of which this rank takes every world_size-th slot.
    A thread gathers the next batch while the device computes.
    """

    def __init__(self, dataset, weights, batch_size, seed, rank=0, world_size=1, pin_memory=False):
        self.dataset, self.weights, self.batch_size = dataset, np.asarray(weights, dtype=np.float64), batch_size
        self.seed, self.rank, self.world_size, self.pin_memory = seed, rank, world_size, pin_memory
        self.state = {"step": 0, "drawn": [0] * len(dataset.domains)}  # batches and windows handed out so far
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sampler")
        self.ahead = None  # the future of the next batch

    def next_batch(self):
        ahead, before = self.ahead or self.executor.submit(self.gather, self.state), self.epochs()
        batch = ahead.result()
        self.state = batch.state
        self.ahead = self.executor.submit(self.gather, self.state)
        # Repeating data up to four times costs little (Muennighoff et al. 2023). A domain passes that only once
        passed = np.flatnonzero((before <= 4) & (self.epochs() > 4)) if self.rank == 0 else []
        for i in passed:
            warnings.warn(f"domain '{self.dataset.domains[i]}' has been repeated more than 4 times by batch "
                          f"{self.state['step']}", stacklevel=2)
        return batch

    def slots(self, state):
        """The global batch that follows `state`: domain (B,), window (B,), and the state after it."""
        generator = np.random.default_rng([self.seed, state["step"]])
        counts = systematic_counts(self.weights, self.batch_size, generator.random())
        windows, drawn = [], list(state["drawn"])
        for i, n in enumerate(counts.tolist()):
            size = len(self.dataset.train[i])
            while n > 0:  # once, or more often where a block or an epoch ends
                epoch, place = divmod(drawn[i], size)
                block, start = divmod(place, BLOCK)
                taken = order(self.seed, self.dataset.domains[i], epoch, size, block)[start : start + n]
                windows.append(taken)
                drawn[i] += len(taken)
                n -= len(taken)
        domain = np.repeat(np.arange(len(counts)), counts)
        shuffle = generator.permutation(self.batch_size)
        return domain[shuffle], np.concatenate(windows)[shuffle], {"step": state["step"] + 1, "drawn": drawn}

    def gather(self, state):
        """This rank's slots of the batch that follows `state`, copied out of the memory maps."""
        domain, window, after = self.slots(state)
        domain, window = domain[self.rank :: self.world_size], window[self.rank :: self.world_size]
        dtype = self.dataset.train[0].dtype
        tokens = torch.empty(len(domain), self.dataset.block_size + 1, dtype=getattr(torch, dtype.name),
                             pin_memory=self.pin_memory)
        rows = tokens.numpy()
        for i in np.unique(domain):
            mine = domain == i
            rows[mine] = self.dataset.train[i][window[mine]]
            path = f"{self.dataset.directory}/{self.dataset.domains[i]}/train.bin"
            check_vocabulary(rows[mine], self.dataset.vocab_size, path)
        domain = torch.from_numpy(domain)
        return Batch(tokens, domain.pin_memory() if self.pin_memory else domain, after)

    def epochs(self):
        """How often each domain has been seen: (K,) float64."""
        return np.array([drawn / len(w) for drawn, w in zip(self.state["drawn"], self.dataset.train)])

    def state_dict(self):
        return {"step": self.state["step"], "drawn": list(self.state["drawn"])}

    def load_state_dict(self, state):
        self.state, self.ahead = {"step": state["step"], "drawn": list(state["drawn"])}, None

    def close(self):
        self.executor.shutdown(cancel_futures=True)


def evaluation_batches(dataset, n_windows, batch_size, rank=0, world_size=1):
    """n_windows validation windows of every domain (0: all), shared out among ranks.

    They are spread evenly over val.bin, whose first windows may be a few neighbouring files.
    Yields tokens (batch_size, T + 1) and domain (batch_size,) int64, the same number of batches on every rank. Batches
    are filled up with rows of domain K, which are to be dropped, so a compiled model is compiled for one shape.
    """
    k = len(dataset.domains)
    index = []
    for i, windows in enumerate(dataset.val):
        n = min(n_windows or len(windows), len(windows))
        index += [(i, j * len(windows) // n) for j in range(n)]
    for start in range(0, len(index), batch_size * world_size):
        part = index[start + rank : start + batch_size * world_size : world_size]
        rows = np.stack([dataset.val[i][j] for i, j in part] + [dataset.val[0][0]] * (batch_size - len(part)))
        names = ",".join(sorted({dataset.domains[i] for i, _ in part}))
        check_vocabulary(rows, dataset.vocab_size, f"{dataset.directory}/{{{names}}}/val.bin")
        yield torch.from_numpy(rows), torch.tensor([i for i, _ in part] + [k] * (batch_size - len(part)))


def domain_sums(domain, k, dtype, *token_values):
    """Sums of token values over each domain, and the numbers of tokens, which ranks and micro-batches add to.

    domain: (b,) int64, rows with domain >= K are dropped; token_values: n tensors (b, T).  Returns (n + 1, K) of dtype.
    A matrix product, not a scatter: the order of its sums is fixed on every device.
    """
    member = (domain == torch.arange(k, device=domain.device)[:, None]).to(dtype)  # (K, b)
    T = token_values[0].size(1)
    per_row = [values.sum(dim=1, dtype=dtype) for values in token_values]
    return torch.stack([*(member @ values for values in per_row), member.sum(dim=1) * T])
