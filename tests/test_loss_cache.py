"""--cache_reference_losses: what is read is what was computed, and nothing foreign, torn or stale is ever read."""

import errno
import resource
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, read_metrics, write_dataset
from forked import distance, run_forked
from test_bad_input import assert_refused
from test_resume import assert_same, left_by
from test_runtime import run_here

import loss_cache
from cli import UserError
from loss_cache import HEADER, LossCache
from sampler import Sampler, load_dataset

pytestmark = pytest.mark.filterwarnings("ignore:domain .* has been repeated")
T = 16
WINDOWS = {"counting": 374, "simple": 187, "rich": 124, "small": 18}  # conftest's data: (tokens - 1) // T
PROXY = [flag for flag in TINY if not flag.startswith(("--block_size", "--n_"))] + ["--log_interval=1"]
ONE_STEP = ["--max_steps=1", "--warmup_steps=0"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, data_dir):
    return make_reference(tmp_path_factory.mktemp("cache") / "reference", data_dir)


def make_reference(out, data_dir, *flags):
    run_forked("train_reference.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={out}", "--max_steps=60", *flags)
    return out


@pytest.fixture
def lab(tmp_path, reference, data_dir):
    """A function that runs a proxy with the cache on a copy of the data, named `data`, and returns what it left. The
    copies begin without a cache; `forward_passes` of the reference are counted where it runs in this process."""
    lab = SimpleNamespace(n=0, reference=reference, forward_passes=0)

    def count(module, _):
        frozen = not next(module.parameters(), torch.ones(1, requires_grad=True)).requires_grad
        lab.forward_passes += type(module).__name__ == "Transformer" and frozen

    def data(name):
        return tmp_path / name if (tmp_path / name).exists() else shutil.copytree(data_dir, tmp_path / name)

    def run(name, *flags, out=None, forked=False, **options):
        lab.n, lab.out, lab.forward_passes = lab.n + 1, out or tmp_path / f"run{lab.n}", 0
        flags = ["--cache_reference_losses", *PROXY, f"--reference={lab.reference}", f"--data_dir={data(name)}",
                 f"--out_dir={lab.out}", *flags]
        if forked:
            run_forked("train_doremi.py", *flags, **options)
        else:
            hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
            result = run_here("train_doremi.py", *flags)
            hook.remove()
            assert result.returncode == 0, result.stderr
        return left_by(lab.out) if options.get("status", 0) == 0 else None

    lab.run, lab.data = run, data
    return lab


def files(data):
    return {path.parent.name: path for path in sorted(data.glob("*/reference_losses-*"))}


def rows(path, mode="r"):
    """The stored losses of a file: (n, T) float16."""
    return np.memmap(path, dtype="<f2", mode=mode, offset=HEADER).reshape(-1, T)


def stored(data):
    """Which windows are stored: {DOMAIN: (n,) bool}."""
    return {name: (rows(path) > 0).all(axis=1) for name, path in files(data).items()}


def contents(data):
    return {path: path.read_bytes() for path in files(data).values()}


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-3), ("bfloat16", 1e-2)])  # bfloat16 keeps 8 bits
def test_alpha_is_that_of_a_run_without(lab, dtype, bound):
    """float16 keeps 11 bits of a token's loss, and rounds up as often as down; sixty steps of training amplify."""
    steps = ["--max_steps=60", f"--dtype={dtype}"]
    without, found = (lab.run("data", *steps, flag)["checkpoint"]["alpha_history"]
                      for flag in ("--no-cache_reference_losses", "--cache_reference_losses"))
    at_a_step, of_alpha_bar = distance(found, without), distance(found.mean(0), without.mean(0))
    moved = distance(without[-1], without[0])
    print(f"\n{dtype}: alpha moves by {moved:.3f}; float16 changes it by {at_a_step:.2e} at most at a step, alpha_bar "
          f"by {of_alpha_bar:.2e}")
    assert moved > 0.05 and 0 < of_alpha_bar < 1e-3 and at_a_step < bound


def test_second_run_reads_what_the_first_has_stored(lab):
    """The same to the bit, without a forward pass of the reference. Other values stored are other excess losses."""
    first = lab.run("data")
    assert lab.forward_passes == 12
    before = contents(lab.data("data"))
    second = lab.run("data")
    assert lab.forward_passes == 0
    assert_same(second, first)
    assert contents(lab.data("data")) == before
    epochs = read_metrics(lab.out)[-2]["epochs"]
    for name, whole in stored(lab.data("data")).items():  # 3 of 12 slots and 12 steps each
        assert len(whole) == WINDOWS[name] and whole.sum() == min(len(whole), 36), name
        assert epochs[name] == 36 / len(whole)

    for path in files(lab.data("data")).values():
        stored_rows = rows(path, "r+")
        stored_rows[stored_rows > 0] = 1.5
    lab.run("data", "--learning_rate=1e-6", "--min_lr=1e-6")  # it stays untrained: its losses are near log 64 = 4.16
    assert lab.forward_passes == 0
    lines = [line for line in read_metrics(lab.out) if "loss" in line]
    for line in lines:
        expected = {name: loss - 1.5 for name, loss in line["domain_loss"].items()}
        assert line["excess_loss"] == pytest.approx(expected, abs=1e-5)


def test_without_the_flag_nothing_is_stored(lab):
    lab.run("data", "--no-cache_reference_losses")
    assert not files(lab.data("data")) and lab.forward_passes == 12


def test_another_seed_does_not_depend_on_what_is_stored(lab):
    """Seed 2 finds some of its windows stored by seed 1, some not, in the same micro-batches: it is what it is cold."""
    cold = lab.run("cold", "--seed=2", "--micro_batch_size=4")
    passes = lab.forward_passes
    lab.run("data", "--seed=1")
    before = stored(lab.data("data"))
    warm = lab.run("data", "--seed=2", "--micro_batch_size=4")
    assert_same(warm, cold)
    assert 0 < lab.forward_passes <= passes <= 36
    after, of_seed_2 = stored(lab.data("data")), stored(lab.data("cold"))
    for name in WINDOWS:
        assert (after[name] == (before[name] | of_seed_2[name])).all()
    assert sum((before[name] & of_seed_2[name]).sum() for name in WINDOWS) > 20  # 18 of them of `small`


def test_ranks_and_micro_batches(lab):
    """float64: two splits differ by 1e-15 of a loss, which reaches its float16 with a chance of 1e-12 a token."""
    one = lab.run("one", "--dtype=float64")
    two = lab.run("two", "--dtype=float64", "--micro_batch_size=3", forked=True, ranks=2)
    reading = lab.run("one", "--dtype=float64", "--micro_batch_size=2", forked=True, ranks=3)
    for found in (two, reading):
        deviation = {name: distance(found["checkpoint"][name], one["checkpoint"][name])
                     for name in ("alpha_history", "excess", "model")}
        print(f"\n{deviation}")
        assert max(deviation.values()) < 1e-10
    assert list(contents(lab.data("two")).values()) == list(contents(lab.data("one")).values())


@pytest.mark.parametrize("kill", [("step", 7), ("renamed", 6), ("update", 11)])
def test_killed_and_resumed(lab, tmp_path, kill):
    """What the killed run has stored behind its checkpoint is read where the resumed one computes it otherwise."""
    undisturbed = lab.run("undisturbed")
    lab.run("data", out=tmp_path / "killed", forked=True, kill=kill, status=-9)
    assert sum(whole.sum() for whole in stored(lab.data("data")).values()) > 60
    assert_same(lab.run("data", "--resume", out=tmp_path / "killed"), undisturbed)
    assert list(contents(lab.data("data")).values()) == list(contents(lab.data("undisturbed")).values())


def test_torn_window_is_computed_again(lab):
    """A write that was cut short leaves zeros at the end of a row, a lost page at its beginning."""
    first = lab.run("data")
    before = contents(lab.data("data"))
    for path in files(lab.data("data")).values():
        whole = np.flatnonzero((rows(path) > 0).all(axis=1))
        torn = rows(path, "r+")
        torn[whole[0], T // 2 :], torn[whole[1], :1], torn[whole[2]] = 0, 0, 0
        torn.flush()
    assert contents(lab.data("data")) != before
    assert_same(lab.run("data"), first)
    assert lab.forward_passes > 0 and contents(lab.data("data")) == before


def test_retrained_reference_and_new_data_have_files_of_their_own(lab, tmp_path, data_dir):
    lab.run("data")
    first = contents(lab.data("data"))
    lab.reference = make_reference(tmp_path / "retrained", data_dir, "--seed=5")
    cold, warm = lab.run("cold"), lab.run("data")
    assert_same(warm, cold)
    assert lab.forward_passes == 12  # nothing of the other reference's was read
    assert all(path.read_bytes() == content for path, content in first.items())
    assert len(list(lab.data("data").glob("*/reference_losses-*"))) == 8

    ids = np.fromfile(lab.data("data") / "rich/train.bin", dtype="<u2")
    ids[::-1].tofile(lab.data("data") / "rich/train.bin")  # other text, of the same size
    lab.run("data", "--dtype=float64")  # nor those of another precision
    names = [path.parent.name for path in lab.data("data").glob("*/reference_losses-*")]
    assert len(names) == 12
    lab.run("data")
    names = [path.parent.name for path in lab.data("data").glob("*/reference_losses-*")]
    assert sorted(names) == sorted([*WINDOWS] * 3 + ["rich"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu(lab):
    """There a micro-batch's losses are written while the next is computed."""
    first = lab.run("data", "--device=cuda", "--micro_batch_size=4")
    assert_same(lab.run("data", "--device=cuda", "--micro_batch_size=4"), first)
    assert lab.forward_passes == 0


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def refused(lab, *flags, mentions, late=False):
    flags = ["--cache_reference_losses", *PROXY, f"--reference={lab.reference}", f"--data_dir={lab.data('data')}",
             f"--out_dir={lab.data('data').parent}/refused", *flags]
    result = run_here("train_doremi.py", *flags)
    assert_refused("train_doremi.py", result, mentions, late)
    assert not list(lab.data("data").glob("*/.*"))


@pytest.mark.parametrize("spoil, mentions", [
    (lambda path: path.write_bytes(path.read_bytes()[:-2]), ["bytes, expected 4,672", "delete it"]),
    (lambda path: path.write_bytes(path.read_bytes() + b"xx"), ["4,674 bytes", "delete it"]),
    (lambda path: path.write_bytes(b""), [" 0 bytes", "delete it"]),
    (lambda path: path.write_bytes(b"\xff" * path.stat().st_size), ["another reference or other data", "delete it"]),
    (lambda path: (path.unlink(), path.mkdir()), ["Is a directory"])])
def test_spoilt_file(lab, spoil, mentions):
    lab.run("data", *ONE_STEP)
    path = files(lab.data("data"))["small"]  # 4096 + 2 * 18 * 16 bytes
    spoil(path)
    refused(lab, mentions=[str(path), *mentions])
    assert not (lab.data("data").parent / "refused").exists()


def test_file_of_another_reference_under_this_ones_name(lab, tmp_path, data_dir):
    lab.run("data", *ONE_STEP)
    ours = files(lab.data("data"))["rich"]
    lab.reference, reference = make_reference(tmp_path / "retrained", data_dir, "--seed=5"), lab.reference
    lab.run("other", *ONE_STEP)
    theirs = files(lab.data("other"))["rich"]
    assert theirs.name != ours.name and theirs.stat().st_size == ours.stat().st_size
    shutil.copy(theirs, ours)
    lab.reference = reference
    refused(lab, mentions=[str(ours), "another reference", theirs.read_bytes()[:64].decode(), ours.name[17:33]])


def test_full_disk(lab):
    """A limit of 10,000 bytes a file stands in for it: the cache's files are there, their later pages are not."""
    lab.run("data", *ONE_STEP, "--seed=9")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        refused(lab, mentions=["counting/reference_losses-", "File too large", "2 bytes per training token"], late=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_same(lab.run("data"), lab.run("cold"))  # there is space again


def test_data_that_cannot_be_written_to(lab, monkeypatch):
    def denied(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(loss_cache.os, "link", denied)
    refused(lab, mentions=["reference_losses-", "Read-only file system", "without the flag"])
    assert not files(lab.data("data"))


def test_reference_that_is_not_finite(lab, tmp_path):
    lab.reference = shutil.copytree(lab.reference, tmp_path / "broken")
    checkpoint = torch.load(lab.reference / "ckpt.pt", weights_only=True)
    checkpoint["model"]["norm.weight"][0] = torch.nan
    torch.save(checkpoint, lab.reference / "ckpt.pt")
    refused(lab, mentions=["reference loss of window", "not finite", "Train the reference again"], late=True)
    assert not any(whole.any() for whole in stored(lab.data("data")).values())


def test_a_run_is_resumed_with_the_flag_it_was_started_with(lab, tmp_path):
    lab.run("data", "--no-cache_reference_losses", out=tmp_path / "refused")
    refused(lab, "--resume", mentions=["cache_reference_losses", "same flags"])


# ---------------------------------------------------------------------------------------------------------------------
# The cache by hand: one domain of 5 windows of 4 + 1 tokens


@pytest.fixture
def dataset(tmp_path):
    return load_dataset(write_dataset(tmp_path / "five", {"a": (np.arange(21), np.arange(5))}), 4)


def batch_of(cache, windows):
    domain, window = np.zeros(len(windows), dtype=np.int64), np.array(windows)
    return SimpleNamespace(domain=torch.from_numpy(domain), window=torch.from_numpy(window),
                           companion=cache.read(domain, window))


def test_what_is_used_is_what_is_stored(dataset):
    """Rounded to float16 the first time, too; a zero is stored as 2**-24; the first that is stored stays."""
    cache = LossCache(dataset, {"fingerprint": "x"}, torch.device("cpu"))
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    loss = torch.tensor([[0.0, 1 / 3, 1e-9, 65504.0], [1.0, 2.0, 3.0, 4.0001]])
    batch = batch_of(cache, [4, 1])
    expected = [[2.0**-24, float(np.float16(1 / 3)), 2.0**-24, 65504.0], [1.0, 2.0, 3.0, 4.0]]
    assert cache.losses(lambda _: loss, tokens, batch, 0).tolist() == expected
    assert cache.losses(None, tokens, batch, 0).tolist() == expected  # gathered before it was stored: looked up again
    assert cache.losses(None, tokens[:1], batch_of(cache, [0, 1]), 1).tolist() == expected[1:]
    mixed = cache.losses(lambda _: loss + 1, tokens, batch_of(cache, [3, 1]), 0)
    assert mixed[1].tolist() == expected[1] and mixed[0, 1:].tolist() == [float(np.float16(4 / 3)), 1.0, 65504.0]
    whole = cache.read(np.zeros(5, dtype=np.int64), np.arange(5))[1]
    assert whole.tolist() == [False, True, False, True, True]
    for value in (float("nan"), float("inf"), 65520.0):
        with pytest.raises(UserError, match="window 2 is not finite"):
            cache.losses(lambda _: loss * 0 + value, tokens, batch_of(cache, [2, 1]), 0)  # noqa: B023
        assert not cache.read(np.zeros(1, dtype=np.int64), np.array([2]))[1].any()
    cache.close()


def test_companion_is_told_the_windows_of_the_batch(dataset):
    for rank in range(2):
        sampler = Sampler(dataset, [1.0], 4, 3, rank, 2, companion=lambda domain, window: (domain, window))
        for batch in (sampler.next_batch() for _ in range(5)):
            assert torch.equal(torch.from_numpy(dataset.train[0][batch.window.numpy()]), batch.tokens)
            domain, window = batch.companion
            assert domain.tolist() == batch.domain.tolist() and window.tolist() == batch.window.tolist()
        sampler.close()
