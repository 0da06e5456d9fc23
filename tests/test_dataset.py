"""What the sampler reads: windows, mixtures, evaluation windows, and sums over domains. All of it is exact."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draw, edit, rehash, write_dataset

from sampler import domain_sums, evaluation_batches, load_dataset, sampling_weights
from train_reference import held_out_loss


@pytest.mark.parametrize("dtype, start", [("uint16", 60_000), ("uint32", 3_000_000_000)])
def test_windows_are_aligned(tmp_path, dtype, start):
    """29 tokens hold 4 windows of 7 + 1; 28 hold 3: the last token of one window is the first of the next."""
    directory = write_dataset(tmp_path / "data", {"a": ([0] * 29, [0] * 28)}, vocab_size=start + 100)
    ids = start + np.arange(29)
    for split, n in (("train", 29), ("val", 28)):
        ids[:n].astype("<u4" if dtype == "uint32" else "<u2").tofile(directory / "a" / f"{split}.bin")
    edit(directory / "meta.json", lambda meta: meta.update(dtype=dtype))
    rehash(directory)
    dataset = load_dataset(directory, 7)
    assert dataset.train[0].tolist() == [list(range(start + 7 * j, start + 7 * j + 8)) for j in range(4)]
    assert dataset.val[0].tolist() == dataset.train[0][:3].tolist()
    assert not dataset.train[0].flags.writeable
    (batch,), _ = draw(dataset, [1.0], 4, 1)
    assert batch.tokens.dtype == getattr(torch, dtype)
    assert sorted(batch.tokens.long()[:, 0].tolist()) == [start + 7 * j for j in range(4)]


# ---- sampling weights.  Token counts of data_dir: counting 6000, simple 3000, rich 2000, small 300 ----


@pytest.mark.parametrize("spec, planned, expected", [
    ("uniform", 0, [1, 1, 1, 1]),
    ("token_count", 0, [6000, 3000, 2000, 300]),
    ("temperature:0.5", 0, [6000**0.5, 3000**0.5, 2000**0.5, 300**0.5]),
    # small is capped at 4 x 300 = 1200; the other 10,800 are shared equally, below their caps
    ("unimax:4", 12_000, [3600, 3600, 3600, 1200]),
    ("unimax:4", 3200, [800, 800, 800, 800]),  # 800 each is below every cap
    # small 300, rich 2000, then 7700 / 2 = 3850 is above simple's 3000, and counting gets the remaining 4700
    ("unimax:1", 10_000, [4700, 3000, 2000, 300]),
    ("unimax:4", 10**9, [6000, 3000, 2000, 300]),  # more than all data four times: proportional to the data
    ("2,0,1,1", 0, [0.5, 0, 0.25, 0.25]),
    ("1e+1,0,5e+0,5", 0, [0.5, 0, 0.25, 0.25]),  # this plus joins nothing
    ("1e+1,0,0,0+0,.1,0,0+uniform", 0, [1 + 1 / 4, 1 + 1 / 4, 1 / 4, 1 / 4]),
    ("+".join(["uniform"] * 50), 0, [1, 1, 1, 1]),  # longer than a file's name may be
    ("uniform+0.1,0.2,0.3,0.4", 0, [0.175, 0.225, 0.275, 0.325])])  # the mean of the two
def test_sampling_weights(data_dir, spec, planned, expected):
    weights = sampling_weights(spec, load_dataset(data_dir, 16), planned)
    assert weights == pytest.approx(np.array(expected) / sum(expected), rel=1e-14)
    assert weights.dtype == np.float64 and weights.sum() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("wrap, warned", [
    (lambda w: w, False), (lambda w: {"domain_weights": w, "provenance": {"tokenizer_sha256": "synthetic" * 4}}, False),
    (lambda w: {"train_domain_weights": w, "eval_domain_weights": {name: 9 for name in w}}, False),
    (lambda w: {"domain_weights": w, "provenance": {"tokenizer_sha256": "another"}}, True)])
def test_weights_of_a_file_are_matched_by_name(data_dir, tmp_path, wrap, warned):
    path = tmp_path / "weights.json"
    path.write_text(json.dumps(wrap({"small": 1, "rich": 2, "counting": 0.0, "simple": 5})))  # not meta.json's order
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights = sampling_weights(str(path), load_dataset(data_dir, 16), 0)
    assert weights.tolist() == [0.0, 5 / 8, 2 / 8, 1 / 8]
    assert ["another tokenizer" in str(warning.message) for warning in caught] == [True] * warned


@pytest.mark.parametrize("spec, share", [
    ("c++/w.json", 1), ("c++/w.json+1e+0,1,1,1", 0.5), ("~/a+b.json+uniform", 0.5), ("a+b.json+uniform", 0.5),
    ("uniform+~/a+b.json+c++/w.json+1,1,1,1", 0.5)])
def test_paths_with_a_plus(data_dir, tmp_path, monkeypatch, spec, share):
    """Each file is (1, 0, 0, 0), and each other mixture uniform."""
    (tmp_path / "c++").mkdir()
    for name in "c++/w.json", "a+b.json":
        (tmp_path / name).write_text(json.dumps({"counting": 1, "simple": 0, "rich": 0, "small": 0}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    weights = sampling_weights(spec, load_dataset(data_dir, 16), 0)
    assert weights.tolist() == [share + (1 - share) / 4] + [(1 - share) / 4] * 3


@pytest.mark.parametrize("n_windows", [0, 1, 2, 4, 12])
@pytest.mark.parametrize("batch_size, world_size", [(1, 1), (4, 1), (7, 1), (1, 3), (2, 4), (5, 20)])
def test_evaluation_windows_are_spread_and_dealt_evenly(numbered, n_windows, batch_size, world_size):
    """Domains a, b, c have 5, 3, 9 validation windows; 0 means all of them. Every rank has as many batches."""
    found, numbers = [], set()
    for rank in range(world_size):
        batches = list(evaluation_batches(numbered, n_windows, batch_size, rank, world_size))
        numbers.add(len(batches))
        for number, (tokens, domain) in enumerate(batches, start=1):
            assert tokens.shape == (batch_size, 9) and domain.shape == (batch_size,)
            real = domain < 3
            assert number == len(batches) or real.all()  # only the last is filled up
            starts = tokens.long()[:, 0]
            assert torch.equal(tokens.long(), starts[:, None] + torch.arange(9))
            found += zip(domain[real].tolist(), starts[real].tolist())
    assert len(numbers) == 1 and len(found) == len(set(found))
    for i, n in enumerate([5, 3, 9]):
        taken = sorted((start - 10_000 * i - 5_000) // 8 for domain, start in found if domain == i)
        gaps = np.diff([*taken, n])
        assert taken[0] == 0 and len(taken) == min(n, n_windows or n) and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("world_size, batch_size", [(1, 4), (3, 5), (20, 1)])
def test_held_out_loss(numbered, world_size, batch_size):
    """Where a token's loss is its id, domain i's n windows have mean 10,000 i + 5,000 + (1 + 8 n) / 2."""
    totals = []
    for rank in range(world_size):  # one after the other
        machine = SimpleNamespace(rank=rank, world_size=world_size, device="cpu", sum_dtype=torch.float64,
                                  micro_batch_size=batch_size,
                                  all_reduce=lambda tensor: totals.append(tensor.clone()) or sum(totals))
        with np.errstate(invalid="ignore"):  # a rank without windows of a domain, before the others are added
            loss = held_out_loss(lambda tokens: tokens[:, 1:].double(), numbered, 0, machine)
    assert loss.tolist() == [10_000 * i + 5_000 + (1 + 8 * n) / 2 for i, n in enumerate([5, 3, 9])]


def test_domain_sums():
    """Rows of domains 2, 0, 2 and a filling row (3 of 3 domains); domain 1 is absent."""
    losses = torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0], [64.0, 128.0]])
    total, excess, count = domain_sums(torch.tensor([2, 0, 2, 3]), 3, torch.float64, losses, losses / 2)
    assert total.tolist() == [12.0, 0.0, 51.0] and count.tolist() == [2.0, 0.0, 4.0]
    assert torch.equal(excess, total / 2) and total.dtype == torch.float64
