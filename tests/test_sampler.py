"""The sampler: counts, permutation, batches, mixtures, evaluation windows. All of it is integers: tests are exact."""

import json
import time
import tracemalloc
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sampler
from cli import UserError
from sampler import (
    Sampler,
    domain_sums,
    evaluation_batches,
    held_out_loss,
    load_dataset,
    permute,
    round_keys,
    sampling_weights,
    systematic_counts,
)

quick = settings(max_examples=60, deadline=None)
integer_weights = st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any)


@pytest.fixture(scope="module")
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


# ---------------------------------------------------------------------------------------------------------------------
# How many sequences each domain gets


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


@pytest.mark.parametrize("weights", [[0.0, 1, 1], [1, 0.0, 1], [1, 1, 0.0], [0.0, 0.3, 0.0], [0.7, 0.1, 0.0]])
def test_a_domain_of_weight_zero_is_never_drawn(weights):
    u = np.concatenate([np.linspace(0, 1, 500, endpoint=False), [1 - 2**-53, 1 - 2**-30, 2**-53]])
    counts = np.array([systematic_counts(np.array(weights), 64, x) for x in u])
    assert (counts[:, np.array(weights) == 0] == 0).all() and (counts.sum(axis=1) == 64).all()


# ---------------------------------------------------------------------------------------------------------------------
# The permutation


def inverse(value, size, keys):
    """permute backwards, one integer at a time: the rounds in reverse, out of range values sent through again."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = 2**half - 1
    while True:
        left, right = value >> half, value & mask
        for key in reversed(keys.tolist()):
            scrambled = int(sampler.scramble(np.array([(left + key) % 2**64], dtype=np.uint64))[0])
            left, right = right ^ (scrambled & mask), left
        value = left << half | right
        if value < size:
            return value


@quick
@given(st.integers(1, 5000), st.integers(0, 2**32), st.integers(0, 1000))
@example(1, 0, 0)
@example(2, 0, 0)
@example(4096, 0, 0)
@example(4097, 0, 0)
def test_permute_is_a_bijection(size, seed, epoch):
    order = permute(np.arange(size), size, round_keys(seed, "domain", epoch))
    assert np.array_equal(np.sort(order), np.arange(size))


@quick
@given(st.integers(10**4, 10**12), st.integers(0, 2**32), st.data())
def test_permute_is_a_bijection_at_any_size(size, seed, data):
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True)))
    keys = round_keys(seed, "domain", 0)
    order = permute(index, size, keys)
    assert ((order >= 0) & (order < size)).all()
    assert [inverse(int(value), size, keys) for value in order] == index.tolist()


def test_permute_depends_on_seed_domain_and_epoch():
    orders = {permute(np.arange(100), 100, round_keys(seed, domain, epoch)).tobytes()
              for seed in (0, 1, 11) for domain in ("a", "b", "1/a") for epoch in (0, 1, 10)}
    assert len(orders) == 27
    assert np.array_equal(round_keys(3, "x", 4), round_keys.__wrapped__(3, "x", 4))  # and on nothing else


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


def test_order_is_uncorrelated():
    """Correlations of n independent pairs have standard deviation 1 / sqrt(n): with position, neighbour, next epoch."""
    n = 50_000
    order = [permute(np.arange(n), n, round_keys(1, "domain", epoch)) for epoch in (0, 1)]
    for a, b in [(np.arange(n), order[0]), (order[0][:-1], order[0][1:]), (order[0], order[1])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


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
    alone = load_dataset(write_dataset(tmp_path / "alone", {"c": stream, "other": stream}), 8)
    windows = []
    for dataset, weights in [(numbered, [0, 0, 1]), (alone, [1, 0]), (alone, [0, 1])]:
        s, state, order = Sampler(dataset, weights, 1, seed=5), {"step": 0, "drawn": [0] * len(weights)}, []
        for _ in range(46):  # two epochs
            _, window, state = s.slots(state)
            order += window.tolist()
        s.close()
        windows.append(order)
    assert windows[0] == windows[1] != windows[2]
    assert sorted(windows[0][:23]) == list(range(23)) and windows[0][:23] != windows[0][23:]


def test_order_does_not_depend_on_where_it_is_taken_up(monkeypatch, tmp_path):
    """Blocks of the permutation are kept between steps; wherever one begins, the windows are those of the bijection."""
    directory = write_dataset(tmp_path / "data", {"a": (np.arange(81) % 50, [0] * 9), "b": ([0] * 13, [0] * 9)})
    dataset = load_dataset(directory, 4)  # 20 and 3 windows
    monkeypatch.setattr(sampler, "PERMUTED", 8)  # blocks of 8, 8 and 4 windows
    expected = [np.concatenate([permute(np.arange(n), n, round_keys(5, name, epoch)) for epoch in range(40)])
                for n, name in ((20, "a"), (3, "b"))]
    s = Sampler(dataset, [0.5, 0.5], 4, seed=5)
    rng = np.random.default_rng(0)
    for first, count in [(0, 4), (4, 9), (13, 30), (3, 1), *rng.integers(0, 100, size=(30, 2))]:
        for i, n in enumerate((20, 3)):
            first, count = int(first), min(int(count), 3 * 40 - int(first))
            parts = list(s.in_order(i, n, first, count))
            found = np.concatenate(parts) if parts else np.zeros(0)
            assert np.array_equal(found, expected[i][first : first + max(count, 0)])
    s.close()


def test_slots_are_shuffled(numbered):
    s = Sampler(numbered, [1 / 3] * 3, 300, seed=0)
    domain, _, after = s.slots(s.state_dict())
    assert np.abs(np.diff(domain)).astype(bool).sum() > 150  # two of three neighbours differ; unshuffled, two in all
    assert not np.array_equal(domain, s.slots(after)[0])
    s.close()


def test_batch_is_what_the_slots_say(numbered):
    """A window's tokens are consecutive, T + 1 of them, and start at a multiple of T."""
    s = Sampler(numbered, [0.2, 0.5, 0.3], 30, seed=3)
    domain, window, after = s.slots(s.state_dict())
    batch = s.next_batch()
    assert batch.tokens.dtype == torch.uint16 and batch.domain.dtype == torch.int64 and batch.state == after
    assert batch.domain.tolist() == domain.tolist()
    assert torch.equal(batch.tokens.long(), torch.from_numpy(10_000 * domain + 8 * window)[:, None] + torch.arange(9))
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
    s = Sampler(numbered, weights, 12, seed)  # the same in this thread, nothing gathered ahead
    state = s.state_dict()
    for batch in whole:
        alone = s.gather(state)
        assert torch.equal(alone.tokens.long(), batch.tokens.long()) and alone.state == batch.state
        state = alone.state
    s.close()


def test_state_can_be_put_back_at_any_time(numbered):
    """The batch that was gathered ahead belongs to the old state, and is not handed out."""
    s = Sampler(numbered, [0.2, 0.5, 0.3], 30, seed=3)
    s.next_batch()
    state = s.state_dict()
    first, _ = s.next_batch(), s.next_batch()
    s.load_state_dict(state)
    assert torch.equal(s.next_batch().tokens.long(), first.tokens.long())
    s.close()


def test_seed_changes_the_batches(numbered):
    first, second = (draw(numbered, [0.2, 0.5, 0.3], 30, 1, seed)[0][0] for seed in (0, 1))
    assert not torch.equal(first.tokens.long(), second.tokens.long())


def test_a_billion_windows_cost_nothing(tmp_path, monkeypatch):
    """Start-up and resumption are O(1) in windows and steps: no table, and a block of each domain's order."""
    n = 10**9
    directory = write_dataset(tmp_path / "huge", {"huge": ([0], [0] * 9), "small": ([0] * 400, [0] * 9)})
    with open(directory / "huge" / "train.bin", "wb") as file:
        file.truncate(2 * (4 * n + 1))  # sparse: 8 GB that take no space
    meta = json.loads((directory / "meta.json").read_text())
    meta["domains"]["huge"]["train_tokens"] = 4 * n + 1
    (directory / "meta.json").write_text(json.dumps(meta))

    permuted = []
    monkeypatch.setattr(sampler, "permute", lambda index, *rest: permuted.append(len(index)) or permute(index, *rest))

    def start_at(state):
        start = time.perf_counter()
        s = Sampler(load_dataset(directory, 4), [31 / 32, 1 / 32], 32, seed=0)
        s.load_state_dict(state)
        batch = s.gather(s.state_dict())
        s.close()
        assert batch.tokens.shape == (32, 5) and batch.state["step"] == state["step"] + 1
        return time.perf_counter() - start

    states = [{"step": 0, "drawn": [0, 0]}, {"step": 10**6, "drawn": [31 * 10**6, 10**6]}]
    seconds = [min(start_at(state) for _ in range(3)) for state in states]
    tracemalloc.start()
    permuted.clear()
    for state in states:
        start_at(state)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"start and first batch of 1e9 windows: {seconds[0]:.4f} s; at step 1e6: {seconds[1]:.4f} s; {peak} bytes")
    assert permuted == 2 * [4096, 99]
    assert peak < 2**20 and max(seconds) < 1
    assert max(len(json.dumps(state)) for state in states) < 100


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


def test_state_of_another_number_of_domains_is_refused(numbered):
    s = Sampler(numbered, [0.2, 0.5, 0.3], 4, seed=0)
    with pytest.raises(UserError, match="2 domains, the data set has 3"):
        s.load_state_dict({"step": 1, "drawn": [2, 2]})
    s.close()


# ---------------------------------------------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize("dtype, start", [("uint16", 60_000), ("uint32", 3_000_000_000)])
def test_windows_are_aligned(tmp_path, dtype, start):
    """29 tokens hold 4 windows of 7 + 1; 28 hold 3: the last token of one window is the first of the next."""
    directory = write_dataset(tmp_path / "data", {"a": ([0] * 29, [0] * 28)}, vocab_size=start + 100)
    ids = start + np.arange(29)
    for split, n in (("train", 29), ("val", 28)):
        ids[:n].astype("<u4" if dtype == "uint32" else "<u2").tofile(directory / "a" / f"{split}.bin")
    meta = json.loads((directory / "meta.json").read_text())
    (directory / "meta.json").write_text(json.dumps({**meta, "dtype": dtype}))
    dataset = load_dataset(directory, 7)
    assert dataset.train[0].tolist() == [list(range(start + 7 * j, start + 7 * j + 8)) for j in range(4)]
    assert dataset.val[0].tolist() == dataset.train[0][:3].tolist()
    assert not dataset.train[0].flags.writeable
    (batch,), _ = draw(dataset, [1.0], 4, 1)
    assert batch.tokens.dtype == getattr(torch, dtype)
    assert sorted(batch.tokens.long()[:, 0].tolist()) == [start + 7 * j for j in range(4)]


# ---------------------------------------------------------------------------------------------------------------------
# Sampling weights.  Token counts of data_dir: counting 6000, simple 3000, rich 2000, small 300


@pytest.mark.parametrize("spec, planned, expected", [
    ("uniform", 0, [1, 1, 1, 1]),
    ("token_count", 0, [6000, 3000, 2000, 300]),
    ("temperature:0.5", 0, [6000**0.5, 3000**0.5, 2000**0.5, 300**0.5]),
    ("temperature:0", 0, [1, 1, 1, 1]),
    ("temperature:1", 0, [6000, 3000, 2000, 300]),
    # small is capped at 4 x 300 = 1200; the other 10,800 are shared equally, below their caps
    ("unimax:4", 12_000, [3600, 3600, 3600, 1200]),
    # 800 each is below every cap
    ("unimax:4", 3200, [800, 800, 800, 800]),
    # small 300, rich 2000, then 7700 / 2 = 3850 is above simple's 3000, and counting gets the remaining 4700
    ("unimax:1", 10_000, [4700, 3000, 2000, 300]),
    # more than all data four times: proportional to the data
    ("unimax:4", 10**9, [6000, 3000, 2000, 300]),
    ("0.1,0.2,0.3,0.4", 0, [0.1, 0.2, 0.3, 0.4]),
    ("2,0,1,1", 0, [0.5, 0, 0.25, 0.25]),
])
def test_sampling_weights(data_dir, spec, planned, expected):
    weights = sampling_weights(spec, load_dataset(data_dir, 16), planned)
    assert weights == pytest.approx(np.array(expected) / sum(expected), rel=1e-14)
    assert weights.dtype == np.float64 and weights.sum() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("wrap", [
    lambda w: w, lambda w: {"domain_weights": w, "provenance": {"tokenizer_sha256": "synthetic" * 4}},
    lambda w: {"train_domain_weights": w, "eval_domain_weights": {name: 9 for name in w}},
    lambda w: {"domain_weights": w, "provenance": "by hand"}])
def test_weights_of_a_file_are_matched_by_name(data_dir, tmp_path, wrap):
    path = tmp_path / "weights.json"
    path.write_text(json.dumps(wrap({"small": 1, "rich": 2, "counting": 0.0, "simple": 5})))  # not meta.json's order
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = sampling_weights(str(path), load_dataset(data_dir, 16), 0)
    assert weights.tolist() == [0.0, 5 / 8, 2 / 8, 1 / 8]


def test_weights_found_with_another_tokenizer_are_warned_of(data_dir, tmp_path):
    path = tmp_path / "weights.json"
    content = {"domain_weights": dict.fromkeys(["counting", "simple", "rich", "small"], 0.25)}
    path.write_text(json.dumps({**content, "provenance": {"tokenizer_sha256": "another"}}))
    with pytest.warns(UserWarning, match="another tokenizer"):
        sampling_weights(str(path), load_dataset(data_dir, 16), 0)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@quick
@given(st.integers(0, 12), st.integers(1, 7), st.integers(1, 20))
def test_evaluation_covers_the_first_windows_once(numbered, n_windows, batch_size, world_size):
    """Domains a, b, c have 5, 3, 9 validation windows; 0 means all of them."""
    expected = [(i, 10_000 * i + 5_000 + 8 * j) for i, n in enumerate([5, 3, 9]) for j in range(min(n, n_windows or n))]
    found = []
    for rank in range(world_size):
        batches = list(evaluation_batches(numbered, n_windows, batch_size, rank, world_size))
        for number, (tokens, domain) in enumerate(batches, start=1):
            assert tokens.shape == (batch_size, 9) and domain.shape == (batch_size,)
            real = domain < 3
            assert number == len(batches) or real.all()  # only the last is filled up
            starts = tokens.long()[:, 0]
            assert torch.equal(tokens.long(), starts[:, None] + torch.arange(9))
            found += zip(domain[real].tolist(), starts[real].tolist())
    assert sorted(found) == expected


@pytest.mark.parametrize("world_size, batch_size, n_windows", [(1, 4, 0), (2, 4, 0), (3, 5, 2), (20, 1, 4)])
def test_held_out_loss(numbered, world_size, batch_size, n_windows):
    """With the target's id as its loss, n windows of domain i have mean 10,000 i + 5,000 + (1 + 8 n) / 2."""
    take = [min(n, n_windows or n) for n in (5, 3, 9)]
    totals = []
    for rank in range(world_size):
        machine = SimpleNamespace(rank=rank, world_size=world_size, device="cpu", exact=torch.float64,
                                  all_reduce=lambda tensor: totals.append(tensor.clone()) or sum(totals))
        with np.errstate(invalid="ignore"):  # a rank without windows of a domain, before the others are added
            loss = held_out_loss(lambda tokens: tokens[:, 1:].double(), numbered, n_windows, batch_size, machine)
    assert loss.tolist() == [10_000 * i + 5_000 + (1 + 8 * n) / 2 for i, n in enumerate(take)]
    assert sum(totals)[1].tolist() == [8 * n for n in take]


def test_domain_sums():
    """Rows of domains 2, 0, 2 and a filling row (3 of 3 domains); domain 1 is absent."""
    losses = torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0], [64.0, 128.0]])
    total, count = domain_sums(losses, torch.tensor([2, 0, 2, 3]), 3)
    assert total.tolist() == [12.0, 0.0, 51.0] and count.tolist() == [2.0, 0.0, 4.0]
    assert total.dtype == torch.float64


@quick
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 11))
def test_domain_sums_add_over_micro_batches(domain, cut):
    losses, domain = torch.arange(len(domain) * 3.0).view(-1, 3), torch.tensor(domain)
    parts = domain_sums(losses[:cut], domain[:cut], 4) + domain_sums(losses[cut:], domain[cut:], 4)
    assert torch.equal(parts, domain_sums(losses, domain, 4))


def test_bytes_per_token_and_record(numbered):
    """conftest writes three bytes a token."""
    assert numbered.bytes_per_token().tolist() == [3.0, 3.0, 3.0]
    assert numbered.token_counts().tolist() == [57.0, 401.0, 185.0]
    record = json.loads(json.dumps(numbered.describe(np.array([0.2, 0.5, 0.3]))))
    assert record["sampling_weights"] == {"a": 0.2, "b": 0.5, "c": 0.3} and record["domains"] == ["a", "b", "c"]
    assert record["data"]["train_tokens"] == {"a": 57, "b": 401, "c": 185}
