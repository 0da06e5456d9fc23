"""The transformer: a Llama-style decoder that returns the loss of every token.

RMSNorm, rotary embeddings, SwiGLU, grouped-query attention, tied embeddings, no biases. It knows nothing of domains: it
maps token ids (B, T + 1) to token losses (B, T), and its caller decides how much each token counts.

Dimensions: B sequences, T tokens, D width, H query heads, G key/value heads, E head size, F hidden width, V vocabulary.

Parameters are kept in float32 and cast to the compute dtype where they are used. A frozen copy that is *stored* in the
compute dtype gives the same losses to the bit, without the casts.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common.cli import UserError

LOSS_CHUNK = 2**22  # logits alive at once in the loss on a CPU: 16 MB of float32, which stay in its cache


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    block_size: int  # T, the context in tokens
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    n_ffn: int

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise UserError(f"--{name}={value} must be at least 1")
        if self.n_embd % self.n_head or self.n_embd // self.n_head % 2:
            raise UserError(f"--n_embd={self.n_embd} must be n_head ({self.n_head}) times an even head size")
        if self.n_head % self.n_kv_head:
            raise UserError(f"--n_head={self.n_head} must be a multiple of n_kv_head ({self.n_kv_head})")


class Linear(nn.Linear):
    def __init__(self, n_in, n_out, std=0.02):
        super().__init__(n_in, n_out, bias=False)
        self.std = std  # of the initial weights

    def reset_parameters(self):
        """Draw nothing: `initial_parameters` does, and on the meta device PyTorch would import its compiler for it."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    std = 0.02

    def reset_parameters(self):
        """Draw nothing, as above."""


def residual_std(config):
    """Of the matrices that write into the residual stream, whose variance adds up over the blocks (GPT-2)."""
    return 0.02 / math.sqrt(2 * config.n_layer)


class RMSNorm(nn.Module):
    def __init__(self, n_embd):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-5)


def rotary_table(block_size, head_size, base=10_000.0):
    """Cosines and sines of the rotary embedding (Su et al. 2021, eq. 34): (2, T, E / 2) float64."""
    cpu = torch.device("cpu")  # also while a model is made on the meta device
    frequency = base ** -(torch.arange(0, head_size, 2, dtype=torch.float64, device=cpu) / head_size)
    angle = torch.outer(torch.arange(block_size, dtype=torch.float64, device=cpu), frequency)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x, rotary):
    """x: (B, T, H, E).  Pairs are (first half, second half) of the head, as in GPT-NeoX; angles are never in bf16."""
    cos, sin = rotary[:, : x.size(1), None, :]  # (T, 1, E / 2) each
    a, b = x.to(rotary.dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_size = config.n_embd // config.n_head
        self.qkv = Linear(config.n_embd, (config.n_head + 2 * config.n_kv_head) * self.head_size)
        self.out = Linear(config.n_embd, config.n_embd, residual_std(config))

    def forward(self, x, rotary):
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_size)  # (B, T, H + 2G, E)
        q, k, v = qkv.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=2)
        q, k = rotate(q, rotary), rotate(k, rotary)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H or G, T, E)
        grouped = self.n_kv_head != self.n_head
        if grouped and q.is_cuda and q.element_size() > 2:  # no fused kernel there takes groups in float32
            k, v = (t.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for t in (k, v))
            grouped = False
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.out(y.transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)), gate and up in one matrix product."""

    def __init__(self, config):
        super().__init__()
        self.gate_up = Linear(config.n_embd, 2 * config.n_ffn)
        self.down = Linear(config.n_ffn, config.n_embd, residual_std(config))

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = RMSNorm(config.n_embd)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.n_embd)
        self.ffn = FeedForward(config)
        self.recompute = False  # in the backward pass, instead of keeping the activations

    def forward(self, x, rotary):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.residual, x, rotary, use_reentrant=False)
        return self.residual(x, rotary)

    def residual(self, x, rotary):
        x = x + self.attention(self.attention_norm(x), rotary)
        return x + self.ffn(self.ffn_norm(x))


def chunk_loss(x, weight, targets):
    """x (N, D), weight (V, D), targets (N,) -> log of the softmax's denominator, logit of the target: (N,) each."""
    logits = full_precision(x @ weight.T)  # (N, V)
    return logits.logsumexp(-1), logits.gather(-1, targets[:, None])[:, 0]


def chunk_gradients(x, weight, targets, log_z, grad_loss):
    """Gradients of a chunk's losses: by x (N, D) and by weight (V, D)."""
    p = (full_precision(x @ weight.T) - log_z[:, None]).exp()  # the softmax: (N, V)
    onehot = torch.arange(len(weight), device=x.device) == targets[:, None]
    grad_logits = ((p - onehot.to(p.dtype)) * grad_loss[:, None]).to(x.dtype)
    return grad_logits @ weight, grad_logits.T @ x


class TokenLoss(torch.autograd.Function):
    """Cross-entropy of a linear head, token by token, with the logits of only a chunk of tokens alive at a time.

    x (B, T, D) in the compute dtype, weight (V, D), targets (B, T) int64 -> losses (B, T) in nats, float32 or float64.
    Nothing of size (B * T, V) is kept for the backward pass: it computes each chunk's logits again, one more matrix
    product of the head in exchange for B * T * V floats of memory traffic.  loss, gradients: chunk_loss and
    chunk_gradients, or these compiled.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, loss, gradients):
        w = weight.to(x.dtype)
        chunk = loss_chunk(x.device, len(w))
        log_z, target_logit = [], []
        for x_c, targets_c in zip(x.flatten(0, 1).split(chunk), targets.flatten().split(chunk)):
            log_z_c, target_logit_c = loss(x_c, w, targets_c)
            log_z.append(log_z_c)
            target_logit.append(target_logit_c)
        log_z = torch.cat(log_z)
        ctx.save_for_backward(x, weight, targets, log_z)
        ctx.gradients = gradients
        return log_z.view(targets.shape) - torch.cat(target_logit).view(targets.shape)

    @staticmethod
    def backward(ctx, grad_loss):
        x, weight, targets, log_z = ctx.saved_tensors
        w = weight.to(x.dtype)
        chunk = loss_chunk(x.device, len(w))
        grad_x, grad_weight = [], torch.zeros_like(weight)
        parts = zip(*(t.split(chunk) for t in (x.flatten(0, 1), targets.flatten(), log_z, grad_loss.flatten())))
        for x_c, targets_c, log_z_c, grad_c in parts:
            grad_x_c, grad_weight_c = ctx.gradients(x_c, w, targets_c, log_z_c, grad_c)
            grad_x.append(grad_x_c)
            grad_weight += grad_weight_c
        return torch.cat(grad_x).view_as(x), grad_weight, None, None, None


def loss_chunk(device, vocab_size):
    """Tokens whose logits are computed at once. A GPU wants few large products: 1 GB of logits there."""
    return max(1, (LOSS_CHUNK if device.type == "cpu" else 64 * LOSS_CHUNK) // vocab_size)


def full_precision(x):
    """Losses and norms are summed in float32, or in float64 when everything is float64."""
    return x if x.dtype == torch.float64 else x.float()


class Transformer(nn.Module):
    """config: ModelConfig; dtype: the compute dtype (bfloat16, float32 or float64); recompute: activation
    checkpointing.  The initial parameters depend on the caller's torch.manual_seed."""

    def __init__(self, config, dtype=torch.float32, recompute=False):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embedding = Embedding(config.vocab_size, config.n_embd)  # tied: also the output head
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)
        self.loss, self.gradients = chunk_loss, chunk_gradients
        self.register_buffer("rotary", self.make_rotary(), persistent=False)
        for block in self.blocks:
            block.recompute = recompute
        if dtype == torch.float64:
            self.double()
        if not self.norm.weight.is_meta:
            with torch.no_grad():
                for name, value in self.initial_parameters():
                    self.get_parameter(name).copy_(value)

    def make_rotary(self):
        table = rotary_table(self.config.block_size, self.config.n_embd // self.config.n_head)
        return table if self.dtype == torch.float64 else table.float()

    def to_empty(self, *, device, recurse=True):
        """Allocate a model that was made on the meta device.  Parameters are undefined, the rotary table is not."""
        super().to_empty(device=device, recurse=recurse)
        self.rotary = self.make_rotary().to(device)
        return self

    def initial_parameters(self):
        """Yield (name, value) of every parameter, on the CPU: normal with the std of its module; norms are 1.

        A module of another kind must be given its own rule here.
        """
        for prefix, module in self.named_modules():
            for name, parameter in module.named_parameters(prefix, recurse=False):
                value = torch.ones(parameter.shape)
                if not isinstance(module, RMSNorm):
                    value.normal_(0.0, module.std)
                yield name, value

    def forward(self, tokens):
        """tokens: (B, T + 1) int64, T <= block_size.  Return token losses (B, T) in nats, float32 (or float64)."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.embedding(inputs).to(self.dtype)  # (B, T, D)
        for block in self.blocks:
            x = block(x, self.rotary)
        return TokenLoss.apply(self.norm(x), self.embedding.weight, targets, self.loss, self.gradients)

    def fingerprint(self):
        """Hex digest of the parameters as they are stored."""
        digest = hashlib.sha256()
        for name, parameter in self.named_parameters():
            digest.update(name.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def loss_chunks(self, tokens, device):
        """Into how many chunks the loss of so many tokens is cut."""
        return math.ceil(tokens / loss_chunk(device, self.config.vocab_size))

    def compile_parts(self):
        """Compile the blocks and the loss of a chunk, each by itself: what stands between them may break a graph."""
        for block in self.blocks:
            block.compile(dynamic=False, fullgraph=True)
        self.loss = torch.compile(chunk_loss, dynamic=False, fullgraph=True)
        self.gradients = torch.compile(chunk_gradients, dynamic=False, fullgraph=True)

    @classmethod
    def load(cls, config, parameters, dtype):
        """The model of a finished run.  config: its config.json; parameters: those of its checkpoint, which are not
        copied.  Raises UserError where they do not fit."""
        with torch.device("meta"):  # no initial values are drawn
            model = cls(ModelConfig(**config["model"]), dtype)
        try:
            model.load_state_dict(parameters, assign=True)
        except RuntimeError:
            raise UserError(f"the checkpoint does not match the shape in its config.json: {config['model']}") from None
        return model

    def freeze(self):
        """Store the parameters in the compute dtype, without gradients: the same losses to the bit, no more casts."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(self.dtype, copy=True)  # lets go of a mapped checkpoint
        return self.requires_grad_(False)

    def n_params(self):
        """All parameters; the tied embedding counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self):
        """Floating-point operations of a training step per token: forward 1 part, backward 2 (PaLM, appendix B).

        6 per weight of every matrix product (the head counts, the look-up does not) + 12 L D T of attention.
        """
        matrices = sum(parameter.numel() for parameter in self.parameters() if parameter.dim() == 2)
        return 6 * matrices + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size
