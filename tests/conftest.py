"""What several tests share: data sets, text, and running a script as a person would."""
# ruff: noqa: E402

import contextlib
import gzip
import io
import json
import lzma
import os
import random
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

WITH_CARD = dict(os.environ)  # for test_cuda.py, whose scripts are processes of their own
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all other tests run on the CPU, whatever the machine has; before torch

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background, or under nohup, ignores them
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from oracle import EXTRA_FLAGS

from common.cli import flag_lines
from common.files import folder_name, sample_sha256
from common.run import FORMAT, SIGNALS, identity
from common.tokenizer import load_tokenizer
from sampler import Sampler, load_dataset

ROOT = Path(__file__).parent.parent
VOCAB = 64
TINY = ["--block_size=16", "--n_layer=1", "--n_head=2", "--n_kv_head=1", "--n_embd=16", "--n_ffn=32", "--batch_size=12",
        "--max_steps=12", "--log_interval=3", "--eval_interval=6", "--eval_windows=4", "--save_interval=4",
        "--no-compile"]
EXTRA = flag_lines(SimpleNamespace(**EXTRA_FLAGS)).split()  # of a rule of yours
TRAINING = [flag for flag in TINY if not flag.startswith(("--block_size", "--n_"))]  # what a proxy does not inherit


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the long forms: every split, many kills, more seeds")


def pytest_runtest_setup(item):
    if "slow" in item.keywords and not item.config.getoption("--slow"):
        pytest.skip("a long form: --slow")


def write_dataset(directory, streams, vocab_size=VOCAB, tokenizer="synthetic"):
    """streams: {DOMAIN: (train ids, val ids)}.  Returns the directory, as prepare.py would have left it."""
    directory, domains = Path(directory), {}
    for name, (train, val) in streams.items():
        folder = directory / folder_name(name)
        folder.mkdir(parents=True)
        for split, ids in (("train", train), ("val", val)):
            np.asarray(ids, dtype="<u2").tofile(folder / f"{split}.bin")
        domains[name] = {"train_tokens": len(train), "val_tokens": len(val), "train_documents": 1, "val_documents": 1,
                         "train_bytes": 3 * len(train), "val_bytes": 3 * len(val)}
    (directory / "meta.json").write_text(json.dumps(
        {"format": 1, "tokenizer": tokenizer, "tokenizer_sha256": tokenizer * 4, "vocab_size": vocab_size,
         "eot_token": 0, "dtype": "uint16", "domains": domains}))
    rehash(directory)
    return directory


def rehash(directory):
    """Let meta.json describe the bins as they are now."""
    def change(meta):
        size = np.dtype(meta["dtype"]).itemsize
        for name, entry in meta["domains"].items():
            for split in ("train", "val"):
                path = directory / folder_name(name) / f"{split}.bin"
                entry[f"{split}_sha256"] = sample_sha256(path, size * entry[f"{split}_tokens"])

    edit(directory / "meta.json", change)


def markov_dataset(directory, domains, n_val, seed):
    """domains: (name, training tokens, n).  Each is a chain in which every id has n equally likely successors."""
    rng, streams = np.random.default_rng(seed), {}
    for name, n_train, successors in domains:
        table, ids = rng.integers(1, VOCAB, size=(VOCAB, successors)), [1]
        for choice in rng.integers(successors, size=n_train + n_val - 1):
            ids.append(table[ids[-1], choice])
        streams[name] = ids[:n_train], ids[n_train:]
    return write_dataset(directory, streams)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Four domains of different entropy and size; the smallest is repeated within a few steps."""
    domains = [("counting", 6000, 1), ("simple", 3000, 2), ("rich", 2000, 8), ("small", 300, 3)]
    return markov_dataset(tmp_path_factory.mktemp("data") / "synthetic", domains, n_val=200, seed=0)


@pytest.fixture(scope="session")
def world(tmp_path_factory, data_dir):
    """A finished reference and proxy of data_dir, which tests copy before they break them, and what the first said."""
    directory = tmp_path_factory.mktemp("runs")
    reference, proxy = directory / "reference", directory / "proxy"
    said = run_here("train_reference.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={reference}").stdout
    run_here("train_doremi.py", *TRAINING, f"--reference={reference}", f"--out_dir={proxy}")
    return SimpleNamespace(reference=reference, proxy=proxy, said=said)


@pytest.fixture(scope="session")
def numbered(tmp_path_factory):
    """Three domains whose tokens tell where they are from: domain i counts up from 10,000 i. Windows of 8 + 1."""
    streams = {name: (10_000 * i + np.arange(8 * n + 1), 10_000 * i + 5_000 + np.arange(8 * m + 5))
               for i, (name, n, m) in enumerate([("a", 7, 5), ("b", 50, 3), ("c", 23, 9)])}
    return load_dataset(write_dataset(tmp_path_factory.mktemp("data") / "numbered", streams, vocab_size=40_000), 8)


def draw(dataset, weights, batch_size, n, seed=0, state=None, **ranks):
    """The next n batches of a fresh sampler, from `state` on if there is one, and the state after them."""
    s = Sampler(dataset, weights, batch_size, seed, **ranks)
    if state is not None:
        s.load_state_dict(state)
    batches = [s.next_batch() for _ in range(n)]
    s.close()
    return batches, s.state_dict()


def run_here(script, *flags, status=0, cwd="."):
    """Run a script, which must exit with `status`, in this process.  Return its stdout and stderr."""
    found, threads = 0, torch.get_num_threads()
    handlers = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    torch.set_num_threads(1)
    try:
        with (mock.patch.object(sys, "argv", [str(script), *map(str, flags)]), contextlib.chdir(cwd),
              contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as error:
        found = error.code or 0
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert found == status, err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def printed(script, *args):
    """What a script prints, and {first word: the other words} of its lines."""
    said = run_here(script, *args).stdout
    return said, {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.strip()}


def contents(folder):
    """{path: bytes, or None of a folder}, of everything below a folder but locks."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")
            if path.name != ".lock"}


def refused(folder, mentions, script, *flags, cwd=".", begun=False):
    """A script stops with status 2 and one line with all mentions; nothing in folder is new, changed or half-written.
    begun: it may leave a run's files and a progress bar before the line; return the files' names."""
    before = contents(folder)
    *bars, line = run_here(script, *flags, status=2, cwd=cwd).stderr.splitlines()
    assert f"{script}: error: " in line and (begun or not bars), (bars, line)
    assert all(mention in line for mention in mentions), (mentions, line)
    after = contents(folder)
    assert begun or after == before
    assert not [path for path in after if path.name.endswith(".tmp")]
    return {path.name for path, found in after.items() if found is not None and path not in before}


def edit(path, change):
    """Apply `change` to the object in a JSON file, in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def finished_run(path, config, step, parameters=None, **state):
    """Write config.json and ckpt.pt of a run that has reached `step`.  config: without the shape of the model."""
    shape = {"vocab_size": 300, "n_layer": 1, "n_head": 1, "n_kv_head": 1, "n_embd": 8, "n_ffn": 8}
    config = {"format": FORMAT, **config, "model": shape | config["model"]}
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    torch.save({"format": FORMAT, "stage": config["stage"], "identity": identity(config), "step": step, "seconds": 1.0,
                "model": parameters or {}, "optimizer": {}, "sampler": {"step": step, "drawn": []}, **state},
               path / "ckpt.pt")
    return path


def read_metrics(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def read_alpha(run_dir):
    """The history of a finished proxy: (T, K)."""
    (path,) = Path(run_dir).glob("doremi_domain_weights_*.pt")
    history = torch.load(path, weights_only=True)
    assert [entry["step"] for entry in history] == list(range(1, len(history) + 1))
    return torch.stack([entry["domain_weights"] for entry in history]).numpy()


EOT = "<|endoftext|>"
TEXTS = [f"Document {n}: naïve café — 漢字 😀 {EOT} is text.\r\n\n\tIt costs {n * 37} and ends in spaces.   \n"
         for n in range(120)]
WORDS = "the of naïve and to in is that for it as was with be by on not he his but at are this have from or had".split()


def prose(words, seed=0):
    source = random.Random(seed)
    return " ".join(source.choice(WORDS) + (".\n" if source.random() < 0.1 else "") for _ in range(words))


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(data))


def write_texts(path, texts=TEXTS):
    write_rows(path, [{"text": text} for text in texts])


def prepare_in(folder, arguments, script="prepare.py"):
    """Run prepare.py or link.py in a folder.  Return what it prints."""
    return run_here(script, *arguments.split(), cwd=folder).stdout


def read_set(folder):
    """Decode a data set. Returns meta.json and {domain: {side: texts}}; counts are checked on the way."""
    meta = json.loads((folder / "meta.json").read_text())
    eot, texts = meta["eot_token"], {}
    files = [str(path) for path in folder.glob("tokenizer.*")]
    decode = load_tokenizer(files[0] if files else meta["tokenizer"]).decode
    for domain, entry in meta["domains"].items():
        texts[domain] = {}
        for side in ("train", "val"):
            path = folder / folder_name(domain) / f"{side}.bin"
            ids = np.fromfile(path, "<u2" if meta["dtype"] == "uint16" else "<u4")
            assert ids[0] == eot and ids.max() < meta["vocab_size"] and entry[f"{side}_tokens"] == len(ids)
            found = [decode(part[1:].tolist()) for part in np.split(ids, np.flatnonzero(ids == eot)[1:])]
            assert entry[f"{side}_documents"] == len(found) and entry[f"{side}_bytes"] == sum(map(len, found))
            texts[domain][side] = [text.decode() for text in found]
    return meta, texts


def sides(found):
    return sorted(found["train"] + found["val"])
