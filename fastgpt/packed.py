"""GPT-2's weights as decoding reads them: packed in memory and, byte for byte the same, in a file.

`fastgpt quantize` writes packed.safetensors: matrices in strips (csrc/strips.h) of float32, bfloat16, int8 or int4, all
else in float32. Its metadata has a format version, the dtype, the size of int4's groups, the model's config, its
tokenizer and a checksum. `fastgpt dequantize` makes a plain model of it.
"""

import argparse
import json
import mmap
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

import numpy as np
import torch

import gpt

from . import _kernels
from . import tokenizer as tokenizers

DTYPES = ("float32", "bfloat16", "int8", "int4")
FILE = "packed.safetensors"
FORMAT, VERSION, GROUP = "fastgpt packed", "1", "32"
PIECE, PART = 1 << 24, 1 << 20  # bytes that a thread takes and has a checksum for; that it reads and checks at once


def expect(good, message, error=ValueError):
    if not good:
        raise error(message)


def arena(size, what):
    """`size` bytes of zeros, in huge pages where the system gives them: reading them is a sixth faster."""
    free = free_memory()
    expect(
        free is None or size <= free,
        f"{what}: {size / 1e9:,.1f} GB are needed, but {(free or 0) / 1e9:,.1f} GB of memory are free",
        MemoryError,
    )
    memory = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)[:size]


def free_memory():
    """Bytes that a process may still take; None where the system does not say."""
    with suppress(OSError, StopIteration), open("/proc/meminfo", encoding="ascii") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    return None


def head_dtype(dtype):
    """wte's: its rows are what logits are made of, so int4 has them in int8."""
    return "int8" if dtype == "int4" else dtype


def padded(n):
    return -(-n // 16) * 16


def sizes(config):
    """{name: (N, K)} of the matrices that are packed."""
    C, H = config.n_embd, config.n_head
    matrices = {"wte.weight": (config.vocab_size, C)}
    for i in range(config.n_layer):
        matrices |= {
            f"h.{i}.attn.c_attn.weight": (H * padded(3 * C // H), C),  # q, k and v of head 0, of head 1, ...
            f"h.{i}.attn.c_proj.weight": (C, C),
            f"h.{i}.mlp.c_fc.weight": (4 * C, C),
            f"h.{i}.mlp.c_proj.weight": (C, 4 * C),
        }
    return matrices


def layout(config, dtype):
    """{name: (dtype in the file, shape)} of all tensors, in memory's order; each is a multiple of 64 bytes."""
    C, matrices = config.n_embd, sizes(config)

    def matrix(name, kind=dtype):
        return {name: ("U8", (_kernels.packed_bytes(kind, *matrices[name]),))}

    def vector(name, n=C):
        return {name: ("F32", (padded(n),))}

    tensors = matrix("wte.weight", head_dtype(dtype)) | {"wpe.weight": ("F32", (config.block_size, padded(C)))}
    for i in range(config.n_layer):
        for norm, layers in (("ln_1", ("attn.c_attn", "attn.c_proj")), ("ln_2", ("mlp.c_fc", "mlp.c_proj"))):
            tensors |= vector(f"h.{i}.{norm}.weight") | vector(f"h.{i}.{norm}.bias")
            for name in (f"h.{i}.{layer}" for layer in layers):
                tensors |= matrix(f"{name}.weight") | vector(f"{name}.bias", matrices[f"{name}.weight"][0])
    return tensors | vector("ln_f.weight") | vector("ln_f.bias")


def size_of(kind, shape):
    return int(np.prod(shape)) * (4 if kind == "F32" else 1)


@dataclass
class Packed:
    """A model's weights in one piece of memory."""

    config: gpt.GPTConfig
    dtype: str
    tokenizer: str | None
    memory: np.ndarray  # bytes

    def __post_init__(self):
        self.tensors, at = {}, 0  # views, by name
        for name, (kind, shape) in layout(self.config, self.dtype).items():
            part = self.memory[at : at + size_of(kind, shape)]
            self.tensors[name] = part.view(np.float32).reshape(shape) if kind == "F32" else part
            at += part.nbytes

    @classmethod
    def empty(cls, config, dtype, tokenizer):
        size = sum(size_of(*x) for x in layout(config, dtype).values())
        return cls(config, dtype, tokenizer, arena(size, f"Decoder: the weights in {dtype}"))

    @classmethod
    def from_model(cls, model, dtype):
        """Pack a gpt.GPT's parameters."""
        expect(dtype in DTYPES, f"Decoder: dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        config, parameters = model.config, {name: p.detach() for name, p in model.named_parameters()}
        with torch.device("meta"):
            wanted = {name: tuple(p.shape) for name, p in gpt.GPT(config).named_parameters()}
        found = {name: tuple(p.shape) for name, p in parameters.items()}
        different = sorted(wanted.items() ^ found.items())
        expect(not different, f"Decoder: model is not gpt.py's GPT: {different and different[0]}")
        own = [name for name in gpt.FORMULAS if not is_known(getattr(model.ops, name), name)]
        expect(not own, f"Decoder: model has {', '.join(own)} of its own, expected gpt.py's formulas")
        packed = cls.empty(config, dtype, getattr(model, "tokenizer", None))
        matrices = sizes(config)
        for name, tensor in packed.tensors.items():
            x = parameters[name].float()
            expect(x.isfinite().all(), f"Decoder: {name} has values that are not finite")
            if ".c_attn." in name:
                x = by_head(x, config.n_head)
            if name in matrices:
                kind = head_dtype(dtype) if name == "wte.weight" else dtype
                _kernels.pack(x.contiguous().numpy(), kind, tensor)
            else:
                tensor[..., : x.shape[-1]] = x.numpy()
        return packed

    def to_model(self, ops=None):
        """A gpt.GPT of the rounded weights."""
        model = gpt.GPT(self.config, ops)
        matrices = sizes(self.config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                tensor = self.tensors[name]
                if name in matrices:
                    kind = head_dtype(self.dtype) if name == "wte.weight" else self.dtype
                    x = torch.empty(matrices[name])
                    _kernels.unpack(tensor, kind, x.numpy())
                else:
                    x = torch.from_numpy(tensor)
                if ".c_attn." in name:
                    x = x.view(self.config.n_head, -1, *x.shape[1:])[:, : 3 * self.config.n_embd // self.config.n_head]
                    x = x.unflatten(1, (3, -1)).transpose(0, 1).flatten(0, 2)
                p.copy_(x[..., : p.shape[-1]])
        model.tokenizer = self.tokenizer
        return model.eval()

    def save(self, path):
        """Write the file; whatever happens, it is whole or not there."""
        about = dict(format=FORMAT, version=VERSION, dtype=self.dtype, group=GROUP)
        about |= dict(config=json.dumps(asdict(self.config)), tokenizer=json.dumps(self.tokenizer))
        header, at = {"__metadata__": about | {"crc32": checksum(about, crcs(self.memory))}}, 0
        for name, (kind, shape) in layout(self.config, self.dtype).items():
            end = at + size_of(kind, shape)
            header[name] = dict(dtype=kind, shape=shape, data_offsets=(at, end))
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % mmap.PAGESIZE)  # so that the tensors can be mapped
        temporary = f"{path}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                file.write(self.memory.data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                os.remove(temporary)

    @classmethod
    def load(cls, path):
        """Read the file into huge pages; what is not as it was written is refused with the file's name."""
        with reading(path), open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            expect(0 < length <= min(size - 8, 100_000_000), "no header of safetensors")
            header = json.loads(file.read(length))
            about = header.pop("__metadata__", None)
            expect(isinstance(about, dict) and about.get("format") == FORMAT, "not written by `fastgpt quantize`")
            version = about.get("version")
            expect(version == VERSION, f"format version {version}, expected {VERSION}: quantize again")
            dtype, group = about.get("dtype"), about.get("group")
            expect(dtype in DTYPES and group == GROUP, f"dtype {dtype} in groups of {group}, expected {GROUP}")
            crc = about.pop("crc32", None)
            config, tokenizer = gpt.GPTConfig(**json.loads(about["config"])), json.loads(about["tokenizer"])
            at, found = 0, {}
            for name, (kind, shape) in layout(config, dtype).items():
                end = at + size_of(kind, shape)
                found[name] = dict(dtype=kind, shape=list(shape), data_offsets=[at, end])
                at = end
            expect(found == header, "its tensors are not those of its config")
            expect(size == 8 + length + at, f"{size:,} bytes, expected {8 + length + at:,}")
            packed = cls.empty(config, dtype, tokenizer)
            expect(crc == checksum(about, crcs(packed.memory, file.fileno(), 8 + length)), "its checksum is another")
        return packed


@contextmanager
def reading(path):
    expect(os.path.isfile(path), f"{path} does not exist or is no file, expected one written by `fastgpt quantize`")
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or not what was expected ({line})") from error


def crcs(memory, file=None, offset=0):
    """CRC-32 of each piece of memory; with a file, memory is read from it first. All threads do it."""

    def one(at):
        piece, done, crc = memory[at : at + PIECE].data, 0, 0
        while done < len(piece):  # a part at a time, checked while the cache holds it
            part = piece[done : done + PART]
            n = len(part) if file is None else os.preadv(file, [part], offset + at + done)
            expect(n > 0, "it ends too early")
            crc = zlib.crc32(part[:n], crc)
            done += n
        return crc

    with ThreadPoolExecutor(_kernels.num_threads()) as threads:
        return list(threads.map(one, range(0, len(memory), PIECE)))


def checksum(about, pieces):
    return f"{zlib.crc32(json.dumps([about, pieces], sort_keys=True).encode()):08x}"


def is_known(formula, name):
    """Is it gpt.py's formula, or ours or torch's function for it?"""
    ours = ("gpt", "__main__", "fastgpt.ops", "fastgpt.bfloat16", "fastgpt.torch_ops")
    return getattr(formula, "__name__", None) == name and formula.__module__ in ours


def by_head(x, H):
    """c_attn's rows, q of all heads, k, v, as q, k and v of each head, and zeros to a multiple of 16. (3C, ...)"""
    x = x.unflatten(0, (3, H, -1)).transpose(0, 1).flatten(1, 2)  # (H, 3D, ...)
    rows = torch.zeros(H, padded(x.shape[1]), *x.shape[2:])
    rows[:, : x.shape[1]] = x
    return rows.flatten(0, 1)


def load(source, dtype=None):
    """Packed weights of a model, of a folder with packed.safetensors or with a model, or of a model on the Hub."""
    expect(dtype is None or dtype in DTYPES, f"Decoder: dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if isinstance(source, Packed):
        packed = source
    elif not isinstance(source, (str, os.PathLike)):
        expect(isinstance(source, torch.nn.Module), f"Decoder: model is {source!r}, expected a gpt.GPT or a folder")
        return Packed.from_model(source, dtype or "float32")
    elif os.path.exists(path := os.path.join(source, FILE)):
        packed = Packed.load(path)
        compare_config(packed, os.path.join(source, "config.json"), path)
    else:
        model = gpt.GPT.from_pretrained(os.fspath(source))
        return Packed.from_model(model, dtype or "float32")
    expect(dtype in (None, packed.dtype), f"Decoder: dtype is {dtype!r}, but {source!s} is packed in {packed.dtype}")
    return packed


def compare_config(packed, path, weights):
    if not os.path.exists(path):
        return
    with reading(path), open(path, encoding="utf-8") as file:
        beside = json.load(file)
        for ours, theirs in gpt.HF_SIZES.items():
            value, other = getattr(packed.config, ours), beside.get(theirs)
            expect(value == other, f"{theirs} is {other}, but {value} in {weights}")


def quantize(argv=None):
    parser = argparse.ArgumentParser(
        prog="fastgpt quantize", description="Pack a model's weights for generation, smaller and as memory holds them."
    )
    parser.add_argument("folder", help="folder with a model, or gpt2, gpt2-medium, ...")
    parser.add_argument("--dtype", required=True, help=", ".join(DTYPES))
    parser.add_argument("--out", required=True, metavar="FOLDER", help=f"where {FILE} goes")
    parser.add_argument("--overwrite", action="store_true", help=f"replace a {FILE} that is there")
    args = parser.parse_args(argv)
    expect(args.dtype in DTYPES, f"--dtype is {args.dtype!r}, expected one of {', '.join(DTYPES)}")
    free = not os.path.exists(os.path.join(args.out, "model.safetensors"))
    expect(free, f"--out is {args.out!r}, which holds a model: take another folder")
    path = os.path.join(args.out, FILE)
    expect(args.overwrite or not os.path.exists(path), f"{path} exists: add --overwrite, or take another folder")
    model = gpt.GPT.from_pretrained(args.folder)
    packed = Packed.from_model(model, args.dtype)
    os.makedirs(args.out, exist_ok=True)
    if tokenizers.has_files(args.folder):
        tokenizers.copy_files(args.folder, args.out)
    packed.save(path)
    before = sum(4 * p.numel() for p in model.parameters())
    print(f"{path}: {packed.memory.nbytes:,} bytes in {args.dtype}, {before / packed.memory.nbytes:.2f} times less")


def dequantize(argv=None):
    parser = argparse.ArgumentParser(
        prog="fastgpt dequantize", description="Make a plain model, in float32, of weights that were packed."
    )
    parser.add_argument("folder", help=f"folder with {FILE}")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where model.safetensors and config.json go")
    args = parser.parse_args(argv)
    taken = [name for name in ("model.safetensors", FILE) if os.path.exists(os.path.join(args.out, name))]
    expect(not taken, f"--out is {args.out!r}, which has {', '.join(taken)}: take another folder")
    packed = Packed.load(os.path.join(args.folder, FILE))
    extra = {"tokenizer": packed.tokenizer} if packed.tokenizer else {}
    packed.to_model().save_pretrained(args.out, **extra)
    if tokenizers.has_files(args.folder):
        tokenizers.copy_files(args.folder, args.out)
    print(f"{args.out}: a model of the weights that {args.folder} has in {packed.dtype}")
