"""
The naive version of every kernel: slow NumPy in float64, written from the math and not from kernels_cpu.py.

Names and arguments are those of the kernels, but results are returned instead of written. A backward function takes only
the inputs of its forward, not saved statistics, so that an error in those cannot hide. It returns the gradient itself;
the caller adds it to earlier ones.

Rows are handled one at a time, attention reads only the keys that a query may see, and softmax and layernorm are
differentiated through their explicit Jacobian matrices. test_kernels.py checks each backward function here against
finite differences of its forward function.
"""
import math

import numpy as np

LAYERNORM_EPS = 1e-5


def float64(array):
    return np.asarray(array, dtype=np.float64)


# encoder: out[b,t] = wte[tokens[b,t]] + wpe[t]

def encoder_forward(tokens, wte, wpe):
    B, T = tokens.shape
    out = [float64(wte)[tokens[b, t]] + (float64(wpe)[t] if wpe.size else 0) for b in range(B) for t in range(T)]
    return np.array(out)                                            # (B*T, C)


def encoder_backward(dout, tokens, wte_shape, wpe_shape):
    dwte, dwpe = np.zeros(wte_shape), np.zeros(wpe_shape)
    B, T = tokens.shape
    for b in range(B):
        for t in range(T):
            dwte[tokens[b, t]] += dout[b * T + t]
            if dwpe.size:
                dwpe[t] += dout[b * T + t]
    return dwte, dwpe


# layernorm: out = weight * (inp - mean) * rstd + bias over each row

def layernorm_forward(inp, weight, bias):
    inp = float64(inp)
    mean = inp.mean(axis=1)
    rstd = 1 / np.sqrt(inp.var(axis=1) + LAYERNORM_EPS)
    return (inp - mean[:, None]) * rstd[:, None] * float64(weight) + float64(bias), mean, rstd


def layernorm_backward(dout, inp, weight):
    dout, inp, weight = float64(dout), float64(inp), float64(weight)
    N, C = inp.shape
    dinp, dweight = np.zeros((N, C)), np.zeros(C)
    for n in range(N):
        rstd = 1 / math.sqrt(inp[n].var() + LAYERNORM_EPS)
        norm = (inp[n] - inp[n].mean()) * rstd
        # dnorm_i/dinp_j: through inp_i itself, through the mean, and through rstd (drstd/dinp_j = -rstd^2 norm_j / C)
        jacobian = rstd * (np.eye(C) - 1 / C - np.outer(norm, norm) / C)
        dinp[n] = (dout[n] * weight) @ jacobian
        dweight += dout[n] * norm
    return dinp, dweight, dout.sum(axis=0)


# rmsnorm: out = weight * inp * rstd over each row

def rmsnorm_forward(inp, weight, epsilon):
    inp = float64(inp)
    rstd = 1 / np.sqrt((inp ** 2).mean(axis=1) + epsilon)
    return inp * rstd[:, None] * float64(weight), rstd


def rmsnorm_backward(dout, inp, weight, epsilon):
    dout, inp, weight = float64(dout), float64(inp), float64(weight)
    N, C = inp.shape
    dinp, dweight = np.zeros((N, C)), np.zeros(C)
    for n in range(N):
        rstd = 1 / math.sqrt((inp[n] ** 2).mean() + epsilon)
        norm = inp[n] * rstd
        # dnorm_i/dinp_j: through inp_i itself and through rstd (drstd/dinp_j = -rstd^2 norm_j / C)
        dinp[n] = (dout[n] * weight) @ (rstd * (np.eye(C) - np.outer(norm, norm) / C))
        dweight += dout[n] * norm
    return dinp, dweight


# rope: pairs of channels i and HS/2 + i of a head as complex numbers, times e^(i angle)

def rope(rows, cos, sin, heads, T, position, sign):
    rows, half = float64(rows).copy(), cos.shape[1]
    turn = float64(cos) + sign * 1j * float64(sin)
    for n in range(len(rows)):
        for head in rows[n, :2 * half * heads].reshape(heads, 2 * half):
            turned = (head[:half] + 1j * head[half:]) * turn[position + n % T]
            head[:half], head[half:] = turned.real, turned.imag
    return rows


# matmul: out = inp @ weight.T + bias

def matmul_forward(inp, weight, bias):
    out = np.einsum("nc,oc->no", float64(inp), float64(weight), optimize=True)
    return out + float64(bias) if bias.size else out


def matmul_backward(dout, inp, weight):
    dout = float64(dout)
    dinp = np.einsum("no,oc->nc", dout, float64(weight), optimize=True)
    dweight = np.einsum("no,nc->oc", dout, float64(inp), optimize=True)
    return dinp, dweight, dout.sum(axis=0)


# attention: each query t of each head averages the values of the keys 0..t, weighted by softmax(q.k / sqrt(HS))

def split_heads(qkv, B, T, NH, KV):
    """(B*T, (NH + 2*KV)*HS) -> q, k, v, each (B, NH, T, HS): a key head is repeated for each query head that reads it."""
    heads = float64(qkv).reshape(B, T, NH + 2 * KV, -1).transpose(0, 2, 1, 3)
    q, k, v = np.split(heads, [NH, NH + KV], axis=1)
    return q, np.repeat(k, NH // KV, axis=1), np.repeat(v, NH // KV, axis=1)


def join_heads(heads):
    """(B, NH, T, HS) -> (B*T, C)."""
    B, NH, T, HS = heads.shape
    return heads.transpose(0, 2, 1, 3).reshape(B * T, NH * HS)


def join_gradients(dq, dk, dv, KV):
    """The gradient of split_heads: those of a key head's copies add up."""
    B, NH, T, HS = dk.shape
    dk, dv = (gradient.reshape(B, KV, NH // KV, T, HS).sum(axis=2) for gradient in (dk, dv))
    return np.concatenate([join_heads(dq), join_heads(dk), join_heads(dv)], axis=1)


def softmax(scores):
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()


def attention_forward(qkv, B, T, NH, KV=None):
    q, k, v = split_heads(qkv, B, T, NH, KV or NH)
    out, lse = np.zeros(q.shape), np.zeros((B, NH, T))
    for b, h, t in np.ndindex(B, NH, T):
        seen = slice(0, t + 1)
        scores = k[b, h, seen] @ q[b, h, t] / math.sqrt(q.shape[-1])
        out[b, h, t] = softmax(scores) @ v[b, h, seen]
        lse[b, h, t] = scores.max() + np.log(np.exp(scores - scores.max()).sum())
    return join_heads(out), lse


def attention_backward(dout, qkv, B, T, NH, KV=None):
    q, k, v = split_heads(qkv, B, T, NH, KV or NH)
    dout = float64(dout).reshape(B, T, NH, -1).transpose(0, 2, 1, 3)
    dq, dk, dv = np.zeros(q.shape), np.zeros(q.shape), np.zeros(q.shape)
    scale = 1 / math.sqrt(q.shape[-1])
    for b, h, t in np.ndindex(B, NH, T):
        seen = slice(0, t + 1)
        p = softmax(k[b, h, seen] @ q[b, h, t] * scale)
        dp = v[b, h, seen] @ dout[b, h, t]
        dscores = (np.diag(p) - np.outer(p, p)) @ dp
        dq[b, h, t] = dscores @ k[b, h, seen] * scale
        dk[b, h, seen] += np.outer(dscores, q[b, h, t]) * scale
        dv[b, h, seen] += np.outer(p, dout[b, h, t])
    return join_gradients(dq, dk, dv, KV or NH)


# The same with factors rounded to bfloat16: the upper half of a float32, rounded to nearest, ties to even

def bfloat16(array):
    upper = np.asarray(array, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = upper + 0x7fff + (upper >> 16 & 1) & 0xffff0000
    return np.where(np.isnan(array), np.nan, rounded.astype(np.uint32).view(np.float32)).astype(np.float64)


def matmul_forward_bfloat16(inp, weight, bias):
    return matmul_forward(bfloat16(inp), bfloat16(weight), bias)


def round_activations(inp):
    """inp (N, C), float32, its groups of 32 rounded to integers from -127 to 127, each with the scale of its group."""
    groups = inp.reshape(len(inp), -1, 32)
    largest = abs(groups).max(axis=-1, keepdims=True)
    largest[largest <= 1e-33] = np.inf      # all integers are 0
    integers = np.floor(groups * (np.float32(127) / largest) + np.float32(0.5))     # in float32, so that ties go one way
    largest[np.isinf(largest)] = 0
    return (integers * (largest.astype(np.float64) / 127)).reshape(inp.shape)


def matmul_backward_bfloat16(dout, inp, weight):
    dinp, dweight, _ = matmul_backward(bfloat16(dout), bfloat16(inp), bfloat16(weight))
    return dinp, dweight, float64(dout).sum(axis=0)


def attention_forward_bfloat16(qkv, B, T, NH, KV=None):
    q, k, v = split_heads(bfloat16(qkv), B, T, NH, KV or NH)
    out, lse = np.zeros(q.shape), np.zeros((B, NH, T))
    for b, h, t in np.ndindex(B, NH, T):
        seen = slice(0, t + 1)
        scores = k[b, h, seen] @ q[b, h, t] / math.sqrt(q.shape[-1])
        out[b, h, t] = bfloat16(softmax(scores)) @ v[b, h, seen]
        lse[b, h, t] = scores.max() + np.log(np.exp(scores - scores.max()).sum())
    return join_heads(out), lse


def attention_backward_bfloat16(dout, qkv, B, T, NH, KV=None):
    """From the outputs of attention_forward, not rounded, which the sum in the softmax's derivative is computed from."""
    q, k, v = split_heads(bfloat16(qkv), B, T, NH, KV or NH)
    out, lse = attention_forward(qkv, B, T, NH, KV)
    out = out.reshape(B, T, NH, -1).transpose(0, 2, 1, 3)
    dout = float64(dout).reshape(B, T, NH, -1).transpose(0, 2, 1, 3)
    dq, dk, dv = np.zeros(q.shape), np.zeros(q.shape), np.zeros(q.shape)
    scale = 1 / math.sqrt(q.shape[-1])
    for b, h, t in np.ndindex(B, NH, T):
        seen = slice(0, t + 1)
        p = np.exp(k[b, h, seen] @ q[b, h, t] * scale - lse[b, h, t])
        dp = v[b, h, seen] @ bfloat16(dout[b, h, t])
        dscores = bfloat16(p * (dp - bfloat16(dout[b, h, t]) @ out[b, h, t]))
        dq[b, h, t] = dscores @ k[b, h, seen] * scale
        dk[b, h, seen] += np.outer(dscores, q[b, h, t]) * scale
        dv[b, h, seen] += np.outer(bfloat16(p), bfloat16(dout[b, h, t]))
    return join_gradients(dq, dk, dv, KV or NH)


# gelu, tanh approximation. (1 + tanh u)/2 is the logistic function of 2u, which gives both formulas below.

def gelu_gate(x):
    """(1 + tanh u)/2 with u = sqrt(2/pi) (x + 0.044715 x^3), and du/dx."""
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    with np.errstate(over="ignore"):
        gate = 1 / (1 + np.exp(-2 * u))
    return gate, math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)


def gelu_forward(inp):
    inp = float64(inp)
    return inp * gelu_gate(inp)[0]


def gelu_backward(dout, inp):
    inp = float64(inp)
    gate, du = gelu_gate(inp)
    return float64(dout) * (gate + inp * gate * (1 - gate) * 2 * du)


# swiglu: silu(gate) * value, the gates in the first half of each row and the values in the second

def swiglu_forward(inp):
    gate, value = np.split(float64(inp), 2, axis=1)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * value


def swiglu_backward(dout, inp):
    gate, value = np.split(float64(inp), 2, axis=1)
    with np.errstate(over="ignore"):
        s = 1 / (1 + np.exp(-gate))
    dsilu = s + gate * s * (1 - s)
    return np.concatenate([float64(dout) * value * dsilu, float64(dout) * gate * s], axis=1)


# gelu itself: x times the probability Phi(x) that a standard normal number is below x, whose derivative is the density

def normal_distribution(x):
    """Phi(x) and the density at x. With erfc, Phi is exact in the lower tail, where 1 + erf would lose all digits."""
    return np.vectorize(math.erfc)(-x / math.sqrt(2)) / 2, np.exp(-x**2 / 2) / math.sqrt(2 * math.pi)


def gelu_exact_forward(inp):
    inp = float64(inp)
    return inp * normal_distribution(inp)[0]


def gelu_exact_backward(dout, inp):
    inp = float64(inp)
    probability, density = normal_distribution(inp)
    return float64(dout) * (probability + inp * density)


def residual_forward(inp1, inp2):
    return float64(inp1) + float64(inp2)


# classifier: cross-entropy over the first V of the Vp columns, and its gradient times dloss

def fused_classifier(logits, targets, dloss, V):
    N, Vp = logits.shape
    losses, dlogits = np.zeros(N), np.zeros((N, Vp))
    for n in range(N):
        p = softmax(float64(logits[n, :V]))
        # not -log(p[target]): p may underflow to zero where the loss is still finite
        largest = float64(logits[n, :V]).max()
        losses[n] = largest - float64(logits[n, targets[n]]) - np.log(p.max())
        p[targets[n]] -= 1
        dlogits[n, :V] = p * dloss
    return losses, dlogits


# optimizer

def global_norm(grads):
    return math.sqrt(math.fsum(float(g) * float(g) for g in grads.reshape(-1)))


def adamw_update(params, grads, m, v, learning_rate, beta1, beta2, eps, weight_decay, grad_scale, step):
    params, grads = float64(params), float64(grads) * grad_scale
    m = beta1 * float64(m) + (1 - beta1) * grads
    v = beta2 * float64(v) + (1 - beta2) * grads**2
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    params = params - learning_rate * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * params)
    return params, m, v
