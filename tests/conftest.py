"""What several tests share: a small data set with known structure, and running a script as a person would."""

import contextlib
import io
import json
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import runtime
from sampler import Sampler, load_dataset

ROOT = Path(__file__).parent.parent
VOCAB = 64
TINY = ["--block_size=16", "--n_layer=1", "--n_head=2", "--n_kv_head=1", "--n_embd=16", "--n_ffn=32", "--batch_size=12",
        "--max_steps=12", "--log_interval=3", "--eval_interval=6", "--eval_windows=4", "--save_interval=4",
        "--no-compile"]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the long forms: every split, many kills, more seeds")


def pytest_runtest_setup(item):
    if "slow" in item.keywords and not item.config.getoption("--slow"):
        pytest.skip("a long form: --slow")


def write_dataset(directory, streams, vocab_size=VOCAB, tokenizer="synthetic"):
    """streams: {DOMAIN: (train ids, val ids)}.  Returns the directory, as prepare.py would have left it."""
    directory = Path(directory)
    domains = {}
    for name, (train, val) in streams.items():
        (directory / name).mkdir(parents=True)
        for split, ids in (("train", train), ("val", val)):
            np.asarray(ids, dtype="<u2").tofile(directory / name / f"{split}.bin")
        domains[name] = {"train_tokens": len(train), "val_tokens": len(val), "train_documents": 1, "val_documents": 1,
                         "train_bytes": 3 * len(train), "val_bytes": 3 * len(val)}
    (directory / "meta.json").write_text(json.dumps(
        {"tokenizer": tokenizer, "tokenizer_sha256": tokenizer * 4, "vocab_size": vocab_size, "eot_token": 0,
         "dtype": "uint16", "domains": domains}))
    return directory


def markov_stream(rng, n, successors):
    """n ids of a chain in which every id has a few equally likely successors: ids (n,), entropy log(successors)."""
    table = rng.integers(1, VOCAB, size=(VOCAB, successors))
    ids = [1]
    for choice in rng.integers(successors, size=n - 1):
        ids.append(table[ids[-1], choice])
    return np.array(ids)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Four domains of different entropy and size; the smallest is repeated within a few steps."""
    rng = np.random.default_rng(0)
    streams = {}
    for name, n, successors in [("counting", 6000, 1), ("simple", 3000, 2), ("rich", 2000, 8), ("small", 300, 3)]:
        ids = markov_stream(rng, n + 200, successors)
        streams[name] = ids[:n], ids[n:]
    return write_dataset(tmp_path_factory.mktemp("data") / "synthetic", streams)


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
    """Run a script in this process, as `python script flags` would: a run costs its steps, not seconds of imports.

    Return its stdout and stderr; its exit status must be `status`.
    """
    found, threads = 0, torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    torch.set_num_threads(1)
    try:
        with (mock.patch.object(runtime, "matmul_peak", lambda *_: 1e12, create=True),  # a second's measurement
              mock.patch.object(sys, "argv", [str(script), *map(str, flags)]), contextlib.chdir(cwd),
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


def contents(folder):
    """{path: bytes, or None of a folder}, of everything below a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


def refused(folder, mentions, script, *flags, cwd=".", begun=False):
    """A script says why it stops: status 2, one line with all mentions, nothing new, changed or half-written in folder.

    begun: it had begun to train, so it may leave a run's files, and a progress bar before the line; return their names.
    """
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


def read_metrics(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
