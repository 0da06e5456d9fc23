"""The demo's text: ten domains of different kinds and sizes, out of the packages that are installed anyway.

usage   python demo/corpus.py data/demo-text
writes  data/demo-text/DOMAIN.txt, plain text
next    python prepare.py data/demo-text --out_dir=data/demo

Nothing is downloaded. The standard library and the packages named in DOMAINS are read, so the text depends on their
versions alone. A paragraph that occurred before is left out, so near copies of a file do not straddle the split.
"""

import ast
import doctest
import hashlib
import importlib.metadata
import importlib.util
import os
import random
import re
import sys
import unicodedata
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.cli import UserError, run
from common.files import staged

TEST = r"(^|/)(tests?|testing|_?internal_tests)/|/(test_[^/]*|conftest)\.py$"
CODE = rf"(?!.*({TEST}|/_vendor|_pb2)).*\.py$"
# Domain: million characters, the packages that share them (what one lacks goes to the next), and a pattern of the
# files to take, whose paths begin with the package's name. Sessions and prose of a docstring are all that two share.
DOMAINS = {
    "python_code": (12, "jinja2 fsspec pydantic torchgen PIL setuptools wandb fontTools matplotlib torch", CODE),
    "python_tests": (5.5, "matplotlib networkx numpy sympy", rf".*({TEST}).*(?<=\.py)$"),
    "cpp_headers": (5.5, "torch", r"torch/include/(ATen/(?!ops/)|c10/|torch/csrc/)(?!.*(generated|macros)).*\.h$"),
    "docstrings": (3, "mpmath networkx numpy sympy", CODE),
    "doctests": (1.3, "mpmath networkx numpy sympy", CODE),
    "type_stubs": (1.5, "contourpy PIL google.protobuf matplotlib numpy torch", r".*(?<!version)\.pyi$"),
    "schemas": (0.9, "google.type google.api google.protobuf torch torchgen", r".*\.(yaml|proto|json)$"),
    "manual": (0.9, "fonttools pydantic sympy torch tqdm", ""),
    "tables": (1.4, "matplotlib", r".*\.(afm|csv)$"),
    "arithmetic": (1.4, "", ""),
}  # fmt: skip


def files(package, pattern):
    """Yield the texts of a package's files whose paths match, in an order that mixes its folders."""
    try:
        roots = importlib.util.find_spec(package).submodule_search_locations
    except (ModuleNotFoundError, AttributeError):
        raise UserError(f"the package {package} is missing; pip install -r requirements.txt") from None
    paths = {}  # path from the package's name on -> path on this machine
    for root in roots:
        for path in Path(root).rglob("*"):
            inside = f"{package}/{path.relative_to(root).as_posix()}"
            if re.match(pattern, inside) and path.is_file():
                paths[inside] = path
    for inside in sorted(paths, key=lambda inside: hashlib.sha256(inside.encode()).digest()):
        try:
            yield paths[inside].read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a test of an encoding
            continue


def split_docstrings(code):
    """Split the docstrings of a Python file into their prose and their interactive sessions."""
    prose, sessions = [], []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (doc := ast.get_docstring(node)):
            try:
                parts = doctest.DocTestParser().parse(doc)
            except ValueError:  # not a well-formed session
                continue
            prose.append("".join(part for part in parts if isinstance(part, str)).strip())
            sessions.append("".join(f">>> {part.source}{part.want}" for part in parts if not isinstance(part, str)))
    return "\n\n".join(prose), "\n\n".join(filter(None, sessions))


def unicode_names():
    """Yield the characters of Unicode 3.2, which every version of Python has, with their categories and names."""
    data = unicodedata.ucd_3_2_0
    chars = [chr(code) for code in range(32, 0x1D800) if data.name(chr(code), "CJK")[:3] not in ("CJK", "HAN")]
    for start in range(0, len(chars), 50):
        yield "\n".join(f"U+{ord(c):04X}\t{c}\t{data.category(c)}\t{data.name(c)}" for c in chars[start : start + 50])


def arithmetic(pages=2000):
    """Yield pages of sums, products, equations and series, spelt out."""
    source = random.Random(0)
    for page in range(pages):
        kind, size, lines = page % 4, 10 ** (1 + page // 4 % 4), []
        for _ in range(30):
            a, b, c = (int(source.random() * limit) + 1 for limit in (size, size, 9))  # no version changes random()
            lines.append((f"{a} + {b} = {a + b}", f"{a} * {c} = {a * c}", f"{c} * x + {a} = {c * b + a}, so x = {b}",
                          ", ".join(str(a + i * c) for i in range(8)))[kind])  # fmt: skip
        yield "\n".join(lines)


def sources(domain, packages, pattern):
    """Yield iterators over the texts of a domain."""
    if domain in ("docstrings", "doctests"):
        for package in packages:
            yield (split_docstrings(code)[domain == "doctests"] for code in files(package, pattern))
    elif domain == "manual":  # the language reference, and what packages say of themselves
        yield (importlib.metadata.metadata(package).get_payload() for package in packages)
        yield (topics[name] for name in sorted(topics))
    elif domain == "arithmetic":
        yield arithmetic()
    else:
        yield from [unicode_names()] * (domain == "tables")
        yield from (files(package, pattern) for package in packages)


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-") or "://" in sys.argv[1]:
        raise UserError("usage: python demo/corpus.py OUT_DIR, a folder to make on a disk of this machine")
    out_dir, seen = os.path.expanduser(sys.argv[1]), set()
    with staged(out_dir) as staging:
        for domain, (millions, packages, pattern) in DOMAINS.items():
            kept, left, found = [], round(millions * 1e6), list(sources(domain, packages.split(), pattern))
            for rank, source in enumerate(found):
                share = left // (len(found) - rank)
                for text in source:
                    new = []
                    for part in text.split("\n\n"):
                        if len(part.strip()) < 60 or part.strip() not in seen:
                            new.append(part)
                            seen.add(part.strip())
                    kept.append("\n\n".join(new).strip("\n")[:share] + "\n\n")
                    share -= len(kept[-1])
                    left -= len(kept[-1])
                    if share <= 0:
                        break
            (staging / f"{domain}.txt").write_text("".join(kept), encoding="utf-8", newline="\n")
            print(f"{out_dir}/{domain}.txt: {sum(map(len, kept)) / 1e6:.1f} million characters")


if __name__ == "__main__":
    run(main)
