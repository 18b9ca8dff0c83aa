"""Every loss once more, straight from its formula: dense, slow, one document and one class at a time.

The tests compare the package with these. They share no code with it, and are written to be read beside the
papers.

Each function: (logits (N, V), labels (N,), documents (N,) of set ids or None, **parameters) -> scalar. Rows
with label -100 are dropped first. Token losses average over the rows left. Set-level losses take one value
a document (no `documents`: all rows are one), and average these with the documents' row counts as weights.
Nothing left: a zero connected to the logits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

NAIVE = {}

# What the losses that need more are told: the tokens that are numbers, with their values, and how often each token is a
# label. The tests tell the package the same.
NUMBERS = {1: 3.0, 2: 7.0, 4: 0.0}
FORMS = {1: "", 2: " ", 4: " "}  # what stands before them
COUNTS = [5, 16, 3, 0, 9, 1]
# The probability that the reference model gives each token, in whatever context.
REFERENCE = [0.25, 0.02, 0.9, 0.5, 0.1, 1e-3, 0.6]


def token_loss(row):
    """Register row(z (V,), y, **parameters) -> scalar: the value of one row."""

    def loss(logits, labels, documents=None, **parameters):
        rows = [row(z, int(y), **parameters) for z, y in zip(logits, labels, strict=True) if y != -100]
        return sum(rows) / len(rows) if rows else logits.sum() * 0

    NAIVE[row.__name__] = loss
    return loss


def set_loss(value):
    """Register value(z (n, V), y (n,), **parameters) -> scalar: the value of one document."""

    def loss(logits, labels, documents=None, **parameters):
        keep = labels != -100
        if not keep.any():
            return logits.sum() * 0
        documents = torch.zeros_like(labels) if documents is None else documents
        total = 0
        for d in documents[keep].unique():
            rows = keep & (documents == d)
            total = total + rows.sum() * value(logits[rows], labels[rows], **parameters)
        return total / keep.sum()

    NAIVE[value.__name__] = loss
    return loss


def class_loss(value):
    """Register value(p (n,), g (n,) of 0 and 1, **parameters) -> a class; a set takes their mean."""

    def mean_over_present(z, y, **parameters):
        p = z.softmax(1)
        values = [value(p[:, c], (y == c).to(p.dtype), **parameters) for c in y.unique()]
        return sum(values) / len(values)

    mean_over_present.__name__ = value.__name__
    return set_loss(mean_over_present)


# The paper's five


@token_loss
def cross_entropy(z, y, label_smoothing=0.0):
    logp = z.log_softmax(0)
    return -(1 - label_smoothing) * logp[y] - label_smoothing * logp.mean()


@token_loss
def focal(z, y, gamma=2.0, alpha=1.0):
    p = z.softmax(0)[y]
    return -alpha * (1 - p) ** gamma * z.log_softmax(0)[y]


@token_loss
def self_adjusting_dice(z, y, alpha=1.0, smooth=1.0, detach_weight=False):
    p = z.softmax(0)[y]
    weight = (1 - p) ** alpha
    q = (weight.detach() if detach_weight else weight) * p
    return 1 - (2 * q + smooth) / (q + 1 + smooth)


@set_loss
def generalized_dice(z, y, smooth=1e-5):
    p = z.softmax(1)
    above, below = smooth, smooth
    for c in y.unique():
        member = y == c
        weight = 1 / int(member.sum()) ** 2
        above = above + 2 * weight * p[member, c].sum()
        below = below + weight * (p[:, c].sum() + member.sum())
    return 1 - above / below


def lovasz_extension(errors, member):
    """Algorithm 1 of Berman 2018: steps of the Jaccard loss as rows become wrong, the largest error first."""
    members, wrong, wrong_others, before, total = sum(member), 0, 0, 0.0, 0
    for i in errors.argsort(descending=True).tolist():
        if member[i]:
            wrong += 1
        else:
            wrong_others += 1
        jaccard = 1 - (members - wrong) / (members + wrong_others)
        total = total + errors[i] * (jaccard - before)
        before = jaccard
    return total


@class_loss
def lovasz(p, g):
    return lovasz_extension(torch.where(g == 1, 1 - p, p), [bool(x) for x in g])


# More segmentation losses


@class_loss
def dice(p, g, smooth=1.0):
    return 1 - (2 * (p * g).sum() + smooth) / (p.sum() + g.sum() + smooth)


@class_loss
def jaccard(p, g, smooth=1.0):
    both = (p * g).sum()
    return 1 - (both + smooth) / (p.sum() + g.sum() - both + smooth)


def tversky_of_class(p, g, alpha, beta, smooth):
    hit, false_positive, false_negative = (p * g).sum(), (p * (1 - g)).sum(), ((1 - p) * g).sum()
    return 1 - (hit + smooth) / (hit + alpha * false_positive + beta * false_negative + smooth)


@class_loss
def tversky(p, g, alpha=0.3, beta=0.7, smooth=1.0):
    return tversky_of_class(p, g, alpha, beta, smooth)


@class_loss
def focal_tversky(p, g, alpha=0.3, beta=0.7, gamma=0.75, smooth=1.0):
    return tversky_of_class(p, g, alpha, beta, smooth) ** gamma


@set_loss
def log_cosh_dice(z, y, smooth=1.0):
    return torch.log(torch.cosh(dice(z, y, smooth=smooth)))


@class_loss
def jaccard_metric(p, g):
    distance = (p - g).abs().sum()
    return 1 - (p.sum() + g.sum() - distance) / (p.sum() + g.sum() + distance)


@set_loss
def unified_focal(z, y, focal_weight=0.5, delta=0.6, gamma=0.5, smooth=1.0):
    # Symmetric form: delta weighs the cross-entropy and the misses, 1 - delta the false alarms.
    modified_focal = delta * focal(z, y, gamma=1 - gamma)
    regions = focal_tversky(z, y, alpha=1 - delta, beta=delta, gamma=gamma, smooth=smooth)
    return focal_weight * modified_focal + (1 - focal_weight) * regions


@set_loss
def topk_cross_entropy(z, y, k=0.1):
    nll = torch.stack([cross_entropy(z[i : i + 1], y[i : i + 1]) for i in range(len(y))])
    return nll.sort(descending=True).values[: max(1, int(k * len(y)))].mean()


@token_loss
def poly(z, y, epsilon=1.0):
    return -z.log_softmax(0)[y] + epsilon * (1 - z.softmax(0)[y])


@token_loss
def asymmetric(z, y, gamma_positive=0.0, gamma_negative=4.0, label_smoothing=0.1):
    p, logp = z.softmax(0), z.log_softmax(0)
    share = label_smoothing / len(z)
    target = -(1 - label_smoothing + share) * (1 - p[y]) ** gamma_positive * logp[y]
    others = sum(p[j] ** gamma_negative * logp[j] for j in range(len(z)) if j != y)
    return target - share * others


# Losses of the related work


@token_loss
def gce(z, y, q=0.7):
    return (1 - z.softmax(0)[y] ** q) / q


@token_loss
def encouraging(z, y, log_end=0.75):
    p = z.softmax(0)[y]
    bonus = torch.log(1 - p) if p <= log_end else math.log(1 - log_end) - (p - log_end) / (1 - log_end)
    return -z.log_softmax(0)[y] + bonus


@token_loss
def squentropy(z, y, coefficient=1.0):
    return -z.log_softmax(0)[y] + coefficient * sum(z[j] ** 2 for j in range(len(z)) if j != y) / (len(z) - 1)


@token_loss
def spherical_z(z, y, slope=1.0, offset=10.0):
    standardised = (z[y] - z.mean()) / z.std(correction=0)
    return torch.log1p(torch.exp(slope * (offset - standardised))) / slope


@token_loss
def z_regularized(z, y, coefficient=1e-4):
    return -z.log_softmax(0)[y] + coefficient * z.logsumexp(0) ** 2


def ldr(z, y, temperature=1.0, margin=0.1):
    others = torch.ones_like(z)
    others[y] = 0
    scaled = (z - z[y] + margin * others) / temperature
    return temperature * (scaled.logsumexp(0) - math.log(len(z)))


token_loss(ldr)


@token_loss
def aldr(z, y, alpha=2.0, temperature=1.0, margin=0.1):
    q = (z.detach() / temperature).softmax(0)
    away_from_uniform = sum(x * math.log(x * len(z)) for x in q.tolist() if x)
    own = temperature - temperature * away_from_uniform / (alpha * math.log(len(z)))
    return ldr(z, y, temperature=own, margin=margin)


def project_on_simplex(z):
    """Euclidean projection: the one threshold tau at which the entries of z above it, less tau, sum to 1."""
    for size in range(len(z), 0, -1):
        top = z.topk(size).values
        tau = (top.sum() - 1) / size
        if top[-1] > tau:
            return (z - tau).clamp(min=0)


@token_loss
def sparsemax(z, y):
    p = project_on_simplex(z)
    return (p * z).sum() - z[y] + (1 - (p**2).sum()) / 2


@set_loss
def direct_coverage(z, y, n=256):
    logp = -cross_entropy(z, y) * len(y)
    # 1 - (1-P)^n, by the two functions that keep small P apart from 0.
    return -torch.log(-torch.expm1(n * torch.log1p(-logp.exp())))


# Losses that need to know more than logits and labels


def number_loss(row):
    """As token_loss, over the rows whose label is a number: row(q (K,), v (K,), value of the label)."""

    def loss(logits, labels, documents=None, numbers=NUMBERS, max_digits=1):
        rows = [(z, int(y)) for z, y in zip(logits, labels, strict=True) if int(y) in numbers]
        if not rows:
            return logits.sum() * 0
        values = torch.tensor(list(numbers.values()), dtype=logits.dtype)
        found = [row(torch.stack([z[token] for token in numbers]).softmax(0), values, numbers[y]) for z, y in rows]
        return sum(found) / len(found)

    NAIVE[row.__name__] = loss
    return loss


@number_loss
def number_token_wasserstein(q, v, target):
    return sum(q[j] * abs(v[j] - target) for j in range(len(v)))


@number_loss
def number_token_mse(q, v, target):
    return (sum(q[j] * v[j] for j in range(len(v))) - target) ** 2


def number_token_gaussian(logits, labels, documents=None, numbers=NUMBERS, forms=FORMS, sigma=0.5, max_digits=1):
    found = []
    for z, y in zip(logits, labels.tolist(), strict=True):
        if y in numbers:
            like = [j for j in numbers if forms[j] == forms[y]]
            heights = [math.exp(-((numbers[j] - numbers[y]) ** 2) / (2 * sigma**2)) for j in like]
            t = [height / sum(heights) for height in heights]
            logp = z.log_softmax(0)
            entropy = -sum(x * math.log(x) for x in t if x)
            found.append(-sum(t[i] * logp[j] for i, j in enumerate(like)) - entropy)
    return sum(found) / len(found) if found else logits.sum() * 0


NAIVE["number_token_gaussian"] = number_token_gaussian


@token_loss
def ldam(z, y, max_margin=0.5, counts=COUNTS):
    least = min(n for n in counts if n)
    n = (counts[y] if y < len(counts) else 0) or least  # a token that is no label counts as the rarest
    moved = z.clone()
    moved[y] = z[y] - max_margin * (least / n) ** 0.25
    return moved.logsumexp(0) - moved[y]


@token_loss
def weighted_cross_entropy(z, y, power=0.5, cap=10.0, counts=COUNTS):
    seen = [n for n in counts if n]
    n = (counts[y] if y < len(counts) else 0) or min(seen)
    return min(cap, (sum(seen) / len(seen) / n) ** power) * -z.log_softmax(0)[y]


# Losses of today's fine-tuning frameworks


@token_loss
def dft(z, y, beta=1.0):
    return -(z.softmax(0)[y].detach() ** beta) * z.log_softmax(0)[y]


@token_loss
def anchored(z, y, coefficient=0.1, reference=REFERENCE):
    logp = z.log_softmax(0)[y]
    p_ref = torch.tensor(reference[y], dtype=torch.float64)
    r = (p_ref.log() - logp).clamp(-20, 20)
    return -logp.exp().detach() * logp + coefficient * (r.exp() - 1 - r)


@token_loss
def prior_weighted(z, y, reference=REFERENCE):
    return -reference[y] * z.log_softmax(0)[y]


@set_loss
def importance_weighted(z, y, cap=16.0, reference=REFERENCE):
    nll = -z.log_softmax(1)[torch.arange(len(y)), y]
    ratio = 0
    for i in range(len(y)):
        ratio += -float(nll[i].detach()) - math.log(reference[y[i]])
    return min(math.exp(ratio / len(y)), cap) * nll.mean()


@token_loss
def entropy_adaptive(z, y, alpha=1.0, k=20):
    top = z.detach().topk(min(k, len(z))).values.softmax(0)
    entropy = torch.special.entr(top).sum()
    return (entropy / math.log(k)) ** alpha * -z.log_softmax(0)[y]


@token_loss
def confidence_penalty(z, y, coefficient=0.1):
    logp = z.log_softmax(0)
    return -logp[y] - coefficient * -(logp.exp() * logp).sum()


@token_loss
def gem(z, y, beta=0.7):
    logp = z.log_softmax(0)
    q = F.softmax(logp / beta, 0).detach()
    return -logp[y] + (q * logp).sum()


@token_loss
def thresholded(z, y, threshold=0.1, keep="above"):
    above = bool(z.softmax(0)[y] >= threshold)
    return -z.log_softmax(0)[y] if above == (keep == "above") else 0 * z.sum()


@token_loss
def deft(z, y):
    p = z.softmax(0)
    a = sum(x**2 for x in p).detach()
    return (1 - p[y] ** a) / a


@token_loss
def brier(z, y):
    wanted = torch.zeros_like(z)
    wanted[y] = 1
    return ((z.softmax(0) - wanted) ** 2).sum()


@token_loss
def tofu(z, y, gamma=3.0, temperature=0.8):
    p = z.detach().softmax(0)[y]
    g = (1 - p) ** gamma - gamma * p * (1 - p) ** (gamma - 1) * torch.log(p)
    return -g * temperature * (z / temperature).log_softmax(0)[y]


@token_loss
def sed(z, y, coefficient=1.0, k=2, threshold=0.5):
    p = z.softmax(0)
    unsure = sum(sorted(p.tolist(), reverse=True)[:k]) < threshold
    return -z.log_softmax(0)[y] + coefficient * unsure * (p[y] - 1 / 2) ** 2


@token_loss
def idft(z, y, beta=1.0, low=0.1, high=2.0):
    logp = z.log_softmax(0)
    entropy = -(logp.exp() * logp).sum()
    g = torch.exp(-(logp[y] + entropy) / beta).clamp(low, high)
    return -(logp[y].exp() ** g).detach() * logp[y]


@token_loss
def unlikelihood(z, y):
    return -torch.log(1 - z.softmax(0)[y])
