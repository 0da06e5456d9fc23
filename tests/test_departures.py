"""experiments/exactness.py: its exact variant is what train_doremi.py computes, and the others are not."""

from argparse import Namespace

import pytest
from conftest import TINY, read_alpha
from forked import run_forked

from common import ranks
from common.run import load_finished
from experiments import exactness
from model import Transformer
from sampler import load_dataset


def test_exact_variant_is_the_product_and_the_others_are_not(tmp_path, data_dir):
    reference = tmp_path / "reference"
    run_forked("train_reference.py", "--dtype=float64", *TINY, f"--data_dir={data_dir}", f"--out_dir={reference}")
    run_forked("train_doremi.py", f"--reference={reference}", f"--out_dir={tmp_path}/proxy", "--no-compile")
    product = read_alpha(tmp_path / "proxy")

    config, checkpoint = load_finished(reference, ("reference",))
    args = Namespace(**config["flags"] | {"step_size": 1.0, "smoothing": 1e-3})
    machine = ranks.setup(args)
    dataset = load_dataset(data_dir, config["model"]["block_size"])
    frozen = Transformer.load(config, checkpoint["model"], machine.dtype).freeze()
    alphas = {variant: exactness.train_proxy(variant, frozen, dataset, machine, args, seed=2)
              for variant in exactness.VARIANTS}
    assert alphas["exact"] == pytest.approx(product, abs=1e-12)
    for variant, alpha in alphas.items():
        largest = abs(alpha - product).max()
        assert variant == "exact" or largest > 1e-6, f"{variant} departs by {largest:.1e} only"
