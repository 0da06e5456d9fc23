"""What the tables and the pictures share: columns, fonts, style, axes, rows of marks.

Names of domains and runs are text, whatever characters they have: never markup, and never left out.
"""

import contextlib
import functools
import logging
import unicodedata

import matplotlib
import numpy as np
from matplotlib import font_manager, ft2font
from matplotlib.ticker import LogLocator

from common.cli import print_anywhere
from common.files import write_atomically

BEFORE = {"color": "0.45", "marker": "o", "markerfacecolor": "white"}  # in every picture: the reference, the baseline
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "0.9", "font.size": 9,
         "axes.axisbelow": True, "lines.markersize": 5, "errorbar.capsize": 2, "legend.frameon": False,
         "text.usetex": False, "text.parse_math": False}  # $ is a dollar
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # a family without a bold face is fine, too
TALLEST = 500  # inches: a picture has at most 65,535 rows of pixels

# ---- text ----


def escaped(text, good=str.isprintable):
    """Write the characters that cannot be shown as Python does: \\n, \\u65b0."""
    return "".join(c if good(c) else c.encode("unicode_escape").decode() for c in text)


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


def percent(weight, _=None):
    return f"{100 * weight:.0f}%" if weight >= 0.0995 else f"{100 * weight:.2g}%"


# ---- fonts ----


@functools.cache
def installed_fonts():
    """Return [(family, file)] of the fonts on this machine, upright and regular ones first."""
    manager = font_manager.fontManager
    for path in set(font_manager.findSystemFonts()) - {font.fname for font in manager.ttflist}:
        with contextlib.suppress(Exception):  # installed since matplotlib last looked; some it cannot read
            manager.addfont(path)
    regular = "normal", ("400", "normal", "regular")
    fonts = sorted(manager.ttflist, key=lambda font: (font.style != regular[0], str(font.weight) not in regular[1]))
    return [(font.name, font.fname) for font in fonts if "Last Resort" not in font.name]  # which has boxes for all


@functools.cache
def characters(path):
    try:
        return frozenset(ft2font.FT2Font(path).get_charmap())
    except Exception:  # the library raises several classes, of fonts of colours, for instance
        return frozenset()


@functools.cache
def family_with(character):
    """Return "sans-serif" where matplotlib's own font has the character, another family that has it, or None."""
    if ord(character) in characters(font_manager.findfont(font_manager.FontProperties(family=["sans-serif"]))):
        return "sans-serif"
    return next((family for family, path in installed_fonts() if ord(character) in characters(path)), None)


def plain(text, longest=None):
    """Return a text as it can be drawn: what no font has is escaped, and the middle of a long one is left out."""
    text = escaped(text, lambda c: c.isprintable() and family_with(c) is not None)
    if longest and len(text) > longest:
        text = f"{text[: longest // 2]}...{text[-(longest // 2) :]}"
    return text


def style(*texts):
    """Return a context in which pictures with these texts are drawn and saved."""
    others = {family_with(c) for c in "".join(texts) if c.isprintable()} - {None, "sans-serif"}
    return matplotlib.rc_context({**STYLE, "font.family": ["sans-serif", *sorted(others)]})


# ---- axes ----


def weight_axis(axis, weights):
    """Make an axis (axes.xaxis or axes.yaxis) logarithmic, with ticks in percent, and as long as the weights need."""
    low, high = max(weights[weights > 0].min() / 1.3, 1e-6), min(1.3 * weights.max(), 1.0)
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axis.set_major_formatter(percent)
    axis.set_minor_formatter("")


def draw_rows(axes, names, series, height=0.8):
    """Draw a row for each name, from the top, with a mark of each series: (values, errors or None, style).

    Return a handle of each series for the legend.
    """
    handles = []
    offsets = np.linspace(-height / 2, height / 2, len(series) + 2)[1:-1]
    for offset, (values, errors, look) in zip(offsets, series):
        handles.append(axes.errorbar(values, np.arange(len(names)) + offset, xerr=errors, **{**look, "linestyle": ""}))
    axes.set_yticks(range(len(names)), [plain(name, 28) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    return handles


def legend(axes, handles, names, **options):
    """Draw a legend with every name in it: matplotlib leaves out labels that begin with an underscore."""
    made = axes.legend(handles, [str(i) for i in range(len(names))], **options)
    for text, name in zip(made.get_texts(), names):
        text.set_text(plain(name, 28))


def publish(figure, finding, setting, path):
    """Write a picture, titled with the finding."""
    figure.suptitle(plain(finding), weight="bold", fontsize=12, wrap=True)
    figure.supxlabel(plain(setting), fontsize=8, color="0.45")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    print_anywhere(f"written: {path}")
