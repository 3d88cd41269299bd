r"""How far out a value lies among predicted quantiles, and back: which values lie no further out.

Quantiles :math:`Q_1 \le \dots \le Q_K` at levels :math:`q_1 < \dots < q_K` are joined to a
distribution function G: linear between them, jumping where some coincide, and beyond the
outermost with tails that fall like the inverse of the distance, in units b of the predicted
standard deviation: :math:`1 - G(z) = (1 - q_K) / (1 + (z - Q_K)/b)`. How they fall orders the
values there, and no more: what rests on these levels is calibrated on data.

A count x stands for the interval :math:`[x - \tfrac12, x + \tfrac12]`, of all below for 0. With v
uniform on [0, 1], :math:`u = (1 - v)\, G(x^-) + v\, G(x^+)` is the randomised probability integral
transform :cite:p:`czado2009`: uniform if G is the law of x. :math:`p = 2 \min(u, 1 - u)` says how
far out x lies, as in distributional conformal prediction :cite:p:`chernozhukov2021`. The values
with :math:`p \ge a` for *some* v are an interval: closed, and never too short.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Law"]

# From 95 to 97.5 %, and from 99 to 99.5 %, a normal law moves by .3 standard deviations.
_TAIL = 0.3


@dataclass(frozen=True)
class Law:
    """Predicted laws of values that share an array's shape, ``(n_obs, n_vars)``.

    Parameters
    ----------
    quantiles
        ``(n_quantiles, n_obs, n_vars)``, not decreasing along the first axis.
    levels
        ``(n_quantiles,)``, increasing, each in (0, 1).
    std
        Predicted standard deviations, ``(n_obs, n_vars)``.
    whole
        Whether the values are counts.
    """

    quantiles: np.ndarray
    levels: np.ndarray
    std: np.ndarray
    whole: bool

    def transform(self, x: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Randomised transform u of values, and 1 - u, each ``(n_obs, n_vars)`` float64.

        Parameters
        ----------
        x
            Values, ``(n_obs, n_vars)``.
        v
            Uniform on [0, 1], of the same shape.
        """
        half = 0.5 if self.whole else 0.0
        below, to = self._level(x - half, below=True), self._level(x + half)
        mirror = self._mirrored()
        above = mirror._level(half - x)
        beyond = mirror._level(-half - x, below=True)
        if self.whole:
            below, above = np.where(x <= 0, 0.0, below), np.where(x <= 0, 1.0, above)
        return (1 - v) * below + v * to, (1 - v) * above + v * beyond

    def tail(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Two-sided randomised tail p of values, ``(n_obs, n_vars)``; small is far out."""
        return 2 * np.minimum(*self.transform(x, v))

    def interval(self, tail: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the closed intervals of values whose tail may be at least ``tail``.

        Parameters
        ----------
        tail
            In (0, 1], broadcasts to ``(n_obs, n_vars)``.
        """
        lower, upper = self._value(tail / 2), -self._mirrored()._value(tail / 2)
        if self.whole:
            # Rounding errors must not shorten an interval.
            lower, upper = np.ceil(lower - 0.5 - 1e-6), np.floor(upper + 0.5 + 1e-6)
            lower, upper = np.maximum(lower, 0), np.maximum(upper, 0)
        return lower, np.maximum(lower, upper)

    def _mirrored(self) -> Law:
        """The law of -x, whose lower tail is the upper one here, to full precision."""
        return Law(-self.quantiles[::-1], 1 - self.levels[::-1], self.std, self.whole)

    @property
    def _width(self) -> np.ndarray:
        return _TAIL * self.std.astype(np.float64) + (0.5 if self.whole else 1e-12)

    def _level(self, z: np.ndarray, *, below: bool = False) -> np.ndarray:
        """G(z), or its limit from below, ``(n_obs, n_vars)``."""
        known = self.quantiles.astype(np.float64)
        n = len(known)
        k = ((known < z) if below else (known <= z)).sum(0)
        left, right = np.clip(k - 1, 0, n - 1), np.clip(k, 0, n - 1)
        start, stop = (np.take_along_axis(known, at[None], 0)[0] for at in (left, right))
        share = (z - start) / np.where(stop > start, stop - start, 1)
        inside = self.levels[left] + share * (self.levels[right] - self.levels[left])
        low = self.levels[0] / (1 + np.maximum(known[0] - z, 0) / self._width)
        high = 1 - (1 - self.levels[-1]) / (1 + np.maximum(z - known[-1], 0) / self._width)
        return np.where(k == 0, low, np.where(k == n, high, inside))

    def _value(self, level: np.ndarray) -> np.ndarray:
        """Where G reaches a level of at most one half, ``(n_obs, n_vars)``."""
        known, levels = self.quantiles.astype(np.float64), self.levels
        level = np.broadcast_to(level, known[0].shape)
        k = np.searchsorted(levels, level)
        left, right = np.clip(k - 1, 0, len(levels) - 1), np.clip(k, 0, len(levels) - 1)
        start, stop = (np.take_along_axis(known, at[None], 0)[0] for at in (left, right))
        step = np.where(right > left, levels[right] - levels[left], 1)
        inside = start + (level - levels[left]) / step * (stop - start)
        low = known[0] - self._width * (levels[0] / level - 1)
        high = known[-1] + self._width * ((1 - levels[-1]) / (1 - level) - 1)
        return np.where(k == 0, low, np.where(k == len(levels), high, inside))
