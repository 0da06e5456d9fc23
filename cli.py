"""The command line: flags, each once with unit and default, and bad input in one line with exit status 2."""

import argparse
import errno
import json
import math
import shlex
import sys

from tqdm import tqdm


class UserError(Exception):
    """Something that the person at the keyboard can mend.

    The message is one line: what is wrong, where (file, flag, domain), what was found, what was expected, what to do.
    Programming errors are never wrapped in it, so that they keep their traceback.
    """


def run(main):
    """Call main(); turn a UserError, or a disk that is full or read-only, into one line and exit status 2."""
    try:
        main()
    except UserError as error:
        message = str(error)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and error.errno not in (errno.EROFS, errno.EACCES, errno.EEXIST, errno.ENOTDIR):
            raise
        mend = "free some space or choose" if full else "choose"
        message = f"{error.filename or 'output'}: {error.strerror}; {mend} another --out_dir."
    else:
        return
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # so that the error has a line of its own
    print(f"{sys.argv[0]}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with @FILE (several words, '# comments' and blank lines allowed) and errors in one line, status 2."""

    def __init__(self, description):
        super().__init__(description=description, fromfile_prefix_chars="@", allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter,
                         epilog="@FILE reads flags from a file, e.g. @configs/official_120m.txt; later flags win.")
        self.files = []

    def _read_args_from_files(self, arg_strings):
        self.files += [arg[1:] for arg in arg_strings if arg.startswith("@")]
        return super()._read_args_from_files(arg_strings)

    def convert_arg_line_to_args(self, line):
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"{error} in the line: {line.strip()}")

    def error(self, message):
        where = f" (flags were also read from {', '.join(self.files)})" if self.files else ""
        self.exit(2, f"{self.prog}: error: {message}{where}; see --help.\n")


def add_optimization_flags(parser, description=None):
    """The flags of training, which the proxy takes over from its reference; returns their names."""
    group = parser.add_argument_group("optimization", description)
    add = group.add_argument
    add("--max_steps", type=positive, default=1000, help="optimizer steps (default %(default)s)")
    add("--batch_size", type=positive, default=16, help="sequences per step over all ranks (default %(default)s)")
    add("--learning_rate", type=non_negative, default=3e-3, help="peak learning rate (default %(default)s)")
    add("--min_lr", type=non_negative, help="last learning rate (default: a tenth of the peak)")
    add("--lr_schedule", choices=["cosine", "exponential"], default="cosine",
        help="decay after warm-up; exponential is the paper's (default %(default)s)")
    add("--warmup_steps", type=natural, help="steps of linear warm-up (default: the paper's 6%% of max_steps, but at "
        "least 300, or a third of a shorter run)")
    add("--weight_decay", type=non_negative, default=0.01,
        help="AdamW's, on matrices only (default %(default)s, the paper's)")
    add("--beta1", type=fraction, default=0.9, help="AdamW's (default %(default)s)")
    add("--beta2", type=fraction, default=0.99, help="AdamW's (default %(default)s)")
    add("--grad_clip", type=non_negative, default=1.0,
        help="largest norm of the gradient; 0: none (default %(default)s)")
    add("--seed", type=natural, default=1, help="of the initial weights and of the batches (default %(default)s)")
    return [action.dest for action in group._group_actions]


MACHINE_FLAGS = ("out_dir", "resume", "device", "compile", "micro_batch_size", "log_interval", "eval_interval",
                 "eval_windows", "save_interval", "wandb")
PLACES = ("data_dir", "domain_weights", "sampling_weights", "reference")  # what lies there is compared, not its path


def add_machine_flags(parser, out_dir):
    """Flags that do not change what is computed (up to the order of floating-point sums), but for --dtype."""
    add = parser.add_argument_group("machine").add_argument
    add("--out_dir", default=out_dir, help="the run's directory (default %(default)s)")
    add("--resume", action="store_true", help="go on from the run's last checkpoint, if it has one")
    add("--device", default="auto", help="cpu, cuda, mps (default: cuda where there is one, else cpu)")
    add("--dtype", choices=["auto", "bfloat16", "float32", "float64"], default="auto",
        help="of the computation (default: bfloat16 where the hardware multiplies it, else float32)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: where the run is long)")
    add("--micro_batch_size", type=positive, help="sequences per forward pass and rank (default: all of the rank's)")
    add("--log_interval", type=positive, default=10, help="steps between lines of metrics (default %(default)s)")
    add("--eval_interval", type=positive, default=200, help="steps between evaluations (default %(default)s)")
    add("--eval_windows", type=natural, default=64, help="validation windows per domain; 0: all (default %(default)s)")
    add("--save_interval", type=positive, default=500, help="steps between checkpoints (default %(default)s)")
    add("--wandb", choices=["disabled", "offline", "online"], default="disabled", help="(default %(default)s)")


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
    text = json.dumps(value)
    return text if len(text) <= width else text[: width - 3] + "..."
