"""Stage 4 of DoReMi: train the large model on the averaged weights.

reads   --data_dir as prepare.py wrote it; --domain_weights, the weights.json of average_weights.py
writes  OUT_DIR/{flags.txt, config.json, metrics.jsonl, ckpt.pt}
next    python compare.py BASELINE_DIR OUT_DIR

It is stage 1 with larger defaults: the same loop, so that a baseline and a DoReMi run differ in their weights alone.
"""

import cli
from train_reference import parse_args, train

DEFAULTS = {"out_dir": "checkpoints/large", "n_layer": 5, "n_head": 3, "n_kv_head": 1, "n_embd": 192, "n_ffn": 512,
            "max_steps": 500, "learning_rate": 2e-3, "eval_interval": 50}


def main():
    train(parse_args(__doc__, DEFAULTS), "large")


if __name__ == "__main__":
    cli.run(main)
