"""The sampler: counts, permutation, batches. All of it is integers: tests are exact."""

import json
import time
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from conftest import draw, edit, rehash, write_dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sampler
from sampler import Sampler, load_dataset, permute, round_keys, systematic_counts

quick = settings(max_examples=60, deadline=None)
integer_weights = st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any)


# ---- how many sequences each domain gets ----


@quick
@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1.0)), min_size=1, max_size=30).filter(any),
       st.integers(1, 2000), st.floats(0, 1, exclude_max=True))
@example([1.0, 1.0], 512, 1 - 2**-53)  # 512 + u is 513 in floating point
@example([0.1] * 10, 10, 0.0)
def test_counts_sum_to_the_batch_and_are_within_one_of_their_share(weights, batch_size, u):
    weights = np.array(weights)
    counts = systematic_counts(weights / weights.sum(), batch_size, u)
    assert counts.sum() == batch_size and counts.dtype == np.int64
    assert (counts >= 0).all() and (counts[weights == 0] == 0).all()
    assert (np.abs(counts - batch_size * weights / weights.sum()) <= 1 + 1e-9).all()


@quick
@given(integer_weights, st.integers(1, 300))
def test_counts_are_unbiased(weights, batch_size):
    """With weights m_i / M a count is constant in u between multiples of 1 / M: M midpoints are the exact integral."""
    weights = np.array(weights)
    M = weights.sum()
    total = sum(systematic_counts(weights / M, batch_size, (j + 0.5) / M) for j in range(M))
    assert total.tolist() == (batch_size * weights).tolist()


# ---- the permutation ----


@quick
@given(st.integers(1, 5000), st.integers(0, 2**32), st.integers(0, 1000))
@example(1, 0, 0)
@example(2, 0, 0)
@example(4096, 0, 0)
@example(4097, 0, 0)
def test_permute_is_a_bijection(size, seed, epoch):
    order = permute(np.arange(size), size, round_keys(seed, "domain", epoch))
    assert np.array_equal(np.sort(order), np.arange(size))


@pytest.mark.parametrize("size", [2**bits + more for bits in (20, 21, 31, 32, 40, 50) for more in (-1, 0, 1)])
def test_permute_of_many_windows_repeats_none(size):
    keys = round_keys(0, "domain", 0)
    found = permute(np.arange(size - 9999, size), size, keys)
    assert len(set(found.tolist())) == 9999 and found.min() >= 0 and found.max() < size
    assert found[-1] == permute(np.array([size - 1]), size, keys)[0]  # each for itself


def test_a_few_windows_come_in_every_order():
    """24 orders of 4 windows; a Feistel network reaches the 12 even ones only. Mean 1 in 24, five deviations."""
    orders = [tuple(sampler.order(seed, "domain", 0, 4, 0).tolist()) for seed in range(2400)]
    seen = np.array([orders.count(order) for order in set(orders)])
    assert len(seen) == 24 and ((seen - 100) ** 2 / 100).sum() < 23 + 5 * (2 * 23) ** 0.5


def test_order_depends_on_seed_domain_and_epoch():
    orders = {permute(np.arange(100), 100, round_keys(seed, domain, epoch)).tobytes()
              for seed in (0, 1, 11) for domain in ("a", "b", "1/a") for epoch in (0, 1, 10)}
    assert len(orders) == 27
    uncached = sampler.order.__wrapped__
    for size in (4, 1024, 1025, 5000):  # and on nothing else; the blocks of an epoch are parts of one permutation
        blocks = [uncached(3, "x", 4, size, block) for block in range(-(-size // 1024))]
        assert sorted(np.concatenate(blocks)) == list(range(size))
        assert all(np.array_equal(found, sampler.order(3, "x", 4, size, i)) for i, found in enumerate(blocks))


def test_order_is_uncorrelated():
    """Correlations of n independent pairs have standard deviation 1 / sqrt(n): with position, neighbour, next epoch."""
    n = 50_000
    order = [permute(np.arange(n), n, round_keys(1, "domain", epoch)) for epoch in (0, 1)]
    for a, b in [(np.arange(n), order[0]), (order[0][:-1], order[0][1:]), (order[0], order[1])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)


# ---- batches ----


@quick
@given(integer_weights.filter(lambda w: len(w) >= 3), st.integers(1, 40), st.integers(1, 25), st.integers(0, 2**31))
def test_every_window_once_per_epoch(numbered, weights, batch_size, steps, seed):
    """After d draws of a domain of n windows, each was drawn floor(d / n) or ceil(d / n) times, at any batch's end."""
    weights = np.array(weights[:3]) + np.array([0, 0, not any(weights[:3])])
    s = Sampler(numbered, weights / weights.sum(), batch_size, seed)
    drawn, state = [np.zeros(len(windows), dtype=int) for windows in numbered.train], s.state_dict()
    for step in range(1, steps + 1):
        domain, window, state = s.slots(state)
        assert len(domain) == len(window) == batch_size and state["step"] == step
        for i, times in enumerate(drawn):
            np.add.at(times, window[domain == i], 1)
            assert times.max() - times.min() <= 1 and times.sum() == state["drawn"][i]
            assert abs(times.sum() - step * batch_size * weights[i] / weights.sum()) <= step  # within one a step
    s.close()


def test_order_depends_on_the_name_not_the_position(tmp_path, numbered):
    stream = np.arange(8 * 23 + 1), np.arange(20)
    alone = load_dataset(write_dataset(tmp_path / "alone", {"c": stream, "other": stream}, 200), 8)
    windows = []
    for dataset, weights in [(numbered, [0, 0, 1]), (alone, [1, 0]), (alone, [0, 1])]:
        batches, _ = draw(dataset, weights, 1, 46, seed=5)  # two epochs
        windows.append([batch.tokens[0, 0].item() % 10_000 // 8 for batch in batches])
    assert windows[0] == windows[1] != windows[2]
    assert sorted(windows[0][:23]) == list(range(23)) and windows[0][:23] != windows[0][23:]


def test_slots_are_shuffled(numbered):
    (first, second), _ = draw(numbered, [1 / 3] * 3, 300, 2)
    assert (np.diff(first.domain) != 0).sum() > 150  # two of three neighbours differ; unshuffled, two in all
    assert not torch.equal(first.domain, second.domain)


def test_batch_is_what_the_slots_say(numbered):
    """A window's tokens are consecutive, T + 1 of them, and start at a multiple of T."""
    s = Sampler(numbered, [0.2, 0.5, 0.3], 30, seed=3)
    domain, window, after = s.slots(s.state_dict())
    batch = s.next_batch()
    assert batch.tokens.dtype == torch.uint16 and batch.domain.dtype == torch.int64 and batch.state == after
    assert batch.domain.tolist() == domain.tolist()
    assert torch.equal(batch.tokens.long(), torch.from_numpy(10_000 * domain + 8 * window)[:, None] + torch.arange(9))
    s.load_state_dict({"step": 0, "drawn": [0, 0, 0]})  # what was gathered ahead belongs to the old state
    assert torch.equal(s.next_batch().tokens.long(), batch.tokens.long())
    s.close()


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 12), st.integers(0, 2**31))
def test_batch_does_not_depend_on_ranks_prefetching_or_resumption(numbered, world_size, resume_at, seed):
    weights, n = [0.1, 0.6, 0.3], 13
    whole, end = draw(numbered, weights, 12, n, seed)
    for rank in range(world_size):
        before, state = draw(numbered, weights, 12, resume_at, seed, rank=rank, world_size=world_size)
        assert state["step"] == resume_at  # what was gathered ahead is not counted as handed out
        state = json.loads(json.dumps(state))  # a few integers: it survives any format
        after, last = draw(numbered, weights, 12, n - resume_at, seed, state, rank=rank, world_size=world_size)
        assert last == end
        for ours, theirs in zip(before + after, whole, strict=True):
            assert torch.equal(ours.tokens.long(), theirs.tokens[rank::world_size].long())
            assert torch.equal(ours.domain, theirs.domain[rank::world_size])
            assert ours.state == theirs.state


def test_a_billion_windows_cost_nothing(tmp_path):
    """Start-up and resumption are O(1) in windows and steps: there is no table."""
    n = 10**9
    directory = write_dataset(tmp_path / "huge", {"huge": ([0], [0] * 9), "small": ([0] * 400, [0] * 9)})
    with open(directory / "huge" / "train.bin", "wb") as file:
        file.truncate(2 * (4 * n + 1))  # sparse: 8 GB that take no space
    edit(directory / "meta.json", lambda meta: meta["domains"]["huge"].update(train_tokens=4 * n + 1))
    rehash(directory)

    tracemalloc.start()
    begun = time.perf_counter()
    state = {"step": 10**6, "drawn": [31 * 10**6, 10**6]}
    draw(load_dataset(directory, 4), [31 / 32, 1 / 32], 32, 1, state=state)
    assert time.perf_counter() - begun < 2 and tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_epochs_are_counted_and_the_fifth_is_warned_of_once(numbered):
    """Domain a has 7 windows and gets 7 of 14 slots: an epoch a step. It passes the fourth at step 5."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        s = Sampler(numbered, [0.5, 0.5, 0.0], 14, seed=0)
        seen = []
        for step in range(1, 8):
            s.next_batch()
            assert s.epochs().tolist() == [step, step * 7 / 50, 0.0]
            seen.append(len(caught))
        assert seen == [0, 0, 0, 0, 1, 1, 1]
        assert "'a'" in str(caught[0].message) and "4 times" in str(caught[0].message)
        state = s.state_dict()
        s.close()
        draw(numbered, [0.5, 0.5, 0.0], 14, 2, state=state)  # resumed: it was said already
        draw(numbered, [0.5, 0.5, 0.0], 14, 7, rank=1, world_size=2)  # other ranks are silent
    assert len(caught) == 1
