"""What is seen of wrong results: the first wrong value, and what the errors have in common."""

import math

import torch

from .. import check


def is_wrong(result, name):
    """Which elements of a tensor are wrong."""
    got, exact = result.values[name], result.truth.exact[name]
    expected = exact.float().double()
    finite = expected.isfinite()
    same = (got == expected) | got.isnan() & expected.isnan()
    bound = check.largest_error(result.truth, name)
    return torch.where(finite, ~((got - exact).abs() <= bound), ~same)


def first_wrong(failed):
    """A sentence on the first wrong value, or the first error."""
    result = next((r for r in failed if "no rows" not in r.case.title), failed[0])
    if result.error:
        return sentence(f"In {result.case.title}: {result.error}")
    name = result.wrong[0]
    got, exact, wrong = result.values[name], result.truth.exact[name], is_wrong(result, name)
    if not wrong.any():
        row = next(row for row in result.rows if row.tensor == name)
        return (
            f"{name} in {result.case.title}: no number is far off, all together are: their errors are {row.rms:.2f} "
            f"times as large as the formula's own, expected at most {row.rms_bound:.2f}."
        )
    at = tuple(wrong.nonzero()[0].tolist())
    place = f"{name}[{', '.join(map(str, at))}]" if at else name
    bound = check.largest_error(result.truth, name)[at].item()
    return (
        f"First wrong value: {place} is {digits(got[at].item(), exact[at].item())}, expected "
        f"{digits(exact[at].item(), got[at].item())}, at most {bound:.1e} off, in {result.case.title}."
    )


def sentence(text):
    return text if text[-1] in ".?!" else f"{text}."


def digits(x, other):
    """x with as many digits as tell it from the other."""
    for n in range(4, 10):
        if f"{x:.{n}g}" != f"{other:.{n}g}":
            return f"{x:.{n + 1}g}"
    return f"{x:.10g}"


def describe(failed, results):
    """What the errors have in common, as lines."""
    lines = []
    names = list(dict.fromkeys(n for r in failed for n in r.wrong))
    if "out" not in names:
        grads = [n for n in failed[0].values if n != "out"]
        right = [n for n in grads if n not in names]
        lines.append(
            f"out is right; {', '.join(names)} {'is' if len(names) == 1 else 'are'} wrong"
            + (
                f", {', '.join(right)} right: the mistake is in the backward."
                if right
                else ": the mistake is in the backward."
            )
        )
    good = [r.case.title for r in results if r.ok and "no rows" not in r.case.title]
    if good:
        lines.append(f"Right in {'; '.join(good[:4])}; wrong in {'; '.join(r.case.title for r in failed[:4])}.")
    result = max(failed, key=lambda r: r.values[names[0]].numel() if names[0] in r.wrong else 0)
    lines += [sentence(f"{names[0]} in {result.case.title}: {line}") for line in patterns(result, names[0])]
    return lines


def patterns(result, name):
    """How the wrong values of a tensor differ from the right ones, in words."""
    got, exact, wrong = result.values[name], result.truth.exact[name], is_wrong(result, name)
    if not wrong.any():
        return ["every number is nearly right, but the sum of the errors is too large: a sum of lower precision?"]
    if got.isnan().all():
        return ["all numbers are NaN"]
    if not got.any():
        return ["all numbers are zero"]
    if got.numel() > 1 and (got == got.flatten()[0]).all():
        return ["all numbers are the same"]
    for what, x in result.case.inputs.items():
        if x.shape == got.shape and torch.equal(x.double(), got):
            return [f"it is {what} itself, a copy"]
    found = place(wrong)
    if (~got.isfinite() & exact.isfinite()).any():
        count = int((~got.isfinite() & exact.isfinite()).sum())
        return [*found, f"{count} of {got.numel()} numbers are not finite"]
    at = wrong & exact.isfinite() & got.isfinite()
    if sentence := relation(got[at], exact[at], sizes(result), check.largest_error(result.truth, name)[at]):
        return [*found, sentence]
    if got.numel() > 1 and torch.allclose(got.flatten().sort()[0], exact.flatten().sort()[0], rtol=1e-5, atol=1e-6):
        found.append("the right numbers, in other places" + moved(got, exact))
    else:
        distance = ((got - exact)[at].square().mean() / exact[at].square().mean()).sqrt().item()
        if distance < 5e-3:
            found.append(f"nearly right, about {distance:.0e} off: numbers of lower precision, or an approximation?")
        elif per := by_dimension(got, exact):
            found.append(per)
        else:
            found.append(
                f"{int(wrong.sum())} of {wrong.numel()} numbers are wrong, with no simple relation to the right ones"
            )
    return found


def dimension_names(n):
    return ["column", "row", "batch", "block"][:n][::-1]


def place(wrong):
    """In which rows and columns the wrong values are, if not in all."""
    found = []
    for d, what in enumerate(dimension_names(wrong.dim())):
        n = wrong.shape[d]
        bad = wrong.movedim(d, 0).reshape(n, -1).any(1).nonzero().flatten().tolist()
        if len(bad) == n:
            continue
        first, last = bad[0], bad[-1]
        if len(bad) == 1:
            which = "the last" if first == n - 1 else "the first" if first == 0 else "only one"
            found.append(f"only {which.removeprefix('only ')} {what} is wrong ({what} {first} of {n}, counted from 0)")
        elif bad == list(range(first, n)):
            found.append(f"wrong from {what} {first} on, of {n}, counted from 0; right before")
        elif bad == list(range(last + 1)):
            found.append(f"wrong up to {what} {last}, of {n}, counted from 0; right after")
        elif len({b - a for a, b in zip(bad, bad[1:], strict=False)}) == 1:
            found.append(f"every {bad[1] - bad[0]}th {what} is wrong, from {what} {first} on, counted from 0")
        else:
            found.append(f"{len(bad)} of {n} {what}s have wrong values, the first is {what} {first}, counted from 0")
    return found


def sizes(result):
    """The sizes that a wrong factor may be made of."""
    case, name = result.case, next(iter(result.case.inputs))
    x = case.inputs[name]
    if name == "qkv":
        (B, T, width), H = x.shape, case.options["n_head"]
        return dict(B=B, T=T, C=width // 3, n_head=H, D=width // 3 // H)
    found = {"rows": x.numel() // x.shape[-1] if x.numel() else 0, "C" if name == "hidden" else "K": x.shape[-1]}
    if name == "hidden":
        count = int((case.options["targets"] != -1).sum())
        return found | dict(V=case.inputs["weight"].shape[0], count=count)
    if case.inputs.get("weight", x).dim() == 2 and "weight" in case.inputs:
        return found | dict(N=case.inputs["weight"].shape[0])
    return {"rows" if k == "rows" else "C": v for k, v in found.items()}


def relation(got, exact, known, bound):
    """One factor or one difference between all wrong values and the right ones."""
    middle = exact.abs() >= exact.abs().median()
    factor = (got[middle] * exact[middle]).sum() / exact[middle].square().sum()
    allowed = 8 * bound + 1e-5 * exact.abs()
    if (
        factor.isfinite()
        and ((got - factor * exact).abs() <= allowed * factor.abs().clamp(min=1)).all()
        and len(got) > 2
    ):
        return f"every wrong number is {spell_factor(factor.item(), known)} times the right one"
    difference = (got - exact).median()
    if len(got) > 2 and ((got - exact - difference).abs() <= allowed).all():
        return f"every wrong number is the right one {'+' if difference > 0 else '-'} {abs(difference.item()):.5g}"
    if len(got) == 1 and abs(ratio := (got / exact).item() - 1) > 1e-3:
        return f"it is {spell_factor(1 + ratio, known)} times the right one"
    return ""


def spell_factor(factor, known):
    text = f"{factor:.5g}"
    if abs(factor + 1) < 1e-4:
        return "-1 (the sign)"
    candidates = {"2": 2, "1/2": 0.5, "sqrt(2)": math.sqrt(2), "1/sqrt(2)": math.sqrt(0.5)}
    for name, n in known.items():
        if n > 1:
            candidates |= {
                name: n,
                f"1/{name}": 1 / n,
                f"sqrt({name})": math.sqrt(n),
                f"1/sqrt({name})": 1 / math.sqrt(n),
            }
            candidates |= {f"({name} - 1)/{name}": (n - 1) / n, f"{name}/({name} - 1)": n / (n - 1)}
    hits = [
        f"{name} = {n}" if (n := known.get(name)) else name
        for name, value in candidates.items()
        if abs(abs(factor) / value - 1) < 1e-4
    ]
    return f"{text} ({'-' if factor < 0 else ''}{' or '.join(hits[:3])})" if hits else text


def moved(got, exact):
    """To where the right numbers went."""
    if got.dim() >= 2 and got.shape[-1] == got.shape[-2] and torch.allclose(got.transpose(-1, -2), exact, 1e-5, 1e-6):
        return ": transposed"
    for d, what in enumerate(dimension_names(got.dim())):
        for by in (1, -1, 2, -2, got.shape[d] // 2):
            if torch.allclose(got.roll(by, d), exact, 1e-5, 1e-6):
                return f": {what} by {what}, shifted by {-by}"
        if torch.allclose(got.flip(d), exact, 1e-5, 1e-6):
            return f": {what}s in the opposite order"
    return ""


def by_dimension(got, exact):
    """A factor or a difference of its own for each row or each column."""
    for d, what in enumerate(dimension_names(got.dim())):
        g, x = (t.movedim(d, 0).flatten(1) if t.dim() > 1 else t[:, None] for t in (got, exact))
        if g.shape[1] < 3:
            continue
        factor = (g * x).sum(1, keepdim=True) / x.square().sum(1, keepdim=True)
        if ((g - factor * x).abs() <= 1e-4 * (x.abs() + x.square().mean().sqrt())).all():
            return f"each {what} is the right one times a factor of its own ({factor[0].item():.4g} for the first)"
        difference = (g - x).mean(1, keepdim=True)
        if ((g - x - difference).abs() <= 1e-4 * (x.abs() + x.square().mean().sqrt())).all():
            return f"each {what} is the right one plus a number of its own ({difference[0].item():.4g} for the first)"
    return ""
