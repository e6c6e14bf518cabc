"""A learner's C++ file: compiled with the machine's compiler, loaded with ctypes, called on tensors.

While it is judged, each array lies between two stretches of memory that nobody may touch, once with its end and
once with its start at the border, so that any access beyond either end stops the process; inputs may not be written. A
handler that is compiled in says which array it was, and where.
"""

import ctypes
import mmap
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import torch

from .tasks import EXERCISES, function_of

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-Wall", "-fno-diagnostics-color")
COMPILE_SECONDS = 120
GUARD = 16 << 20  # bytes on each side of an array

HANDLER = r"""
#include <csignal>
#include <cstdint>
#include <unistd.h>
#if defined(__linux__)
#include <ucontext.h>
#endif

namespace {
struct Array { uintptr_t low, high, first, size; };  // all that is reserved, and where the array is in it
int64_t call, count, pipe_end = -1;
Array arrays[16];
alignas(16) char stack[1 << 16];

void on_fault(int signal, siginfo_t* info, void* context) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
    int64_t writes = -1;
#if defined(__linux__) && defined(__x86_64__)
    writes = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] >> 1 & 1;
#else
    (void)context;
#endif
    int64_t message[7] = {-1, signal, call, address < 65536 ? -2 : -1, 0, 0, writes};
    for (int64_t i = 0; i < count; i++) {
        if (arrays[i].low <= address && address < arrays[i].high) {
            message[3] = i;
            message[4] = static_cast<int64_t>(address - arrays[i].first);
            message[5] = static_cast<int64_t>(arrays[i].size);
        }
    }
    if (write(static_cast<int>(pipe_end), message, sizeof message) < 0) _exit(2);
    _exit(1);
}
}  // namespace

extern "C" void fastgpt_report_faults(int64_t to) {
    pipe_end = to;
    stack_t other = {};
    other.ss_sp = stack;
    other.ss_size = sizeof stack;
    sigaltstack(&other, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | static_cast<int>(SA_RESETHAND);
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
}

extern "C" void fastgpt_arrays(int64_t which_call, int64_t n, const int64_t* ends) {
    call = which_call;
    count = n < 16 ? n : 16;
    for (int64_t i = 0; i < count; i++) {
        arrays[i] = {static_cast<uintptr_t>(ends[4 * i]), static_cast<uintptr_t>(ends[4 * i + 1]),
                     static_cast<uintptr_t>(ends[4 * i + 2]), static_cast<uintptr_t>(ends[4 * i + 3])};
    }
}
"""


def find_compiler():
    """CXX from the environment, or the first of COMPILERS that is there: as words of a command line."""
    if words := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(words[0]):
            return words
        raise ValueError(f"no C++ compiler: CXX is {os.environ['CXX']!r}, and there is no such command")
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise ValueError(f"no C++ compiler: {', '.join(COMPILERS)} are not there; install one, or set CXX to yours")


def compile_file(path, folder):
    """Compile a learner's file. -> the library in `folder`, and the compiler's warnings as lines"""
    folder, path = Path(folder), Path(path)
    declared = "".join(f'extern "C" {p};\n' for e in EXERCISES.values() for p in e.prototypes)
    (folder / "exercises.h").write_text(f"#include <cstdint>\n{declared}", encoding="utf-8")
    (folder / "handler.cpp").write_text(HANDLER, encoding="utf-8")
    library = folder / f"{path.stem}.so"
    files = ["-include", str(folder / "exercises.h"), str(path.absolute()), str(folder / "handler.cpp")]
    compiler, own = find_compiler(), shlex.split(os.environ.get("CXXFLAGS", ""))
    for tuned in (["-march=native"], []):  # not every compiler knows that for every processor
        command = [*compiler, *FLAGS, *tuned, *own, "-Wno-error", *files, "-o", str(library)]
        try:
            made = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
                timeout=COMPILE_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"{path.name}: the compiler is not done after {COMPILE_SECONDS} s") from None
        if made.returncode == 0 or "error" in made.stderr and path.name in made.stderr:
            break
    if made.returncode:
        raise ValueError(f"{path.name}: does not compile: {first_error(made.stderr, path)}")
    return library, messages(made.stderr, path, "warning")


def messages(text, path, kind):
    """The compiler's messages on a file: "line 12: ..." each."""
    pattern = rf"^.*{re.escape(path.name)}:(\d+):(?:\d+:)? (?:fatal )?{kind}: (.*)$"
    return [f"line {line}: {what}" for line, what in re.findall(pattern, text, re.MULTILINE)]


def first_error(text, path):
    errors = messages(text, path, "error") or [
        line for line in text.splitlines() if "error" in line or "undefined" in line
    ]
    first = errors[0][:200] if errors else "the compiler says nothing"
    if "conflicting declaration" in first or "language linkage" in first:
        first += " (its arguments must be those of the file that `start` writes)"
    return first


def parameters(prototype):
    """[(type, name)] of a prototype."""
    parts = prototype.partition("(")[2].rstrip(")").split(", ")
    return [tuple(part.strip().rsplit(" ", 1)) for part in parts]


PROTOTYPES = [prototype for e in EXERCISES.values() for prototype in e.prototypes]


def describe_fault(signal_name, which, array, offset, size, writes):
    """What the signal handler saw, as a message."""
    function = function_of(PROTOTYPES[which])
    does = {0: "reads", 1: "writes"}.get(writes, "reads or writes")
    if array == -2:
        return f"{function} {does} at nullptr"
    if array == -1:
        return f"{function} crashed with {signal_name}: it {does} outside of all arrays, or calls itself without end,"
    kind, name = [(kind, name) for kind, name in parameters(PROTOTYPES[which]) if kind.endswith("*")][array]
    width = 8 if "int64_t" in kind else 4
    if 0 <= offset < size:
        return f"{function} writes into {name}, which is an input,"
    where = "past its end" if offset >= size else "before its start"
    return f"{function} {does} {name}[{offset // width}], {where} ({name} has {size // width} numbers),"


KINDS = {"int64_t": ctypes.c_int64, "float": ctypes.c_float, "double": ctypes.c_double}


def extents(name, a):
    """The numbers that a C++ function gets, and the shapes of what it sets, for arguments by name."""
    if name in ("linear", "linear_gelu"):
        x, weight, bias = a["x"], a["weight"], a.get("bias")
        N, K = weight.shape
        numbers = dict(M=x.numel() // K, N=N, K=K)
        shapes = dict(out=(*x.shape[:-1], N), dx=x.shape, dweight=weight.shape)
        return numbers, shapes | dict(dbias=None if bias is None else bias.shape)
    if name == "gelu":
        return dict(n=a["x"].numel()), dict(out=a["x"].shape, dx=a["x"].shape)
    if name == "layer_norm":
        x, C = a["x"], a["x"].shape[-1]
        numbers = dict(rows=x.numel() // C, C=C, eps=a.get("eps", 1e-5))
        return numbers, dict(out=x.shape, dx=x.shape, dweight=(C,), dbias=(C,))
    if name == "attention":
        (B, T, width), H = a["qkv"].shape, a["n_head"]
        return dict(B=B, T=T, H=H, D=width // 3 // H), dict(out=(B, T, width // 3), dqkv=a["qkv"].shape)
    hidden, (V, C) = a["hidden"], a["weight"].shape
    return dict(rows=hidden.numel() // C, C=C, V=V), dict(out=(), dhidden=hidden.shape, dweight=(V, C))


UNWRITTEN = 0x7FA0DEAD  # a signaling NaN: whatever is computed with it has other bits


class Memory:
    """An array between two stretches of memory that may not be touched."""

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def __init__(self, x, at_end, writable):
        """Filled with the tensor x, its end or its start at the border."""
        self.size = x.numel() * x.element_size()
        pages = -(-self.size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.reserved = pages + 2 * GUARD
        self.low = self.libc.mmap(
            None,
            self.reserved,
            mmap.PROT_NONE if hasattr(mmap, "PROT_NONE") else 0,
            mmap.MAP_PRIVATE | mmap.MAP_ANON,
            -1,
            0,
        )
        if self.low in (None, ctypes.c_void_p(-1).value):
            raise MemoryError
        middle = self.low + GUARD
        self.first = middle + (pages - self.size if at_end else 0)
        if pages:
            self.libc.mprotect(middle, pages, mmap.PROT_READ | mmap.PROT_WRITE)
            ctypes.memmove(self.first, x.data_ptr(), self.size)
            if not writable:
                self.libc.mprotect(middle, pages, mmap.PROT_READ)

    def read(self, like):
        x = torch.empty_like(like)
        ctypes.memmove(x.data_ptr(), self.first, self.size)
        return x

    def free(self):
        self.libc.munmap(self.low, self.reserved)


class Library:
    """The functions of a compiled file, on tensors. What is not in it is not an attribute."""

    def __init__(self, path, faults_to=None):
        self.library, self.at_end, self.fill, self.unwritten = ctypes.CDLL(str(path)), None, float("nan"), {}
        if faults_to is not None:
            self.library.fastgpt_report_faults(ctypes.c_int64(faults_to))
        for e in EXERCISES.values():
            for i, prototype in enumerate(e.prototypes):
                if hasattr(self.library, function_of(prototype)):
                    self._offer(e, i, prototype)

    def guard(self, at_end, fill=float("nan")):
        """Guard arrays at their end (True), at their start (False), or not at all (None)."""
        self.at_end, self.fill, self.unwritten = at_end, fill, {}

    def _offer(self, e, i, prototype):
        if e.name == "sampling":
            self.sample = lambda *args: sample(self, prototype, *args)
        elif e.name == "kv-cache":
            self.KVCache = lambda: KVCache(self, prototype)
        elif i == 0:
            setattr(self, e.function, self._forward(e, prototype))
        else:
            setattr(self, f"{e.function}_backward", self._backward(e, prototype))

    def _forward(self, e, prototype):
        def forward(*arguments):
            given = named(e, arguments)
            numbers, shapes = extents(e.name, given)
            return self.call(prototype, given, numbers, shapes)[0]["out"]

        forward.__module__, forward.__qualname__ = Path(self.library._name).stem, e.function
        return forward

    def _backward(self, e, prototype):
        def backward(dout, *arguments):
            given = named(e, arguments)
            numbers, shapes = extents(e.name, given)
            results = self.call(prototype, given | dict(dout=dout), numbers, shapes)[0]
            return tuple(results.get(name) for name in e.gradients)

        return backward

    def call(self, prototype, arrays, numbers, shapes):
        """Call a function. -> what it set, by name, and what it returned"""
        words, memories, ends, results, keep = [], [], [], {}, []
        for kind, name in parameters(prototype):
            if not kind.endswith("*"):
                words.append(KINDS[kind](numbers[name]))
                continue
            x, output = arrays.get(name), not kind.startswith("const")
            if output and x is None and shapes.get(name) is not None:
                x = self._blank(shapes[name])
            if x is None:
                words.append(ctypes.c_void_p(None))
                ends += (0, 0, 0, 0)
                continue
            x = x.detach().contiguous()
            keep.append(x)
            if self.at_end is not None:
                memory = Memory(x, self.at_end, output)
                memories.append((name, memory))
                ends += (memory.low, memory.low + memory.reserved, memory.first, memory.size)
                words.append(ctypes.c_void_p(memory.first))
            else:
                words.append(ctypes.c_void_p(x.data_ptr()))
            if output:
                results[name] = x
        function = getattr(self.library, function_of(prototype))
        function.restype = KINDS.get(prototype.split()[0])
        if memories:
            which = ctypes.c_int64(PROTOTYPES.index(prototype))
            self.library.fastgpt_arrays(which, ctypes.c_int64(len(ends) // 4), (ctypes.c_int64 * len(ends))(*ends))
        returned = function(*words)
        for name, memory in memories:
            if name in results:
                results[name] = memory.read(results[name])
                if self.fill != self.fill and name not in arrays:
                    self.unwritten[name] = int((results[name].reshape(-1).view(torch.int32) == UNWRITTEN).sum())
            memory.free()
        return results, returned

    def _blank(self, shape):
        """An output before the call: while it is judged, filled with what shows up."""
        x = torch.empty(shape)
        if self.at_end is not None:
            if self.fill != self.fill:
                x.reshape(-1).view(torch.int32).fill_(UNWRITTEN)
            else:
                x.fill_(self.fill)
        return x


def named(e, arguments):
    return {n: x for n, x in zip(e.arguments, arguments, strict=False) if x is not None}


def sample(library, prototype, logits, temperature, top_k, top_p, rng):
    """gpt.py's sample: the C++ function for each row."""
    V, tokens = logits.shape[-1], []
    for row in logits:
        numbers = dict(V=V, temperature=temperature, top_k=V if top_k is None else min(top_k, V))
        numbers |= dict(top_p=2.0 if top_p is None else top_p, u=0.0 if temperature == 0 else rng.random())
        tokens.append(library.call(prototype, dict(logits=row), numbers, {})[1])
    return torch.tensor(tokens)[:, None]


class KVCache:
    """The C++ function with the keys and values that it keeps."""

    def __init__(self, library, prototype):
        self.library, self.prototype, self.past, self.room, self.kept = library, prototype, 0, 0, None

    def attention(self, qkv, n_head):
        B, t, width = qkv.shape
        C = width // 3
        if self.past + t > self.room:
            self.room = 2 * (self.past + t)
            more = {name: self.library._blank((B, self.room, C)) for name in ("keys", "values")}
            for name in more if self.kept else ():
                more[name][:, : self.past] = self.kept[name][:, : self.past]
            self.kept = more
        numbers = dict(B=B, t=t, past=self.past, room=self.room, H=n_head, D=C // n_head)
        results, _ = self.library.call(self.prototype, dict(qkv=qkv) | self.kept, numbers, dict(out=(B, t, C)))
        self.kept, self.past = {name: results[name] for name in self.kept}, self.past + t
        return results["out"]
