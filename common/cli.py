"""The command line: flags, each once with unit and default, and bad input in one line with exit status 2."""

import argparse
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import unicodedata

from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can fix.

    The message is one line: what is wrong, where (file, flag, domain), what was found, what to do. Programming errors
    are never wrapped in it: they keep their traceback.
    """


def run(main, leave=lambda: None):
    """Call main().  Turn a UserError into one line and exit status 2, after leave().

    Each node says it once: its other ranks wait a moment, in which torchrun ends them if they fail of the same.
    """
    try:
        main()
    except UserError as error:
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # so that the error has a line of its own
        if os.environ.get("LOCAL_RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        print_anywhere(f"{sys.argv[0]}: error: {' '.join(str(error).split())}", sys.stderr)
        leave()
        sys.exit(2)


def print_anywhere(text, file=None):
    """Print, with escapes in place of characters that this console cannot show."""
    file = file or sys.stdout
    encoding = file.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
WORD = re.compile(rf"(?:{QUOTED.pattern}|[^\s'\"])+(?=\s|$)")


class ArgumentParser(argparse.ArgumentParser):
    """argparse with @FILE (several words, '# comments' and blank lines allowed) and errors in one line, status 2."""

    def __init__(self, description, **options):
        super().__init__(description=description, **options, fromfile_prefix_chars="@", allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter,
                         epilog="@FILE reads flags from a file, e.g. @configs/official_120m.txt; later flags win.")
        self.files = []

    def _read_args_from_files(self, arg_strings):
        self.files += [arg[1:] for arg in arg_strings if arg.startswith("@")]
        return super()._read_args_from_files(arg_strings)

    def convert_arg_line_to_args(self, line):
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


def path(text):
    """A path of this machine's disks, with ~ for the home directory: the shell leaves the one of --out_dir=~/runs."""
    if not text:
        raise argparse.ArgumentTypeError("a path is empty")
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is a remote address; give a path of this machine's disks")
    return os.path.expanduser(text)


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive whole number")
    return value


def natural(text):
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{value} is not a whole number from 0 to 2**63 - 1")
    return value


def non_negative(text):
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} is not a finite number >= 0")
    return value


def fraction(text):
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 1)")
    return value


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
    columns = [[escaped(cell) for cell in column] for column in columns]
    widths = [max(map(width, column)) for column in columns]
    lines = []
    for first, *others in zip(*columns):
        cells = [first + " " * (widths[0] - width(first))]
        cells += [" " * (space - width(cell)) + cell for space, cell in zip(widths[1:], others)]
        lines.append("   ".join(cells))
    return lines


def width(text):
    """Return the columns that a text takes on a terminal: Chinese characters take two, accents of their own none."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "FW") for c in text)
