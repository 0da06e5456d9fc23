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
import shlex
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python tools/mixture.py

from common import cli
from common.cli import UserError
from common.files import read_json, write_atomically
from sampler import check_weights, folder_name, load_dataset, sampling_weights

# What a trainer reads (docs/elsewhere.md): the whole, each domain, and what joins the domains
TRAINERS = {
    "megatron": ("--data-path {all}", "{weight} {file}", " "),
    "nemo": ("paths=[{all}]", '"{weight}", {path}', ", "),
    "nanotron": ("dataset_folder: {paths}\ndataset_weights: {weights}", "", ""),
    "torchtitan": ("datasets=(\n{all}\n)", "    WeightedDataset(dataset=..., weight={weight}),  # {name}", "\n"),
    "litdata": ("weights={weights}  # {names}", "", ""),
    "streaming": ("{all}", "Stream(local={path}, proportion={weight}),", "\n"),
    "olmo-core": ("{all}", "SourceMixtureConfig(source_name={name}, target_ratio={weight}, paths=[{path}]),", "\n"),
    "levanter": ("train_weights:\n{all}", "  {name}: {weight}", "\n"),
    "datasets": ("interleave_datasets([data[name] for name in {names}], probabilities={draws}, "
                 "stopping_strategy='all_exhausted')", "", ""),
}


def moved(answer, old, new):
    """Move an answer onto new reference weights: proportional to new * answer / old.  (K,) each.

    Where the old one is 0 or NaN (a domain that the run did not know) the domain keeps its new reference weight; the
    others share what is left of 1.  Raises UserError.
    """
    known = old > 0  # False for NaN
    tilted = new[known] * answer[known] / old[known]
    if not tilted.sum() > 0:
        raise UserError("--onto: the answer has no weight on any domain of the new reference weights")
    found = new.copy()
    found[known] = new[known].sum() * tilted / tilted.sum()
    return found


def move_file(path, dataset, new):
    """Return the answer in a weights.json, moved onto new reference weights (K,), and notes on what was left out."""
    remedy = "expected a weights.json of average_weights.py, which holds the answer and its reference's weights"
    content = read_json(path, remedy)
    answer, provenance = content.get("domain_weights"), content.get("provenance")
    if not isinstance(provenance, dict):
        raise UserError(f"{path}: {remedy}")
    old = provenance.get("reference_weights")
    check_weights(path, answer)
    check_weights(path, old)
    if old.keys() != answer.keys() or not sum(old.values()) > 0:
        raise UserError(f"{path}: {remedy}")
    result = moved(np.array([answer.get(name, 0.0) for name in dataset.domains]),
                   np.array([old.get(name, np.nan) for name in dataset.domains]) / sum(old.values()), new)
    kept = [name for name in dataset.domains if not old.get(name)]
    dropped = sorted(old.keys() - set(dataset.domains))
    notes = [f"{name}: not in the old reference, so with the new reference weight" for name in kept]
    notes += [f"{name}: not in this data set, so dropped" for name in dropped]
    if provenance.get("tokenizer_sha256") != dataset.meta["tokenizer_sha256"]:
        notes.append(f"{dataset.directory} has another tokenizer than the run of {path}; its tilt may be another, too")
    return result, notes


def write_mixture(path, dataset, title, weights, reference_weights):
    """reference_weights: (K,) of a moved answer, so it can be moved again."""
    if path.exists():
        raise UserError(f"--out={path}: exists already; delete it, or choose another name")
    provenance = {"tokenizer": dataset.meta["tokenizer"], "tokenizer_sha256": dataset.meta["tokenizer_sha256"],
                  "data_dir": dataset.directory, "mixture": title}
    if reference_weights is not None:
        provenance["reference_weights"] = dict(zip(dataset.domains, reference_weights.tolist()))
    content = {"domain_weights": dict(zip(dataset.domains, weights.tolist())), "provenance": provenance}
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def mixture_table(dataset, mixtures, planned_tokens):
    tokens = dataset.token_counts()
    columns = [["", "", *dataset.domains], ["data", "tokens", *(f"{n:.3g}" for n in tokens)]]
    for title, weights in mixtures.items():
        columns.append([title, "weight", *(f"{weight:.4f}" for weight in weights)])
        if planned_tokens:
            epochs = weights * planned_tokens / tokens
            columns.append(["", "tokens", *(f"{n:.3g}" for n in weights * planned_tokens)])
            columns.append(["", "epochs ", *(f"{n:.1f}{'!' if n > 4 else ' '}" for n in epochs)])
    return cli.align(columns)


def trainer_words(trainer, dataset, weights):
    """A mixture as another trainer reads it. Domains of weight 0 are left out: most trainers refuse them."""
    whole, each, between = TRAINERS[trainer]
    names, shares, paths, draws, parts = [], [], [], [], []
    for name, weight in zip(dataset.domains, weights):
        if weight > 0:
            share, path, entry = float(f"{weight:.10g}"), token_path(dataset, name), dataset.meta["domains"][name]
            names.append(name)
            shares.append(share)
            paths.append(path)
            draws.append(weight * entry["train_documents"] / entry["train_tokens"])  # where a draw is a document
            parts.append(each.format(name=quoted(name), weight=share, path=quoted(path), file=shlex.quote(path)))
    return whole.format(all=between.join(parts), names=quoted(names), weights=shares, paths=quoted(paths),
                        draws=(np.array(draws) / sum(draws)).tolist())


def quoted(value):
    """A string or a list of strings, as Python, YAML and JSON read it."""
    return json.dumps(value, ensure_ascii=False)


def token_path(dataset, name):
    """The file of a domain's tokens that tools.link has linked, as Megatron names it; else the domain's name."""
    path = Path(dataset.directory, folder_name(name), "train.bin")
    return str(path.resolve().with_suffix("")) if path.is_symlink() else name


def main(argv=None):
    parser = cli.ArgumentParser(__doc__)
    add = parser.add_argument
    add("data_dir", metavar="DATA", type=cli.path, help="a data set of prepare.py or tools.link")
    add("mixtures", metavar="SPEC", nargs="+", help="as --sampling_weights takes it")
    add("--tokens", type=cli.non_negative, help="of the run, such as 3.67e10: adds tokens, and epochs with ! above 4")
    add("--onto", metavar="WEIGHTS", help="move the answer SPEC, a weights.json, onto these reference weights")
    add("--out", metavar="FILE.json", type=cli.path, help="write the mixture")
    add("--as", dest="trainer", choices=sorted(TRAINERS), help="print the mixture for another trainer")
    args = parser.parse_args(argv)
    if args.tokens is None and "unimax:" in " ".join([*args.mixtures, args.onto or ""]):
        raise UserError("unimax needs --tokens, which it shares out")
    if (args.out or args.trainer or args.onto) and len(args.mixtures) > 1:
        raise UserError("--onto, --out and --as are for one mixture; give one")
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
        print(trainer_words(args.trainer, dataset, weights))
    else:
        print("\n".join(mixture_table(dataset, mixtures, args.tokens)))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
