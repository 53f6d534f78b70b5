"""Generated ratings, in which popular IDs need more dimensions than rare ones."""

from __future__ import annotations

import hashlib

import numpy as np

from ..errors import check_least
from .ratings import RATING_MAX, RATING_MIN, DataError, Ratings, event_counts

__all__ = ["MAX_RANK", "synthetic_ratings"]

MAX_RANK = 32
# Fixed: the random draws come chunk by chunk, so this size is part of what a seed means.
_CHUNK = 1 << 18


def synthetic_ratings(
    events: int = 200_000, *, n_users: int | None = None, n_items: int | None = None, seed: int = 0
) -> Ratings:
    r"""Generate ratings in which an ID needs the more dimensions the more popular it is.

    Every event draws a user u and an item i independently, so a pair may come back:

        P(u) ~ rank(u)^-0.8,  P(i) ~ rank(i)^-1.05           (ranks are a random permutation)
        score  = 3.85 + a_u + b_i + sum_{k < min(K_u, K_i)} s_k p_uk q_ik + noise
        rating = score rounded to the nearest half, clipped to 0.5..5

        a_u ~ N(0, 0.3^2),  b_i ~ N(0, 0.4^2),  centred over the traffic
        p_uk, q_ik ~ N(0, 1),  s_k^2 = 0.25 / (k + 1),  noise ~ N(0, 0.5^2)
        K = clip(floor(sqrt(n) / 2), 1, 32),  n = events * P(id), the ID's expected count

    An ID expected 16 times has 2 factors, one expected 4096 times has 32. Between two head IDs
    the interaction has variance 1.01, of which the first two factors hold 37 %; a tail ID has
    nothing for a wide row to learn. Timestamps rise by 1 to 120 s from event to event.

    Args:
        events: number of events E, at least 1.
        n_users, n_items: `events // 20` and `events // 40` by default, at least 50.
        seed: equal arguments give equal arrays.

    Returns:
        The ratings, 20 bytes an event; IDs that were never drawn keep their code.

    Raises:
        DataError: if a count is below 1 or the seed is negative.
    """
    n_users = max(50, events // 20) if n_users is None else n_users
    n_items = max(50, events // 40) if n_items is None else n_items
    check_least(DataError, 1, events=events, n_users=n_users, n_items=n_items)
    check_least(DataError, 0, seed=seed)

    rng = np.random.default_rng(seed)
    u_ids, u_cdf, u_bias, u_factors = _plant(rng, n_users, events, exponent=0.8, bias_std=0.3)
    i_ids, i_cdf, i_bias, i_factors = _plant(rng, n_items, events, exponent=1.05, bias_std=0.4)
    user: np.ndarray = np.empty(events, np.int32)
    item: np.ndarray = np.empty(events, np.int32)
    rating: np.ndarray = np.empty(events, np.float32)
    timestamp: np.ndarray = np.empty(events, np.int64)
    now = 1_000_000_000
    for start in range(0, events, _CHUNK):
        part = slice(start, min(start + _CHUNK, events))
        size = part.stop - part.start
        u = np.searchsorted(u_cdf, rng.random(size), side="right")
        i = np.searchsorted(i_cdf, rng.random(size), side="right")
        score = 3.85 + u_bias[u] + i_bias[i] + rng.normal(0.0, 0.5, size)
        score += np.einsum("ek,ek->e", u_factors[u], i_factors[i])
        rating[part] = np.clip(np.round(score * 2) / 2, RATING_MIN, RATING_MAX)
        user[part], item[part] = u_ids[u], i_ids[i]
        timestamp[part] = now + np.cumsum(rng.integers(1, 121, size))
        now = int(timestamp[part.stop - 1])
    digest = hashlib.sha256()
    for array, dtype in ((user, np.int64), (item, np.int64), (rating, None), (timestamp, None)):
        for start in range(0, events, _CHUNK):
            digest.update(np.ascontiguousarray(array[start : start + _CHUNK], dtype).data)
    checksum = digest.hexdigest()
    counts = event_counts(user, item, timestamp, n_items) | {"skipped": 0}
    return Ratings(user, item, rating, timestamp, n_users, n_items, "synthetic", checksum, counts)


def _plant(
    rng: np.random.Generator, n: int, events: int, exponent: float, bias_std: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return one side's IDs [n], cdf [n], biases [n] and factors [n, MAX_RANK], by popularity."""
    share = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    share /= share.sum()
    cdf = np.cumsum(share)
    cdf[-1] = 1.0
    bias = rng.normal(0.0, bias_std, n)
    bias -= share @ bias
    rank = np.clip(np.sqrt(events * share) // 2, 1, MAX_RANK)
    factors = rng.standard_normal((n, MAX_RANK), dtype=np.float32)
    factors *= (0.25 / np.arange(1, MAX_RANK + 1, dtype=np.float32)) ** 0.25  # sqrt(s_k) a side
    factors *= np.arange(MAX_RANK) < rank[:, None]
    return rng.permutation(n), cdf, bias, factors
