"""The commands in the heads of configs/*.txt run as they are printed, in order, with a tiny model and few steps."""

import json
import re

import pytest
from conftest import ROOT, run_here

SMALL = ["--block_size=16", "--n_layer=1", "--n_head=2", "--n_kv_head=1", "--n_embd=16", "--n_ffn=32",
         "--batch_size=12", "--micro_batch_size=3", "--max_steps=4", "--warmup_steps=1", "--eval_windows=2"]


def commands(config):
    """Each command of a config's head as words, without torchrun's."""
    head = config.read_text().split("\n\n--")[0]
    lines = [line.removeprefix("#").strip() for line in re.sub(r" \\\n# +", " ", head).splitlines()]
    lines = [re.sub(r"^torchrun( --\S+)* ", "python ", line) for line in lines]
    return [line.split()[1:] for line in lines if re.match(r"python \w+\.py", line)]


@pytest.mark.parametrize("config", sorted(ROOT.glob("configs/*.txt")), ids=lambda path: path.stem)
def test_commands_of_a_head_run_as_printed(config, data_dir, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/pile").symlink_to(data_dir)
    ran = commands(config)
    if not any(script == "train_doremi.py" for script, *_ in ran):  # of a large model alone
        (tmp_path / "checkpoints/proxy").mkdir(parents=True)
        weights = dict.fromkeys(("counting", "simple", "rich", "small"), 0.25)
        (tmp_path / "checkpoints/proxy/weights.json").write_text(json.dumps(weights))
    assert ran
    for script, *flags in ran:
        run_here(script, *flags, *(SMALL if script in ("train_reference.py", "train_large.py") else []), cwd=tmp_path)
