"""What the two reports share: reading a run's directory, and the look of the pictures."""

import json

import numpy as np
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cli import UserError

GREY = "0.45"  # what came before (reference, baseline) is an open grey circle in every picture of this project


def read_text(path):
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise UserError(f"{path}: no such file; expected in the directory of a run of train_*.py.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; the file is damaged.") from None


def make_directory(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path}: a file is in the way of this directory; choose another --out_dir.") from None


def read_config(run):
    """config.json of a run (a Path) as a dict. Raises UserError where it is missing, damaged or not a run's."""
    path = run / "config.json"
    try:
        config = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: invalid JSON on line {error.lineno}: {error.msg}; the file is damaged.") from None
    required = {"stage", "model", "n_params", "domains", "sampling_weights", "data", "flags", "versions"}
    required |= {"reference"} if isinstance(config, dict) and config.get("stage") == "proxy" else set()
    if missing := required - set(config):
        raise UserError(f"{path}: has no {', '.join(sorted(missing))}; not written by a train_*.py of this version.")
    return config


def in_order(values, domains, what):
    """{DOMAIN: number} as an array (K,) in the order of domains. Raises UserError where a name or a number is off."""
    if odd := set(values) ^ set(domains):
        raise UserError(f"{what}: {', '.join(sorted(odd))} stands here or in the run's domains, but not in both.")
    for name, value in values.items():
        if not (isinstance(value, (int, float)) and 0 <= value < float("inf")):
            raise UserError(f"{what}: the value of '{name}' is {value}; expected a finite number >= 0.")
    return np.array([values[name] for name in domains], dtype=np.float64)


def percent(weight):
    return f"{100 * weight:.0f}%" if weight >= 0.0995 else f"{100 * weight:.2g}%"


def text_width(texts, fontsize):
    """Width in inches of the widest of texts, so that labels get the room that they need."""
    return max(TextPath((0, 0), text, size=fontsize).get_extents().width for text in texts) / 72


def add_titles(figure, finding, setting):
    """The finding in bold, as large as fits up to 12 points, and below it what was run, in small print."""
    width, height = figure.get_size_inches()
    size = min(12, 12 * 0.85 * width / text_width([finding], 12))  # bold is a seventh wider
    figure.text(0.25 / width, 1 - 0.3 / height, finding, fontsize=size, weight="bold", va="center")
    figure.text(0.25 / width, 1 - 0.58 / height, setting, fontsize=8, color=GREY, va="center")


def weight_axis(axis, low, high):
    """A logarithmic axis of weights, ticks in per cent. axis: axes.xaxis or axes.yaxis; low, high its limits."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda weight, _: percent(weight)))
    axis.set_minor_formatter(NullFormatter())
    axis.grid(True, color="0.9", linewidth=0.6)
    axis.axes.set_axisbelow(True)
    axis.axes.spines[["top", "right"]].set_visible(False)
