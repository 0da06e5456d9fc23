"""The command line: flags, each once with unit and default, and bad input in one line with exit status 2."""

import argparse
import json
import math
import shlex
import sys

from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can fix.

    The message is one line: what is wrong, where (file, flag, domain), what was found, what to do. Programming errors
    are never wrapped in it: they keep their traceback.
    """


def run(main, leave=lambda: None):
    """Call main().  Turn a UserError, and what the operating system refuses, into one line and exit status 2, after
    leave()."""
    try:
        main()
    except (UserError, OSError) as error:
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # so that the error has a line of its own
        print(f"{sys.argv[0]}: error: {' '.join(str(error).split())}", file=sys.stderr)
        leave()
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
        self.exit(2, f"{self.prog}: error: {message}{where}; see --help\n")


def add_data_and_model_flags(parser, defaults):
    """Flags of stages 1 and 4.  defaults: {flag: value}; without one, --sampling_weights must be given."""
    add = parser.add_argument_group("data and model").add_argument
    add("--data_dir", default="data/demo", help="data set of prepare.py (default: %(default)s)")
    add("--sampling_weights", required="sampling_weights" not in defaults, help="what batches are drawn from: uniform, "
        "token_count, temperature:P (token_count ** P), unimax:EPOCHS, FILE.json, numbers such as 0.2,0.8, or the mean "
        "of several of these: uniform+token_count "
        f"(default: {defaults.get('sampling_weights', 'none, it must be given')})")
    add("--block_size", type=positive, default=64, help="context in tokens (default: %(default)s)")
    for name, meaning in [("n_layer", "blocks"), ("n_head", "query heads"), ("n_kv_head", "key and value heads"),
                          ("n_embd", "width"), ("n_ffn", "hidden width of the feed-forward")]:
        add(f"--{name}", type=positive, help=f"{meaning} (default: %(default)s)")


def add_optimization_flags(parser, inherited=False):
    """Flags of training.  inherited: they default to what the reference's run used.  Return their names."""
    group = parser.add_argument_group("optimization")

    def add(name, kind, default, meaning, shown="%(default)s"):
        if inherited and name != "--seed":
            shown = f"the reference's; with another --max_steps, {shown}" if "max_steps" in shown else "the reference's"
        choices = {"choices": kind} if isinstance(kind, list) else {"type": kind}
        group.add_argument(name, default=default, help=f"{meaning} (default: {shown})", **choices)

    add("--max_steps", positive, 4000, "optimizer steps")
    add("--batch_size", positive, 24, "sequences per step over all ranks")
    add("--learning_rate", non_negative, 3e-3, "peak learning rate")
    add("--min_lr", non_negative, None, "last learning rate", "a tenth of the peak")
    add("--lr_schedule", ["cosine", "exponential"], "cosine", "decay after warm-up; exponential is the paper's")
    add("--warmup_steps", natural, None, "steps of linear warm-up",
        "the paper's 6%% of max_steps, but at least 300, or a third of a shorter run")
    add("--weight_decay", non_negative, 0.01, "AdamW's weight decay, on matrices only")
    add("--beta1", fraction, 0.9, "AdamW's decay of the first moment")
    add("--beta2", fraction, 0.99, "AdamW's decay of the second moment")
    add("--grad_clip", non_negative, 1.0, "largest norm of the gradient; 0: no limit")
    add("--seed", natural, 1, "of the initial weights and of the batches",
        "the reference's + 1" if inherited else "%(default)s")
    return [action.dest for action in group._group_actions]


MACHINE_FLAGS = ("resume", "device", "compile", "micro_batch_size", "activation_checkpointing", "log_interval",
                 "eval_interval", "eval_windows", "save_interval", "timeout", "wandb")
PATH_FLAGS = ("out_dir", "data_dir", "sampling_weights", "reference")


def add_machine_flags(parser, out_dir, inherited=False):
    """Flags that do not change what is computed (up to the order of floating-point sums), except --dtype.

    inherited: --dtype defaults to what the reference's run used."""
    add = parser.add_argument_group("machine").add_argument
    add("--out_dir", default=out_dir, help="the run's directory (default: %(default)s)")
    add("--resume", action="store_true", help="continue from the run's last checkpoint, if it has one")
    add("--device", default="auto", help="cpu, cuda, mps (default: cuda if there is one, else cpu)")
    add("--dtype", choices=["auto", "bfloat16", "float32", "float64"], default="auto",
        help="of the computation (default: " + ("the reference's)" if inherited else
                                                "bfloat16 on GPUs that multiply it, else float32)"))
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: if the run is long)")
    add("--micro_batch_size", type=positive, help="sequences per forward pass and rank (default: all of the rank's)")
    add("--activation_checkpointing", action=argparse.BooleanOptionalAction, default=False,
        help="compute each block again in the backward pass: less memory, a third more time (default: no)")
    add("--log_interval", type=positive, default=10, help="steps between lines of metrics (default: %(default)s)")
    add("--eval_interval", type=positive, default=500, help="steps between evaluations (default: %(default)s)")
    add("--eval_windows", type=natural, default=128,
        help="validation windows per domain, spread over val.bin; 0: all (default: %(default)s)")
    add("--save_interval", type=positive, default=500, help="steps between checkpoints (default: %(default)s)")
    add("--timeout", type=positive, default=600,
        help="seconds after which a rank that waits for another gives up (default: %(default)s)")
    add("--wandb", choices=["disabled", "offline", "online"], default="disabled",
        help="log to Weights & Biases, too (default: %(default)s)")


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
