"""Stage 4 of DoReMi: train the large model on the averaged weights.

reads   --data_dir, as prepare.py wrote it; --sampling_weights, the weights.json of average_weights.py
writes  OUT_DIR/{flags.txt, config.json, metrics.jsonl, ckpt.pt}
next    python compare.py BASELINE_DIR OUT_DIR

This is stage 1 with larger defaults. The loop is the same, so a baseline and a DoReMi run differ in their weights only.
"""

from common import ranks
from train_reference import parse_args, train

DEFAULTS = {"out_dir": "checkpoints/large", "n_layer": 4, "n_head": 3, "n_kv_head": 1, "n_embd": 96, "n_ffn": 256,
            "max_steps": 1500, "batch_size": 32, "learning_rate": 2e-3, "eval_interval": 100}

if __name__ == "__main__":
    ranks.run(lambda: train(parse_args(__doc__, DEFAULTS), "large"))
