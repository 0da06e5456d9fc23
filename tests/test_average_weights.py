"""Stage 3: the answer, what is said of it, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch

import average_weights
import cli
from average_weights import effective_domains, headline, running_average, thin, times, total_variation

DOMAINS = ["books", "code", "web"]
PNG = b"\x89PNG\r\n\x1a\n"


def history(*entries):
    return [{"step": step, "domain_weights": torch.tensor(row, dtype=torch.float64)} for step, row in entries]


def proxy_run(path, alpha, seed=1, max_steps=None, **changes):
    """A proxy run's directory with the history alpha, a list of T rows of K weights."""
    path.mkdir()
    torch.save(history(*enumerate(alpha, start=1)), path / f"doremi_domain_weights_{len(alpha)}.pt")
    config = {
        "stage": "proxy",
        "model": {"vocab_size": 300, "block_size": 8, "n_layer": 1, "n_head": 1, "n_kv_head": 1, "n_embd": 8,
                  "n_ffn": 16},
        "n_params": 5000,
        "domains": DOMAINS,
        "sampling_weights": dict.fromkeys(DOMAINS, 1 / 3),
        "data": {"data_dir": "data/toy", "tokenizer": "bytes", "tokenizer_sha256": "ab" * 32, "vocab_size": 300,
                 "train_tokens": {"books": 600, "code": 300, "web": 100}},
        "flags": {"max_steps": max_steps or len(alpha), "batch_size": 4, "step_size": 1.0, "smoothing": 1e-3,
                  "seed": seed},
        "reference": {"out_dir": "checkpoints/reference", "sampling_weights": {"web": 0.2, "books": 0.5, "code": 0.3},
                      "seed": 7, "max_steps": 20},
        "versions": {"python": "3.12.0", "torch": "2.13.0", "numpy": "2.4.0"},
        "device": "cpu",
        "world_size": 1,
    }
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


def random_alpha(steps, seed):
    return np.random.default_rng(seed).dirichlet(np.ones(3), size=steps).tolist()


def average(*args):
    average_weights.main([str(arg) for arg in args])


def refused(capsys, *args):
    """The single line on standard error of a run that must fail with status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: average(*args))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_the_published_recipe_gives_the_answer_to_the_bit(tmp_path):
    run = proxy_run(tmp_path / "proxy", random_alpha(1000, seed=0))
    average(run)
    # The official repository's recipe, word for word but for the path:
    domain_weights = torch.load(run / "doremi_domain_weights_1000.pt")
    total_weights = sum(d["domain_weights"] for d in domain_weights)
    avg_weights = total_weights / len(domain_weights)
    answer = json.loads((run / "weights.json").read_text())["domain_weights"]
    assert list(answer) == DOMAINS
    assert list(answer.values()) == avg_weights.tolist()


def test_newest_history_by_number_not_by_name(tmp_path):
    run = proxy_run(tmp_path / "proxy", [[0.2, 0.3, 0.5]] * 9)
    torch.save([{"step": t, "domain_weights": torch.tensor([1.0, 0, 0]).double()} for t in range(1, 11)],
               run / "doremi_domain_weights_10.pt")
    average(run)
    assert json.loads((run / "weights.json").read_text())["domain_weights"] == {"books": 1, "code": 0, "web": 0}


def test_seeds_mean_sd_and_provenance(tmp_path, capsys):
    first = proxy_run(tmp_path / "a", [[0.2, 0.4, 0.4], [0.4, 0.4, 0.2]], seed=1)  # averages 0.3, 0.4, 0.3
    second = proxy_run(tmp_path / "b", [[0.1, 0.8, 0.1], [0.1, 0.8, 0.1]], seed=2)  # averages 0.1, 0.8, 0.1
    average(first, second, f"--out_dir={tmp_path / 'out'}")
    written = json.loads((tmp_path / "out" / "weights.json").read_text())
    assert written["domain_weights"] == pytest.approx({"books": 0.2, "code": 0.6, "web": 0.2}, abs=1e-15)
    record = written["provenance"]
    assert record["sd_over_seeds"] == pytest.approx(
        {"books": math.sqrt(0.02), "code": math.sqrt(0.08), "web": math.sqrt(0.02)})  # |difference| / sqrt(2)
    assert record["largest_move"] == pytest.approx(0.3)  # books from 0.5 to 0.2, code from 0.3 to 0.6
    assert record["total_variation"] == pytest.approx(0.3)
    assert record["seeds"] == [1, 2]
    assert [run["reference_seed"] for run in record["runs"]] == [7, 7]
    assert record["tokenizer_sha256"] == "ab" * 32
    assert record["train_tokens"] == {"books": 600, "code": 300, "web": 100}
    assert record["reference"]["sampling_weights"] == {"web": 0.2, "books": 0.5, "code": 0.3}
    for key, value in {"steps": 2, "batch_size": 4, "block_size": 8, "step_size": 1.0, "smoothing": 1e-3}.items():
        assert record[key] == value
    assert record["proxy"]["n_params"] == 5000
    said = capsys.readouterr().out
    assert "another round is due" in said
    assert "total variation 0.400 on average, 0.400 at most" in said  # half of 0.2 + 0.4 + 0.2
    assert not (first / "weights.json").exists()


def test_convergence_is_said(tmp_path, capsys):
    average(proxy_run(tmp_path / "proxy", [[0.5005, 0.2995, 0.2]] * 3))  # moved by 5e-4 from the reference's 0.5
    assert "below 1e-3: the rounds have converged" in capsys.readouterr().out


def test_average_from_leaves_out_the_first_steps(tmp_path):
    run = proxy_run(tmp_path / "proxy", [[1.0, 0, 0]] * 2 + [[0, 0.25, 0.75]] * 3)
    average(run, "--average_from=0.4")  # of five steps, two
    written = json.loads((run / "weights.json").read_text())
    assert written["domain_weights"] == {"books": 0, "code": 0.25, "web": 0.75}
    assert written["provenance"]["average_from"] == 0.4


def test_unfinished_run_is_said(tmp_path, capsys):
    average(proxy_run(tmp_path / "proxy", random_alpha(3, seed=0), max_steps=8))
    assert "3 of 8 steps" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [1, 2, 1500])
def test_picture_is_a_png_that_shows_something(tmp_path, steps):
    from matplotlib.image import imread

    run = proxy_run(tmp_path / "proxy", random_alpha(steps, seed=3))
    average(run)
    assert (run / "weights.png").read_bytes().startswith(PNG)
    pixels = imread(run / "weights.png")[..., :3]
    assert pixels.shape[0] > 400 and pixels.shape[1] > 800
    assert 0.01 < (pixels < 0.9).any(axis=2).mean() < 0.5
    assert (pixels[:, -3:] == 1).all() and (pixels[-3:] == 1).all()  # nothing runs off the edge


def test_small_functions():
    assert running_average(np.array([[1.0, 0], [0, 1], [0.5, 0.5]])).tolist() == [[1, 0], [0.5, 0.5], [0.5, 0.5]]
    assert total_variation(np.array([0.5, 0.5, 0]), np.array([0.25, 0.5, 0.25])) == 0.25
    assert effective_domains(np.array([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])) == pytest.approx([4, 1, 2])
    middles, means = thin(np.arange(1.0, 7)[:, None], points=3)  # steps 1..6 in pairs
    assert middles.tolist() == [1.5, 3.5, 5.5] == means[:, 0].tolist()
    assert times(0.03, 0.09)[1:] == "3.0" and times(0.24, 0.02)[1:] == "12" and times(0.0, 0.1) == "new"
    found = headline(DOMAINS, np.array([0.5, 0.3, 0.2]), np.array([0.25, 0.3, 0.45]))
    assert found.startswith("DoReMi raises web from 20% to 45%") and "lowers books from 50% to 25%" in found


GOOD = [0.2, 0.3, 0.5]


@pytest.mark.parametrize(("entries", "named"), [
    (history((1, GOOD), (3, GOOD), (4, GOOD)), "step 2"),
    (history((1, GOOD), (2, GOOD)), "found 2"),
    (history((0, GOOD), (1, GOOD), (2, GOOD)), "step 1"),
    (history((1, GOOD), (2, [math.nan, 0.5, 0.5]), (3, GOOD)), "step 2"),
    (history((1, GOOD), (2, GOOD), (3, [0.6, 0.6, -0.2])), "step 3"),
    (history((1, GOOD), (2, GOOD), (3, [0.2, 0.2, 0.2])), "step 3"),
    (history((1, GOOD), (2, [0.5, 0.5]), (3, GOOD)), "(2,)"),
    ({"step": 1}, "cannot be read"),
])
def test_a_bad_history_is_refused(tmp_path, capsys, entries, named):
    run = proxy_run(tmp_path / "proxy", [GOOD] * 3)
    torch.save(entries, run / "doremi_domain_weights_3.pt")
    line = refused(capsys, run)
    assert "doremi_domain_weights_3.pt" in line and named in line
    assert not list(run.glob("weights.*"))


def test_bad_directories_are_refused(tmp_path, capsys):
    assert "config.json" in refused(capsys, tmp_path / "nowhere")
    run = proxy_run(tmp_path / "proxy", [GOOD] * 3)
    (run / "doremi_domain_weights_3.pt").write_bytes(b"PK\x03\x04 cut short")
    assert "cannot be read" in refused(capsys, run)
    (run / "doremi_domain_weights_3.pt").unlink()
    assert "no doremi_domain_weights_STEP.pt" in refused(capsys, run)
    assert "expected one of train_doremi.py" in refused(capsys, proxy_run(tmp_path / "large", [GOOD], stage="large"))
    (run / "config.json").write_text('{\n"stage": }')
    assert "line 2" in refused(capsys, run)
    (run / "config.json").write_text('{"stage": "proxy"}')
    assert "has no data, domains" in refused(capsys, run)
    unknown = {"out_dir": "r", "sampling_weights": {"books": 1.0, "codes": 0.0, "web": 0.0}, "seed": 1, "max_steps": 2}
    assert "code, codes" in refused(capsys, proxy_run(tmp_path / "other", [GOOD], reference=unknown))


def test_runs_that_differ_in_more_than_the_seed_are_refused(tmp_path, capsys):
    run = proxy_run(tmp_path / "a", [GOOD] * 3)
    assert "twice" in refused(capsys, run, run)
    names = ["books", "code", "news"]
    assert "domains" in refused(capsys, run, proxy_run(tmp_path / "b", [GOOD] * 3, domains=names))
    data = json.loads((run / "config.json").read_text())["data"]
    other = proxy_run(tmp_path / "c", [GOOD] * 3, data={**data, "tokenizer_sha256": "cd" * 32})
    assert "tokenizer_sha256" in refused(capsys, run, other)
    assert "has 2 steps" in refused(capsys, run, proxy_run(tmp_path / "d", [GOOD] * 2, max_steps=3))
    assert not list(tmp_path.glob("*/weights.*"))


def test_bad_flags_are_refused(tmp_path, capsys):
    run = proxy_run(tmp_path / "proxy", [GOOD] * 3)
    assert "--average_from" in refused(capsys, run, "--average_from=1")
    assert "--average_from" in refused(capsys, run, "--average_from=nan")
    assert "--average=0.5" in refused(capsys, run, "--average=0.5")  # no abbreviations
    (tmp_path / "file").write_text("")
    assert "in the way" in refused(capsys, run, f"--out_dir={tmp_path / 'file'}")
