"""The transformer: sizes, losses, gradients, and what it must not see or keep."""

import math
import re

import pytest
import torch
from conftest import ROOT
from oracle import token_losses

import model
import train_reference
from common import ranks
from model import ModelConfig, Transformer

SMALL = ModelConfig(vocab_size=61, block_size=12, n_layer=2, n_head=4, n_kv_head=2, n_embd=24, n_ffn=40)
SHAPE = ("block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_ffn")


def build(config=SMALL, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return Transformer(config, dtype)


def random_tokens(b=3, t=SMALL.block_size, vocab_size=SMALL.vocab_size, seed=1):
    return torch.randint(vocab_size, (b, t + 1), generator=torch.Generator().manual_seed(seed))


def oracle(transformer, tokens):
    """The losses of the oracle, which computes all logits at once, every head by itself: (B, T)."""
    return token_losses(dict(transformer.named_parameters()), tokens, SMALL.n_head, SMALL.n_kv_head)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.txt")), ids=lambda path: path.stem)
def test_heads_of_the_configs(path, monkeypatch):
    """The sizes in the head of each file against the flags below it."""
    head = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    monkeypatch.setattr("sys.argv", ["train.py", f"@{path}"])
    args = train_reference.parse_args("", train_reference.DEFAULTS)
    vocab_size = int(re.search(r"parameters with ([\d,]+) tokens", head)[1].replace(",", ""))
    with torch.device("meta"):
        transformer = Transformer(ModelConfig(vocab_size, **{name: getattr(args, name) for name in SHAPE}))
    tokens = args.max_steps * args.batch_size * args.block_size
    assert f"{transformer.n_params():,} parameters with" in head and f"steps, {tokens:,} tokens" in head
    assert f"{transformer.flops_per_token() * tokens:.1e}".replace("e+", "e") in head
    memory = float(re.search(r"memory: ([\d.]+) GB", head)[1])
    assert 16 * transformer.n_params() / 1e9 == pytest.approx(memory, rel=0.015)
    assert args.batch_size % (8 * args.micro_batch_size) == 0  # 8 GPUs


def test_parameters_and_flops_by_hand():
    """V 61, T 12, L 2, H 4, G 2, D 24, E 6, F 40."""
    block = 24 * (4 + 2 * 2) * 6 + 24 * 24 + 24 * 2 * 40 + 40 * 24  # qkv, out, gate and up, down
    assert block == 1152 + 576 + 1920 + 960 == 4608
    matrices = 61 * 24 + 2 * block  # the tied embedding as head
    assert build().n_params() == matrices + 24 * (2 * 2 + 1)  # and five norms
    assert build().flops_per_token() == 6 * matrices + 12 * 2 * 24 * 12 == 70_992


@pytest.mark.parametrize("chunk_tokens", [1, 7, 36, 1000])
def test_losses_are_the_oracles(chunk_tokens, monkeypatch):
    """So no token sees a later one, and two query heads share a key head."""
    monkeypatch.setattr(model, "LOSS_CHUNK", chunk_tokens * SMALL.vocab_size)  # 36 tokens: 36, 6, 1 and 1 chunks
    transformer, tokens = build(), random_tokens()
    transformer.embedding.weight.data *= 50  # far from uniform: losses between 0 and tens of nats
    losses = transformer(tokens)
    assert losses.shape == (3, 12) and losses.dtype == torch.float64 and losses.max() > 10
    torch.testing.assert_close(losses, oracle(transformer, tokens), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(transformer(tokens[:, :6]), losses[:, :5], rtol=0, atol=1e-12)  # a shorter sequence


@pytest.mark.parametrize("dtype, loss_bound, bound", [
    (torch.float64, 1e-12, 1e-12), (torch.float32, 2e-5, 1e-4), (torch.bfloat16, 0.05, 0.05)])
def test_losses_and_gradients_in_every_precision(dtype, loss_bound, bound, monkeypatch):
    """Against the oracle in float64, tokens weighted unequally, relative to the largest entry of each gradient."""
    monkeypatch.setattr(model, "LOSS_CHUNK", 10 * SMALL.vocab_size)  # 36 tokens: chunks of 10, 10, 10, 6
    exact, ours, tokens = build(), build(dtype=dtype), random_tokens()
    ours.load_state_dict(exact.state_dict())
    weight = torch.linspace(0.1, 2.0, 36, dtype=torch.float64).view(3, 12)
    expected, losses = oracle(exact, tokens), ours(tokens)
    assert (losses - expected).abs().max() < loss_bound and losses.dtype != torch.bfloat16  # summed in float32 at least
    (weight * expected).sum().backward()
    (weight * losses).sum().backward()
    for (name, wanted), found in zip(exact.named_parameters(), ours.parameters()):
        assert (found.grad.double() - wanted.grad).abs().max() < bound * wanted.grad.abs().max(), name


def test_no_logits_are_kept(monkeypatch):
    """The largest tensor that is kept is the embedding; the logits would be 32 times that."""
    monkeypatch.setattr(model, "LOSS_CHUNK", 16 * 4096)
    config = ModelConfig(vocab_size=4096, block_size=64, n_layer=1, n_head=1, n_kv_head=1, n_embd=8, n_ffn=8)
    transformer, kept = build(config, torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        transformer(random_tokens(4, 64, 4096))
    assert max(t.numel() for t in kept) == 4096 * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_frozen_copy_gives_the_same_losses_to_the_bit(dtype):
    transformer, tokens = build(dtype=dtype), random_tokens()
    losses, frozen = transformer(tokens).detach(), transformer.freeze()
    assert torch.equal(frozen(tokens), losses) and not frozen(tokens).requires_grad
    assert all(p.dtype == dtype for p in frozen.parameters())


def test_a_model_from_the_meta_device_is_the_same():
    whole, machine = build(), ranks.Machine(torch.device("cpu"), torch.float64, torch.float64, micro_batch_size=1)
    loaded = Transformer.load({"model": vars(SMALL)}, whole.state_dict(), torch.float64)
    assert torch.equal(loaded(random_tokens()), whole(random_tokens()))
    assert loaded.norm.weight.data_ptr() == whole.norm.weight.data_ptr()
    with torch.device("meta"):
        placed = Transformer(SMALL, torch.float64)
    torch.manual_seed(0)
    assert torch.equal(ranks.place(placed, machine, compiled=False)(random_tokens()), whole(random_tokens()))


def test_initial_parameters_have_the_deviations_of_gpt2():
    config = ModelConfig(vocab_size=500, block_size=8, n_layer=8, n_head=2, n_kv_head=2, n_embd=64, n_ffn=64)
    for name, value in build(config, torch.float32).state_dict().items():
        if value.dim() == 1:
            assert (value == 1).all()
        else:  # the standard deviation of n numbers has an error of 1 / sqrt(2 n)
            std = 0.02 / 4 if name.endswith(("out.weight", "down.weight")) else 0.02
            assert value.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * value.numel())), name
