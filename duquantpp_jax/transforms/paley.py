"""Hadamard matrices of orders that are not powers of two, by Paley's two constructions.

In a field of q elements chi(a) is 1 for squares, -1 for other elements and 0 for 0, and Q is the
matrix of chi(a - b). With 1 the column of ones,

    I    q = 3 mod 4:  H = I + [[0, 1^T], [-1, Q]]                             of order q + 1
    II   q = 1 mod 4:  H = C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]]     of order 2 (q + 1)
                       with C = [[0, 1^T], [1, Q]] and x Kronecker's product

so 12 = 11 + 1, 20 = 19 + 1, 28 = 3^3 + 1, 148 = 2 (73 + 1), 344 = 7^3 + 1. These and their
products by powers of two are all multiples of 4 below 240 but 92, 116, 156, 172, 184, 188, 232 and
236.

Source: Paley, On orthogonal matrices (1933).
"""

import itertools

import numpy as np
from jaxtyping import Float, Int


def paley(order: int) -> Float[np.ndarray, "order order"] | None:
    """A Hadamard matrix with entries 1 and -1, or None if neither construction has this order."""
    if order < 4 or order % 4:
        return None
    q = order - 1
    if q % 4 == 3 and (squares := _characters(q)) is not None:
        return np.eye(order) + _bordered(squares, -1.0)
    q = order // 2 - 1
    if q % 4 == 1 and (squares := _characters(q)) is not None:
        conference = _bordered(squares, 1.0)
        a, b = np.array([[1.0, 1.0], [1.0, -1.0]]), np.array([[1.0, -1.0], [-1.0, -1.0]])
        return np.kron(conference, a) + np.kron(np.eye(order // 2), b)
    return None


def _bordered(q: Float[np.ndarray, "n n"], left: float) -> Float[np.ndarray, "m m"]:
    return np.block([[np.zeros((1, 1)), np.ones((1, len(q)))], [np.full((len(q), 1), left), q]])


def _characters(q: int) -> Float[np.ndarray, "q q"] | None:
    """chi(a - b) for all a, b of the field of q = p^k elements; None unless p is prime, k <= 3."""
    found = _prime_power(q)
    if found is None:
        return None
    p, k = found
    elements = np.array(list(itertools.product(range(p), repeat=k)))  # digits, highest power first
    place = p ** np.arange(k)[::-1]
    chi = np.full(q, -1.0)
    chi[_squares(elements, p) @ place] = 1.0
    chi[0] = 0.0
    differences = (elements[:, None, :] - elements[None, :, :]) % p
    return chi[differences @ place]


def _squares(elements: Int[np.ndarray, "q k"], p: int) -> Int[np.ndarray, "q k"]:
    """The square of each element: a polynomial mod p, reduced by an irreducible polynomial."""
    k = elements.shape[1]
    products = np.zeros((len(elements), 2 * k - 1), np.int64)
    for i, j in itertools.product(range(k), repeat=2):
        products[:, i + j] += elements[:, i] * elements[:, j]
    modulus = _irreducible(p, k)
    for lead in range(k - 1):  # x^k = -(the lower coefficients of the modulus)
        products[:, lead + 1 : lead + 1 + k] -= products[:, lead, None] * modulus
    return products[:, k - 1 :] % p


def _irreducible(p: int, k: int) -> Int[np.ndarray, " k"]:
    """Coefficients below the leading 1 of a polynomial without roots, irreducible for k <= 3."""
    tails, points = itertools.product(range(p), repeat=k), np.arange(p)
    return np.array(next(t for t in tails if k == 1 or np.all(np.polyval([1, *t], points) % p)))


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k, p prime and k <= 3."""
    for k in (1, 2, 3):
        p = round(q ** (1 / k))
        if p**k == q and p > 1 and all(p % d for d in range(2, int(p**0.5) + 1)):
            return p, k
    return None
