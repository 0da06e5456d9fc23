"""Stage 3: the answer, what is said of it, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch

import average_weights
import cli
import trust
from average_weights import headline, running_average, thin, times
from trust import effective_domains, total_variation

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
                  "update_after": 0, "seed": seed},
        "reference": {"out_dir": "checkpoints/reference", "sampling_weights": {"web": 0.2, "books": 0.5, "code": 0.3},
                      "seed": 7, "max_steps": 20, "batch_size": 6},
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
    assert record["spread"]["deviation"] == pytest.approx(
        {"books": math.sqrt(0.02), "code": math.sqrt(0.08), "web": math.sqrt(0.02)})  # |difference| / sqrt(2)
    assert record["spread"]["total_variation"] == record["spread"]["total_variation_most"] == pytest.approx(0.4)
    assert record["spread"]["between_halves"] == pytest.approx(0.1)  # mean alphas (.15, .6, .25), (.25, .6, .15)
    assert record["converged"] is False
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
    assert "another round would move within the noise" in said  # code moved by 0.3, its sd is 0.28
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


def autoregressive(rng, phi, steps, k):
    """x_t = phi * x_{t-1} + e_t, e of variance 1, in its stationary state: (steps, k)."""
    x = np.empty((steps, k))
    x[0] = rng.standard_normal(k) / math.sqrt(1 - phi**2)
    for t, noise in enumerate(rng.standard_normal((steps - 1, k)), start=1):
        x[t] = phi * x[t - 1] + noise
    return x


@pytest.mark.parametrize(("phi", "tolerance"), [(0.0, 0.1), (0.9, 0.25)])
def test_standard_error_of_a_known_series(phi, tolerance):
    """The mean of T steps of an AR(1) series has the standard error 1 / ((1 - phi) sqrt(T)); phi = 0 is white noise."""
    x = autoregressive(np.random.default_rng(0), phi, 10_000, 4)
    error, length = trust.block_standard_error(x)
    assert error == pytest.approx(np.full(4, 1 / ((1 - phi) * 100)), rel=tolerance)
    assert 8 <= length <= (8 if phi == 0 else 120)  # the autocorrelation 0.9 ** lag falls below 1/e at lag 10
    trend = np.linspace(0, 1, 10_000)[:, None]  # a drift that a plain block bootstrap would take for error
    assert trust.block_standard_error(x + trend)[0] == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_short_and_constant_runs_have_a_standard_error(steps):
    error, length = trust.block_standard_error(np.full((steps, 3), 1 / 3))
    assert error == pytest.approx(np.zeros(3), abs=1e-15) and 1 <= length <= max(1, steps // 4)


def test_expected_total_variation_is_that_of_resampled_answers():
    """Two answers with independent normal errors differ by what the single run's spread says."""
    alpha = np.random.default_rng(1).dirichlet([5, 3, 2], size=4000)
    said = trust.measure_spread(DOMAINS, alpha.mean(axis=0, keepdims=True), alpha[None])
    others = np.random.default_rng(2).dirichlet([5, 3, 2], size=(400, 4000)).mean(axis=1)
    found = np.mean([total_variation(p, q) for p, q in zip(others[::2], others[1::2])])
    assert said["total_variation"] == pytest.approx(found, rel=0.15)


def test_what_alpha_did():
    alpha = np.array([[1.0, 0, 0]] * 2 + [[0.5, 0.5, 0]] * 2 + [[0, 0.25, 0.75]] * 4)
    assert trust.between_halves(alpha) == 0.75  # averages 0.75, 0.25, 0 and 0, 0.25, 0.75
    assert trust.between_halves(alpha[:1]) == 0
    frozen = np.concatenate([np.full((4, 3), 1 / 3), alpha])  # the steps before --update_after are no half
    assert trust.measure_spread(DOMAINS, frozen[:1], frozen[None], frozen=4)["between_halves"] == 0.75
    assert trust.near_one_hot(alpha[None]) == 0.25
    assert trust.near_one_hot(np.array([[0.9, 0.1]])) == 0  # more than 0.9
    assert trust.quarters(alpha[None]) == pytest.approx([1, 2, *[effective_domains(alpha[-1])] * 2])
    assert len(trust.quarters(alpha[None, :1])) == 4
    floor = 0.03 / 3
    low, high = 1.005 * floor, 1.02 * floor
    steps = [[0.5, low, high]] * 3 + [[0.5, low, low]] * 1  # domain 2 is at the floor in a quarter of these
    assert trust.at_floor(np.array([[[0.5, 0.2, low]] * 12 + steps]), 0.03).tolist() == [False, True, False]
    assert trust.at_floor(np.array([[[0.5, 0.5, 0.0]]]), 0.0).tolist() == [False, False, True]


def test_cost_of_the_papers_search():
    """280M for 8B at equal tokens: (6 + 8) * 280e6 / (6 * 8e9) = 8.17%, the paper's 8%."""
    tokens = 512 * 1024 * 200_000
    flops = trust.search_flops(280e6, tokens, tokens)
    assert flops / (6 * 8e9 * tokens) == pytest.approx(0.0817, abs=5e-5)
    arguments = (DOMAINS, np.ones(3), np.ones(3) / 3, 280e6, flops, tokens)
    (line,) = trust.of_large_run(*arguments, 8e9, None)
    assert "8.2% of a large run of 8e+09 parameters and 1.05e+11 tokens, the proxy's (--large_tokens)" in line
    (line,) = trust.of_large_run(*arguments, None, None)
    assert "23% or 7.8% of a large run of 10 or 30 times the parameters" in line  # 14 / 60 and 14 / 180


def test_cost_counts_every_proxy_and_a_shared_reference_once(tmp_path, capsys):
    runs = [proxy_run(tmp_path / name, random_alpha(5, seed), seed=seed) for seed, name in enumerate("abc")]
    average(*runs, "--large_params=1e6", "--large_tokens=1e5")
    flops = json.loads((runs[0] / "weights.json").read_text())["provenance"]["search_flops"]
    assert flops == 5000 * 8 * (6 * 20 * 6 + 3 * 8 * 5 * 4)  # 20 steps of 6 sequences; 5 of 4, three times
    assert f"{flops:.3g} FLOPs" in capsys.readouterr().out


def test_repeated_domains_and_their_caps(tmp_path, capsys):
    def said(large_tokens):
        tokens, answer = np.array([600, 300, 100]), np.array([0.2, 0.3, 0.5])
        return trust.of_large_run(DOMAINS, tokens, answer, 1e6, 1e9, 1e6, None, large_tokens)

    line, _ = said(900)  # 180, 270 and 450 tokens
    assert "repeated          web 4.5 times (4 at weight 0.44): lower it to that" in line  # 400 of 900
    line, _ = said(800)
    assert line == "repeated          no domain more than 4 times, web 4.0 times"
    line, _ = said(1e4)
    assert "web 50.0 times (4 at weight 0.04), code 10.0 times (4 at weight 0.12): no weights keep all at 4" in line
    assert "the mean is 10.0; find more text" in line
    assert len(said(None)) == 1
    average(proxy_run(tmp_path / "proxy", [[0.2, 0.3, 0.5]] * 4), "--large_tokens=9e2")
    assert "web 4.5 times" in capsys.readouterr().out


def test_advice_on_alpha_comes_and_goes():
    answer = np.array([0.4, 0.3, 0.3])

    def said(hot, floored):
        alphas = np.array([[[0.98, 0.01, 0.01]] * hot + [[0.4, 0.3, 0.3]] * (100 - hot)])
        alphas[0, 100 - floored :] = [0.6, 0.399, 0.001 / 3]
        return "\n".join(trust.of_alpha(DOMAINS, answer, alphas, smoothing=1e-3))

    assert "10% of the steps (one domain has over 90% of alpha)" in said(10, 0) and "step_size" not in said(10, 0)
    assert "11% of the steps" in said(11, 0) and "use a smaller --step_size" in said(11, 0)
    assert "at the floor" not in said(0, 12)  # 12 of the last 25 steps
    assert "at the floor      web: " in said(0, 13)


def test_advice_on_rounds_comes_and_goes():
    reference = np.array([0.5, 0.3, 0.2])

    def said(move, deviation, halves, **spread):
        spread = {"deviation": dict.fromkeys(DOMAINS, deviation), "total_variation": 0.1, "between_halves": halves,
                  **(spread or {"block_steps": 9})}
        return "\n".join(trust.moves(DOMAINS, reference, reference + np.array([-move, move, 0]), spread))

    assert "another round is due" in said(0.021, 0.01, 0) and "noise" not in said(0.021, 0.01, 0)
    assert "within twice its standard error (0.01): another round would move within the noise" in said(0.019, 0.01, 0)
    assert "within twice its sd over seeds (0.01)" in said(0.019, 0.01, 0, total_variation_most=0.2)
    assert "the rounds have converged" in said(0.0009, 0.01, 0)
    assert "from blocks of 9 steps" in said(0.02, 0.01, 0)
    assert "blocks" not in said(0.02, 0.01, 0, total_variation_most=0.2)
    assert "train the proxy for longer" in said(0.02, 0.01, 0.021)  # the total variation of the move is 0.02
    assert "train the proxy for longer" not in said(0.02, 0.01, 0.019)


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
    unknown = {"out_dir": "r", "sampling_weights": {"books": 1.0, "codes": 0.0, "web": 0.0}, "seed": 1, "max_steps": 2,
               "batch_size": 4}
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
    for flag in ("--large_tokens", "--large_params"):
        for value in ("0", "-1e9", "nan", "inf", "8 billion"):
            assert flag in refused(capsys, run, f"{flag}={value}")
    (tmp_path / "file").write_text("")
    assert "in the way" in refused(capsys, run, f"--out_dir={tmp_path / 'file'}")
