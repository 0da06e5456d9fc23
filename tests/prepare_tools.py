"""What the tests of prepare.py share: texts, writers of inputs, a reader of data sets."""

import contextlib
import gzip
import io
import json
import lzma
import random
import signal
import sys

import numpy as np

import prepare
import sampler
import tokenizer

EOT = "<|endoftext|>"
TEXTS = [
    f"Document {number}: naïve café — 漢字 😀 {EOT} is text.\r\n\n\tIt costs {number * 37} and ends in spaces.   \n"
    for number in range(120)
]
WORDS = "the of and to in is that for it as was with be by on not he his but at are this have from or had an".split()


def prose(words, seed=0):
    source = random.Random(seed)
    return " ".join(source.choice(WORDS) + (".\n" if source.random() < 0.1 else "") for _ in range(words))


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))


def write_texts(path, texts=TEXTS):
    write_rows(path, [{"text": text} for text in texts])


def prepare_in(folder, arguments, main=prepare.main):
    """Run a script's main in a folder; returns its exit status, standard output and standard error."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before, sys.argv, status = sys.argv, ["prepare.py", *arguments.split()], 0
    try:
        with (contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as out,
              contextlib.redirect_stderr(io.StringIO()) as err):  # fmt: skip
            prepare.run(main)
    except SystemExit as stop:
        status = stop.code
    sys.argv = before
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return status, out.getvalue(), err.getvalue()


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
            ids = np.fromfile(path, "<u2" if meta["dtype"] == "uint16" else "<u4")[: entry[f"{side}_tokens"]]
            assert ids[0] == eot and ids.max() < meta["vocab_size"] and entry[f"{side}_tokens"] == len(ids)
            found = [decode(part[1:].tolist()) for part in np.split(ids, np.flatnonzero(ids == eot)[1:])]
            assert entry[f"{side}_documents"] == len(found)
            assert entry[f"{side}_bytes"] == sum(map(len, found))
            texts[domain][side] = [text.decode() for text in found]
    return meta, texts


def sides(found):
    return sorted(found["train"] + found["val"])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
