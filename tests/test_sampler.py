"""The sampler: counts, permutation, batches. All of it is integers: tests are exact."""

import json
import time
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from conftest import draw, edit, write_dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sampler import Sampler, load_dataset, permute, round_keys, systematic_counts

pytestmark = pytest.mark.filterwarnings("ignore:domain .* has been repeated")
quick = settings(max_examples=60, deadline=None)
integer_weights = st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any)


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


SMALL = [*range(1, 70), 4095, 4096, 4097]
LARGE = [2**bits + more for bits in (20, 21, 31, 32, 40, 50) for more in (-1, 0, 1)] + [10**9, 10**12]


def keys_of(seed):
    return round_keys(seed, "domain", 0)


@pytest.mark.parametrize("seed", [0, 1, 2**31])
def test_permute_is_a_bijection(seed):
    """Of every small range; in large ones no two of many indices meet."""
    for size in SMALL:
        assert np.array_equal(np.sort(permute(np.arange(size), size, keys_of(seed))), np.arange(size))
    for size in LARGE:
        index = np.unique(np.concatenate([np.arange(1000), size - 1 - np.arange(1000), size // 2 + np.arange(1000)]))
        order = permute(index, size, keys_of(seed))
        assert order.min() >= 0 and order.max() < size and len(np.unique(order)) == len(index)


def test_every_element_has_its_own_size_and_keys():
    """All at once they are what each is alone."""
    size = np.array(SMALL + LARGE)
    index, keys = size // 3, np.stack([keys_of(seed) for seed in range(len(size))])
    assert permute(index, size, keys).tolist() == [permute([i], n, k).item() for i, n, k in zip(index, size, keys)]


@pytest.mark.parametrize("size", [3, 4, 6, 13])
def test_first_two_windows_of_an_epoch_are_uniform(size):
    """Chi-square over all ordered pairs: mean n - 1, variance 2 (n - 1); five standard deviations for fixed seeds."""
    pairs, draws = size * (size - 1), 60 * size * (size - 1)
    seen = np.zeros((size, size))
    for epoch in range(draws):
        first, second = permute(np.array([0, 1]), size, round_keys.__wrapped__(7, "domain", epoch))
        seen[first, second] += 1
    assert np.trace(seen) == 0
    chi_square = ((seen[~np.eye(size, dtype=bool)] - 60) ** 2 / 60).sum()
    assert chi_square < pairs - 1 + 5 * np.sqrt(2 * (pairs - 1))


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
    """Two epochs of domain c alone, of 23 windows."""
    stream = np.arange(8 * 23 + 1), np.arange(20)
    alone = load_dataset(write_dataset(tmp_path / "alone", {"c": stream, "other": stream}, vocab_size=200), 8)
    a, b, c = ([batch.tokens.long()[0, 0].item() % 10_000 for batch in draw(dataset, weights, 1, 46, seed=5)[0]]
               for dataset, weights in ((numbered, [0, 0, 1]), (alone, [1, 0]), (alone, [0, 1])))
    assert a == b != c and sorted(a[:23]) == list(range(0, 184, 8)) and a[:23] != a[23:]


def test_batch_is_shuffled_and_its_windows_are_aligned(numbered):
    """A window's tokens are consecutive, T + 1 of them, and start at a multiple of T."""
    (batch, after), _ = draw(numbered, [1 / 3] * 3, 300, 2)
    (other,), _ = draw(numbered, [1 / 3] * 3, 300, 1, seed=1)
    assert batch.tokens.dtype == torch.uint16 and batch.domain.dtype == torch.int64
    start = batch.tokens.long()[:, 0]
    assert torch.equal(batch.tokens.long(), start[:, None] + torch.arange(9))
    assert torch.equal(start // 10_000, batch.domain) and (start % 10_000 % 8 == 0).all()
    assert (batch.domain.diff() != 0).sum() > 150  # two of three neighbours differ; unshuffled, two in all
    assert not torch.equal(batch.domain, after.domain) and not torch.equal(batch.domain, other.domain)


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


def test_state_can_be_put_back_at_any_time(numbered):
    """The batch that was gathered ahead belongs to the old state, and is not handed out."""
    s = Sampler(numbered, [0.2, 0.5, 0.3], 30, seed=3)
    s.next_batch()
    state = s.state_dict()
    first, _ = s.next_batch(), s.next_batch()
    s.load_state_dict(state)
    assert torch.equal(s.next_batch().tokens.long(), first.tokens.long())
    s.close()


def test_a_billion_windows_cost_nothing(tmp_path):
    """Start-up and resumption are O(1) in windows and steps: there is no table."""
    n = 10**9
    directory = write_dataset(tmp_path / "huge", {"huge": ([0], [0] * 9), "small": ([0] * 400, [0] * 9)})
    with open(directory / "huge" / "train.bin", "wb") as file:
        file.truncate(2 * (4 * n + 1))  # sparse: 8 GB that take no space
    edit(directory / "meta.json", lambda meta: meta["domains"]["huge"].update(train_tokens=4 * n + 1))
    tracemalloc.start()
    for state in ({"step": 0, "drawn": [0, 0]}, {"step": 10**6, "drawn": [31 * 10**6, 10**6]}):
        start = time.perf_counter()
        (batch,), after = draw(load_dataset(directory, 4), [31 / 32, 1 / 32], 32, 1, state=state)
        assert time.perf_counter() - start < 1 and batch.tokens.shape == (32, 5)
        assert after["step"] == state["step"] + 1 and len(json.dumps(after)) < 100
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_epochs_are_counted_and_the_fifth_is_warned_of_once(numbered):
    """Domain a has 7 windows and gets 7 of 14 slots: an epoch a step. It passes the fourth at step 5."""
    s = Sampler(numbered, [0.5, 0.5, 0.0], 14, seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 8):
            s.next_batch()
            assert s.epochs().tolist() == [step, step * 7 / 50, 0.0] and len(caught) == (step > 4)
        draw(numbered, [0.5, 0.5, 0.0], 14, 2, state=s.state_dict())  # resumed: it was said already
        draw(numbered, [0.5, 0.5, 0.0], 14, 7, rank=1, world_size=2)  # other ranks are silent
    s.close()
    assert len(caught) == 1 and "'a'" in str(caught[0].message)
