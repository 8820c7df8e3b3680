"""Straight lines through logarithms."""

import math
from statistics import linear_regression


def power_law(x, y):
    """`(c, e)` of the least-squares fit `y = c x^e` in logarithms."""
    slope, intercept = linear_regression([math.log(value) for value in x], [math.log(value) for value in y])
    return math.exp(intercept), slope


def upper_half(values):
    """The second half of a sorted sweep, with the middle one of an odd number; at least two points."""
    return values[min(len(values) // 2, len(values) - 2) :]


def upper_half_exponent(x, y):
    """The exponent of `y` in `x` over the upper half of a sweep."""
    return power_law(upper_half(x), upper_half(y))[1]
