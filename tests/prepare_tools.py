"""What the tests of data sets share: texts, writers of inputs, a reader of data sets."""

import gzip
import json
import lzma
import random

import numpy as np
from conftest import run_here

import sampler
import tokenizer

EOT = "<|endoftext|>"
TEXTS = [
    f"Document {number}: naïve café — 漢字 😀 {EOT} is text.\r\n\n\tIt costs {number * 37} and ends in spaces.   \n"
    for number in range(120)
]
WORDS = "the of naïve and to in is that for it as was with be by on not he his but at are this have from or had".split()


def prose(words, seed=0):
    source = random.Random(seed)
    return " ".join(source.choice(WORDS) + (".\n" if source.random() < 0.1 else "") for _ in range(words))


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(data))


def write_texts(path, texts=TEXTS):
    write_rows(path, [{"text": text} for text in texts])


def prepare_in(folder, arguments, script="prepare.py"):
    """Run prepare.py or link.py in a folder.  Return what it prints."""
    return run_here(script, *arguments.split(), cwd=folder).stdout


def read_set(folder):
    """Decode a data set. Returns meta.json and {domain: {side: texts}}; counts are checked on the way."""
    meta = json.loads((folder / "meta.json").read_text())
    eot, texts = meta["eot_token"], {}
    files = [str(path) for path in folder.glob("tokenizer.*")]
    decode = tokenizer.load_tokenizer(files[0] if files else meta["tokenizer"]).decode
    for domain, entry in meta["domains"].items():
        texts[domain] = {}
        for side in ("train", "val"):
            path = folder / sampler.folder_name(domain) / f"{side}.bin"
            ids = np.fromfile(path, "<u2" if meta["dtype"] == "uint16" else "<u4")
            assert ids[0] == eot and ids.max() < meta["vocab_size"] and entry[f"{side}_tokens"] == len(ids)
            found = [decode(part[1:].tolist()) for part in np.split(ids, np.flatnonzero(ids == eot)[1:])]
            assert entry[f"{side}_documents"] == len(found)
            assert entry[f"{side}_bytes"] == sum(map(len, found))
            texts[domain][side] = [text.decode() for text in found]
    return meta, texts


def sides(found):
    return sorted(found["train"] + found["val"])
