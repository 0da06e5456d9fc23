"""The experiments measure the product: their exact variant is what train_doremi.py computes."""

import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, TINY
from forked import run_forked

import runtime
from sampler import load_dataset
from train_doremi import load_reference, load_reference_config

sys.path.insert(0, str(ROOT / "experiments"))
import exactness


def test_exact_variant_is_the_product_and_the_others_are_not(tmp_path, data_dir):
    flags = ["--dtype=float64", *TINY]
    run_forked("train_reference.py", *flags, f"--data_dir={data_dir}", f"--out_dir={tmp_path}/reference")
    run_forked("train_doremi.py", f"--reference={tmp_path}/reference", f"--out_dir={tmp_path}/proxy", "--no-compile",
               "--update_after=2")
    product = torch.load(tmp_path / "proxy/doremi_domain_weights_12.pt", weights_only=True)
    product = torch.stack([entry["domain_weights"] for entry in product]).numpy()

    config = load_reference_config(tmp_path / "reference")
    args = Namespace(**config["flags"] | {"reference": str(tmp_path / "reference"), "update_after": 2})
    machine = runtime.setup(args)
    dataset = load_dataset(data_dir, config["model"]["block_size"])
    reference = load_reference(args, config, dataset, machine)
    alphas = {variant: exactness.train_proxy(variant, reference, dataset, machine, args, step_size=1.0, seed=1)
              for variant in exactness.VARIANTS}
    assert alphas["exact"] == pytest.approx(product, abs=1e-12)
    for variant, alpha in alphas.items():
        largest = abs(alpha - product).max()
        assert variant == "exact" or largest > 1e-6, f"{variant} departs by {largest:.1e} only"
