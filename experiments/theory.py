"""stub being written"""
import json
import sys
from pathlib import Path

import numpy as np


def mixtures(counts):
    """Reference weights by name, (K,) each: token counts, all equal, the counts dealt out in reverse order of size, and
    two that give every other domain three times the share of the rest."""
    counts = np.asarray(counts, dtype=float)
    natural, k = counts / counts.sum(), len(counts)
    order = np.argsort(counts)
    reversed_ = np.empty(k)
    reversed_[order] = natural[order[::-1]]
    up = np.where(np.arange(k) % 2 == 0, 3.0, 1.0)
    down = 4 - up
    return {"natural": natural, "uniform": np.full(k, 1 / k), "reversed": reversed_,
            "up": up / up.sum(), "down": down / down.sum()}


if sys.argv[1] == "weights":
    meta = json.loads((Path(sys.argv[2]) / "meta.json").read_text())
    directory = Path(sys.argv[3]) / "weights"
    directory.mkdir(parents=True, exist_ok=True)
    for name, w in mixtures([d["train_tokens"] for d in meta["domains"].values()]).items():
        text = json.dumps(dict(zip(meta["domains"], w.tolist())))
        path = directory / f"{name}.json"
        if not path.exists():
            path.write_text(text)
