"""demo/corpus.py: ten domains of uneven size, the same on every machine with the same packages."""

import collections
import hashlib
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_corpus_is_the_same_everywhere(tmp_path):
    """A second run has another place, locale, time zone and hash seed."""
    env = os.environ | {"PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Tokyo", "PYTHONUTF8": "0"}
    hashes = []
    for out_dir, options in ((tmp_path / "a", {}), (tmp_path / "elsewhere/b", {"env": env, "cwd": "/"})):
        subprocess.run([sys.executable, ROOT / "demo/corpus.py", out_dir], check=True, **options)
        hashes.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out_dir.iterdir()})
    assert hashes[0] == hashes[1] and len(hashes[0]) == 10
    sizes = sorted(path.stat().st_size for path in (tmp_path / "a").iterdir())
    assert 25e6 < sum(sizes) < 40e6
    assert 0.015 < sizes[0] / sum(sizes) < 0.04 and 0.25 < sizes[-1] / sum(sizes) < 0.4
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "a").iterdir()]
    parts = collections.Counter(part.strip() for text in texts for part in text.split("\n\n"))
    assert max(count for part, count in parts.items() if len(part) >= 60) == 1
