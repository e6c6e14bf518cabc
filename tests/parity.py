"""What the tests of all kernels share: the verdict of fastgpt check as an assertion, and a tiny shape for each op."""


def assert_parity(rows):
    bad = [
        f"{r.tensor} of {r.op} {r.shape}: error {r.kernel:.2e}, expected <= {r.bound:.2e}; rms {r.rms:.2f}, expected <= "
        f"{r.rms_bound:.2f}; {r.wrong}"
        for r in rows
        if not r.ok
    ]
    assert rows and not bad, "\n".join(bad)


T_SIZES = (1, 2, 63, 65, 97, 128, 257)  # one, two, one off a block or a register, a prime, whole blocks

TINY_SHAPES = dict(
    layer_norm=(3, 11),
    gelu=(3, 5),
    linear=(33, 4, 5),
    linear_gelu=(33, 4, 5),
    attention=(2, 5, 2, 3),
    lm_loss=(2, 3, 4, 5),
)
