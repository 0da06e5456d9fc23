"""The command line: flags and their files, defaults and what the help says of them."""

import argparse
import json
import re
import sys
from argparse import Namespace

import pytest
import torch
from conftest import run_here
from hypothesis import given, settings
from hypothesis import strategies as st

import train_doremi
import train_large
import train_reference
from common import cli, ranks
from train_reference import resolve_flags


def parser():
    p = cli.ArgumentParser("a test")
    p.add_argument("--name", default="nobody")
    p.add_argument("--steps", type=cli.positive, default=1)
    p.add_argument("--rate", type=float)
    p.add_argument("--resume", action="store_true")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction)
    return p


def test_flags_from_a_file(tmp_path):
    file = tmp_path / "flags.txt"
    file.write_text("# a comment that isn't closed\n\n--steps=3 --rate 0.5   # two on a line, one with a space\n"
                    "--name='two words # no comment'\n   --no-compile\n")
    args = parser().parse_args([f"@{file}"])
    assert vars(args) == {"steps": 3, "rate": 0.5, "name": "two words # no comment", "compile": False, "resume": False}
    assert parser().parse_args([f"@{file}", "--steps=4"]).steps == 4  # later flags win,
    assert parser().parse_args(["--steps=4", f"@{file}"]).steps == 3  # wherever they stand
    outer = tmp_path / "outer.txt"
    outer.write_text(f"@{file}\n--rate=0.25")
    assert parser().parse_args([f"@{outer}"]).rate == 0.25


@pytest.mark.parametrize("content, named", [("--stepz=3", "--stepz"), ("--steps=0", "--steps"), ("--step=3", "--step"),
                                            ("--rate=fast", "fast"), ("stray", "stray"), ("--name='open", "open")])
def test_errors_in_a_file_name_the_file(tmp_path, content, named, capsys):
    file = tmp_path / "some_flags.txt"
    file.write_text(f"--name=somebody\n{content}\n")
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args([f"@{file}"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and named in err and str(file) in err and err.count("\n") == 1, err


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"])), st.integers(1, 10**9),
       st.none() | st.floats(allow_nan=False), st.booleans(), st.booleans() | st.none())
def test_flag_lines_read_back(tmp_path_factory, name, steps, rate, resume, compiled):
    args = Namespace(name=name, steps=steps, rate=rate, resume=resume, compile=compiled)
    file = tmp_path_factory.getbasetemp() / "round_trip.txt"
    file.write_text(cli.flag_lines(args), encoding="utf-8")
    assert vars(parser().parse_args([f"@{file}"])) == {**vars(args), "resume": False}


@pytest.mark.parametrize("kind, good, bad", [
    (cli.positive, {"1": 1}, ["0", "-1", "1.5", "x"]),
    (cli.natural, {"0": 0, str(2**63 - 1): 2**63 - 1}, ["-1", str(2**63)]),
    (cli.non_negative, {"0": 0.0, "1e-3": 1e-3}, ["-1", "nan", "inf"]),
    (cli.fraction, {"0": 0.0, "0.9": 0.9}, ["1", "-0.1", "nan"])])
def test_types(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises((ValueError, argparse.ArgumentTypeError)):
            kind(text)


def help_of(script):
    """{flag: its help}, on one line each."""
    result = run_here(script, "--help")
    assert all(word in result.stdout for word in ("reads ", "writes ", "next "))
    options = re.split(r"\n  (?=--)", result.stdout.split("\n@FILE")[0])[1:]
    return {re.match(r"--(\w+)", option)[1]: " ".join(option.split()) for option in options}


@pytest.mark.parametrize("script, module, required", [
    ("train_reference.py", train_reference, []), ("train_large.py", train_large, ["--sampling_weights=uniform"])])
def test_help_shows_the_defaults_that_are_used(script, module, required, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, *required])
    args, lines = vars(train_reference.parse_args("", module.DEFAULTS)), help_of(script)
    assert lines.keys() == args.keys()
    for name, value in args.items():
        if name != "resume" and f"--{name}={value}" not in required:
            assert (default := re.search(r"\(default: (.*)\)", lines[name])), lines[name]
            assert value in (None, False, "auto") or default[1] == str(value), (name, value, default[1])
    assert required or args["sampling_weights"] == "token_count"


def test_large_requires_sampling_weights(tmp_path):
    result = run_here("train_large.py", f"--out_dir={tmp_path}/out", status=2)
    assert "--sampling_weights" in result.stderr and not (tmp_path / "out").exists()


def test_the_proxy_inherits_from_the_reference_but_for_its_seed(tmp_path, monkeypatch):
    """And the help says of exactly these flags that they are the reference's."""
    theirs = {"max_steps": 77, "batch_size": 6, "learning_rate": 0.5, "min_lr": 0.25, "lr_schedule": "exponential",
              "warmup_steps": 11, "weight_decay": 0.125, "beta1": 0.5, "beta2": 0.75, "grad_clip": 3.0, "seed": 41,
              "data_dir": "there", "dtype": "float64"}
    (tmp_path / "config.json").write_text(json.dumps({
        "stage": "reference", "model": {}, "n_params": 1, "domains": [], "data": {},
        "flags": {**theirs, "out_dir": "elsewhere", "sampling_weights": "1,2", "compile": True, "log_interval": 7}}))

    def parse(*flags):
        monkeypatch.setattr(sys, "argv", ["train_doremi.py", f"--reference={tmp_path}", *flags])
        return vars(train_doremi.parse_args())

    found, lines = parse(), help_of("train_doremi.py")
    assert found.items() >= {**theirs, "seed": 42, "sampling_weights": "uniform", "compile": None, "log_interval": 10,
                             "step_size": 1.0, "smoothing": 1e-3, "out_dir": "checkpoints/proxy"}.items()
    assert parse("--seed=5", "--beta1=0.1").items() >= {"seed": 5, "beta1": 0.1, "beta2": 0.75}.items()
    assert parse("--max_steps=78")["warmup_steps"] is None  # of another length: the rule for that length
    assert {name for name, line in lines.items() if "(default: the reference's" in line} == theirs.keys()
    assert "the reference's + 1" in lines["seed"]
    for name in found.keys() - theirs.keys() - {"resume"}:
        default = re.search(r"\(default: (.*)\)", lines[name])[1]
        assert found[name] in (None, False, "auto") or default.split(",")[0] in (str(found[name]), str(tmp_path),
                                                                                 "checkpoints/reference"), name


def resolved(**changes):
    args = Namespace(learning_rate=0.01, min_lr=None, warmup_steps=None, max_steps=150, device="cpu", dtype="float32")
    vars(args).update(changes)
    resolve_flags(args)
    return args


def test_defaults_that_depend_on_others():
    assert resolved().min_lr == 0.001  # a tenth
    assert {steps: resolved(max_steps=steps).warmup_steps for steps in (2, 150, 900, 3000, 200_000)} == {
        2: 0, 150: 50, 900: 300, 3000: 300, 200_000: 12_000}  # a third, at most 300; 6% where that is more
    assert resolved(device="auto").device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolved(dtype="auto").dtype in ("float32", "bfloat16")


def test_compile_is_decided_by_the_length_of_the_run(monkeypatch):
    monkeypatch.setattr(ranks.shutil, "which", lambda name: "/usr/bin/" + name)

    def decide(flops, **flags):
        flags = {"device": "cpu", "dtype": "float32", "compile": None, **flags}
        return ranks.decide_compile(Namespace(**flags), flops)

    assert decide(1e15) and not decide(1e12) and decide(1e12, device="cuda") and not decide(1e15, dtype="float64")
    assert decide(1e12, compile=True) and not decide(1e15, compile=False)
    monkeypatch.setattr(ranks.shutil, "which", lambda name: None)
    assert not decide(1e15)  # no compiler
