"""Algorithm 1 is computed exactly, under every split into nodes, ranks and micro-batches.

The product's runs are compared, step by step, with oracle.py, which shares no code with them. Three data sets: `even`,
four domains that fill every batch; `skewed`, whose rarest domain appears in one batch of eight; `many`, thirty domains
for batches of 24, so some are absent at every step.
"""

import functools
import itertools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import EXTRA, ROOT, VOCAB, draw, markov_dataset, read_alpha, read_metrics
from forked import distance, run_forked
from oracle import EXTRA_FLAGS, doremi

from model import ModelConfig, Transformer
from sampler import load_dataset, sampling_weights
from train_doremi import update_alpha

pytestmark = pytest.mark.filterwarnings("ignore:domain .* has been repeated")

BATCH, STEPS = 24, 20
SHAPE = {"block_size": 16, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 16, "n_ffn": 24}
MODEL = [f"--{name}={value}" for name, value in SHAPE.items()]
# At twice this learning rate, float32 rounding of the initial parameters alone moves the excess of `many` by 1e-4.
FLAGS = [f"--batch_size={BATCH}", "--learning_rate=0.01", "--warmup_steps=4", "--weight_decay=0.1", "--eval_windows=2",
         "--log_interval=1", "--no-compile"]
SAMPLING = {"even": "uniform", "skewed": "0.9,0.075,0.02,0.005", "many": "uniform"}
NUMBERS = itertools.count()  # of runs: each has its directory


def make_world(directory, case, dtype, launch=run_forked):
    """Write data to a directory, and train a reference that has learnt something of it."""
    successors = [1, 2, 8, 3] if case != "many" else [1 + i % 9 for i in range(30)]
    data = markov_dataset(directory / "data", [(f"domain{i}", 1500, n) for i, n in enumerate(successors)], 100, 5)
    launch("train_reference.py", f"--data_dir={data}", f"--out_dir={directory}/reference", f"--dtype={dtype}",
           *FLAGS, *MODEL, "--max_steps=40", "--seed=3", "--sampling_weights=uniform",
           f"--lr_schedule={'exponential' if case == 'even' else 'cosine'}")
    return directory


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A function from (case, dtype) to what make_world makes, once."""
    return functools.cache(lambda case, dtype: make_world(tmp_path_factory.mktemp(f"{case}-{dtype}"), case, dtype))


@pytest.fixture(scope="module")
def truth(world):
    """A function from (case, dtype) to the oracle's run, in float64 from the parameters that a run of dtype has."""
    return functools.cache(lambda case, dtype: run_oracle(world(case, dtype), case, dtype))


def run_proxy(directory, case, ranks, micro_batch_size, launch=run_forked, **options):
    """Run the product; return what it left: alphas, excess, losses, final parameters, answer."""
    out = directory / f"proxy{next(NUMBERS)}"
    launch("train_doremi.py", f"--reference={directory}/reference", f"--out_dir={out}", *FLAGS, "--seed=7",
           f"--max_steps={STEPS}", "--smoothing=0.01", f"--sampling_weights={SAMPLING[case]}",
           f"--micro_batch_size={micro_batch_size}", "--grad_clip=2", *EXTRA, ranks=ranks, **options)
    metrics = [line for line in read_metrics(out) if "loss" in line]
    alpha = read_alpha(out)
    assert len(alpha) == STEPS
    return {"alpha": alpha, "alpha_bar": sum(alpha) / STEPS,
            "excess": [list(line["excess"].values()) for line in metrics],
            "logged_alpha": [list(line["alpha"].values()) for line in metrics],
            "loss": [line["loss"] for line in metrics], "grad_norm": [line["grad_norm"] for line in metrics],
            "model": torch.load(out / "ckpt.pt", weights_only=True)["model"]}


def run_oracle(directory, case, dtype):
    flags = json.loads((directory / "reference/config.json").read_text())["flags"]
    flags |= {"seed": 7, "max_steps": STEPS, "step_size": 1.0, "smoothing": 0.01, "grad_clip": 2.0} | EXTRA_FLAGS
    torch.manual_seed(7)
    with torch.device("meta"):
        model = Transformer(ModelConfig(vocab_size=VOCAB, **SHAPE), getattr(torch, dtype))
    initial = dict(model.initial_parameters())
    reference = torch.load(directory / "reference/ckpt.pt", weights_only=True)["model"]
    dataset = load_dataset(directory / "data", SHAPE["block_size"])
    drawn, _ = draw(dataset, sampling_weights(SAMPLING[case], dataset, 0), BATCH, STEPS, seed=7)
    batches = [(batch.tokens.long(), batch.domain.tolist()) for batch in drawn]
    torch.set_num_threads(1)
    return doremi(initial, reference, batches, 30 if case == "many" else 4, flags)


EVERY = itertools.product(SAMPLING, ["float64", "float32"], [(1, 24), (1, 6), (2, 12), (2, 4), (3, 4), (4, 6), (4, 3)])


@pytest.mark.parametrize("case, dtype, ranks, micro_batch_size, nodes", [
    ("even", "float64", 1, 24, 1), ("even", "float64", 2, 12, 1), ("skewed", "float64", 2, 4, 1),
    ("skewed", "float64", 4, 3, 2), ("many", "float64", 4, 3, 1), ("skewed", "float32", 4, 3, 1),
    *(pytest.param(case, dtype, *split, 1, marks=pytest.mark.slow) for case, dtype, split in EVERY)])
def test_run_is_the_oracles(world, truth, case, dtype, ranks, micro_batch_size, nodes):
    """Twenty steps against the oracle: alpha, excess, every parameter's gradient, final parameters, the answer."""
    directory, expected = world(case, dtype), truth(case, dtype)
    record = directory / f"record{next(NUMBERS)}"
    found = run_proxy(directory, case, ranks, micro_batch_size, nodes=nodes, record=record)
    gradients = torch.load(f"{record}.0", weights_only=True)["gradients"]
    assert len(gradients) == STEPS and len(gradients[0]) == 2 + 6 * SHAPE["n_layer"]
    deviations = {name: distance(found[name], expected[name])
                  for name in ("alpha", "excess", "loss", "grad_norm", "model", "alpha_bar")}
    deviations["gradients"] = max(map(distance, gradients, expected["gradients"]))
    print(f"\n{case}, {dtype}, {ranks} ranks of {micro_batch_size} at a time: {deviations}")
    if dtype == "float32":
        assert max(deviations["alpha"], deviations["alpha_bar"], 0.1 * deviations["excess"]) < 2e-6
        assert distance(gradients[0], expected["gradients"][0]) < 1e-6 * expected["grad_norm"][0]  # of 2 to 7
        return
    assert max(deviations.values()) < 1e-12
    assert found["logged_alpha"] == found["alpha"].tolist()  # metrics.jsonl says what the history says

    # The case is what it is meant to be: alpha moves, some steps are clipped and some are not, domains are absent
    assert np.abs(found["alpha"][-1] - found["alpha"][0]).max() > 0.02
    assert min(found["grad_norm"]) < 2 < max(found["grad_norm"])
    assert (expected["absent"] > STEPS) == (case != "even")


def test_under_torchrun(world):
    """The launcher that people use gives what the forked processes of these tests give, to the bit."""
    def torchrun(script, *flags, ranks):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        subprocess.run([*command, ROOT / script, *flags], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    directory = world("skewed", "float64")
    found, forked = (run_proxy(directory, "skewed", 2, 4, launch=launch) for launch in (torchrun, run_forked))
    assert distance(found["alpha"], forked["alpha"]) == 0 and distance(found["model"], forked["model"]) == 0


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_update_by_hand():
    """eta = 2, c = 0.1: alpha' = (0.2 e^(2 * ln 2), 0.3 e^0, 0.5 e^(2 * ln 3)) = (0.8, 0.3, 4.5), of sum 5.6."""
    alpha = update_alpha(double(0.2, 0.3, 0.5), double(math.log(2), 0, math.log(3)), step_size=2.0, smoothing=0.1)
    expected = [0.9 * 0.8 / 5.6 + 0.1 / 3, 0.9 * 0.3 / 5.6 + 0.1 / 3, 0.9 * 4.5 / 5.6 + 0.1 / 3]
    assert alpha.tolist() == pytest.approx(expected, abs=1e-15)
    # exp(1e4) is infinite, the weights are not, and no weight is ever lost for good: two have the smoothing only
    for excess in ((1e4, 0, 0), (0, 1e4, 0)):
        alpha = update_alpha(alpha, double(*excess), step_size=1.0, smoothing=1e-3)
        expected = [1 - 2e-3 / 3 if each else 1e-3 / 3 for each in excess]
        assert alpha.tolist() == pytest.approx(expected, abs=1e-15)


def test_uniform_alpha_is_ordinary_training(world):
    """Step size 0, six sequences of each domain: alpha stays 1 / K, and a proxy is the reference's run to rounding."""
    directory = world("even", "float64")
    common = [f"--data_dir={directory}/data", *FLAGS, "--max_steps=5", "--seed=3",
              "--dtype=float64", "--sampling_weights=uniform", "--lr_schedule=cosine"]
    run_forked("train_reference.py", f"--out_dir={directory}/plain", *common, *MODEL)
    run_forked("train_doremi.py", f"--reference={directory}/reference", f"--out_dir={directory}/still", "--step_size=0",
               *common)
    plain, still = (torch.load(directory / name / "ckpt.pt", weights_only=True) for name in ("plain", "still"))
    assert distance(plain["model"], still["model"]) < 1e-12
    assert distance(still["alpha_history"], np.full((5, 4), 0.25)) < 1e-15
