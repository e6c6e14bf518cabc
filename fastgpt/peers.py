"""Other programs that run GPT-2 on a CPU, for `fastgpt bench --generate`: the same weights in each one's own form.

A peer is a name, the dtype of its head (the rows of wte that logits are made of) and a function stream(prompt, n): an
iterator of n greedy tokens, whose first takes the whole prompt. A program that is not installed raises Missing.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import gpt


class Missing(Exception):
    """A package that a peer needs is not installed, or does not do what it should."""


@dataclass
class Peer:
    name: str
    head: str
    stream: Callable[[list[int], int], Iterator[int]]


def need(*names):
    """Modules, or Missing with the name of the first that cannot be imported."""
    modules = []
    for name in names:
        try:
            modules.append(importlib.import_module(name))
        except Exception as error:
            if not isinstance(error, ImportError):
                raise Missing(f"{name} does not load: {error}") from error
            raise Missing(f"pip install {name.split('.')[0].replace('_cpp', '-cpp-python')}") from error
    return modules if len(modules) > 1 else modules[0]


@contextmanager
def silent():
    """Nothing on stdout and stderr, from C neither."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved, null = (os.dup(1), os.dup(2)), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        os.dup2(null, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, file in zip((1, 2), saved, strict=True):
            os.dup2(file, number)
            os.close(file)
        os.close(null)


def once(folder, name, write):
    """The path of a file or folder, which write(path) makes unless it is there: whole or not at all."""
    path, new = os.path.join(folder, name), os.path.join(folder, f"new-{name}")
    if not os.path.exists(path):
        with silent():
            write(new)
        os.rename(new, path)
    return path


def arrays(model):
    """Parameters as float32 arrays, matrices as gpt.py has them, (out, in)."""
    return {name: p.detach().float().numpy() for name, p in model.named_parameters()}


# -------------------------------------------------------------------------------------------------- transformers


def transformers(model: gpt.GPT, dtype, folder) -> Peer:
    package = need("transformers")
    package.utils.logging.set_verbosity_error()
    package.utils.logging.disable_progress_bar()
    path = once(folder, "transformers", model.save_pretrained)
    theirs = package.GPT2LMHeadModel.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    def stream(prompt, n):
        new, past = torch.tensor([prompt]), None
        for _ in range(n):
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the cache's name is to change
                out = theirs(new, past_key_values=past, use_cache=True, logits_to_keep=1)
                new, past = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            yield int(new)

    return Peer(f"transformers {dtype}", dtype, stream)


# --------------------------------------------------------------------------------------------------- ONNX Runtime


def onnx_graph(model, path):
    """GPT-2 in the fused operators that ONNX Runtime has for it: Attention with a cache, SkipLayerNormalization ..."""
    onnx = need("onnx")
    make, fused = onnx.helper, "com.microsoft"
    config, weights, nodes = model.config, arrays(model), []
    C, H = config.n_embd, config.n_head
    D = C // H
    inits = []

    def constant(name, array):
        inits.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(op, inputs, outputs, domain="", **attributes):
        nodes.append(make.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def vector(name):
        return constant(name, weights[name])

    def matrix(name):
        return constant(f"{name}.T", weights[name].T)

    def skip_norm(y, x, bias, norm, at):
        """-> the normalized sum of x, y and the bias, and the sum itself"""
        inputs = [y, x, vector(f"{norm}.weight"), vector(f"{norm}.bias"), vector(bias)]
        outputs = [f"normed{at}", "", "", f"x{at}"]
        node("SkipLayerNormalization", inputs, outputs, fused, epsilon=1e-5)
        return outputs[0], outputs[3]

    token = node("Gather", [constant("wte", weights["wte.weight"]), "ids"], ["token"])
    place = node("Gather", [constant("wpe", weights["wpe.weight"]), "positions"], ["place"])
    x = node("Add", [token, place], ["x"])
    normed = node("LayerNormalization", [x, vector("h.0.ln_1.weight"), vector("h.0.ln_1.bias")], ["n"], epsilon=1e-5)
    for i in range(config.n_layer):
        h, after = f"h.{i}", f"h.{i + 1}.ln_1" if i + 1 < config.n_layer else "ln_f"
        inputs = [normed, matrix(f"{h}.attn.c_attn.weight"), vector(f"{h}.attn.c_attn.bias"), "", f"past{i}"]
        outputs = [f"heads{i}", f"present{i}"]
        node("Attention", inputs, outputs, fused, num_heads=H, unidirectional=1)
        y = node("MatMul", [outputs[0], matrix(f"{h}.attn.c_proj.weight")], [f"attended{i}"])
        normed, x = skip_norm(y, x, f"{h}.attn.c_proj.bias", f"{h}.ln_2", 2 * i)
        inner = node("MatMul", [normed, matrix(f"{h}.mlp.c_fc.weight")], [f"inner{i}"])
        inner = node("FastGelu", [inner, vector(f"{h}.mlp.c_fc.bias")], [f"gelu{i}"], fused)
        y = node("MatMul", [inner, matrix(f"{h}.mlp.c_proj.weight")], [f"mlp{i}"])
        normed, x = skip_norm(y, x, f"{h}.mlp.c_proj.bias", after, 2 * i + 1)
    last = node("Gather", [normed, constant("last", np.array([-1]))], ["last_hidden"], axis=1)
    node("MatMul", [last, constant("wte.T", weights["wte.weight"].T)], ["logits"])

    def value(name, kind, shape):
        return make.make_tensor_value_info(name, getattr(onnx.TensorProto, kind), shape)

    layers = range(config.n_layer)
    inputs = [value("ids", "INT64", [1, "T"]), value("positions", "INT64", [1, "T"])]
    inputs += [value(f"past{i}", "FLOAT", [2, 1, H, "P", D]) for i in layers]
    outputs = [value("logits", "FLOAT", [1, 1, config.vocab_size])]
    outputs += [value(f"present{i}", "FLOAT", [2, 1, H, "P+T", D]) for i in layers]
    graph = make.make_graph(nodes, "gpt2", inputs, outputs, inits)
    opsets = [make.make_opsetid("", 17), make.make_opsetid(fused, 1)]
    onnx.save(make.make_model(graph, opset_imports=opsets, ir_version=9), path)


def onnxruntime(model: gpt.GPT, dtype, folder) -> Peer:
    ort = need("onnxruntime")
    path = once(folder, "gpt2.onnx", lambda path: onnx_graph(model, path))
    if dtype == "int8":
        quantize = need("onnxruntime.quantization").quantize_dynamic
        options = dict(DefaultTensorType=need("onnx").TensorProto.FLOAT)  # what operators of its own return
        operators, whole = ["MatMul", "Attention"], path
        path = once(
            folder,
            "gpt2-int8.onnx",
            lambda path: quantize(whole, path, op_types_to_quantize=operators, extra_options=options),
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    c, names = model.config, [output.name for output in session.get_outputs()]
    nothing = np.empty((2, 1, c.n_head, 0, c.n_embd // c.n_head), np.float32)

    def stream(prompt, n):
        new, at, cache = np.array([prompt]), 0, [ort.OrtValue.ortvalue_from_numpy(nothing)] * c.n_layer
        for _ in range(n):
            positions = np.arange(at, at + new.shape[1])[None]
            feed = {"ids": ort.OrtValue.ortvalue_from_numpy(new)}
            feed |= {"positions": ort.OrtValue.ortvalue_from_numpy(positions)}
            feed |= {f"past{i}": past for i, past in enumerate(cache)}
            logits, *cache = session.run_with_ort_values(names, feed)
            at, new = at + new.shape[1], logits.numpy().argmax(-1)
            yield int(new[0, 0])

    return Peer(f"ONNX Runtime {dtype}", dtype, stream)


# ---------------------------------------------------------------------------------------------------- CTranslate2


def write_ctranslate2(model, path):
    specs = need("ctranslate2.specs")
    config, weights = model.config, arrays(model)
    common = specs.common_spec
    spec = specs.TransformerDecoderModelSpec.from_config(
        config.n_layer, config.n_head, pre_norm=True, activation=common.Activation.GELUTanh
    )

    def norm(to, name):
        to.gamma, to.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]

    def linear(to, name):
        to.weight, to.bias = weights[f"{name}.weight"], weights[f"{name}.bias"]

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = weights["wte.weight"]
    decoder.position_encodings.encodings = weights["wpe.weight"]
    norm(decoder.layer_norm, "ln_f")
    for i, layer in enumerate(decoder.layer):
        norm(layer.self_attention.layer_norm, f"h.{i}.ln_1")
        linear(layer.self_attention.linear[0], f"h.{i}.attn.c_attn")
        linear(layer.self_attention.linear[1], f"h.{i}.attn.c_proj")
        norm(layer.ffn.layer_norm, f"h.{i}.ln_2")
        linear(layer.ffn.linear_0, f"h.{i}.mlp.c_fc")
        linear(layer.ffn.linear_1, f"h.{i}.mlp.c_proj")
    spec.register_vocabulary([str(i) for i in range(config.vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.validate()
    os.makedirs(path)
    spec.save(path)


def ctranslate2(model: gpt.GPT, dtype, folder) -> Peer:
    package = need("ctranslate2")
    path = once(folder, "ctranslate2", lambda path: write_ctranslate2(model, path))
    threads = torch.get_num_threads()
    generator = package.Generator(path, device="cpu", compute_type=dtype, intra_threads=threads)

    def stream(prompt, n):
        steps = generator.generate_tokens(
            [str(i) for i in prompt], max_length=n, min_length=n, sampling_topk=1, end_token=[]
        )
        for step in steps:
            yield step.token_id

    return Peer(f"CTranslate2 {dtype}", dtype, stream)


# ------------------------------------------------------------------------------------------------------- llama.cpp

LLAMA = dict(float32=("f32", 0, "f32"), float16=("f16", 1, "f16"), int8=("q8_0", 7, "q8_0"), int4=("q4_0", 2, "q6_K"))


def write_gguf(model, path):
    gguf = need("gguf")
    config, weights = model.config, arrays(model)
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    for i in range(config.n_layer):
        layers = dict(ln_1="attn_norm", attn_c_attn="attn_qkv", attn_c_proj="attn_output", ln_2="ffn_norm")
        layers |= dict(mlp_c_fc="ffn_up", mlp_c_proj="ffn_down")
        names |= {f"h.{i}.{ours.replace('_', '.', ours[0] != 'l')}": f"blk.{i}.{its}" for ours, its in layers.items()}
    for name, array in weights.items():
        layer, _, kind = name.rpartition(".")
        writer.add_tensor(f"{names[layer]}.{kind}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(model: gpt.GPT, dtype, folder) -> Peer:
    package: Any = need("llama_cpp")
    kind, file_type, head = LLAMA[dtype]
    whole, threads = once(folder, "f32.gguf", lambda path: write_gguf(model, path)), torch.get_num_threads()

    def quantize(path):
        params = package.llama_model_quantize_default_params()
        params.ftype, params.nthread = file_type, threads
        status = package.llama_model_quantize(whole.encode(), path.encode(), params)
        if status:
            raise Missing(f"llama_model_quantize gave status {status}")

    path = once(folder, f"{kind}.gguf", quantize)
    with silent():
        c = model.config
        options = dict(n_ctx=c.block_size, n_threads=threads, n_threads_batch=threads, verbose=False)
        llama = package.Llama(path, **options)

    def stream(prompt, n):
        llama.reset()
        new = prompt
        for _ in range(n):
            llama.eval(new)
            logits = np.ctypeslib.as_array(package.llama_get_logits(llama.ctx), (c.vocab_size,))
            new = [int(logits.argmax())]
            yield new[0]

    return Peer(f"llama.cpp {kind}", head, stream)
