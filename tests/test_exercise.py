"""fastgpt exercise: right answers pass, wrong ones don't and are told why; bad files end in one line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastgpt
import gpt
from fastgpt.learn import exercise, judge, judge_generation, native, sandbox, tasks
from fastgpt.learn.tasks import EXERCISES
from fastgpt.learn.wrong import WRONG
from fastgpt.learn.wrong_generation import KV_CACHE, SAMPLING

RIGHT = Path(__file__).parent / "exercises"
FORMULAS = [name for name, e in EXERCISES.items() if e.inputs]
compiler = pytest.mark.skipif(not any(map(shutil.which, native.COMPILERS)), reason="no C++ compiler on this machine")


class Inside:
    """A sandbox without a process of its own, for functions that can be trusted: quicker."""

    native = False

    def __init__(self, **functions):
        self.child = sandbox.Child(0, 0, __file__, None)
        self.child.module = SimpleNamespace(**functions)

    def ask(self, request, what="", seconds=None):
        return self.child.answer(dict(request))


def verdict_on(source, name):
    """The verdict on a file with this text, run here."""
    functions = {}
    exec(compile("import math\nimport torch\nimport torch.nn.functional as F\n" + source, "learner", "exec"), functions)
    return exercise.judge_exercise(Inside(**functions), name, set(functions))


def check_file(path, **options):
    """(right?, what is printed)."""
    import io

    out = io.StringIO()
    return exercise.check_file(path, speed=False, file=out, **options), out.getvalue()


def written(tmp_path, text, name="mine.py"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------ right answers


@pytest.mark.slow
def test_right_answers_in_python_pass():
    right, text = check_file(RIGHT / "right.py")
    assert right, text
    assert text.count("Right: ") == len(EXERCISES)
    assert max(map(len, text.splitlines())) <= 100


@compiler
@pytest.mark.slow
def test_right_answers_in_cpp_pass(isa):
    right, text = check_file(RIGHT / "right.cpp")
    assert right, text
    assert text.count("Right: ") == len(EXERCISES) and text.count("its own backward") == len(FORMULAS)


@pytest.mark.slow
def test_a_file_answers_what_it_defines_and_nothing_else(tmp_path):
    """A method, a helper, a call or what comes from torch has an exercise's name, too."""
    cache = "import math\nimport torch\nfrom torch.nn.functional import gelu\n" + CACHE.format(INIT, APPEND, "S - T")
    right, text = check_file(written(tmp_path, cache))
    assert right and text.count("mine.py: ") == 1 and "kv-cache" in text
    assert exercise.defined(written(tmp_path, "try:\n    from other import gelu\nexcept ImportError: pass\n"))[0] == [
        "gelu"
    ]


@compiler
@pytest.mark.slow
def test_a_fused_function_with_helpers_in_cpp_passes(tmp_path):
    right, text = check_file(written(tmp_path, FUSED, "mine.cpp"))
    assert right and text.count("mine.cpp: ") == 1


FUSED = """#include <cmath>
#include <cstdint>
static float gelu(float u) { return u / 2 * (1 + std::tanh(0.7978845608f * (u + 0.044715f * u * u * u))); }
static void linear(float* y, int64_t n) { y[n] = gelu(y[n]); }
extern "C" {
void linear_gelu(const float* x, const float* weight, const float* bias, float* out, int64_t M, int64_t N, int64_t K) {
    for (int64_t i = 0; i < M * N; i++) {
        out[i] = bias ? bias[i % N] : 0;
        for (int64_t k = 0; k < K; k++) out[i] += x[i / N * K + k] * weight[i % N * K + k];
        linear(out, i);  // gelu
    }
}
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMULAS)
def test_the_formula_itself_and_torchs_own_function_pass(name):
    from fastgpt import torch_ops

    e = EXERCISES[name]
    verdict = exercise.judge_exercise(Inside(**{e.function: getattr(gpt, name)}), name, set())
    assert verdict.ok and f"gpt.{name}" in verdict.notes[0] and "borrowed" in verdict.notes[0]
    if name != "linear_gelu":  # without a bias too
        own = getattr(torch_ops, name)
        assert exercise.judge_exercise(Inside(**{e.function: own}), name, set()).ok


# ------------------------------------------------------------------------------------------------ known mistakes


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_each_known_mistake_is_named(name):
    titles = list(WRONG[name].items())
    for title, formula in titles[:8] if name == "linear_gelu" else titles:  # after its own come linear's and gelu's
        verdict = exercise.judge_exercise(Inside(**{EXERCISES[name].function: formula}), name, set())
        assert not verdict.ok and verdict.mistake == [f"The mistake: {title}."], title


@pytest.mark.slow
def test_each_known_mistake_of_sampling_is_named():
    for title, sample in SAMPLING.items():
        verdict = judge_generation.judge_sampling(Inside(sample=sample))
        assert not verdict.ok and verdict.mistake == [f"The mistake: {title}."], title


def cache_of(pieces):
    """A KVCache that computes everything again by pieces(qkv, n_head, cuts)."""

    class KVCache:
        def __init__(self):
            self.seen = []

        def attention(self, qkv, n_head):
            self.seen.append(qkv)
            cuts = [x.shape[1] for x in self.seen]
            return pieces(torch.cat(self.seen, 1), n_head, cuts)[:, -qkv.shape[1] :]

    return KVCache


@pytest.mark.slow
def test_each_known_mistake_of_the_kv_cache_is_named():
    for title, pieces in KV_CACHE.items():
        verdict = judge_generation.judge_cache(Inside(KVCache=cache_of(pieces)))
        assert not verdict.ok and verdict.mistake == [f"The mistake: {title}."], title


LAYER_NORM = """
def layer_norm(x, weight, bias, eps=1e-5):
    mean = x.mean(-1, keepdim=True)
    {}
"""
ATTENTION = """
def attention(qkv, n_head):
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = (x.view(B, T, n_head, C // n_head).transpose(1, 2) for x in qkv.split(C, dim=2))
    att = (q @ k.transpose(-2, -1)) {}
    y = att @ v
    return y.transpose(1, 2).contiguous().view(B, T, C)
"""
SCALED = "/ math.sqrt(C // n_head)"
MASKED = f"{SCALED}\n    att = att.masked_fill(torch.tril(torch.ones(T, T)) == 0, float('-inf'))"
LOSS = """
def lm_loss(hidden, weight, targets):
    logits = hidden @ weight.T
    {}
"""
CACHE = """
class KVCache:
    {}
    def attention(self, qkv, n_head):
        B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        q, k, v = (x.view(B, T, n_head, C // n_head).transpose(1, 2) for x in qkv.split(C, dim=2))
        {}
        S = self.k.shape[2]
        att = (q @ self.k.transpose(-2, -1)) / math.sqrt(C // n_head)
        att = att.masked_fill(~torch.ones(T, S, dtype=torch.bool).tril({}), float('-inf'))
        return (torch.softmax(att, -1) @ self.v).transpose(1, 2).reshape(B, T, C)
"""
BACKWARD = """
def gelu(x): return F.gelu(x, approximate='tanh')
def gelu_backward(dout, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = gelu(x)
"""
NORM_BACKWARD = """
def layer_norm(x, weight, bias, eps=1e-5): return F.layer_norm(x, weight.shape, weight, bias, eps)
def layer_norm_backward(dout, x, weight, bias, eps=1e-5):
    h, g, rows = layer_norm(x, 0 * weight + 1, 0 * bias, eps), dout * weight, tuple(range(x.dim() - 1))
    return {}, (dout * h).sum(rows), dout.sum(rows)
"""
SAMPLE = """
def sample(logits, temperature, top_k, top_p, rng):
    ordered, tokens = logits.double().sort(dim=-1, descending=True, stable=True)
    if temperature == 0: return tokens[:, :1]
    probs = ((ordered[:, :top_k] - ordered[:, :1]) / temperature).softmax(-1)
    picked = []
    for p, token in zip(probs.tolist(), tokens.tolist()):
        u, total, left = rng.random(), 0.0, [q for i, q in enumerate(p) if top_p is None or sum(p[:i]) < top_p]
        for q, t in zip(left, token):
            total += q
            if total > u: break
        picked.append([t])
    return torch.tensor(picked)
"""
INIT = "def __init__(self): self.k = self.v = None"
APPEND = (
    "self.k = k if self.k is None else torch.cat((self.k, k), 2); "
    "self.v = v if self.v is None else torch.cat((self.v, v), 2)"
)

FAULTS = {  # as somebody else would write them: exercise, text, words of the verdict
    "unbiased variance": (
        "layer_norm", LAYER_NORM.format("return (x - mean) / torch.sqrt(x.var(-1, keepdim=True) + eps) * weight + bias"),
        "divided by C - 1",
    ),
    "std and eps outside": (
        "layer_norm", LAYER_NORM.format("return (x - mean) / (x.std(-1, keepdim=True, correction=0) + eps) * weight + bias"),
        "eps stands outside the root",
    ),
    "RMSNorm": (
        "layer_norm", LAYER_NORM.format("return F.rms_norm(x, (x.shape[-1],), eps=eps) * weight + bias"),
        "the mean is not subtracted: this is RMSNorm",
    ),
    "one pass variance": (
        "layer_norm",
        LAYER_NORM.format("return (x - mean) / ((x * x).mean(-1, keepdim=True) - mean * mean + eps).sqrt() * weight + bias"),
        "digits cancel",
    ),
    "default eps of another library": ("layer_norm", "def layer_norm(x, w, b, eps=1e-6): return F.layer_norm(x, w.shape, w, b, eps)", "eps is 1e-6"),
    "erf": ("gelu", "def gelu(x): return F.gelu(x)", "exact GELU, with erf"),
    "own tanh": ("gelu", "def gelu(x):\n    u = (2 / math.pi) ** .5 * (x + .044715 * x ** 3)\n    return x / 2 * (1 + (u.exp() - (-u).exp()) / (u.exp() + (-u).exp()))", "exp overflows for large x"),
    "square weight": ("linear", "def linear(x, weight, bias=None):\n    y = torch.matmul(x, weight)\n    return y if bias is None else y + bias", "not transposed"),
    "mask diagonal": ("attention", ATTENTION.format(SCALED + "\n    att = att.masked_fill(torch.tril(torch.ones(T, T), -1) == 0, -1e10).softmax(-1)"), "the mask hides the position itself"),
    "mask one late": ("attention", ATTENTION.format(SCALED + "\n    att = att.masked_fill(torch.tril(torch.ones(T, T), 1) == 0, float('-inf')).softmax(-1)"), "shows one position of the future"),
    "multiplied mask": ("attention", ATTENTION.format(SCALED + "\n    att = (att * torch.ones(T, T).tril()).softmax(-1)"), "hidden scores are set to 0"),
    "no maximum": ("attention", ATTENTION.format(MASKED + "\n    att = att.exp(); att = att / att.sum(-1, keepdim=True)"), "max-subtraction"),
    "not divided by the sum": ("attention", ATTENTION.format(MASKED + "\n    att = att.exp()"), "not divided by its sum"),
    "softmax axis": ("attention", ATTENTION.format(MASKED + "\n    att = att.softmax(-2)"), "over the queries (dim=-2)"),
    "1/D": ("attention", ATTENTION.format("/ (C // n_head)\n    att = att.masked_fill(torch.tril(torch.ones(T, T)) == 0, float('-inf')).softmax(-1)"), "divided by D; it is sqrt(D)"),
    "sqrt(C)": ("attention", ATTENTION.format("/ math.sqrt(C)\n    att = att.masked_fill(torch.tril(torch.ones(T, T)) == 0, float('-inf')).softmax(-1)"), "divided by sqrt(C)"),
    "interleaved": ("attention", ATTENTION.format(MASKED + "\n    att = att.softmax(-1)").replace("x.view(B, T, n_head, C // n_head).transpose(1, 2)", "x.view(B, T, C // n_head, n_head).permute(0, 3, 1, 2)").replace("y.transpose(1, 2).contiguous()", "y.permute(0, 2, 3, 1).contiguous()"), "the heads are interleaved"),
    "cross entropy counts all": ("lm_loss", LOSS.format("return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1, reduction='sum') / targets.numel()"), "the mean is over all positions"),
    "negative index": ("lm_loss", LOSS.format("return -torch.log_softmax(logits, -1).gather(-1, (targets % logits.shape[-1])[..., None]).mean()"), "taken for the last token (a negative index"),
    "no maximum in the loss": ("lm_loss", LOSS.format("k = targets != -1; n = logits.exp().sum(-1).log() - logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]; return n[k].mean()"), "max-subtraction"),
    "bias after gelu": ("linear_gelu", "def linear_gelu(x, weight, bias=None):\n    y = F.gelu(x @ weight.T, approximate='tanh')\n    return y if bias is None else y + bias", "the bias is added after gelu"),
    "dropped bias gradient": ("linear", "def linear(x, w, b=None): return F.linear(x, w, b)\ndef linear_backward(d, x, w, b=None): return d @ w, d.flatten(0, -2).T @ x.flatten(0, -2), None if b is None else torch.zeros_like(b)", "the gradient of the bias was dropped"),
    "two mistakes in a backward": ("linear", "def linear(x, w, b=None): return F.linear(x, w, b)\ndef linear_backward(d, x, w, b=None): return -d @ w, d.flatten(0, -2).T @ x.flatten(0, -2), None if b is None else d.flatten(0, -2).mean(0)", "The mistake in dx: dx has the wrong sign. The mistake in dbias: dbias is the mean"),
    "stale cache": ("kv-cache", CACHE.format(INIT, "self.k, self.v = (k, v) if self.k is None else (self.k, self.v)", "S - T"), "the cache is stale"),
    "shared cache": ("kv-cache", CACHE.format("k = v = None\n", APPEND.replace("self.k =", "KVCache.k =").replace("self.v =", "KVCache.v ="), "S - T"), "two caches share"),
    "mask from 0": ("kv-cache", CACHE.format(INIT, APPEND, "0"), "takes the new queries for positions 0, 1"),
    "cache of the piece alone": ("kv-cache", CACHE.format(INIT, "self.k, self.v = k, v", "S - T"), "the past is forgotten"),
    "multinomial": ("sampling", "def sample(logits, temperature, top_k, top_p, rng):\n    if temperature == 0: return logits.argmax(-1, keepdim=True)\n    return torch.multinomial(torch.softmax(logits / temperature, -1), 1)", "rng is not used"),
    "eps of its own": ("layer_norm", "def layer_norm(x, w, b, eps=1e-5): return F.layer_norm(x, w.shape, w, b, 1e-5)", "eps is the argument of this name"),
    "dout left out": ("gelu", BACKWARD + "        return torch.autograd.grad(y.sum(), x)[0]", "dout is not used"),
    "another backward": ("gelu", BACKWARD + "        return dout * (x > 0)", "in the backward alone: dx is the gradient of another formula (this is ReLU, not GELU)"),
    "not divided in the backward": ("layer_norm", NORM_BACKWARD.format("(g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True))"), "dx is not divided by sqrt(variance + eps)"),
    "scores of one head": ("attention", ATTENTION.format(MASKED + "\n    att = att.softmax(-1)[:, :1]"), "wrong from column 16 on, of 32"),
    "values not reached": ("attention", ATTENTION.format(MASKED + "\n    att = att.softmax(-1); v = v.detach()"), "dv is zero"),
    "no zeros": ("lm_loss", LOSS.format("return F.cross_entropy(logits.flatten(0, -2), targets.flatten().clamp(min=0), ignore_index=0)"), "a target of 0 does not count"),
    "ReLU": ("linear_gelu", "def linear_gelu(x, w, b=None): return torch.relu(F.linear(x, w, b))", "this is ReLU"),
    "not multiplied by what is left": ("sampling", SAMPLE, "not multiplied by the sum that is left"),
    # not in the dictionary: none may pass, and what is seen is told
    "columns from 64 on": ("linear", "def linear(x, w, b=None):\n    y = F.linear(x, w, b)\n    return torch.cat((y[..., :64], y[..., 64:] * 1.001), -1)", "wrong from column 64 on, of 257"),
    "last row": ("gelu", "def gelu(x):\n    y = F.gelu(x, approximate='tanh')\n    y = y.clone()\n    y[..., -1:, :] *= 0.5 if y.dim() > 1 else 1\n    return y", "only the last row is wrong"),
    "a factor": ("layer_norm", "def layer_norm(x, w, b, eps=1e-5): return 0.25 * F.layer_norm(x, w.shape, w, b, eps)", "0.25 times the right one"),
    "half precision": ("linear", "def linear(x, w, b=None): return F.linear(x.half(), w.half(), None if b is None else b.half()).float()", "nearly right"),
    "zeros": ("gelu", "def gelu(x): return 0 * x", "all numbers are zero"),
    "a copy": ("gelu", "def gelu(x): return x + 0", "a copy"),
    "constants": ("gelu", "def gelu(x): return 0 * x + 0.5", "all numbers are the same"),
    "NaN": ("attention", "def attention(qkv, n_head): return qkv.chunk(3, -1)[0] * math.nan", "all numbers are NaN"),
    "kept from the last call": ("gelu", "kept = {}\ndef gelu(x): return kept.setdefault(x.shape, F.gelu(x, approximate='tanh'))", "wrong in 2x64 again, other numbers"),
    "bfloat16": ("linear", "def linear(x, w, b=None): return F.linear(x.bfloat16(), w.bfloat16(), None if b is None else b.bfloat16()).float()", "numbers of lower precision"),
    "log of p + 1e-8": ("lm_loss", LOSS.format("t = targets.flatten(); k = t != -1; return -(logits.flatten(0, -2).softmax(-1)[k, t[k]] + 1e-8).log().mean()"), "nearly right"),
    "smoothed labels": ("lm_loss", LOSS.format("return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1, label_smoothing=0.1)"), "times the right one"),
    "clamped": ("gelu", "def gelu(x): return F.gelu(x.clamp(-8, 8), approximate='tanh')", "11 of 3120 numbers"),
    "a sink": ("attention", ATTENTION.format(MASKED + "\n    att = torch.cat((att, torch.zeros(B, n_head, T, 1)), -1).softmax(-1)[..., :-1]"), "each row is the right one times a factor of its own"),
    "a window": ("attention", ATTENTION.format(MASKED + "\n    att = att.masked_fill(torch.ones(T, T).tril(-64) == 1, -math.inf).softmax(-1)"), "wrong from row 64 on, of 130"),
    "rounded": ("linear", "def linear(x, w, b=None):\n    y = F.linear(x, w, b)\n    return y + ((y * 1e4).round() / 1e4 - y).detach()", "numbers of lower precision"),
    "begun anew": ("kv-cache", CACHE.format(INIT, "self.k, self.v = (self.k, self.v) if T == 1 else (None, None); " + APPEND, "S - T"), "wrong from row 64 on, of 70"),
    "window of 128": ("kv-cache", CACHE.format(INIT, APPEND + "; self.k, self.v = self.k[:, :, -128:], self.v[:, :, -128:]", "S - T"), "260 positions"),
    "never quite greedy": ("sampling", "import gpt\ndef sample(logits, t, k, p, rng): return gpt.sample(logits, max(t, 1e-3), k, p, rng)", "only where temperature is 0, there always"),
    "reversed": ("gelu", "def gelu(x): return F.gelu(x.flip(-1), approximate='tanh')", "columns in the opposite order"),
    "mask for long texts": ("attention", ATTENTION.format(MASKED + "\n    att = att.softmax(-1) if T <= 128 else att.softmax(-1) * (torch.arange(T) >= T - 128)"), "wrong in 1x130x1x20; 1x257x1x8"),
    "window": ("kv-cache", CACHE.format(INIT, APPEND + "; self.k, self.v = self.k[:, :, -64:], self.v[:, :, -64:]", "S - T"), "70 positions"),
    "another temperature": ("sampling", "import gpt\ndef sample(logits, t, k, p, rng): return gpt.sample(logits, t if t < 2 else 1.9, k, p, rng)", "wrong only where temperature is not 1, there not always"),
}  # fmt: skip


FIRST = {name: fault for fault, (name, *_) in reversed(FAULTS.items())}.values()  # one of each exercise


@pytest.mark.slow
@pytest.mark.parametrize("fault", [f if f in FIRST else pytest.param(f, marks=pytest.mark.slow) for f in FAULTS])
@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_a_fault_of_somebody_else_fails_and_is_told(fault):
    name, text, words = FAULTS[fault]
    verdict = verdict_on(text, name)
    assert not verdict.ok
    assert words in " ".join([verdict.first, *verdict.mistake]), [verdict.first, *verdict.mistake]


def test_the_first_wrong_value_is_told_with_what_was_expected():
    verdict = verdict_on("def gelu(x): return F.gelu(x)", "gelu")
    x = judge.cases("gelu")[0].inputs["x"].double()
    got, expected = torch.nn.functional.gelu(x).item(), gpt.gelu(x).item()
    assert verdict.first.startswith(f"First wrong value: out[0] is {got:.5f}, expected {expected:.5f}, at most ")
    assert verdict.first.endswith(" off, in 1.")


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("gelu", "def gelu(x): return [1.0]", "gelu returns a list of 1, expected a tensor"),
        ("gelu", "def gelu(x): return F.gelu(x).double()", "float64 of shape (1,), expected float32 of shape (1,)"),
        ("gelu", "def gelu(x): return x.sum()", "float32 of shape (), expected float32 of shape (1,)"),
        ("gelu", "def gelu(x): return x.data.mul_(2)", "it changes x"),
        ("gelu", "def gelu(x): return F.gelu(x.detach())", "has no gradient"),
        ("gelu", "def gelu(x): return trch.tanh(x)", "NameError: name 'trch' is not defined"),
        (
            "gelu",
            "def gelu(x): return x\ndef gelu_backward(dout, x): return dout, dout",
            "returns 2 values, expected 1: dx",
        ),
        (
            "sampling",
            "def sample(logits, t, k, p, rng): return logits.argmax(-1)",
            "expected torch.int64 of shape (1, 1)",
        ),
    ],
)
def test_a_result_of_another_kind_is_told(name, text, words):
    verdict = verdict_on(text, name)
    assert not verdict.ok and words in verdict.first, verdict.first


# ---------------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    "text, words",
    [
        *(
            pytest.param(*bad, marks=pytest.mark.slow)
            for bad in [
                ("def gelu(x):\n    while True: pass\n", "no result after 2 s in 1: is there an endless loop"),
                ("import os\ndef gelu(x): os._exit(0)\n", "it ended the process itself, with status 0"),
                ("import os\ndef gelu(x):\n    os.fork()\n    return x\n", "it starts another process"),
                ("import os\nos.fork()\ndef gelu(x): return x\n", "it starts another process"),
                (
                    "import sys\nsys.exit(3)\ndef gelu(x): return x\n",
                    "cannot be imported: line 2: it calls sys.exit(3)",
                ),
                (
                    "import nowhere\ndef gelu(x): return x\n",
                    "cannot be imported: line 1: ModuleNotFoundError: No module named",
                ),
                ("import ctypes\ndef gelu(x): ctypes.string_at(0)\n", "it crashed with SIGSEGV"),
                (
                    "import os\ndef gelu(x):\n    for i in range(3, 20):\n        try: os.write(i, b'x' * 64)\n"
                    "        except OSError: pass\n    return x\n",
                    "it writes into the pipe on which its results come",
                ),
            ]
        ),
        ("def gelu(x):\n    return x +\n", "line 2: SyntaxError"),
        ("def glu(x): return x\n", "defines none of linear, gelu"),
    ],
)
def test_a_bad_file_ends_in_one_line(tmp_path, text, words):
    with pytest.raises(ValueError) as error:
        check_file(written(tmp_path, text), seconds=2.0)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_what_a_file_prints_is_shown_and_harms_nothing(tmp_path):
    text = (
        "import torch\ndef gelu(x):\n    print('x' * 200)\n    return torch.nn.functional.gelu(x, approximate='tanh')\n"
    )
    path = written(tmp_path, text)
    right, out = check_file(path)
    assert right and "It printed:" in out
    assert max(map(len, out.replace(str(path), path.name).splitlines())) <= 100


@pytest.mark.slow
@pytest.mark.parametrize("change", ("sys.stdout.close()", "sys.stdout = None", "class Own(torch.Tensor): pass"))
def test_a_right_answer_may_do_strange_things(tmp_path, change):
    text = f"import sys\nimport torch\n{change}\nOwn = globals().get('Own', torch.Tensor)\n"
    text += "def gelu(x): return torch.nn.functional.gelu(x, approximate='tanh').as_subclass(Own)\n"
    right, out = check_file(written(tmp_path, text))
    assert right and "It printed" not in out, out


@pytest.mark.slow
def test_an_exception_in_one_case_is_told_with_its_line(tmp_path):
    right, out = check_file(written(tmp_path, "def gelu(x):\n    sys.exit()\n"))
    assert not right and "line 2: NameError: name 'sys' is not defined" in out
    right, out = check_file(written(tmp_path, "import sys\ndef gelu(x):\n    sys.exit()\n"))
    assert not right and "line 3: it calls sys.exit()" in out


# ----------------------------------------------------------------------------------------------------------- C++

GELU = 'extern "C" void gelu(const float* x, float* out, int64_t n) {{ {} }}'
GOOD = "out[i] = 0.5f * x[i] * (1 + std::tanh(0.7978845608f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));"
CPP = {
    "one beyond the end": ("for (int64_t i = 0; i <= n; i++) " + GOOD, "gelu reads or writes x[1], past its end|gelu reads x[1], past its end"),
    "one before the start": ("for (int64_t i = -1; i < n; i++) " + GOOD, "gelu reads x[-1], before its start|gelu reads or writes x[-1], before its start"),
    "a write beyond the end": ("for (int64_t i = 0; i < n; i++) " + GOOD + " out[n] = 0;", "writes out[1], past its end (out has 1 numbers)"),
    "a write into an input": ("for (int64_t i = 0; i < n; i++) " + GOOD + " const_cast<float*>(x)[0] = 0;", "writes into x, which is an input"),
    "an endless loop": ("for (volatile int64_t i = 0; i >= 0;) out[0] = x[0] * n;", "is there an endless loop"),
    "a null pointer": ("volatile float* p = nullptr; *p = x[0] * n; out[0] = 0;", "at nullptr"),
    "a recursion without end": ("volatile char a[9999]; a[0] = 0; gelu(x, out, n); a[1] = 0; out[0] = a[0];", "calls itself without end"),
    "an abort": ("std::abort(); out[0] = x[n];", "it crashed with SIGABRT"),
    "an exit": ("std::exit(0); out[0] = x[n];", "it ended the process itself, with status 0"),
    "a fork": ("if (fork() == 0) _exit(0); for (int64_t i = 0; i < n; i++) " + GOOD, "it starts another process"),
    "an error": ("return x;", "does not compile: line 6: "),
    "what was there": ("for (int64_t i = 0; i < n; i++) { const float y = out[i]; " + GOOD + " out[i] += y; }", "adds to what was in there"),
    "the last one left": ("for (int64_t i = 0; i + 1 < n || i + n == 1; i++) " + GOOD, "never written: 1 of 128 numbers of out"),
    "of a small array nothing": ("for (int64_t i = 0; i < n / 4 * 4; i++) " + GOOD, "never written: 1 of 1 numbers of out"),
    "nothing": ("(void)x; (void)out; (void)n;", "gelu is not written yet"),
}  # fmt: skip


@compiler
@pytest.mark.slow
@pytest.mark.parametrize("fault", CPP)
def test_what_cpp_may_do_wrong_is_a_message(tmp_path, fault):
    body, words = CPP[fault]
    head = "#include <cmath>\n#include <cstdint>\n#include <cstdlib>\n#include <unistd.h>\n\n"
    path = written(tmp_path, head + GELU.format(body) + "\n", "mine.cpp")
    try:
        right, text = check_file(path, seconds=3.0)
    except ValueError as error:
        right, text = False, str(error)
        assert "\n" not in text
    assert not right and any(w in " ".join(text.split()) for w in words.split("|")), text


@pytest.mark.slow
@compiler
def test_other_arguments_and_a_missing_compiler_are_told(tmp_path, monkeypatch):
    path = written(
        tmp_path, 'extern "C" void gelu(const double* x, double* out, int n) { out[0] = x[n]; }\n', "mine.cpp"
    )
    with pytest.raises(ValueError, match="mine.cpp: does not compile: line 1: .*arguments must be those"):
        check_file(path)
    right, text = check_file(written(tmp_path, "void gelu(const float*, float*, int) {}\n", "mine.cpp"))
    assert not right and 'there is no extern "C" void gelu(const float* x, float* out, int64_t n)' in text
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="no C\\+\\+ compiler: CXX is 'no-such-compiler'"):
        check_file(path)
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no C\\+\\+ compiler: c\\+\\+, g\\+\\+, clang\\+\\+ are not there"):
        check_file(path)


# ---------------------------------------------------------------------------------------- files, hints, commands


@pytest.mark.parametrize("name", EXERCISES)
def test_a_file_to_begin_with_is_told_to_be_unwritten(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = exercise.start(name)
    text = path.read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 120 and EXERCISES[name].signature.partition("(")[0] in text
    functions = {}
    exec(compile(text, str(path), "exec"), functions)
    verdict = exercise.judge_exercise(Inside(**functions), name, set(functions))
    assert verdict.todo and not verdict.ok
    with pytest.raises(ValueError, match="is there already and stays as it is"):
        exercise.start(name)
    with pytest.raises(ValueError, match="--out is 'mine.py', expected a name that ends in .cpp"):
        exercise.start(name, cpp=True, out="mine.py")
    assert path.read_text(encoding="utf-8") == text


@compiler
@pytest.mark.slow
def test_cpp_files_to_begin_with_compile_and_are_unwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in EXERCISES:
        path = exercise.start(name, cpp=True)
        assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 120
        native.compile_file(path, tmp_path)
    right, text = check_file(Path("my_layer_norm.cpp"))
    assert not right and "layer_norm is not written yet" in text
    right, text = check_file(Path("my_sampling.cpp"))
    assert not right and "sample is not written yet" in text


@compiler
@pytest.mark.slow
def test_a_forward_without_its_backward_is_right_as_far_as_it_goes(tmp_path):
    text = "#include <cmath>\n#include <cstdint>\n" + GELU.format(f"for (int64_t i = 0; i < n; i++) {GOOD}")
    text += '\nextern "C" void gelu_backward(const float*, const float*, float*, int64_t) {}\n'
    right, out = check_file(written(tmp_path, text, "mine.cpp"))
    assert right and "gelu_backward is not written yet" in out


def test_hints_come_one_by_one_and_stay_readable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = exercise.start("gelu")
    hints = EXERCISES["gelu"].hints
    for i, text in enumerate(hints, 1):
        lines = exercise.hint(path)
        assert lines[0] == f"Hint gelu {i} of {len(hints)}:" and " ".join(lines[1:]).startswith(text[:60])
    assert "That was the last hint" in exercise.hint(path)[0]
    kept = Path("my_gelu.py.hints.txt").read_text(encoding="utf-8")
    assert kept.count("gelu ") >= len(hints) and "of 5" in kept


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_is_what_gpt_py_runs(name):
    text = exercise.solution(name)
    for function in EXERCISES[name].solution:
        assert f"class {function}:" in text or f"def {function}(" in text
    lines = Path(gpt.__file__).read_text(encoding="utf-8")
    assert all(line in lines for line in text.splitlines() if line and not line.startswith("#"))
    if EXERCISES[name].derivation:
        assert (Path(__file__).parents[1] / "csrc" / EXERCISES[name].derivation).exists()


@pytest.mark.slow
def test_the_command_line(tmp_path):
    def run(*args):
        command = [sys.executable, "-m", "fastgpt", "exercise", *args]
        env = os.environ | dict(PYTHONPATH=str(Path(fastgpt.__file__).parents[1]))
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    done = run("start", "softmax")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "fastgpt exercise: error: NAME is 'softmax', expected one of " + ", ".join(EXERCISES) + "\n"
    assert run("start", "gelu").returncode == 0
    done = run("check", "my_gelu.py")
    assert done.returncode == 1 and "gelu is not written yet" in done.stdout and not done.stderr
    done = run("check", "nowhere.py")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "nowhere.py is no file" in done.stderr


# ------------------------------------------------------------------------------------------------- it lives


def losses(ops, steps=3):
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=65), ops)
    optimizer = gpt.make_optimizer(model, 1e-3, 0.99, 0.1)
    tokens = torch.randint(65, (4, 17), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(steps):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found, model


@pytest.mark.slow
def test_a_gpt_trains_on_functions_of_a_file():
    ops = exercise.load_ops(RIGHT / "right.py")
    assert all(getattr(ops, name).__module__ == "right" for name in FORMULAS)
    own, model = losses(ops)
    assert own == pytest.approx(losses(fastgpt)[0], rel=1e-5)
    assert model.ops.linear_gelu is ops.linear_gelu  # the fused one is used: linear and gelu come from the file too
    idx = torch.zeros(1, 3, dtype=torch.long)
    assert torch.equal(model.generate(idx, 8, 0.0), gpt.GPT.generate(model, idx, 8, 0.0))


@pytest.mark.slow
def test_one_function_of_a_file_stands_among_our_kernels(tmp_path):
    text = "import torch\ndef gelu(x): return torch.nn.functional.gelu(x, approximate='tanh')\n"
    ops = exercise.load_ops(written(tmp_path, text))
    assert ops.linear is fastgpt.linear and ops.gelu.__module__ == "mine"
    own, model = losses(ops)
    assert own == pytest.approx(losses(fastgpt)[0], rel=1e-5)
    assert model.ops.linear_gelu is not fastgpt.linear_gelu  # it would leave the file's gelu out


@compiler
@pytest.mark.slow
def test_a_gpt_trains_on_cpp():
    assert losses(exercise.load_ops(RIGHT / "right.cpp"))[0] == pytest.approx(losses(fastgpt)[0], rel=1e-5)


@compiler
@pytest.mark.slow
def test_cpp_without_a_backward_takes_the_formulas(tmp_path):
    text = "#include <cmath>\n#include <cstdint>\n" + GELU.format(f"for (int64_t i = 0; i < n; i++) {GOOD}")
    ops = exercise.load_ops(written(tmp_path, text, "mine.cpp"))
    assert losses(ops)[0] == pytest.approx(losses(fastgpt)[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, words",
    [
        ("def gelu(x): raise NotImplementedError\n", "gelu is not written yet"),
        ("def gelu(x): return x[..., :1]\n", "gelu gives float32 of shape (2, 1), expected float32 of shape (2, 64)"),
        ("def gelu(x): return y\n", "gelu: line 1: NameError"),
        ("def sample(logits, temperature, top_k, top_p, rng): return 0\n", "defines none of linear, gelu"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before(tmp_path, text, words):
    with pytest.raises(ValueError) as error:
        exercise.load_ops(written(tmp_path, text))
    assert words in str(error.value)


@pytest.mark.slow
def test_speed_is_measured_beside_the_others(tmp_path):
    text = "import torch\ndef gelu(x): return torch.nn.functional.gelu(x, approximate='tanh')\n"
    path = written(tmp_path, text)
    _, rows, limit = exercise.measure(path, judge.Verdict("gelu", [], "autograd"), seconds=0.05)
    assert set(rows) == {"forward", "forward+backward"} and limit["gbs"] > 0
    assert all(set(by) == {"kernel", "yours", "formula"} and by["yours"]["share"] > 0 for by in rows.values())


def test_prototypes_are_those_that_the_arguments_fill():
    for e in EXERCISES.values():
        for prototype in e.prototypes:
            assert tasks.function_of(prototype) in (e.cpp_function, f"{e.function}_backward")
            assert all(
                kind.rstrip("*").removeprefix("const ") in native.KINDS for kind, _ in native.parameters(prototype)
            )
