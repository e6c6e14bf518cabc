"""A learner's file in a process of its own: it may print, exit, crash, fork or hang, and what comes back is a message.

The parent asks (Sandbox.ask), the child answers (serve), in frames on two pipes: a length in 8 bytes, then a dictionary
of tensors, numbers and texts. The length FAULT is written by the signal handler that native.py adds to a C++ file.
"""

import importlib.util
import io
import json
import os
import pickle
import random
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch

import gpt

from .. import _kernels, bench
from . import native
from .tasks import EXERCISES

SECONDS = 20.0  # for one answer
START = 120.0  # for torch to be imported, on a machine that is busy
MEMORY = 8 << 30  # bytes that a file may use on top of torch
FAULT = -1
PRINTED = 4000  # bytes kept of what it prints


class Broken(ValueError):
    """The file can't be judged: one line that says why."""


# ---------------------------------------------------------------------------------------------------- parent


class Sandbox:
    """A process that has loaded `path`, and `library`, if that is C++. A context manager."""

    def __init__(self, path, library=None, seconds=SECONDS):
        self.path, self.seconds, self.printed = Path(path), seconds, b""
        self.native = library is not None
        child_reads, self.requests = os.pipe()
        self.answers, child_writes = os.pipe()
        arguments = (child_reads, child_writes, str(self.path.absolute()), library and str(library))
        code = f"import sys; sys.path[:] = {json.dumps(sys.path)}; from fastgpt.learn import sandbox; "
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{code}sandbox.serve{arguments!r}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(child_reads, child_writes),
            env=os.environ | dict(FASTGPT_ISA=_kernels.isa()),
            start_new_session=True,
        )
        os.close(child_reads)
        os.close(child_writes)
        self.drain = threading.Thread(target=self._keep_printed, daemon=True)
        self.drain.start()
        self.ready = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if self.requests is None:
            return  # its number may be another process's by now
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # with whatever it started
        except (ProcessLookupError, PermissionError):
            pass
        self.process.wait()
        self.drain.join(1.0)
        os.close(self.requests)
        os.close(self.answers)
        self.requests = self.answers = None

    def _keep_printed(self):
        while part := self.process.stdout.read1(65536):
            self.printed = (self.printed + part)[:PRINTED]

    def printed_lines(self):
        """What the file has printed so far, without empty lines."""
        return [line for line in self.printed.decode(errors="replace").splitlines() if line.strip()]

    def ask(self, request, what="", seconds=None):
        """The answer. Broken if there is none; `what` says in a message what was asked."""
        if not self.ready:
            self._expect(self._receive("its import", START), "its import")  # torch is there
            self._expect(self._receive("its import", self.seconds), "its import")  # the file is
            self.ready = True
        try:
            send(self.requests, request)
        except BrokenPipeError:
            pass  # the answer says why
        return self._expect(self._receive(what, seconds or self.seconds), what)

    def _expect(self, answer, what):
        if "broken" in answer:
            raise Broken(f"{self.path.name}: {answer['broken']}")
        return answer

    def _receive(self, what, seconds):
        end = time.monotonic() + seconds
        header = self._read(8, end, what, seconds)
        length = struct.unpack("<q", header)[0]
        if length == FAULT:
            number, *seen = struct.unpack("<6q", self._read(48, end, what, seconds))
            told = native.describe_fault(signal.Signals(number).name, *seen)
            raise Broken(f"{self.path.name}: {told} {at(what)}")
        try:
            return decode(self._read(length, end, what, seconds))
        except (EOFError, RuntimeError, pickle.UnpicklingError):
            raise Broken(f"{self.path.name}: it writes into the pipe on which its results come, {at(what)}") from None

    def _read(self, size, end, what, seconds):
        data = b""
        if not 0 < size < MEMORY:
            raise Broken(f"{self.path.name}: it writes into the pipe on which its results come, {at(what)}")
        while len(data) < size:
            if not select.select([self.answers], [], [], max(end - time.monotonic(), 0))[0]:
                self.close()
                raise Broken(f"{self.path.name}: no result after {seconds:g} s {at(what)}: is there an endless loop?")
            part = os.read(self.answers, size - len(data))
            if not part:
                raise Broken(f"{self.path.name}: {self._ending()} {at(what)}")
            data += part
        return data

    def _ending(self):
        try:
            status = self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            return "it closed the pipe on which its results come,"
        self.drain.join(1.0)
        if status >= 0:
            return f"it ended the process itself, with status {status},"
        name = signal.Signals(-status).name
        said = self.printed_lines()
        return f"it crashed with {name}{f' ({said[-1].strip()[:70]})' if said else ''}"


def at(what):
    return f"in {what}" if what else "there"


# ------------------------------------------------------------------------------------------------- both sides


def encode(message):
    data = io.BytesIO()
    torch.save(message, data)
    return data.getvalue()


def decode(data):
    return torch.load(io.BytesIO(data), weights_only=True)


def send(pipe, message):
    data = encode(message)
    data = struct.pack("<q", len(data)) + data
    while data:
        data = data[os.write(pipe, data) :]


# ----------------------------------------------------------------------------------------------------- child


class Child:
    """What the file's functions are asked for: each method is a request, its arguments the request's entries."""

    def __init__(self, reads, writes, path, library):
        self.reads, self.writes, self.path, self.library = reads, writes, path, library
        self.pid, self.forked, self.native = os.getpid(), False, None

    def load(self):
        if self.library:
            self.native = native.Library(self.library, self.writes)
            self.module = self.native
        else:
            self.module = import_file(self.path)

    def case(self, name, arguments, grad, own_backward=False, fill=float("nan"), at_end=True):
        """Output and gradients of a function for these arguments. `grad` is the output's gradient, or None."""
        e = EXERCISES[name]
        if self.native:
            self.native.guard(at_end, fill)
        if not hasattr(self.module, e.function):
            raise Refused(f'there is no extern "C" {e.prototypes[0]}')
        function = own(self.module, e) if own_backward else getattr(self.module, e.function)
        leaves = [
            x.clone().requires_grad_() if is_float(x) else x.clone() if torch.is_tensor(x) else x for x in arguments
        ]
        borrowed = set()
        if not self.native:
            sys.setprofile(lambda frame, event, arg: borrowed.add(borrowed_from(frame)))
        try:
            out = function(*leaves)
        finally:
            sys.setprofile(None)
        answer = dict(borrowed=sorted(borrowed - {None}))
        if not isinstance(out, torch.Tensor):
            raise Refused(f"{e.function} returns {describe(out)}, expected a tensor")
        answer["out"] = out.detach().clone().as_subclass(torch.Tensor)
        answer["unwritten"] = dict(self.native.unwritten) if self.native else {}
        answer["changed"] = [
            n
            for n, x, old in zip(e.arguments, leaves, arguments, strict=False)
            if torch.is_tensor(x) and not torch.equal(x.detach().nan_to_num(), old.nan_to_num())
        ]
        if grad is None or out.shape != grad.shape or out.dtype != grad.dtype:
            return answer
        inputs = {n: x for n, x in zip(e.arguments, leaves, strict=False) if is_float(x)}
        if not out.requires_grad:
            return answer | dict(detached=True)
        grads = torch.autograd.grad(out, list(inputs.values()), grad, allow_unused=True)
        answer["unused"] = [n for n, g in zip(inputs, grads, strict=True) if g is None]
        for (n, x), g in zip(inputs.items(), grads, strict=True):
            answer[f"d{n}"] = torch.zeros_like(x) if g is None else g.detach().as_subclass(torch.Tensor)
        if self.native:
            answer["unwritten"] |= self.native.unwritten
        return answer

    def sample(self, logits, temperature, top_k, top_p, seed, times):
        """The tokens that `sample` draws, one after another from one generator: (B, times)."""
        rng, tokens = random.Random(seed), []
        if self.native:
            self.native.guard(True, float("nan"))
        for i in range(times):
            if self.native:
                self.native.guard(i % 2 == 0, float("nan"))
            token = self.module.sample(logits.clone(), temperature, top_k, top_p, rng)
            if not isinstance(token, torch.Tensor):
                raise Refused(f"sample returns {describe(token)}, expected a tensor of shape ({len(logits)}, 1)")
            if token.shape != (len(logits), 1) or token.dtype != torch.int64:
                raise Refused(
                    f"sample returns {token.dtype} of shape {tuple(token.shape)}, "
                    f"expected torch.int64 of shape ({len(logits)}, 1)"
                )
            tokens.append(token)
        return dict(out=torch.cat(tokens, 1), drawn=float(rng.random()))

    def cache(self, qkv, n_head, cuts, alone=False):
        """The results of a KVCache for the pieces of qkv; unless `alone`, another one gets other numbers in between."""
        results, cache, other = [], self.module.KVCache(), self.module.KVCache()
        for i, piece in enumerate(qkv.split(list(cuts), dim=1)):
            if self.native:
                self.native.guard(i % 2 == 0, float("nan"))
            y = cache.attention(piece.clone(), n_head)
            shape = (*piece.shape[:2], piece.shape[2] // 3)
            if not isinstance(y, torch.Tensor):
                raise Refused(f"KVCache.attention returns {describe(y)}, expected a tensor of shape {shape}")
            if y.shape != shape or y.dtype != piece.dtype:
                raise Refused(
                    f"KVCache.attention returns {y.dtype} of shape {tuple(y.shape)}, expected {piece.dtype} of {shape}"
                )
            results.append(y.detach().clone())
            if i % 2 == 0 and not alone:
                other.attention(-piece.flip(1), n_head)
        return dict(out=torch.cat(results, 1))

    def speed(self, name, inputs, options, seconds, own_backward):
        """Times of the formula, torch, our kernel and the file's function, in turns: {part: {who: [seconds]}}."""
        from .. import ops

        e = EXERCISES[name]
        if self.native:
            self.native.guard(None)
        function = own(self.module, e) if own_backward else getattr(self.module, e.function)
        args = {n: x.requires_grad_() for n, x in inputs.items()}
        ways = bench.contestants(name, False)
        ways["yours"] = lambda **given: function(*given.values())
        bench.keep_memory()
        with torch.no_grad():
            grad = torch.randn_like(getattr(ops, name)(**args, **options))

        def forward(way):
            with torch.no_grad():
                way(**args, **options)

        def both(way):
            torch.autograd.grad(way(**args, **options), list(args.values()), grad)

        parts = {"forward": forward} | ({} if self.native and not own_backward else {"forward+backward": both})
        return {
            part: bench.interleaved({n: lambda run=run, way=way: run(way) for n, way in ways.items()}, seconds, 2)
            for part, run in parts.items()
        }

    def answer(self, request):
        """The answer to a request, or what the file did instead."""
        try:
            answer = getattr(self, request.pop("ask"))(**request)
        except NotImplementedError as error:
            return dict(todo=True) if str(error) == "" else dict(error=line_of(error, self.path))
        except Refused as error:
            answer = dict(error=str(error))
        except BaseException as error:
            answer = dict(error=line_of(error, self.path))
        if self.forked or self.native and has_children():
            return dict(broken="it starts another process (fork), which a formula has no need of")
        return answer

    def note_fork(self):
        self.forked = True


class Refused(Exception):
    """What a function returned is not what was expected: the message is for the learner."""


def serve(reads, writes, path, library=None):
    """The child: load the file, answer until nobody asks any more."""
    child = Child(reads, writes, path, library)
    os.register_at_fork(after_in_child=lambda: os._exit(0), after_in_parent=child.note_fork)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_memory()
    send(writes, {})
    try:
        child.load()
        first = dict(broken="it starts another process (fork) at its import") if child.forked else {}
    except BaseException as error:
        first = dict(broken=f"cannot be imported: {line_of(error, path)}")
    send(writes, first)
    libc = None
    if library:
        import ctypes

        libc = ctypes.CDLL(None)
    with open(reads, "rb", buffering=0, closefd=False) as requests:
        while header := requests.read(8):
            data = b""
            size = struct.unpack("<q", header)[0]
            while len(data) < size:
                data += requests.read(size - len(data))
            answer = child.answer(decode(data))
            if os.getpid() != child.pid:  # C++ that forked: this is the copy
                os._exit(0)
            with suppress(AttributeError, OSError, ValueError):  # it may have closed or removed that
                sys.stdout.flush()
            if libc:
                libc.fflush(None)
            send(writes, answer)
    os._exit(0)


def limit_memory():
    """No more than MEMORY on top of what is in use: an endless list ends in an error, and not the machine."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    except (OSError, ValueError):
        pass  # a system that doesn't tell, or that has a limit already


def has_children():
    try:
        os.waitpid(-1, os.WNOHANG)
        return True
    except ChildProcessError:
        return False


def import_file(path):
    """A Python file as a module of its own name. Its folder comes last in sys.path: it hides nobody's modules."""
    folder = str(Path(path).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line_of(error, path):
    """One line: where in the file, what kind, what it says."""
    if isinstance(error, SystemExit):
        what = f"it calls sys.exit({'' if error.code is None else repr(error.code)[:40]})"
    elif isinstance(error, MemoryError) or "allocate memory" in str(error):
        what = f"it asks for more than {MEMORY >> 30} GiB of memory"
    else:
        what = f"{type(error).__name__}: {gpt.one_line(error)[:200]}".removesuffix(f": {type(error).__name__}")
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == Path(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return f"line {line}: {what}" if line else what


def is_float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def describe(x):
    if isinstance(x, (tuple, list)):
        return f"a {type(x).__name__} of {len(x)}"
    return "None" if x is None else f"{type(x).__name__}"


OURS = {"layer_norm", "gelu", "linear", "linear_gelu", "attention", "attend", "lm_loss", "sample", "generate"}
PACKAGE = str(Path(__file__).parent.parent)


def borrowed_from(frame):
    """Whose function a frame is, if it is one that the exercise asks for."""
    code = frame.f_code
    if code.co_name not in OURS:
        return None
    if code.co_filename == gpt.__file__:
        return f"gpt.{code.co_name}"
    return f"fastgpt.{code.co_name}" if os.path.dirname(code.co_filename) == PACKAGE else None


def own(module, exercise):
    """The file's function with the file's own backward."""
    function, backward = getattr(module, exercise.function), getattr(module, f"{exercise.function}_backward")
    return with_backward(exercise, function, backward)


def with_backward(exercise, function, backward):
    """`function`, whose gradients backward(dout, *arguments) says. Module and name stay the function's."""

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            ctx.save_for_backward(*(x for x in arguments if torch.is_tensor(x)))
            ctx.others = [None if torch.is_tensor(x) else (x,) for x in arguments]
            return function(*arguments)

        @staticmethod
        def backward(ctx, dout):
            saved = iter(ctx.saved_tensors)
            arguments = [next(saved) if other is None else other[0] for other in ctx.others]
            grads = backward(dout.contiguous(), *arguments)
            grads = checked(exercise, grads, dict(zip(exercise.arguments, arguments, strict=False)))
            return tuple(grads.get(name) for name in exercise.arguments[: len(arguments)])

    def call(*arguments, **named):
        for name in exercise.arguments[len(arguments) :]:
            if name not in named:
                break
            arguments += (named.pop(name),)
        return Op.apply(*arguments, **named)

    call.__module__ = getattr(function, "__module__", None) or "torch"
    call.__qualname__ = getattr(function, "__qualname__", exercise.function)
    return call


def checked(exercise, grads, arguments):
    """{input: gradient}, if the backward returned what it should."""
    name, inputs = f"{exercise.function}_backward", exercise.inputs
    grads = grads if isinstance(grads, (tuple, list)) else (grads,)
    expected = ", ".join(exercise.gradients)
    present = [n for n in inputs if arguments.get(n) is not None]
    if len(grads) == len(present) < len(inputs):
        inputs = tuple(present)
    if len(grads) != len(inputs):
        raise Refused(f"{name} returns {len(grads)} value{'s'[: len(grads) != 1]}, expected {len(inputs)}: {expected}")
    result = {}
    for n, g in zip(inputs, grads, strict=True):
        x = arguments.get(n)
        if x is None:
            continue
        if not isinstance(g, torch.Tensor):
            raise Refused(f"{name} returns {describe(g)} for d{n}, expected a tensor of shape {tuple(x.shape)}")
        if g.shape != x.shape or g.dtype != x.dtype:
            raise Refused(
                f"{name} returns d{n} as {g.dtype} of shape {tuple(g.shape)}, expected {x.dtype} of {tuple(x.shape)}"
            )
        result[n] = g
    return result
