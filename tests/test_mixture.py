"""tools/mixture.py: weights and epochs, an answer on another reference, other trainers' words, and what is refused."""

import json

import pytest
import yaml
from conftest import printed, refused, run_here, write_dataset


def toy_data(path, tokens):
    """A data set in which these domains have these numbers of training tokens."""
    return write_dataset(path, {name: ([1] * n, [1] * 9) for name, n in tokens.items()}, tokenizer="ab" * 8)


def answer_file(path, answer, reference):
    provenance = {"reference_weights": reference, "tokenizer_sha256": "ab" * 32}
    path.write_text(json.dumps({"domain_weights": answer, "provenance": provenance}))
    return path


ANSWER, REFERENCE = {"books": 0.2, "code": 0.3, "web": 0.5}, {"books": 0.5, "code": 0.3, "web": 0.2}  # tilts .4, 1, 2.5


def moved(tmp_path, *args):
    said = run_here("tools/mixture.py", *args, f"--out={tmp_path / 'out.json'}").stderr
    content = json.loads((tmp_path / "out.json").read_text())
    (tmp_path / "out.json").unlink()
    return content["domain_weights"], content["provenance"], said


def test_weights_tokens_and_epochs_side_by_side(tmp_path):
    data = toy_data(tmp_path / "data", {"books": 100, "code": 400})
    _, rows = printed("tools/mixture.py", data, "temperature:0.5", "token_count", "1,1", "--tokens=900")
    # 1/3, 1/5 and 1/2 of 900 are 300, 180 and 450 tokens
    assert rows["books"] == ["100", "0.3333", "300", "3.0", "0.2000", "180", "1.8", "0.5000", "450", "4.5!"]
    assert rows["code"] == ["400", "0.6667", "600", "1.5", "0.8000", "720", "1.8", "0.5000", "450", "1.1"]


def test_an_answer_is_moved_onto_another_reference(tmp_path):
    path = answer_file(tmp_path / "weights.json", ANSWER, REFERENCE)
    data = toy_data(tmp_path / "data", {"web": 90, "books": 30, "code": 60})
    weights, provenance, said = moved(tmp_path, data, path, "--onto=uniform")
    assert weights == pytest.approx({"web": 2.5 / 3.9, "books": 0.4 / 3.9, "code": 1 / 3.9}) and said == ""
    assert provenance["reference_weights"] == pytest.approx(dict.fromkeys(ANSWER, 1 / 3))  # it can be moved again
    assert moved(tmp_path, data, path, "--onto=0.2,0.5,0.3")[0] == pytest.approx(ANSWER)  # the old reference


def test_domains_that_come_and_go(tmp_path):
    """The run knew no news and saw no code: they keep their reference weights; books and web share the other half."""
    path = answer_file(tmp_path / "weights.json", ANSWER, {"books": 0.5, "web": 0.5, "code": 0.0})  # tilts 0.4 and 1
    data = toy_data(tmp_path / "data", {"news": 20, "books": 30, "code": 30, "web": 20})
    weights, _, said = moved(tmp_path, data, path, "--onto=token_count")
    # (0.3 * 0.4, 0.2 * 1) is (0.12, 0.2), scaled to 0.3 + 0.2
    assert weights == pytest.approx({"news": 0.2, "code": 0.3, "books": 0.1875, "web": 0.3125})
    assert "note: news: not in the old" in said and "note: code: not in the old" in said
    *_, said = moved(tmp_path, toy_data(tmp_path / "fewer", {"news": 50, "web": 50}), path, "--onto=uniform")
    assert "note: books: not in this data set" in said
    refused(tmp_path, ["--onto"], "tools/mixture.py", toy_data(tmp_path / "x", {"news": 50}), path, "--onto=uniform")


def test_other_trainers_words(tmp_path):
    """Names keep their marks, and a domain of weight 0 is left out."""
    data = toy_data(tmp_path / "data", {"a b": 100, "c (d)": 300, "none": 100})
    words = {trainer: run_here("tools/mixture.py", data, "1,3,0", f"--as={trainer}").stdout
             for trainer in ("megatron", "nanotron", "levanter", "datasets")}
    assert words["megatron"] == "--data-path 0.25 'a b' 0.75 'c (d)'\n"
    assert yaml.safe_load(words["nanotron"]) == {"dataset_folder": ["a b", "c (d)"], "dataset_weights": [0.25, 0.75]}
    assert yaml.safe_load(words["levanter"]) == {"train_weights": {"a b": 0.25, "c (d)": 0.75}}
    # A draw is a document: one of 100 tokens and one of 300, so 0.25 / 100 to 0.75 / 300
    known = {"data": {"a b": 1, "c (d)": 2}, "interleave_datasets": lambda sets, **options: (sets, options)}
    assert eval(words["datasets"], known) == (
        [1, 2], {"probabilities": [0.5, 0.5], "stopping_strategy": "all_exhausted"})
    (data / "none/train.bin").rename(tmp_path / "none_text_document.bin")  # linked tokens are named by their file
    (data / "none/train.bin").symlink_to(tmp_path / "none_text_document.bin")
    said = run_here("tools/mixture.py", data, "0,0,1", "--as=megatron").stdout
    assert said == f"--data-path 1.0 {tmp_path}/none_text_document\n"


@pytest.mark.parametrize("mentions, args", [
    (["unimax", "--tokens"], ["unimax:4"]), (["one mixture"], ["uniform", "token_count", "--as=megatron"]),
    (["exists"], ["uniform", "--out=weights.json"]), (["plain.json"], ["plain.json", "--onto=uniform"]),
    (["zero.json"], ["zero.json", "--onto=uniform"]), (["odd.json"], ["odd.json", "--onto=uniform"]),
    (["weights"], ["0.5,0.5"])])
def test_what_is_refused(tmp_path, mentions, args):
    toy_data(tmp_path / "data", {"books": 100, "code": 100, "web": 100})
    answer_file(tmp_path / "weights.json", ANSWER, REFERENCE)
    (tmp_path / "plain.json").write_text(json.dumps(ANSWER))
    answer_file(tmp_path / "zero.json", ANSWER, dict.fromkeys(ANSWER, 0))
    (tmp_path / "odd.json").write_text(json.dumps({"domain_weights": ANSWER, "provenance": "by hand"}))
    refused(tmp_path, mentions, "tools/mixture.py", "data", *args, cwd=tmp_path)
