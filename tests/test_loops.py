"""The two training loops stand side by side: what differs is DoReMi."""

import difflib

from conftest import ROOT

REFERENCE, PROXY = ((ROOT / name).read_text().splitlines() for name in ("train_reference.py", "train_doremi.py"))


def changed(a, b):
    """Lines that `diff` marks with < or >."""
    return sum(line[0] in "-+" for line in list(difflib.unified_diff(a, b, n=0, lineterm=""))[2:])


def loop(lines):
    """The body of the `while`."""
    start = next(i for i, line in enumerate(lines) if line.startswith("    while ")) + 1
    end = next(i for i in range(start, len(lines)) if lines[i] and not lines[i].startswith(" " * 8))
    return lines[start:end]


def test_loops_differ_in_few_lines():
    a, b = loop(REFERENCE), loop(PROXY)
    assert len(a) >= 25 and len(b) > 40  # all of each was found
    assert changed(a, b) <= 35
