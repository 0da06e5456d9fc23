"""The command line: flags and their files, and the defaults that depend on something."""

import json
import sys
from argparse import Namespace

import pytest
from conftest import refused

import runtime
import train_doremi
import train_reference


def parse(monkeypatch, *flags, module=train_reference):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    return vars(module.parse_args(*([] if module is train_doremi else ["a test", module.DEFAULTS])))


def test_flags_from_a_file(tmp_path, monkeypatch):
    file = tmp_path / "flags.txt"
    file.write_text("# a comment that isn't closed\n\n--max_steps=3 --beta1 0.5   # two on a line, one with a space\n"
                    "--data_dir='two words # no comment'\n   --no-compile\n")
    args = parse(monkeypatch, f"@{file}")
    assert [args[name] for name in ("max_steps", "beta1", "data_dir", "compile", "resume", "sampling_weights")] == [
        3, 0.5, "two words # no comment", False, False, "token_count"]
    assert parse(monkeypatch, f"@{file}", "--max_steps=4")["max_steps"] == 4  # later flags win,
    assert parse(monkeypatch, "--max_steps=4", f"@{file}")["max_steps"] == 3  # wherever they stand


@pytest.mark.parametrize("content, named", [("--max_step=3", "--max_step"), ("--beta1=1", "--beta1"),
                                            ("stray", "stray"), ("--data_dir='open", "open")])
def test_errors_in_a_file_name_the_file(tmp_path, content, named):
    (file := tmp_path / "some_flags.txt").write_text(f"--max_steps=3\n{content}\n")
    refused(tmp_path, [named, str(file)], "train_reference.py", f"@{file}")


def test_the_proxy_inherits_from_the_reference_but_for_its_seed(tmp_path, monkeypatch):
    theirs = {"max_steps": 77, "batch_size": 6, "learning_rate": 0.5, "min_lr": 0.25, "lr_schedule": "exponential",
              "warmup_steps": 11, "weight_decay": 0.125, "beta1": 0.5, "beta2": 0.75, "grad_clip": 3.0, "seed": 41,
              "data_dir": "there", "dtype": "float64"}
    (tmp_path / "config.json").write_text(json.dumps({
        "stage": "reference", "model": {}, "n_params": 1, "domains": [], "data": {},
        "flags": {**theirs, "out_dir": "elsewhere", "sampling_weights": "1,2", "compile": True, "log_interval": 7}}))

    def proxy(*flags):
        return parse(monkeypatch, f"--reference={tmp_path}", *flags, module=train_doremi)

    assert proxy().items() >= {**theirs, "seed": 42, "sampling_weights": "uniform", "compile": None, "step_size": 1.0,
                               "log_interval": 10, "smoothing": 1e-3, "out_dir": "checkpoints/proxy"}.items()
    assert proxy("--seed=5", "--beta1=0.1").items() >= {"seed": 5, "beta1": 0.1, "beta2": 0.75}.items()
    assert proxy("--max_steps=78")["warmup_steps"] is None  # of another length: the rule for that length


def test_defaults_that_depend_on_others():
    for max_steps, expected in {2: 0, 150: 50, 900: 300, 3000: 300, 200_000: 12_000}.items():
        args = Namespace(learning_rate=0.01, min_lr=None, warmup_steps=None, max_steps=max_steps, device="auto",
                         dtype="auto")
        runtime.resolve_flags(args)
        assert args.warmup_steps == expected  # a third, at most 300; 6% where that is more
        assert args.min_lr == 0.001 and args.dtype in ("float32", "bfloat16")  # a tenth
