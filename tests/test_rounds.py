"""Iterated DoReMi, ./rounds.sh: each round starts from the last answer, ends when it should, is never done twice."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY

REFERENCE = [*TINY, "--max_steps=4", "--warmup_steps=1", "--device=cpu"]


def rounds(*flags, reference=REFERENCE, proxy=(), python=sys.executable):
    """./rounds.sh with an interpreter of ours.  flags: its own; reference, proxy: those of the training scripts."""
    command = [ROOT / "rounds.sh", f"--python={python}", *flags, "--", *reference, "--", *proxy]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def done(result):
    assert result.returncode == 0, result.stderr
    return result.stdout


def refused(result, *words):
    """Asserts status 2 and a single line on standard error that holds all of `words`."""
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    for word in words:
        assert word in result.stderr


def answer_of(directory):
    return json.loads((directory / "proxy/weights.json").read_text())


def test_each_round_starts_from_the_last_answer_and_is_done_once(tmp_path, data_dir):
    out = tmp_path / "rounds"
    flags = [f"--data_dir={data_dir}", f"--out_dir={out}", "--start=token_count", "--rounds=2"]
    said = done(rounds(*flags))
    first, second = answer_of(out / "1"), answer_of(out / "2")
    trained_on = [json.loads((out / f"{n}/reference/config.json").read_text())["sampling_weights"] for n in (1, 2)]
    assert trained_on[0]["counting"] == 6000 / 11300
    weights = np.array(list(first["domain_weights"].values()))
    assert list(trained_on[1]) == list(first["domain_weights"])
    assert list(trained_on[1].values()) == (weights / weights.sum()).tolist()  # to the bit; read weights are normalized
    assert np.abs(weights - 0.25).max() > 1e-3

    # Every command is shown; the table has the start, each round's answer, and how far that is from its reference
    assert f"average_weights.py {out}/1/proxy" in said
    assert f"train_doremi.py --reference={out}/2/reference --out_dir={out}/2/proxy --resume" in said
    moves = [max(abs(found["domain_weights"][name] - before[name]) for name in before)
             for found, before in zip((first, second), trained_on)]
    table = said[said.rindex("\ndomain") :]
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["domain", "start", "round", "1", "round", "2"],
        *[[name, *(f"{w[name]:.4f}" for w in (trained_on[0], first["domain_weights"], second["domain_weights"]))]
          for name in ("counting", "simple", "rich", "small")],
        ["largest", "move", *(f"{move:.4f}" for move in moves)],
        ["total", "variation", *(f"{found['provenance']['total_variation']:.4f}" for found in (first, second))],
        ("round 2: not converged, and moves more than round 1: use that one's answer, or train for longer "
         "(docs/results.md)" if moves[1] > moves[0] else "round 2: not converged: a larger --rounds goes on").split()]

    # Again: nothing is done, nothing is written, the table is the same. Other flags are not passed over in silence.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert done(rounds(*flags)) == table
    refused(rounds(*flags, proxy=["--step_size=0.5"]), "was started with", "--step_size=0.5")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_rounds_end_when_no_weight_moves(tmp_path, data_dir):
    said = done(rounds(f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--rounds=3", proxy=["--step_size=0"]))
    assert set(answer_of(tmp_path / "1")["domain_weights"].values()) == {0.25}  # alpha stays where it starts: uniform
    assert said.endswith("round 1: converged: no weight moved by 1e-3\n")
    assert not (tmp_path / "2").exists()


def test_a_round_that_was_cut_off_is_gone_on_with(tmp_path):
    """The training scripts end well on a signal; here they do nothing, and stage 3 finds what is in answer.json."""
    python, answer, out = tmp_path / "python", tmp_path / "answer.json", tmp_path / "out"
    python.write_text(f'#!/bin/sh\ncase "$1" in average_weights.py) mkdir -p "$2"; cp {answer} "$2/weights.json" ;;\n'
                      f'*.py) ;; *) exec {sys.executable} "$@" ;; esac\n')
    python.chmod(0o755)

    def with_answer(**changes):
        record = {"steps": 9, "max_steps": 9, "converged": False, "largest_move": 0.1, "total_variation": 0.1,
                  "reference": {"sampling_weights": {"a": 1.0}}, **changes}
        answer.write_text(json.dumps({"domain_weights": {"a": 1.0}, "provenance": record}))
        return rounds(f"--out_dir={out}", python=python)

    refused(with_answer(steps=5), "round 1 was cut off")
    assert not (out / "rounds.txt").exists()  # so that a wrong flag can be mended
    said = done(with_answer())
    assert said.count("train_reference.py") == said.count("train_doremi.py") == said.count("average_weights.py") == 4
    assert f"--sampling_weights=uniform --out_dir={out}/1/reference" in said
    assert f"--sampling_weights={out}/3/proxy/weights.json --out_dir={out}/4/reference" in said
    assert said.endswith("round 4: not converged: a larger --rounds goes on\n")
    (out / "4/proxy/weights.json").unlink()
    assert "round 4: not converged, and moves more than round 1" in done(with_answer(largest_move=0.11))
    (out / "2/proxy/weights.json").unlink()
    said = done(with_answer(converged=True))
    assert said.count("train_reference.py") == 1
    assert said.endswith("round 2: converged: no weight moved by 1e-3\n")


@pytest.mark.parametrize(("flag", "said"), [
    ("--round=3", "--round=3 is no flag of it"), ("--rounds=0", "--rounds=0: expected a whole number above 0"),
    ("--nproc_per_node=two", "--nproc_per_node=two"), ("--out_dir=", "has no value"), ("checkpoints", "see --help")])
def test_a_wrong_flag_is_one_line(flag, said):
    refused(rounds(flag), said)


def test_flags_that_each_round_sets_are_refused():
    refused(rounds(reference=["--sampling_weights=uniform"]), "--sampling_weights=uniform: each round sets that itself")
    refused(rounds(proxy=["--reference=elsewhere"]), "--reference=elsewhere: each round sets that itself")


def test_help_tells_every_flag():
    help = subprocess.run([ROOT / "rounds.sh", "--help"], capture_output=True, text=True, check=True).stdout
    for flag in ("data_dir", "out_dir", "rounds", "start", "nproc_per_node", "python"):
        assert f"  --{flag}=" in help
    assert help.splitlines()[-1].startswith("  ./rounds.sh --rounds=3 -- @configs/demo_small.txt")
