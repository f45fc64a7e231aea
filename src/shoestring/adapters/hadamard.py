r"""Fast Hadamard transforms of any size K 2^m for which a Hadamard matrix of order K is known by Paley's constructions.

Source   Paley 1933, On orthogonal matrices; Sylvester 1867
Update   U_n = H_n / sqrt(n), H_n in {+1, -1}^{n x n}, H_n H_n^T = n I     H_n = H_K kron H_2 kron ... kron H_2
         K = q + 1, q = 3 mod 4:      H_K = I + [[0, 1], [-1, Q]]
         K = 2 (q + 1), q = 1 mod 4:  H_K = C kron [[1, 1], [1, -1]] + I kron [[1, -1], [-1, -1]], C = [[0, 1], [1, Q]]
         with Q[a, b] = chi(a - b) over the field of q elements, q a prime, its square or its cube; chi is 1 for
         squares, -1 for others, 0 for 0
Costs    n log n: one product by a small factor for each of at most `ceil(m / 5) + 1` axes, so that matrix units do the
         work, in place of m passes of sums. Each factor is scaled, so that no number grows: float16 holds them
Differs  Of all K that fit the smallest is taken. K = 172 and 156 alone need another construction and are refused, but
         344 2^m and 312 2^m are Paley's
"""

from functools import cache
from itertools import product
from math import isqrt

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

LARGEST_BITS = 5  # of a factor that is a power of two: 32 x 32
LARGEST_ORDER = 1024  # of a factor that is none


def transform(x: Float[Tensor, "*batch n"], transposed: bool = False) -> Float[Tensor, "*batch n"]:
    """x U_n^T, the coefficients of the rows of x by the rows of U_n; transposed: x U_n, which is the inverse.

    Raises ValueError if there is no transform of that size.
    """
    shape, n, right = x.shape, x.shape[-1], 1
    y = x.reshape(-1, n)
    del x  # where nobody else holds it, only what a product reads and what it gives are there
    for array in reversed(_factors(n)):
        factor = torch.as_tensor(array.T if transposed else array, dtype=y.dtype)
        factor = factor.to(y.device, non_blocking=True)  # or the host would wait here for the device
        k = len(factor)
        y = (y.reshape(-1, k) @ factor.T) if right == 1 else factor @ y.reshape(-1, k, right)
        right *= k
    return y.reshape(shape)


def matrix(n: int) -> Float[Tensor, "n n"]:
    """H_n, of ones and minus ones, in double precision.

    Raises ValueError if there is none here.
    """
    return (transform(torch.eye(n, dtype=torch.float64), transposed=True) * n**0.5).round()


def has_transform(n: int) -> bool:
    """Whether there is a transform of size n."""
    return _order(n) is not None


def next_size(n: int) -> int:
    """The smallest size from n on that has a transform.

    >>> next_size(10), next_size(96)
    (12, 96)
    """
    return next(size for size in range(n, 2 * n + 1) if has_transform(size))


def products_a_number(n: int) -> int:
    """How many products a transform of size n takes for each number of a row."""
    return sum(len(factor) for factor in _factors(n))


@cache
def _factors(n: int) -> tuple[np.ndarray, ...]:
    """Orthogonal matrices whose Kronecker product is U_n: one of order K, and powers of two of nearly equal size."""
    if (k := _order(n)) is None:
        raise ValueError(
            f"There is no Hadamard transform of size {n} here: it must be K 2^m with K = 1, 12, 20, 28, 36, 44, ...; "
            f"the next size that is one is {next_size(n)}."
        )
    bits = (n // k).bit_length() - 1
    parts = -(-bits // LARGEST_BITS)
    sizes = [bits // parts + (index < bits % parts) for index in range(parts)]
    matrices = ([_paley(k)] if k > 1 else []) + [_sylvester(size) for size in sizes]
    return tuple(h / len(h) ** 0.5 for h in matrices) or (np.ones((1, 1)),)


@cache
def _order(n: int) -> int | None:
    """The smallest K that fits n = K 2^m; None if there is none."""
    if n < 1:
        return None
    odd = n >> _bits_below(n)
    if odd == 1:
        return 1
    orders = (odd << bits for bits in range(2, _bits_below(n) + 1))
    return next((k for k in orders if k <= LARGEST_ORDER and _field_for(k)), None)


def _bits_below(n: int) -> int:
    """How often 2 divides n."""
    return (n & -n).bit_length() - 1


def _field_for(k: int) -> tuple[int, int, int] | None:
    """(prime, exponent, kind) of the field that Paley's first or second construction of order k needs."""
    for kind, q in ((1, k - 1), (2, k // 2 - 1)):
        for exponent in (1, 2, 3):
            prime = round(q ** (1 / exponent))
            if prime**exponent == q and q % 4 == (3 if kind == 1 else 1) and _is_prime(prime):
                return prime, exponent, kind
    return None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, isqrt(n) + 1))


def _sylvester(bits: int) -> np.ndarray:
    h = np.ones((1, 1))
    for _ in range(bits):
        h = np.kron(h, np.array([[1.0, 1.0], [1.0, -1.0]]))
    return h


def _paley(k: int) -> np.ndarray:
    field = _field_for(k)
    assert field is not None
    prime, exponent, kind = field
    q = prime**exponent
    conference = np.ones((q + 1, q + 1))
    conference[0, 0] = 0
    conference[1:, 1:] = _characters_of_differences(prime, exponent)
    if kind == 1:
        conference[1:, 0] = -1
        return conference + np.eye(q + 1)
    plus, minus = np.array([[1.0, 1.0], [1.0, -1.0]]), np.array([[1.0, -1.0], [-1.0, -1.0]])
    return np.kron(conference, plus) + np.kron(np.eye(q + 1), minus)


def _characters_of_differences(prime: int, exponent: int) -> np.ndarray:
    """chi(a - b) for all a, b of the field: polynomials of degree below `exponent`, numbered by their coefficients."""
    elements = np.array(list(product(range(prime), repeat=exponent)))
    places = prime ** np.arange(exponent)[::-1]
    character = -np.ones(len(elements))
    character[[_multiply(a, a, _modulus(prime, exponent), prime) @ places for a in elements]] = 1
    character[0] = 0
    differences = (elements[:, None] - elements[None]) % prime
    return character[differences @ places]


def _modulus(prime: int, exponent: int) -> np.ndarray:
    """c, highest power first, such that x^exponent - c(x) cannot be factored: up to cubes, that it has no root."""
    for c in product(range(prime), repeat=exponent):
        values = [pow(x, exponent, prime) - sum(a * x**i for i, a in enumerate(reversed(c))) for x in range(prime)]
        if exponent == 1 or all(value % prime for value in values):
            return np.array(c)
    raise AssertionError("every finite field has such a polynomial")


def _multiply(a: np.ndarray, b: np.ndarray, modulus: np.ndarray, prime: int) -> np.ndarray:
    """The product of two polynomials, highest power first, by Horner's rule."""
    total = np.zeros_like(a)
    for coefficient in b:
        lead, total = total[0], np.append(total[1:], 0)  # times x
        total = (total + lead * modulus + coefficient * a) % prime
    return total
