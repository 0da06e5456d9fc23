"""DoReMi's answer where the right one is known beforehand.

Five domains over a vocabulary of V = 46; all but the twins have tokens of their own. What theory says of each:

  noise     16 tokens, drawn uniformly. The reference stops at the entropy, log 16; a new proxy's loss is log V: the
            excess starts at log(V / 16) = 1.06, the lowest of all. A high loss is no excess: alpha falls at once, and
            stays about 0 while there is something to learn elsewhere. At the end it may come back.
  trivial   counts 0 1 2 3 0 1 2 3. The reference's loss is 0, so the excess starts at log V = 3.83, the highest of all,
            and alpha jumps there. It is learnt within some tens of steps, and alpha leaves: alpha_bar is in between.
  slow      the next token is a table of the last two (14 x 14 entries; two new tokens in every 16). It takes hundreds
            of steps. Its excess outlasts the others': alpha_bar is by far the largest.
  twin_a,   one text twice, a chain with three equally likely successors: the excess starts at log(V / 3) = 2.73.
  twin_b    Only the order of their windows differs, so alpha_bar is equal up to a random walk.
"""

import math

import numpy as np
import pytest
from conftest import read_alpha, read_metrics, write_dataset
from forked import run_forked

V, STEPS = 46, 200


def make_data(directory, seed, n=40_000):
    rng = np.random.default_rng(seed)
    table, slow = rng.integers(14, size=(14, 14)), []
    while len(slow) < n:
        a, b = rng.integers(14, size=2)
        slow += [a, b]
        for _ in range(14):
            a, b = b, table[a, b]
            slow.append(b)
    successors, twin = np.stack([rng.permutation(12)[:3] for _ in range(12)]), [0]
    for choice in rng.integers(3, size=n - 1):
        twin.append(successors[twin[-1], choice])
    streams = {"noise": rng.integers(16, size=n), "trivial": 16 + np.arange(n) % 4, "slow": 20 + np.array(slow[:n]),
               "twin_a": 34 + np.array(twin), "twin_b": 34 + np.array(twin)}
    return write_dataset(directory, {name: (ids[2000:], ids[:2000]) for name, ids in streams.items()}, vocab_size=V)


def check_answer(reference, out, seed):
    run_forked("train_doremi.py", f"--reference={reference}", f"--out_dir={out}", f"--seed={seed}",
               f"--max_steps={STEPS}", "--log_interval=1")
    lines = [line for line in read_metrics(out) if "loss" in line]
    alpha, excess = read_alpha(out), np.array([list(line["excess"].values()) for line in lines])  # (T, K)
    noise, trivial, slow, twin_a, twin_b = alpha_bar = alpha.mean(axis=0)
    start, late = alpha[:20].mean(axis=0), alpha[-50:].mean(axis=0)
    print(f"\nseed {seed}: alpha_bar {alpha_bar.round(4)}, excess on average {excess.mean(axis=0).round(3)}")

    # Step 1: a new proxy's loss is log V everywhere, the reference's is the entropy
    assert excess[0, [0, 1, 3, 4]] == pytest.approx([math.log(V / 16), math.log(V), *[math.log(V / 3)] * 2], abs=0.25)
    odds = np.exp(excess[0])
    assert alpha[0] == pytest.approx((1 - 1e-3) * odds / odds.sum() + 1e-3 / 5, abs=1e-12)

    assert alpha[:-50, 0].sum() / STEPS < 0.03  # the part of alpha_bar before it may come back
    assert slow > 0.4 and slow == max(alpha_bar)
    assert 0.03 < trivial < 0.3 and start[1] > 0.5 and late[1] < start[1] / 2
    assert abs(twin_a - twin_b) < 0.1 and excess.mean(axis=0)[3] == pytest.approx(excess.mean(axis=0)[4], abs=0.04)
    assert noise < min(trivial, slow)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(10, 16))])
def test_answer_is_the_known_one(tmp_path, seed):
    """Each seed has data, a reference, and two proxies of its own."""
    data, reference = make_data(tmp_path / "data", seed), tmp_path / "reference"
    run_forked("train_reference.py", f"--data_dir={data}", f"--out_dir={reference}", f"--seed={seed}",
               "--max_steps=500", "--batch_size=20", "--block_size=32", "--n_layer=1", "--n_head=2", "--n_kv_head=2",
               "--n_embd=32", "--n_ffn=64", "--learning_rate=0.005", "--eval_interval=500", "--no-compile",
               "--dtype=float32")
    for proxy in (seed, seed + 1):
        check_answer(reference, tmp_path / f"proxy{proxy}", proxy)
