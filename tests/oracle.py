"""An oracle: DoReMi's Algorithm 1 written a second time, from the formulas, with nothing of the product in it.

The whole global batch at once, one process, float64, every sum over domains a loop. Nothing is fused, chunked, cached,
split or overlapped. It is told the batches, the reference's and the proxy's initial parameters, and the flags.
"""

import math

import torch

# For a rule of yours behind a flag of train_doremi.py: {"name": value}. test_exactness.py and test_resume.py give these
# to the product, and to the oracle, which finds them in `flags`. Leave it empty, and the same tests prove that your
# defaults change nothing.
EXTRA_FLAGS = {}


def token_losses(p, tokens, n_head, n_kv_head):
    """-log p(next token) of every position.  p: {name: parameter}; tokens (B, T + 1) -> (B, T) nats."""
    x = p["embedding.weight"][tokens[:, :-1]]
    T, E = x.size(1), x.size(2) // n_head
    n_layer = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))
    for i in range(n_layer):
        w = {name.removeprefix(f"blocks.{i}."): value for name, value in p.items() if name.startswith(f"blocks.{i}.")}

        # Attention, head by head. Head h reads key/value head h // (n_head / n_kv_head).
        h = normalized(x, w["attention_norm.weight"])
        q_rows, k_rows, v_rows = w["attention.qkv.weight"].split([n_head * E, n_kv_head * E, n_kv_head * E])
        heads = []
        for head in range(n_head):
            group = head // (n_head // n_kv_head)
            q = rotated(h @ q_rows[head * E : (head + 1) * E].T)  # (B, T, E)
            k = rotated(h @ k_rows[group * E : (group + 1) * E].T)
            v = h @ v_rows[group * E : (group + 1) * E].T
            score = q @ k.transpose(1, 2) / math.sqrt(E)  # (B, T, T)
            past = torch.ones(T, T).tril().bool()
            heads.append(score.masked_fill(~past, -math.inf).softmax(-1) @ v)
        x = x + torch.cat(heads, dim=-1) @ w["attention.out.weight"].T

        # SwiGLU
        h = normalized(x, w["ffn_norm.weight"])
        gate, up = (h @ half.T for half in w["ffn.gate_up.weight"].chunk(2))
        x = x + (gate * torch.sigmoid(gate) * up) @ w["ffn.down.weight"].T

    logits = normalized(x, p["norm.weight"]) @ p["embedding.weight"].T  # (B, T, V)
    log_probability = logits - logits.exp().sum(-1, keepdim=True).log()
    return -log_probability.gather(-1, tokens[:, 1:, None])[:, :, 0]


def normalized(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def rotated(x):
    """Position t turns the pair (x_j, x_{j + E/2}) by the angle t * 10000^(-2j/E).  x: (B, T, E)."""
    T, E = x.shape[1:]
    out = torch.empty_like(x)
    for j in range(E // 2):
        angle = torch.arange(T, dtype=x.dtype) * 10_000.0 ** (-2 * j / E)
        a, b = x[..., j], x[..., j + E // 2]
        out[..., j] = a * angle.cos() - b * angle.sin()
        out[..., j + E // 2] = a * angle.sin() + b * angle.cos()
    return out


def learning_rate(t, flags):
    """Linear to the peak at the end of warm-up, then down to min_lr at the last step."""
    peak, low, warmup, last = flags["learning_rate"], flags["min_lr"], flags["warmup_steps"], flags["max_steps"]
    if t <= warmup:
        return peak * t / warmup
    fraction = (t - warmup) / (last - warmup)
    if flags["lr_schedule"] == "exponential":
        return peak * (low / peak) ** fraction
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * fraction))


def doremi(initial, reference, batches, k, flags):
    """Algorithm 1.  initial, reference: {name: float64 parameter}; batches: [(tokens (B, T + 1), domain (B,))];
    flags: those of the run.

    Returns per step "alpha" and "excess" (T, K), "loss" (T,), "grad_norm" (T,), "gradients" [{name: tensor}], "absent"
    (domains without a sequence, summed over steps), and at the end "model" {name: tensor} and "alpha_bar" (K,).
    """
    shape = {name: flags[name] for name in ("n_head", "n_kv_head")}
    theta = {name: value.double().clone() for name, value in initial.items()}
    reference = {name: value.double() for name, value in reference.items()}
    first_moment = {name: torch.zeros_like(value) for name, value in theta.items()}
    second_moment = {name: torch.zeros_like(value) for name, value in theta.items()}
    alpha = [1 / k] * k
    excess = [0.0] * k
    out = {"alpha": [], "excess": [], "loss": [], "grad_norm": [], "gradients": [], "absent": 0}
    for t, (tokens, domain) in enumerate(batches, start=1):
        theta = {name: value.detach().requires_grad_() for name, value in theta.items()}
        loss = token_losses(theta, tokens, **shape)
        with torch.no_grad():
            reference_loss = token_losses(reference, tokens, **shape)

        # lambda_t: an absent domain keeps its last
        members = [[b for b in range(len(tokens)) if domain[b] == i] for i in range(k)]
        for i in range(k):
            if members[i]:
                clipped = [max(a - b, 0.0) for s in members[i]
                           for a, b in zip(loss[s].tolist(), reference_loss[s].tolist())]
                excess[i] = math.fsum(clipped) / len(clipped)
            else:
                out["absent"] += 1

        # alpha'_t, then alpha_t
        raised = [alpha[i] * math.exp(flags["step_size"] * excess[i]) for i in range(k)]
        c = flags["smoothing"]
        alpha = [(1 - c) * raised[i] / math.fsum(raised) + c / k for i in range(k)]

        # The gradient of sum_i alpha_t[i] * mean loss of domain i
        objective = sum(alpha[i] * loss[members[i]].mean() for i in range(k) if members[i])
        gradients = dict(zip(theta, torch.autograd.grad(objective, list(theta.values()))))

        # AdamW on the clipped gradient (PyTorch's clipping divides by norm + 1e-6)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        factor = min(1.0, flags["grad_clip"] / (norm + 1e-6)) if flags["grad_clip"] else 1.0
        lr, b1, b2 = learning_rate(t, flags), flags["beta1"], flags["beta2"]
        for name, value in theta.items():
            g = gradients[name] * factor
            first_moment[name] = b1 * first_moment[name] + (1 - b1) * g
            second_moment[name] = b2 * second_moment[name] + (1 - b2) * g * g
            m, v = first_moment[name] / (1 - b1**t), second_moment[name] / (1 - b2**t)
            decay = flags["weight_decay"] if value.dim() == 2 else 0.0
            theta[name] = value.detach() * (1 - lr * decay) - lr * m / (v.sqrt() + 1e-8)

        for name, value in [("alpha", list(alpha)), ("excess", list(excess)), ("loss", loss.mean().item()),
                            ("grad_norm", norm), ("gradients", gradients)]:
            out[name].append(value)
    out["model"] = theta
    out["alpha_bar"] = [math.fsum(row[i] for row in out["alpha"]) / len(out["alpha"]) for i in range(k)]
    return out
