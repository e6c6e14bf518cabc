"""Right values with another gradient: how a mistake in a backward alone is written."""

from functools import lru_cache

from .. import check

output_gradient = lru_cache(check.output_gradient)  # made once: where runs go side by side, nothing random may be drawn


def slope(x, factor):
    """x, but its gradient comes out `factor` times as large."""
    return x.detach() + factor * (x - x.detach())


def takes_gradient_of(x, other):
    """x, but the gradient that belongs to it goes to `other`."""
    return x.detach() + (other - other.detach())


def change(x):
    """0, with the gradient of x."""
    return x - x.detach()


def without_dout(formula):
    """The right values; the gradients are those where `check.output_gradient` is 1 everywhere."""

    def wrong(*arguments, **options):
        out = formula(*arguments, **options)
        return out.detach() + change(out) / output_gradient(out.shape).to(out)

    return wrong
