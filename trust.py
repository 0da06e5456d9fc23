"""How far to trust the answer: its spread, its drift, what alpha did, and what the large run will make of it.

Arrays in, numbers and lines of text out; average_weights.py reads the runs and prints this. Not in the paper, except
for the rule of 1e-3 and the cost: it gives the answer of one run, without its error.

S runs, T steps, K domains. alphas (S, T, K): alpha of the steps that are averaged; answers (S, K): their averages.
"""

import math

import numpy as np

from report import percent

CONVERGED = 1e-3  # the paper's rule for iterated DoReMi: stop when max_i |answer_i - reference_weight_i| is below this
ONE_HOT = 0.9  # alpha is near one-hot where a single domain has more than this
EPOCHS = 4  # text that is repeated more often is worth clearly less than new text (Muennighoff et al. 2023)


# ---- the mathematics


def total_variation(p, q):
    """Half the sum of |p - q|: the share of the training tokens that moves to another domain. In [0, 1]."""
    return 0.5 * float(np.abs(p - q).sum())


def effective_domains(p):
    """exp(H(p)) along the last axis: 1 where a single domain has all the weight, K where all weights are equal."""
    log_p = np.log(np.where(p > 0, p, 1.0))  # 0 log 0 = 0
    return np.exp(-(p * log_p).sum(axis=-1))


def between_halves(alpha):
    """Total variation between the averages of the first and of the second half of alpha (T, K)."""
    middle = len(alpha) // 2
    return total_variation(alpha[:middle].mean(axis=0), alpha[middle:].mean(axis=0)) if middle else 0.0


def block_standard_error(alpha):
    """Standard error (K,) of the average of alpha (T, K) over its autocorrelated steps, and the block length L used.

    As in a block bootstrap, the average's variance is that of the means m of blocks of L steps, times L / T. But alpha
    drifts, alike under every seed, and that is no error: each m is compared with the mean of the blocks before and
    after it, which takes out a linear trend and makes 3/2 of m's variance. L is eight times the lag at which the
    autocorrelation falls below 1/e (in its slowest domain), at most T / 4: an alpha that drifts all along reaches that.
    0 where T < 4.
    """
    T, K = alpha.shape
    centred = alpha - alpha.mean(axis=0)
    power = np.abs(np.fft.rfft(centred, n=2 * T, axis=0)) ** 2  # padded, so that the end does not meet the start
    covariance = np.fft.irfft(power, axis=0)[:T]  # (lag, K)
    lag = int((covariance < covariance[0] / math.e).argmax(axis=0).max())
    L = max(1, min(8 * lag, T // 4))
    if T < 4:
        return np.zeros(K), L
    total = np.cumsum(np.concatenate([np.zeros((1, K)), centred]), axis=0)
    m = (total[L:] - total[:-L]) / L  # (T - L + 1, K), every block
    residual = m[L:-L] - (m[: -2 * L] + m[2 * L :]) / 2
    return np.sqrt((residual**2).mean(axis=0) / 1.5 * L / T), L


def near_one_hot(alphas):
    """The share of steps at which one domain has nearly all of alpha."""
    return float((alphas.max(axis=-1) > ONE_HOT).mean())


def quarters(alphas):
    """The median effective number of domains in each quarter of the steps: a list of 4."""
    T = alphas.shape[1]
    starts = [T * quarter // 4 for quarter in range(4)]
    return [float(np.median(effective_domains(alphas[:, t : max(t + 1, t + T // 4)]))) for t in starts]


def at_floor(alphas, smoothing):
    """(K,) bool: is a domain's alpha within 1% of its least, smoothing / K, in most of the last quarter's steps?"""
    T, K = alphas.shape[1:]
    return (alphas[:, 3 * T // 4 :] <= 1.01 * smoothing / K).mean(axis=(0, 1)) > 0.5


def search_flops(n_params, reference_tokens, proxy_tokens):
    """6 N D for the references; 8 N D for the proxies, 2 of them the reference's forward pass."""
    return n_params * (6 * reference_tokens + 8 * proxy_tokens)


def measure_spread(domains, answers, alphas, frozen=0):
    """How far the answer of another run may lie, as JSON values.

    "deviation" {DOMAIN: weight}: the standard deviation over the seeds, or a single run's standard error s.
    "total_variation": between two answers, the mean over all pairs of seeds; or what is expected of two
    answers with normal errors: half of sum_i 2 s_i / sqrt(pi).
    "between_halves": of the steps at which alpha moves, that is without the first `frozen` ones.
    """
    drift = {"between_halves": between_halves(alphas.mean(axis=0)[frozen:])}
    if len(answers) == 1:
        deviation, length = block_standard_error(alphas[0])
        found = {"block_steps": length, "total_variation": float(deviation.sum()) / math.sqrt(math.pi)}
    else:
        deviation = answers.std(axis=0, ddof=1)
        pairs = [total_variation(p, q) for i, p in enumerate(answers) for q in answers[:i]]
        found = {"total_variation": sum(pairs) / len(pairs), "total_variation_most": max(pairs)}
    return {"deviation": dict(zip(domains, deviation.tolist())), **found, **drift}


# ---- in words: what is found, and what to do about it


def moves(domains, reference, answer, spread):
    """Lines on how far the answer is from the reference's weights, and may be off.  reference, answer (K,)."""
    i = int(np.abs(answer - reference).argmax())
    distance, moved = abs(answer[i] - reference[i]), total_variation(answer, reference)
    deviation, single = spread["deviation"], "block_steps" in spread
    verdict = "not below 1e-3: another round is due (the paper's rule), whose reference is trained on this answer"
    if distance < CONVERGED:
        verdict = "below 1e-3: the rounds have converged"
    elif distance <= 2 * deviation[domains[i]]:
        verdict = (f"within twice its {'standard error' if single else 'sd over seeds'} ({deviation[domains[i]]:.2g}): "
                   "another round would move within the noise; first average more seeds, or train for longer")
    widest = max(deviation, key=deviation.get)
    lines = [
        f"largest move      {distance:.4g} between answer and reference's weight ({domains[i]}), {verdict}",
        f"total variation   {moved:.3f} between answer and reference's weights (0 to 1)",
    ]
    if single:
        lines.append(f"standard error    {deviation[widest]:.2g} at most ({widest}), total variation "
                     f"{spread['total_variation']:.3f} between two such answers: within this run, from blocks of "
                     f"{spread['block_steps']} steps, drift apart; what another seed would change it cannot see: "
                     "run several")
    else:
        lines.append(f"between seeds     sd {deviation[widest]:.2g} at most ({widest}), total variation "
                     f"{spread['total_variation']:.3f} on average, {spread['total_variation_most']:.3f} at most")
    drift = (f"between halves    total variation {spread['between_halves']:.3f} of alpha's averages in two halves "
             "of the steps at which it moves")
    if spread["between_halves"] > max(moved, CONVERGED):
        drift += ", more than the answer moved: it depends on where the run ends; train the proxy for longer"
    return [*lines, drift]


def of_alpha(domains, answer, alphas, smoothing):
    """Lines on what alpha did.  answer (K,)."""
    medians, share = ", ".join(f"{number:.2f}" for number in quarters(alphas)), near_one_hot(alphas)
    advice = ": the answer counts how long each domain led; use a smaller --step_size" if share > 0.1 else ""
    lines = [f"effective number  {effective_domains(answer):.2f} of {len(domains)} domains in the answer; in alpha, at "
             f"the median steps of the run's quarters: {medians}",
             f"near one-hot      {percent(share)} of the steps (one domain has over {ONE_HOT:.0%} of alpha){advice}"]
    if low := [name for name, floored in zip(domains, at_floor(alphas, smoothing)) if floored]:
        lines.append(f"at the floor      {', '.join(low)}: alpha ends at smoothing / K, so that the answer is what the "
                     "early steps left; a larger --smoothing keeps more")
    return lines


def of_large_run(domains, tokens, answer, n_params, flops, proxy_tokens, large_params, large_tokens):
    """Lines on the planned run.  tokens of the domains, answer (K,); flops of the search; proxy_tokens: one proxy's."""
    lines = []
    if large_tokens:
        epochs, cap = answer * large_tokens / tokens, EPOCHS * tokens / large_tokens
        often = [f"{domains[i]} {epochs[i]:.1f} times ({EPOCHS} at weight {cap[i]:.2g})"
                 for i in np.argsort(-epochs) if epochs[i] > EPOCHS]
        advice = (f"lower {'them' if len(often) > 1 else 'it'} to that, with the rest to the other domains (as unimax "
                  "does), or find more text")
        if cap.sum() < 1:
            advice = f"no weights keep all at {EPOCHS}, the mean is {large_tokens / tokens.sum():.1f}; find more text"
        often[5:] = [f"and {len(often) - 5} more"] * (len(often) > 5)
        most = f"no domain more than {EPOCHS} times, {domains[epochs.argmax()]} {epochs.max():.1f} times"
        lines.append(f"repeated          {', '.join(often)}: {advice}" if often else f"repeated          {most}")
    planned = large_tokens or proxy_tokens
    sizes = [large_params] if large_params else [10 * n_params, 30 * n_params]
    shares = " or ".join(percent(flops / (6 * n * planned)) for n in sizes)
    parameters = f"{large_params:.3g} parameters" if large_params else "10 or 30 times the parameters"
    assumed = "" if large_tokens else ", the proxy's (--large_tokens)"
    return [*lines, f"cost              {flops:.3g} FLOPs (reference 6 N D, proxy 8 N D): {shares} of a large run of "
            f"{parameters} and {planned:.3g} tokens{assumed}"]
