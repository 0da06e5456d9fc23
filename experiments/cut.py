"""Cut a data set, so a budget of tokens sees it several times.

    python -m experiments.cut DATA_DIR OUT_DIR TOKENS [SEED]

Every domain keeps the same fraction of its training tokens, together TOKENS, as pieces of 512 tokens from places drawn
with SEED (default 0). A smaller cut is part of a larger one of the same seed. The held-out tokens stay as they are.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from common.files import folder_name, sample_sha256

PIECE = 512  # tokens

def cut(source, out, tokens, seed=0):
    shutil.copytree(source, out)
    meta = json.loads((out / "meta.json").read_text())
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    fraction = tokens / sum(domain["train_tokens"] for domain in meta["domains"].values())
    for name, domain in meta["domains"].items():
        file = out / folder_name(name) / "train.bin"
        train = np.fromfile(file, dtype)
        pieces = train[: len(train) // PIECE * PIECE].reshape(-1, PIECE)
        places = np.random.default_rng(seed).permutation(len(pieces))[: round(fraction * len(pieces))]
        pieces[np.sort(places)].tofile(file)
        domain["train_tokens"] = len(places) * PIECE
        domain["train_sha256"] = sample_sha256(file, file.stat().st_size)
        for count in ("train_documents", "train_bytes"):  # no longer true
            domain.pop(count, None)
    (out / "meta.json").write_text(json.dumps(meta, indent=2))


if __name__ == "__main__":
    cut(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
