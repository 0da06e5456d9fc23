"""The benchmark: its arithmetic on known numbers, its command, and two of its rows in earnest but small."""

import argparse
import json

import numpy as np
import pytest
from conftest import run_script

import bench
import cli
import sampler
from model import ModelConfig, Transformer


@pytest.fixture(scope="module")
def small_bench(tmp_path_factory):
    args = argparse.Namespace(rows=[], nanogpt=None, device="cpu", dtype="float32", repeats=2, json=None)
    return bench.Bench(args, tmp_path_factory.mktemp("bench"))


def test_a_line_is_the_median_of_its_repetitions():
    line = bench.line("what", [3.0, 1.0, 2.5], ">= 2.5", "x")
    assert (line["value"], line["spread"], line["repeats"], line["met"]) == (2.5, [1.0, 3.0], 3, True)
    assert not bench.line("what", [3.0, 1.0, 2.5], "<= 2.4", "x")["met"]
    assert bench.line("what", [0.0], "<= 0")["met"]


def test_ratios_are_taken_within_a_repetition():
    # The machine slows down tenfold meanwhile: each repetition says 2 or 4, the medians of the two columns say 20 / 3
    line = bench.compare("what", [20.0, 8.0, 40.0], [10.0, 2.0, 10.0], ">= 4", "tok/s", "limit", floor=2)
    assert (line["value"], line["spread"], line["met"]) == (4.0, [2.0, 4.0], True)
    assert (line["ours"], line["other"], line["limit"]) == ("20 tok/s", "10 tok/s", "limit; +100%")


@pytest.mark.parametrize(("value", "text"), [
    (1234567.0, "1.23 MB/s"), (2e12, "2 TB/s"), (999.0, "999 B/s"), (0.25, "250 mB/s"), (1e-5, "0.01 mB/s")])
def test_three_digits_and_a_prefix(value, text):
    assert bench.si(value, "B/s") == text


def test_a_rate_counts_calls_over_the_time_that_they_took(monkeypatch):
    now = iter(np.arange(0, 100, 0.25))  # the clock is looked at before each call, which so takes a quarter of a second
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(now))
    calls = []
    assert bench.rate(lambda: calls.append(1), 2) == pytest.approx(len(calls) / 2)
    assert len(calls) == 7  # the first look starts the clock


def test_measures_alternate(small_bench):
    order = []
    found = small_bench.alternate(a=lambda: order.append("a") or 1, b=lambda: order.append("b") or 2)
    assert order == ["a", "b", "a", "b"] and found == {"a": [1, 1], "b": [2, 2]}


def test_generated_data_is_what_the_sampler_reads(tmp_path):
    dataset = sampler.load_dataset(bench.write_dataset(tmp_path / "data", 3, 1025, 70_000), 256)
    assert len(dataset.domains) == 3 and [len(windows) for windows in dataset.train] == [4, 4, 4]
    assert dataset.train[0].dtype == np.uint32 and 60_000 < dataset.train[0].max() < 70_000


def test_the_medium_shape_has_as_many_parameters_as_nanogpt():
    D, L, T, V = 256, 4, 256, 4096
    flags = dict(flag.lstrip("-").split("=") for flag in bench.MEDIUM)
    shape = {name: int(flags[name]) for name in ("block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_ffn")}
    theirs = 12 * L * D**2 + V * D + T * D + (2 * L + 1) * D  # its matrices, tied head, positions and norms
    assert Transformer(ModelConfig(vocab_size=V, **shape)).n_params() == theirs


def test_the_sampler_row(small_bench):
    lines = bench.sampler(small_bench, n_tokens=5000, batch_size=44, block_size=32, seconds=0.05)
    assert [line["what"] for line in lines] == ["gather / memcpy", "next_batch / memcpy", "gather / nanogpt"]
    for line in lines[:2]:
        assert 0 < line["spread"][0] <= line["value"] <= line["spread"][1] < 2 and line["repeats"] == 2
    assert lines[2]["reason"] == "needs --nanogpt=DIR"


def test_a_row_that_nothing_can_be_measured_for_says_so(tmp_path):
    done = run_script("bench.py", "gpt2", "step", "sync", "windows", "--device=cpu", "--repeats=1",
                      f"--json={tmp_path}/bench.json", env={"TMPDIR": str(tmp_path)})
    entries = [json.loads(line) for line in (tmp_path / "bench.json").read_text().splitlines()]
    assert [entry["row"] for entry in entries[:3]] == ["gpt2", "step", "sync"]
    assert [entry["reason"] for entry in entries[:3]] == [
        "needs CUDA", "needs a checkout of github.com/karpathy/nanoGPT: --nanogpt=DIR", "needs CUDA"]
    assert done.stdout.count("not measured: ") == 3
    seconds, allocated, *resident = entries[3:]
    assert seconds["unit"] == "s" and 0 < seconds["value"] < 60
    batch = 512 * 1025 * 2 / 1e6  # MB; a sampler that kept an order of 1e9 windows would hold thousands
    assert all(0 < line["value"] < 100 * batch for line in (allocated, *resident))
    assert seconds["machine"]["threads"] == 1 and seconds["machine"]["copy_bytes_per_second"] > 1e7
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]  # nothing else is left behind


@pytest.mark.parametrize(("flag", "words"), [("stepp", "no row is called stepp; there are step, gpt2"),
                                             ("--nanogpt=/nowhere", "holds no train.py"), ("--repeats=0", "positive")])
def test_bad_flags_are_one_line_and_status_2(flag, words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.py", flag])
    with pytest.raises(SystemExit) as stop:
        cli.run(bench.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and len(error.splitlines()) == 1


def test_a_child_that_fails_is_a_failed_row(small_bench):
    with pytest.raises(bench.Failed, match="ValueError: no such thing"):
        small_bench.run("-c", "raise ValueError('no such thing')")
