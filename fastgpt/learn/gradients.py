"""Right values with another gradient: how a mistake in a backward alone is written."""


def slope(x, factor):
    """x, but its gradient comes out `factor` times as large."""
    return x.detach() + factor * (x - x.detach())


def takes_gradient_of(x, other):
    """x, but the gradient that belongs to it goes to `other`."""
    return x.detach() + (other - other.detach())


def change(x):
    """0, with the gradient of x."""
    return x - x.detach()
