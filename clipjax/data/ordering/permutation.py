"""Random permutations in closed form: where an element goes is computed, and no table is kept.

A Feistel network permutes pairs (l, r): in turn l and r get the sum of themselves and a hash of the other one. Its domain, a x b
pairs, is at least n and hardly more, and an element that leaves [0, n) is permuted again until it is back (cycle walking: Black
and Rogaway, Ciphers with arbitrary finite domains, 2002). Eight rounds: with four, permutations of few elements are visibly not
uniform. All of it is arithmetic of unsigned 64-bit integers, so the values depend on no release of NumPy and on no machine.
"""

import numpy as np

ROUNDS = 8
SMALLEST = np.uint64(8)  # of a and b: on a smaller domain there are too few networks for all permutations to be equally likely
BLOCK = 1 << 15  # elements at a time: what is computed on the way stays in the processor's cache
_HALF = np.uint64(32)


def hashed(*words: int | np.ndarray) -> np.ndarray:
    """uint64, of the words' shape, at least one dimension: a hash of the words, which are not negative, in their order."""
    state = np.full(1, 0x9E3779B97F4A7C15, np.uint64)
    for word in words:
        state = _mixed(state ^ np.atleast_1d(np.asarray(word)).astype(np.uint64)) + state
    return state


def permuted(i: np.ndarray, n: int | np.ndarray, key: np.ndarray) -> np.ndarray:
    """int64, of the shape of `i`: where each element of [0, n) goes in the permutation that `key` (`hashed`) names. `n` and `key`
    may differ from element to element."""
    elements = np.asarray(i)
    out, sizes = np.empty(elements.shape, np.int64), np.broadcast_to(np.asarray(n), elements.shape)
    keys = np.broadcast_to(key.reshape(elements.shape) if key.size > 1 else key[0], elements.shape)
    flat, sizes, keys, into = elements.reshape(-1), sizes.reshape(-1), keys.reshape(-1), out.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        part = slice(start, start + BLOCK)
        into[part] = _walked(flat[part].astype(np.uint64), sizes[part].astype(np.uint64), keys[part])
    return out


def _walked(x: np.ndarray, n: np.ndarray, key: np.ndarray) -> np.ndarray:
    """`permuted` of flat arrays of uint64."""
    a = np.sqrt(n.astype(np.float64)).astype(np.uint64)
    a = np.maximum(a + (a * a < n), SMALLEST)
    b = np.maximum((n + a - np.uint64(1)) // a, SMALLEST)
    out = np.where(n == 1, np.uint64(0), _network(x, a, b, key))
    outside = np.flatnonzero(out >= n)
    while outside.size:
        out[outside] = _network(out[outside], a[outside], b[outside], key[outside])
        outside = outside[out[outside] >= n[outside]]
    return out


def _network(x: np.ndarray, a: np.ndarray, b: np.ndarray, key: np.ndarray) -> np.ndarray:
    left, right = np.divmod(x, b)
    for turn in range(0, ROUNDS, 2):
        left = _added(left, right, a, key + np.uint64(turn))
        right = _added(right, left, b, key + np.uint64(turn + 1))
    return left * b + right


def _added(half: np.ndarray, other: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """(half + a hash of the other one) mod size, which is less than 2^32."""
    total = half + (((_mixed((other << _HALF) ^ key) >> _HALF) * size) >> _HALF)
    return np.where(total >= size, total - size, total)


def _mixed(x: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits each of whose input bits changes each output bit half of the time: the mixing of SplitMix64 (Steele,
    Lea and Flood, Fast splittable pseudorandom number generators, 2014) with the constants of Stafford's thirteenth variant."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
