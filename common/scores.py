"""What evaluate.py has scored: RUN/evaluation/*.json, a file for each data set and each task."""

import hashlib

import numpy as np
import torch

from common.files import misfit, read_json


def scored(part):
    """bits, bytes above 0 and wrong answers of the same number of items"""
    if misfit(part, {"bits": [float], "bytes": (float, [float]), "wrong": [[float]]}):
        return False
    sizes = {len(value) for value in part.values() if value and isinstance(value, list)}
    return sizes == {len(part["bits"])} and np.min(part["bytes"]) > 0


SCORES = {
    "name": str,  # of the data set or the task
    "kind": str,  # of its parts: domains or tasks
    "text": str,  # a hash of what was scored
    "checkpoint": str,  # a hash of the parameters that scored it
    "expected": [str],  # all parts
    # Those that are done. bits: of each window or right answer; bytes: of each, or one number for all; wrong: the bits
    # per byte of each item's wrong answers, or nothing if there are none
    "parts": {str: scored}}


def parameters_hash(parameters):
    """Hex digest of {name: tensor}."""
    digest = hashlib.sha256()
    for name, tensor in parameters.items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_scores(folder, parameters):
    """Return {file name: SCORES} of what is known of these parameters, and notes on what was left out."""
    found, notes = {}, []
    paths = sorted(folder.glob("*.json"))
    checkpoint = parameters_hash(parameters) if paths else None
    for path in paths:
        scores = read_json(path, SCORES, "delete it and run evaluate.py again")
        if scores["checkpoint"] != checkpoint:
            notes.append(f"{path} is of another checkpoint, not shown; run evaluate.py again")
        elif not scores["parts"] or scores["parts"].keys() != set(scores["expected"]):
            notes.append(f"{path} is not complete, not shown; run evaluate.py again")
        else:
            found[path.name] = scores
    return found, notes


# ---- the mathematics: a part in, a number out ----


def bits_per_byte(part):
    """Return all bits of the right answers over all of their bytes."""
    return sum(part["bits"]) / float(np.broadcast_to(part["bytes"], len(part["bits"])).sum())


def accuracy(part):
    """Return the share of items whose right answer has fewer bits per byte than every wrong one: a tie is wrong."""
    own = np.array(part["bits"]) / part["bytes"]
    hits = [all(right < other for other in wrong) for right, wrong in zip(own, part["wrong"])]
    return sum(hits) / len(hits)


def chance(part):
    """Return the share of items that a guess gets right."""
    return float(np.mean([1 / (1 + len(wrong)) for wrong in part["wrong"]]))
