"""Whole steps of a power of two: how far a published tensor moved, in numbers short to tell.

A version that was made by adding whole steps to another (`merge.py`) differs from it by integers
of about 7 bits, where the difference of the bit patterns has 11 to 17. Both sides add in float64
and round once, so the integers give the same bytes; `steps_between` finds them in the two versions
alone, and what it does not find was not made that way.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_sdk.frames import Array
from edge_sdk.quantise import runs

# A step is near rms / 2**5: rounding to it adds at most 1/6000 of the change's power as noise.
FINENESS_BITS = 5
# One byte says which step: every value but 0 is one.
CODES = range(1, 256)
_UNIT_CODE = 224
_MOST_STEPS = (1 << 31) - 1


class Steps(NamedTuple):
    """How many steps each element of a tensor moved, and the byte for the step."""

    code: int
    counts: NDArray[np.int32]


def step_code(squares: float, elements: int) -> int | None:
    """The byte for the step that suits a change with this sum of squares; None: there is none."""
    rms = math.sqrt(squares / elements) if elements and squares > 0.0 else 0.0
    if not 0.0 < rms < math.inf:
        return None
    code = round(math.log2(rms)) - FINENESS_BITS + _UNIT_CODE
    return code if code in CODES else None


def step_of(code: int) -> float:
    """The step that a byte means."""
    return math.ldexp(1.0, code - _UNIT_CODE)


def moved(old: Array, counts: Array, code: int) -> Array:
    """``old``, as many steps further; anything that such numbers can give, and no warning."""
    new, step = np.empty_like(old), step_of(code)
    with np.errstate(all="ignore"):
        for run in runs(old.size):
            new[run] = old[run] + counts[run] * step
    return new


def steps_between(old: Array, new: Array) -> Steps | None:
    """The steps that lead from one vector to the other, bit for bit; None: there are none."""
    squares = 0.0
    with np.errstate(all="ignore"):
        for run in runs(old.size):
            change = np.subtract(new[run], old[run], dtype=np.float64)
            squares += float(np.dot(change, change))
    near = step_code(squares, old.size)
    # Whole steps have nearly the rms of what was rounded to them, so theirs is one of these.
    for code in () if near is None else (near + 1, near, near - 1):
        counts = _counts(old, new, code) if code in CODES else None
        if counts is not None:
            return Steps(code, counts)
    return None


def _counts(old: Array, new: Array, code: int) -> NDArray[np.int32] | None:
    counts, per_step = np.empty(old.size, np.int32), 1.0 / step_of(code)
    bits = f"<u{old.dtype.itemsize}"
    with np.errstate(all="ignore"):
        for run in runs(old.size):
            exact = np.rint(np.subtract(new[run], old[run], dtype=np.float64) * per_step)
            if not np.abs(exact).max() <= _MOST_STEPS:
                return None
            counts[run] = exact
            if not np.array_equal(moved(old[run], exact, code).view(bits), new[run].view(bits)):
                return None
    return counts
