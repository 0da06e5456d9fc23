"""What pictures share: fonts, style, axes, rows of marks.  Names are text, never markup, and never left out."""

import logging
import os
import textwrap
import warnings

os.environ["MPLBACKEND"] = "agg"  # pictures are files; matplotlib refuses to be imported under a notebook's backend

import matplotlib.style
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from common.cli import escaped
from common.files import write_atomically

BEFORE = {"color": "0.45", "marker": "o", "markerfacecolor": "white"}  # in every picture: the reference, the baseline
FONTS = ["DejaVu Sans", "STIXGeneral", "Noto Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC",
         "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans",
         "Microsoft YaHei", "SimHei", "Malgun Gothic", "Arial Unicode MS"]  # each character from the first that has it
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "0.9", "font.size": 9,
         "axes.axisbelow": True, "lines.markersize": 5, "errorbar.capsize": 2, "legend.frameon": False,
         "text.usetex": False, "text.parse_math": False, "font.family": FONTS}  # $ is a dollar
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # not every machine has every font


def wrapped(text, columns):
    """Break a text into lines at its spaces. matplotlib's own wrapping takes $...$ for a formula."""
    return textwrap.fill(escaped(text), columns, break_long_words=False, break_on_hyphens=False)


def short(names, longest=28):
    """Return names that fit beside an axis: the middle of a long one is left out. Names that differ stay different."""
    half = longest // 2
    names = [escaped(name) for name in names]
    cut = [name if len(name) <= longest else f"{name[:half]}...{name[-half:]}" for name in names]
    return [f"{name} ({i})" if cut.count(name) > 1 else name for i, name in enumerate(cut, start=1)]


def percent(weight, _=None):
    return f"{100 * weight:.0f}%" if weight >= 0.0995 else f"{100 * weight:.2g}%"


def style():
    """Return a context in which pictures are drawn: the same on every machine, whatever its matplotlibrc says."""
    return matplotlib.style.context(["default", STYLE])


def new(width, height):
    """Return an empty figure of so many inches."""
    return Figure(figsize=(width, height), layout="constrained")


def shades(n):
    """Return n colours from dark to light, which can be told apart in grey."""
    return colormaps["viridis"](np.linspace(0, 0.85, n))


def weight_axis(axis, weights):
    """Make an axis (axes.xaxis or axes.yaxis) logarithmic, with ticks in percent, and as long as the weights need."""
    low, high = max(weights[weights > 0].min() / 1.3, 1e-6), min(1.3 * weights.max(), 1.0)
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axis.set_major_formatter(percent)
    axis.set_minor_formatter("")


def draw_rows(axes, names, series, height=0.8):
    """Draw a row for each name, with a mark of each series: (values, errors or None, style).  Return their handles."""
    handles, offsets = [], np.linspace(-height / 2, height / 2, len(series) + 2)[1:-1]
    for offset, (values, errors, look) in zip(offsets, series):
        handles.append(axes.errorbar(values, np.arange(len(names)) + offset, xerr=errors, **{**look, "linestyle": ""}))
    axes.set_yticks(range(len(names)), short(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    return handles


def legend(place, handles, names, **options):
    """Draw a legend of axes or a figure; matplotlib itself leaves out names that begin with an underscore."""
    made = place.legend(handles, [str(i) for i in range(len(names))], **options)
    for text, name in zip(made.get_texts(), short(names)):
        text.set_text(name)


def save(figure, finding, setting, path):
    """Write a picture, titled with the finding."""
    inches = figure.get_figwidth()
    figure.suptitle(wrapped(finding, 10 * inches), weight="bold", fontsize=12)
    figure.supxlabel(wrapped(setting, 14 * inches), fontsize=8, color="0.45")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # it is drawn as a box; the table has the name
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
