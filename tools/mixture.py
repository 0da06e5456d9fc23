"""Show mixtures of a data set side by side, move an answer onto another reference, and write it for other trainers.

    python -m tools.mixture DATA temperature:0.7 checkpoints/proxy/weights.json --tokens=3.67e10
    python -m tools.mixture DATA temperature:0.7 --as=megatron
    python -m tools.mixture DATA checkpoints/proxy/weights.json --onto=temperature:0.7 --out=moved.json

reads   DATA/meta.json; a weights.json
writes  FILE, with --out: a mixture that --sampling_weights takes

An answer is its reference's weights times a tilt that belongs to the text (docs/theory.md), so on other reference
weights it is expected to be proportional to new * answer / old.

Dimension: K domains of the data set.
"""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python tools/mixture.py

from common import cli
from common.cli import UserError
from common.files import read_json, write_atomically
from sampler import check_weights, folder_name, load_dataset, sampling_weights

MANY_EPOCHS = 4  # up to which repeating costs little (Muennighoff et al. 2023)

# What a trainer reads (docs/elsewhere.md): the whole, each domain, and what joins the domains. Lists are in one order.
TRAINERS = {
    "megatron": ("--data-path {all}", "{weight} {file}", " "),
    "nemo": ("paths=[{all}]", '"{weight}", {path}', ", "),
    "nanotron": ("dataset_folder: {paths}\ndataset_weights: {weights}", "", ""),
    "torchtitan": ("datasets=(\n{all}\n)", "    WeightedDataset(dataset=..., weight={weight}),  # {name}", "\n"),
    "litdata": ("weights={weights}  # {names}", "", ""),
    "streaming": ("{all}", "Stream(local={path}, proportion={weight}),", "\n"),
    "olmo-core": ("{all}", "SourceMixtureConfig(source_name={name}, target_ratio={weight}, paths=[{path}]),", "\n"),
    "levanter": ("train_weights:\n{all}", "  {name}: {weight}", "\n"),
    "datasets": ("interleave_datasets([data[name] for name in {names}],\n"
                 "                    probabilities={draws}, stopping_strategy='all_exhausted')", "", ""),
}


# ---- the arithmetic ----


def moved(answer, old, new):
    """Move an answer onto new reference weights: proportional to new * answer / old.

    answer: (..., K); old, new: (K,) reference weights, of sum 1 each. Where the old one is 0 or NaN (a domain that the
    run did not know) the domain keeps its new reference weight; the others share what is left of 1.  Raises UserError.
    """
    known = old > 0  # False for NaN
    if not known.any():
        raise UserError("--onto: the answer knows none of the domains of that data set")
    tilted = new[known] * answer[..., known] / old[known]
    total = tilted.sum(axis=-1, keepdims=True)
    share = new[known].sum()
    if share > 0 and not (total > 0).all():
        raise UserError("--onto: the answer is 0 on all domains that the new reference weights have in common with it")
    found = np.broadcast_to(new, answer.shape).copy()
    found[..., known] = share * tilted / np.where(total > 0, total, 1)
    return found


def move_file(path, dataset, new):
    """Return the answer in a weights.json, moved onto new reference weights (K,), and notes on what was left out."""
    remedy = "expected a weights.json of average_weights.py, which holds the answer and its reference's weights"
    content = read_json(path, remedy)
    answer, provenance = content.get("domain_weights"), content.get("provenance")
    if not isinstance(provenance, dict):
        raise UserError(f"{path}: has no provenance; {remedy}")
    old = provenance.get("reference_weights")
    check_weights(path, answer)
    check_weights(path, old)
    if old.keys() != answer.keys() or not sum(old.values()) > 0:
        raise UserError(f"{path}: reference weights that are all 0, or of other domains than the answer; {remedy}")
    result = moved(np.array([answer.get(name, 0.0) for name in dataset.domains]),
                   np.array([old.get(name, np.nan) for name in dataset.domains]) / sum(old.values()), new)
    notes = []
    for name in dataset.domains:
        if not old.get(name):
            known = "of weight 0 in the old reference" if name in old else "unknown to the answer"
            notes.append(f"{name}: {known}, so with the new reference weight")
    if dropped := sorted(old.keys() - set(dataset.domains)):
        notes.append(f"{', '.join(dropped)}: not in this data set, so dropped")
    if provenance.get("tokenizer_sha256") != dataset.meta["tokenizer_sha256"]:
        notes.append(f"{dataset.directory} has another tokenizer than the run of {path}; its tilt may be another, too")
    return result, notes


def write_mixture(path, dataset, title, weights, reference_weights):
    """Write what --sampling_weights reads.  reference_weights: (K,) of a moved answer, so it can be moved again."""
    if path.exists():
        raise UserError(f"--out={path}: exists already; delete it, or choose another name")
    provenance = {name: dataset.meta[name] for name in ("tokenizer", "tokenizer_sha256")}
    provenance |= {"data_dir": dataset.directory, "mixture": title}
    if reference_weights is not None:
        provenance["reference_weights"] = dict(zip(dataset.domains, reference_weights.tolist()))
    content = {"domain_weights": dict(zip(dataset.domains, weights.tolist())), "provenance": provenance}
    write_atomically(path, json.dumps(content, indent=2) + "\n")


# ---- what it prints ----


def mixture_table(dataset, mixtures, planned_tokens):
    """Lines.  mixtures: {title: (K,) weights}."""
    tokens = dataset.token_counts()
    columns = [["", "", *dataset.domains], ["data", "tokens", *(f"{n:.3g}" for n in tokens)]]
    for title, weights in mixtures.items():
        columns.append([title, "weight", *(f"{weight:.4f}" for weight in weights)])
        if planned_tokens:
            epochs = weights * planned_tokens / tokens
            columns.append(["", "tokens", *(f"{n:.3g}" for n in weights * planned_tokens)])
            columns.append(["", "epochs ", *(f"{n:.1f}{'!' if n > MANY_EPOCHS else ' '}" for n in epochs)])
    return cli.align(columns)


def trainer_words(trainer, dataset, weights):
    """A mixture as another trainer reads it. Domains of weight 0 are left out: most trainers refuse them."""
    whole, each, between = TRAINERS[trainer]
    names, shares, paths, draws = [], [], [], []
    for name, weight in zip(dataset.domains, weights):
        if weight > 0:
            names.append(name)
            shares.append(float(f"{weight:.10g}"))
            paths.append(token_path(dataset, name))
            entry = dataset.meta["domains"][name]
            draws.append(weight * entry["train_documents"] / entry["train_tokens"])  # where a draw is a document
    parts = [each.format(name=quoted(name), weight=share, path=quoted(path), file=shlex.quote(path))
             for name, share, path in zip(names, shares, paths)]
    return whole.format(all=between.join(parts), names=quoted(names), weights=shares, paths=quoted(paths),
                        draws=(np.array(draws) / sum(draws)).tolist())


def quoted(value):
    """A string or a list of strings, as Python, YAML and JSON read it."""
    return json.dumps(value, ensure_ascii=False)


def token_path(dataset, name):
    """The file of a domain's tokens that tools.link has linked, as Megatron names it; else the domain's name."""
    path = Path(dataset.directory, folder_name(name), "train.bin")
    return str(path.resolve().with_suffix("")) if path.is_symlink() else name


# ---- the script ----


def main(argv=None):
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument
    add("data_dir", metavar="DATA", type=cli.path, help="a data set of prepare.py or tools.link")
    add("mixtures", metavar="SPEC", nargs="+", help="as --sampling_weights takes it: uniform, token_count, "
        "temperature:P, unimax:EPOCHS, FILE.json, numbers, or several of these joined by +")
    add("--tokens", type=cli.non_negative, help="of the whole run, such as 3.67e10: adds tokens and epochs")
    add("--onto", metavar="WEIGHTS", help="move the answer SPEC, a weights.json, onto these reference weights")
    add("--out", metavar="FILE.json", type=cli.path, help="write the mixture")
    add("--as", dest="trainer", choices=sorted(TRAINERS), help="print the mixture for another trainer")
    args = parser.parse_args(argv)
    if args.tokens is None and any(re.search(r"(^|\+)unimax:", spec) for spec in [*args.mixtures, args.onto or ""]):
        raise UserError("unimax needs --tokens, which it shares out")
    if (args.out or args.trainer or args.onto) and len(args.mixtures) > 1:
        raise UserError(f"--onto, --out and --as are for one mixture, but there are {len(args.mixtures)}; give one")
    dataset = load_dataset(args.data_dir, 1)  # no windows are needed
    new, notes = None, []
    if args.onto:
        new = sampling_weights(args.onto, dataset, args.tokens)
        weights, notes = move_file(args.mixtures[0], dataset, new)
        mixtures = {args.onto: new, f"{args.mixtures[0]} onto {args.onto}": weights}
    else:
        mixtures = {spec: sampling_weights(spec, dataset, args.tokens) for spec in args.mixtures}
    title, weights = list(mixtures.items())[-1]
    if args.out:
        write_mixture(Path(args.out), dataset, title, weights, new)
    if args.trainer:
        cli.print_anywhere(trainer_words(args.trainer, dataset, weights))
    else:
        cli.print_anywhere("\n".join(mixture_table(dataset, mixtures, args.tokens)))
        if args.tokens:
            notes.append(f"! marks domains that are repeated more than {MANY_EPOCHS} times")
    for note in notes:
        cli.print_anywhere(cli.escaped(f"note: {note}"), sys.stderr)


if __name__ == "__main__":
    cli.run(main)
