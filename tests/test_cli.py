"""The command line: flags and their files, defaults and what the help says of them."""

import argparse
import json
import sys
from argparse import Namespace

import pytest
import torch

import train_doremi
from common import cli, ranks
from common.run import FORMAT
from train_reference import resolve_recipe


def parser():
    p = cli.ArgumentParser("a test")
    p.add_argument("--name", default="nobody")
    p.add_argument("--steps", type=cli.positive, default=1)
    p.add_argument("--rate", type=float)
    p.add_argument("--resume", action="store_true")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction)
    return p


def test_flags_from_a_file(tmp_path):
    file, outer = tmp_path / "flags.txt", tmp_path / "outer.txt"
    file.write_text("# a comment that isn't closed\n\n--steps=3 --rate 0.5   # two on a line, one with a space\n"
                    "--name='two words # no comment'\n   --no-compile\n")
    outer.write_text(f"@{file}\n--rate=0.25 --name=runs/lr#2\\new # neither # nor \\ means anything within a word")
    assert vars(parser().parse_args([f"@{file}"])) == {
        "steps": 3, "rate": 0.5, "name": "two words # no comment", "compile": False, "resume": False}
    assert parser().parse_args([f"@{file}", "--steps=4"]).steps == 4  # later flags win,
    assert parser().parse_args(["--steps=4", f"@{file}"]).steps == 3  # wherever they are
    found = parser().parse_args([f"@{outer}"])
    assert (found.steps, found.rate, found.name) == (3, 0.25, "runs/lr#2\\new")
    file.write_text("--name=Müller", encoding="utf-16")
    assert parser().parse_args([f"@{file}"]).name == "Müller"


@pytest.mark.parametrize("content, named", [
    ("--steps=0", "--steps"), ("--step=3", "--step"), ("--rate=fast", "fast"), ("stray", "stray"),
    ("--name='open", "open"), ("--name=M\xfcller", "UTF-8")])
def test_errors_in_a_file_name_the_file(tmp_path, content, named, capsys):
    file = tmp_path / "some_flags.txt"
    file.write_text(f"--name=somebody\n{content}\n", encoding="latin-1")
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args([f"@{file}"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and named in err and str(file) in err and err.count("\n") == 1, err


THEIRS = {"max_steps": 77, "batch_size": 6, "learning_rate": 0.5, "min_lr": 0.25, "lr_schedule": "exponential",
          "warmup_steps": 11, "weight_decay": 0.125, "beta1": 0.5, "beta2": 0.75, "grad_clip": 3.0, "data_dir": "there",
          "dtype": "float64", "device": "cpu", "compile": True, "micro_batch_size": 3, "activation_checkpointing": True,
          "log_interval": 7, "eval_interval": 8, "eval_windows": 9, "save_interval": 10, "timeout": 11,
          "wandb": "offline"}


def test_a_proxy_inherits_every_flag_but_its_own(tmp_path, monkeypatch):
    flags = {**THEIRS, "seed": 41, "out_dir": "elsewhere", "sampling_weights": "1", "resume": True, "n_layer": 2}
    (tmp_path / "config.json").write_text(json.dumps({"format": FORMAT, "flags": flags}))

    def parse_proxy(*flags):
        monkeypatch.setattr(sys, "argv", ["train_doremi.py", f"--reference={tmp_path}", *flags])
        return vars(train_doremi.parse_args())

    own = {"seed": 42, "sampling_weights": "uniform", "out_dir": "checkpoints/proxy", "resume": False}
    assert parse_proxy().items() >= {**THEIRS, **own}.items()
    assert parse_proxy("--seed=5", "--micro_batch_size=1").items() >= {"seed": 5, "micro_batch_size": 1}.items()
    # What derives from a flag derives again
    assert parse_proxy("--learning_rate=0.1").items() >= {"min_lr": 0.01, "warmup_steps": 11}.items()
    assert parse_proxy("--max_steps=3000").items() >= {"min_lr": 0.25, "warmup_steps": 300}.items()
    assert parse_proxy("--min_lr=0.3").items() >= {"min_lr": 0.3, "warmup_steps": 11}.items()


@pytest.mark.parametrize("steps, warmup", [(2, 0), (150, 50), (900, 300), (3000, 300), (200_000, 12_000)])
def test_defaults_that_depend_on_others(steps, warmup):
    """Warm-up takes a third, at most 300, and 6% where that is more; the last learning rate is a tenth."""
    found = resolve_recipe(Namespace(learning_rate=0.01, min_lr=None, warmup_steps=None, max_steps=steps))
    assert (found.warmup_steps, found.min_lr) == (warmup, 0.001)


def test_compile_is_decided_by_the_length_of_the_run(monkeypatch):
    def decide(flops, device="cpu", dtype=torch.float32, compile=None):
        machine = ranks.Machine(torch.device(device), dtype, torch.float64, micro_batch_size=1)
        return ranks.decides_to_compile(Namespace(compile=compile), machine, flops)

    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert decide(1e15) and not decide(9e11)
    assert not decide(1e15, device="cuda") and not decide(1e15, dtype=torch.float64)
    assert decide(9e11, compile=True) and not decide(1e15, compile=False)
    monkeypatch.setattr(torch, "compile", lambda function: 1 / 0)  # a compiler that cannot compile
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        assert not decide(1e15)


@pytest.mark.parametrize("environment", [
    {"RANK": "1"}, {"RANK": "0", "WORLD_SIZE": "2"},  # without LOCAL_WORLD_SIZE: how many nodes?
    {"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
    {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}])
def test_an_environment_that_makes_no_sense(monkeypatch, environment):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks.ranks_of_environment() == (0, 1, 0, 1)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(cli.UserError, match=", ".join(f"{name}={value}" for name, value in environment.items())):
        ranks.ranks_of_environment()
