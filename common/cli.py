"""The command line: flags, each once with unit and default, and bad input in one line with exit status 2."""

import argparse
import codecs
import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
import unicodedata

from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can fix.

    The message is one line: what is wrong, where (file, flag, domain), what was found, what to do. Programming errors
    are never wrapped in it: they keep their traceback.
    """


class Console:
    """Standard output or error that cannot end a run, be it closed, a pipe that ended, or a file on a full disk.

    Characters that it cannot show are written as escapes.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # of a closed stream, and of none
            encoding = self.stream.encoding or "utf-8"
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def isatty(self):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return self.stream.isatty()
        return False

    def flush(self):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def run(main):
    """Call main().  Turn a UserError into one line and exit status 2.

    Each node says it once: its other ranks wait a moment, in which torchrun ends them if they fail of the same.
    """
    sys.stdout, sys.stderr = Console(sys.stdout), Console(sys.stderr)
    try:
        main()
    except UserError as error:
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # so that the error has a line of its own
        if os.environ.get("LOCAL_RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        print(f"{sys.argv[0]}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)


QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
WORD = re.compile(rf"(?:{QUOTED.pattern}|[^\s'\"])+(?=\s|$)")


class ArgumentParser(argparse.ArgumentParser):
    """argparse with @FILE (several words, '# comments' and blank lines allowed) and errors in one line, status 2."""

    def __init__(self, description, **options):
        super().__init__(description=wrapped(description), **options, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter,
                         epilog="@FILE reads flags from a file, e.g. @configs/official_120m.txt; later flags win.")
        self.files = []

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(self.expand(sys.argv[1:] if args is None else args), namespace)

    def expand(self, words):
        """Put the words of a file in the place of @FILE."""
        found = []
        for word in words:
            found += self.expand(self.words_of_file(word[1:])) if word.startswith("@") else [word]
        return found

    def words_of_file(self, name):
        self.files.append(name)
        try:
            with open(os.path.expanduser(name), "rb") as file:
                data = file.read()
            utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as some Windows tools write
            lines = data.decode("utf-16" if utf16 else "utf-8-sig").splitlines()
        except OSError as error:
            self.error(f"@{name} cannot be read ({error.strerror})")
        except UnicodeDecodeError:
            self.error(f"@{name} is not text in UTF-8; save it in that encoding")
        return [word for line in lines for word in self.words_of_line(line)]

    def words_of_line(self, line):
        """Words, with '...' or "..." around what has spaces.  A # begins a comment at the start of a word only; no
        other character means anything: runs/lr#2 and C:\\runs are what they look like."""
        words, rest = [], line.strip()
        while rest and not rest.startswith("#"):
            match = WORD.match(rest)
            if not match:
                self.error(f"a quotation mark is not closed in the line: {line.strip()}")
            words.append(QUOTED.sub(lambda quoted: quoted[0][1:-1], match[0]))
            rest = rest[match.end() :].strip()
        return words

    def error(self, message):
        where = f" (flags were also read from {', '.join(self.files)})" if self.files else ""
        self.exit(2, f"{self.prog}: error: {message}{where}; see --help\n")


def wrapped(description):
    """Fit a docstring to the terminal: paragraphs are filled, the lines of a table keep their places."""
    width, parts = max(40, shutil.get_terminal_size().columns - 2), []
    for paragraph in description.strip().split("\n\n"):
        if "   " in paragraph:
            lines = [textwrap.fill(line, width, subsequent_indent=" " * 8) for line in paragraph.splitlines()]
            parts.append("\n".join(lines))
        else:
            parts.append(textwrap.fill(" ".join(paragraph.split()), width))
    return "\n\n".join(parts)


def path(text):
    """A path of this machine's disks, with ~ for the home directory: the shell leaves the one of --out_dir=~/runs."""
    if not text:
        raise argparse.ArgumentTypeError("a path is empty")
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is a remote address; give a path of this machine's disks")
    return os.path.expanduser(text)


def number(kind, fits, meaning):
    """Return a type for argparse: numbers of this kind for which fits(number) is true."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text} is not {meaning}")

    return parse


positive = number(int, lambda n: n > 0, "a positive whole number")
natural = number(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2**63 - 1")
non_negative = number(float, lambda x: 0 <= x < math.inf, "a finite number >= 0")
fraction = number(float, lambda x: 0 <= x < 1, "in [0, 1)")


def check_same(names, found, remedy):
    """Raise UserError where {key: value} of one is not that of the first.  names, found: of each."""
    for name, values in zip(names, found):
        for key in sorted(values.keys() | found[0].keys()):
            if (here := values.get(key)) != (there := found[0].get(key)):
                raise UserError(f"{name}: {key} is {shown(here)}, but {shown(there)} in {names[0]}; {remedy}")


def flag_lines(args):
    """The flags in the form that @FILE reads back, --resume left out: a fresh run of the same."""
    lines = []
    for name, value in sorted(vars(args).items()):
        if isinstance(value, bool):
            lines += [] if name == "resume" else [f"--{name}" if value else f"--no-{name}"]
        elif value is not None:
            lines.append(f"--{name}={shlex.quote(str(value))}")
    return "\n".join(lines) + "\n"


def shown(value, width=200):
    text = json.dumps(value, default=repr)
    return text if len(text) <= width else text[: width - 3] + "..."


def escaped(text):
    """Write the characters that cannot be shown as Python does: \\n, \\x07."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def align(columns):
    """Return the lines of a table from columns of strings, the first flush left and the others flush right."""
    padded = []
    for i, column in enumerate(columns):
        cells = [escaped(cell) for cell in column]
        widest = max(map(width, cells))
        spaces = [" " * (widest - width(cell)) for cell in cells]
        padded.append([cell + space if i == 0 else space + cell for cell, space in zip(cells, spaces)])
    return ["   ".join(row) for row in zip(*padded)]


def width(text):
    """Return the columns that a text takes on a terminal: Chinese characters take two, accents of their own none."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "FW") for c in text)
