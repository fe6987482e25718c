"""Compiled loops of the sampler (numba): which features fire in a sample, and how strongly.

A sample's random numbers are SplitMix64 as a function of a counter, in any order: R for the shared factors; one for
every four columns, 16 bits each; three for each feature: whether it fires, which of its children wins, its magnitude.
So what fires does not depend on what else was proposed.

    roots   columns [C]: features without parent, number int32 [C], and `record` float32 [C, U + 4]
    kin     children in groups of four: first group and number of groups of each feature int32 [N, 2], first child of
            each group int32 [G], `record` float32 [G, U + 4, 4]
A record: what the feature takes of each factor, zeros up to U, then its shift, its chance of a magnitude above 0, and
mean and standard deviation of the magnitude. It fires with probability Phi(factors . u + shift) * chance.
"""
import math

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from lib.training.kernels import compiled

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # of SplitMix64, and its two multipliers and three shifts
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
S11, S27, S30, S31, ONE, LAST_LAYER = (np.uint64(s) for s in (11, 27, 30, 31, 1, 255))
TAIL = 3.6541528853610088  # where the widest of the ziggurat's 256 layers ends, and the tail begins
PIECE = 16  # samples that one thread takes at a time
GRID, REACH = 64, 8.0  # table of Phi: steps of 1 / 64 from -8 to 8
PER_WORD, UNIT = 4, 2.0**-16  # columns that share 64 random bits, and the step of their 16
# 1 - erf(x) = (1 + A1 x + A2 x^2 + A3 x^3 + A4 x^4)^-4 within 5e-4 for x >= 0 (Abramowitz and Stegun 7.1.27)
A1, A2, A3, A4 = (np.float32(a) for a in (0.278393, 0.230389, 0.000972, 0.078108))
SLACK = np.float32(17)  # 65536 times half of that error, and the rounding of float32
TO_ERF = np.float32(-math.sqrt(0.5) * (1 - 1.02 / 256))  # z to -x; less, as a bfloat16 is off by up to 1 part in 256
ZERO, UNITY, HALF, WHOLE = (np.float32(v) for v in (0, 1, 32768, 65536))


@compiled()
def mix(x):
    """64 bits that look random; one to one."""
    x = (x ^ (x >> S30)) * MIX_1
    x = (x ^ (x >> S27)) * MIX_2
    return x ^ (x >> S31)


@compiled()
def start(seed, number):
    """Key and odd step of a sample's random numbers."""
    key = mix(mix(np.uint64(seed) + GOLDEN) + np.uint64(number) * GOLDEN)
    return key, mix(key + GOLDEN) | ONE


@compiled()
def bits(key, step, j):
    return mix(key + np.uint64(j) * step)


@compiled()
def uniform(x):
    """In (0, 1), of 64 random bits."""
    return (np.float64(x >> S11) + 0.5) * 2.0**-53


@compiled()
def normal(x, layers):
    """Standard normal, of 64 random bits and, in 1 of 80 cases, of more that are hashed from them."""
    while True:
        i = x & LAST_LAYER
        value = (2 * uniform(x) - 1) * layers[i, 0]
        if abs(value) < layers[i + ONE, 0]:
            return value
        x = mix(x + GOLDEN)
        if i > 0:
            if layers[i, 1] + uniform(x) * (layers[i + ONE, 1] - layers[i, 1]) < math.exp(-0.5 * value * value):
                return value
        else:
            while True:
                beyond = -math.log(uniform(x)) / TAIL
                x = mix(x + GOLDEN)
                if -2 * math.log(uniform(x)) > beyond * beyond:
                    return TAIL + beyond if value > 0 else -TAIL - beyond
                x = mix(x + GOLDEN)
        x = mix(x + GOLDEN)


@intrinsic
def _as_float32(typing, number):
    """The float32 that has these 32 bits."""
    def build(context, builder, signature, given):
        return builder.bitcast(given[0], ir.FloatType())
    return types.float32(types.uint32), build


@compiled()
def _wide(low):
    """float32 of the bits of a bfloat16."""
    return _as_float32(np.uint32(np.uint32(low) << np.uint32(16)))


@compiled()
def _below(chance, z, part, phi):
    """chance < Phi(z) * part; phi: lower and upper bound in each step of the grid, which settles all but 1 in 200."""
    at = min(max(int((z + REACH) * GRID), 0), len(phi) - 1)
    if phi[at, 0] * part <= chance and chance < phi[at, 1] * part:
        return chance < 0.5 * math.erfc(-z * math.sqrt(0.5)) * part
    return chance < phi[at, 0] * part


@compiled()
def _magnitude(x, mean, std, layers):
    """Normal given that it is above 0."""
    value = 0.0
    while value <= 0:
        value = mean + std * normal(x, layers)
        x = mix(x ^ MIX_1)
    return value


@compiled(parallel=True)
def factors(seed, first, rank, layers, u, norm):
    """Standard normals into u [n, :rank], and the norm of each row."""
    for r in prange(len(u)):
        key, step = start(seed, np.uint64(first) + np.uint64(r))
        total = 0.0
        for i in range(rank):
            u[r, i] = normal(bits(key, step, i), layers)
            total += u[r, i] * u[r, i]
        norm[r] = math.sqrt(total)


@compiled()
def _propose(z, low, margin, hits, found):
    """Columns where low / 65536 is below a bound of Phi(z + margin) into `found`; how many. z: bits of bfloat16."""
    off = np.float32(-math.sqrt(0.5) * margin)
    for c in range(len(z)):
        x = _wide(z[c]) * TO_ERF + off
        limit = HALF if x > ZERO else WHOLE
        x = max(x, ZERO)
        power = UNITY + x * (A1 + x * (A2 + x * (A3 + x * A4)))
        power *= power
        hits[c] = (np.float32(low[c]) - SLACK) * (power * power) < limit
    words, n = hits.view(np.uint64), 0
    for w in range(len(words)):
        if words[w]:
            for c in range(8 * w, 8 * w + 8):
                found[n] = c
                n += hits[c]
    return n


@compiled()
def _z(record, u):
    s, t = ZERO, ZERO
    for i in range(0, len(u), 2):
        s += record[i] * u[i]
        t += record[i + 1] * u[i + 1]
    return s + t + record[len(u)]


@compiled()
def _z_of_four(record, u, z):
    s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = ZERO
    for i in range(0, len(u), 2):
        s0 += record[i, 0] * u[i]
        s1 += record[i, 1] * u[i]
        s2 += record[i, 2] * u[i]
        s3 += record[i, 3] * u[i]
        t0 += record[i + 1, 0] * u[i + 1]
        t1 += record[i + 1, 1] * u[i + 1]
        t2 += record[i + 1, 2] * u[i + 1]
        t3 += record[i + 1, 3] * u[i + 1]
    shift = record[len(u)]
    z[0], z[1], z[2], z[3] = s0 + t0 + shift[0], s1 + t1 + shift[1], s2 + t2 + shift[2], s3 + t3 + shift[3]


@compiled()
def _roots(order, columns, tables, out):
    """Write the columns that fire, of those proposed; returns how many do."""
    key, step, base, u = order
    number, record, low, found = columns
    phi, layers = tables
    index, value, mean = out
    n, wide = 0, len(u)
    for c in found:
        f, mine = number[c], record[c]
        chance = (low[c] + uniform(bits(key, step, base + 3 * f))) * UNIT
        found[n] = c
        n += _below(chance, _z(mine, u), part=mine[wide + 1], phi=phi)
    n = min(n, len(index))
    for i in range(n):
        mine, index[i] = record[found[i]], number[found[i]]
        mean[i] = mine[wide + 2]
        value[i] = _magnitude(bits(key, step, base + 3 * index[i] + 2), mean[i], std=mine[wide + 3], layers=layers)
    return n


@compiled()
def _children(order, tree, tables, out, n):
    """Write the winner among the children of each feature that fires, and so on; returns how many fire in all."""
    key, step, base, u, scaled = order
    groups, child, record = tree
    phi, layers, z, contenders = tables
    index, value, mean = out
    wide, at = len(u), 0
    while at < n and n < len(index):
        f, m = index[at], 0
        for g in range(groups[f, 0], groups[f, 0] + groups[f, 1]):
            _z_of_four(record[g], u, z)
            for j in range(4):
                contenders[m] = 4 * g + j
                chance = uniform(bits(key, step, base + 3 * (child[g] + j)))
                m += _below(chance, z[j], part=record[g, wide + 1, j], phi=phi)
        if m:
            won = contenders[int(uniform(bits(key, step, base + 3 * f + 1)) * m)]
            g, j = won >> 2, won & 3
            scale = value[at] / mean[at] if scaled else np.float32(1)
            index[n], mean[n] = child[g] + j, record[g, wide + 2, j]
            value[n] = scale * _magnitude(bits(key, step, base + 3 * index[n] + 2), mean[n], std=record[g, wide + 3, j],
                                          layers=layers)
            n += 1
        at += 1
    return n


@compiled(parallel=True)
def fire(order, drawn, roots, kin, tables, out):
    """What fires in each sample.

    order: seed, first, scaled, R. drawn: u [n, U], z [n, C] as bits of bfloat16, its margin [n]. tables: phi, layers,
    the most children of one feature. out: index, value [n, ROOM], count [n].
    """
    seed, first, scaled, rank = order
    u, z, margin = drawn
    number, root = roots
    groups, child, record = kin
    phi, layers, most = tables
    index, value, count = out
    n_words = z.shape[1] // PER_WORD
    for piece in prange(-(-len(u) // PIECE)):
        words, hits = np.empty(n_words, np.uint64), np.empty(z.shape[1], np.uint8)
        low, found = words.view(np.uint16), np.empty(z.shape[1] + 8, np.int32)
        four, mean = np.empty(4, np.float32), np.empty(index.shape[1], np.float32)
        contenders = np.empty(most + 1, np.int32)
        for r in range(PIECE * piece, min(len(u), PIECE * (piece + 1))):
            key, step = start(seed, np.uint64(first) + np.uint64(r))
            for w in range(n_words):
                words[w] = bits(key, step, rank + w)
            n = _propose(z[r], low, margin=margin[r], hits=hits, found=found)
            base, mine, out_r = rank + n_words, u[r], (index[r], value[r], mean)
            n = _roots((key, step, base, mine), (number, root, low, found[:n]), tables=(phi, layers), out=out_r)
            count[r] = _children((key, step, base, mine, scaled), (groups, child, record), n=n, out=out_r,
                                 tables=(phi, layers, four, contenders))
