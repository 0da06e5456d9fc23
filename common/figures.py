"""What the tables and the pictures share: columns, style, axes, rows of marks."""

import numpy as np
from matplotlib.ticker import LogLocator

from common.files import write_atomically
from common.run import load_checkpoint, read_config, start_wandb

BEFORE = {"color": "0.45", "marker": "o", "markerfacecolor": "white"}  # in every picture: the reference, the baseline
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "0.9", "font.size": 9,
         "axes.axisbelow": True, "lines.markersize": 5, "errorbar.capsize": 2, "legend.frameon": False}


def align(columns):
    """Lines of a table from columns of strings, the first flush left and the others flush right."""
    widths = [max(map(len, column)) for column in columns]
    return [f"{row[0]:{widths[0]}}   " + "   ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))
            for row in zip(*columns)]


def percent(weight, _=None):
    return f"{100 * weight:.0f}%" if weight >= 0.0995 else f"{100 * weight:.2g}%"


def weight_axis(axis, weights):
    """Make an axis (axes.xaxis or axes.yaxis) logarithmic, with ticks in percent, and as long as the weights need."""
    low, high = max(weights[weights > 0].min() / 1.3, 1e-6), min(1.3 * weights.max(), 1.0)
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axis.set_major_formatter(percent)
    axis.set_minor_formatter("")


def draw_rows(axes, names, series, height=0.8):
    """A row for each name, from the top, with a mark of each series: (label, values, errors or None, style)."""
    offsets = np.linspace(-height / 2, height / 2, len(series) + 2)[1:-1]
    for offset, (label, values, errors, style) in zip(offsets, series):
        axes.errorbar(values, np.arange(len(names)) + offset, xerr=errors, label=label, **{**style, "linestyle": ""})
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def publish(figure, finding, setting, path, run, **summary):
    """Write a picture, titled with the finding.  If the run was logged to wandb, add picture and summary to its log."""
    figure.suptitle(finding, weight="bold", fontsize=12, wrap=True)
    figure.supxlabel(setting, fontsize=8, color="0.45")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    print(f"written: {path}")
    if (mode := read_config(run)["flags"].get("wandb", "disabled")) != "disabled":
        import wandb

        with start_wandb(run, mode, load_checkpoint(run)) as log:
            log.log({path.stem: wandb.Image(str(path))})
            log.summary.update(summary)
