"""Files damaged at random: from_pretrained and train --resume give the weights that were saved, or one line that names
the file. Nothing else comes out, and nothing is written."""

import json
import shutil
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import gpt

WEIGHTS, CONFIG, TRAINING = "model.safetensors", "config.json", "training.safetensors"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*was trained with:UserWarning"),  # an edited name of a formula
]


# ----------------------------------------------------------------------------------------------------- damages


def damaged_bytes(content):
    """Bits turned over, bytes lost, overwritten, doubled or added."""
    at = st.integers(0, len(content) - 1)
    piece = st.binary(min_size=1, max_size=100)

    def flip(places):
        out = bytearray(content)
        for i, bit in places:
            out[i] ^= 1 << bit
        return bytes(out)

    return st.one_of(
        st.lists(st.tuples(at, st.integers(0, 7)), min_size=1, max_size=50).map(flip),
        at.map(lambda i: content[:i]),
        st.tuples(at, st.integers(1, 5000)).map(lambda a: content[: a[0]] + content[sum(a) :]),
        st.tuples(at, st.integers(1, 5000)).map(lambda a: content[: sum(a)] + content[a[0] :]),
        st.tuples(at, piece).map(lambda a: content[: a[0]] + a[1] + content[a[0] + len(a[1]) :]),
        st.tuples(at, st.integers(1, 5000)).map(lambda a: (content[: a[0]] + bytes(a[1]))[: len(content)]),
        piece.map(lambda b: content + b),
    )


NUMBERS = st.sampled_from((0, 1, -1, 2, 16, 2**31, 2**63, 2**64, 10**12, 10**30)) | st.integers(-9, 999) | st.floats()
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=9) | st.sampled_from(("F16", "I32", "gpt2", "16"))
VALUES = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3))


@st.composite
def edited(draw, value):
    """JSON with one value, anywhere in it, changed, gone, under another's name, or exchanged with its neighbour."""
    value = json.loads(json.dumps(value))
    container = value
    while True:
        keys = list(container if isinstance(container, dict) else range(len(container)))
        if not keys:
            break
        key = draw(st.sampled_from(keys))
        inner = container[key]
        if not (isinstance(inner, (dict, list)) and inner and draw(st.booleans())):
            break
        container = inner
    how = draw(st.sampled_from(("replace", "delete", "move", "exchange"))) if keys else "nothing"
    if how == "replace":
        container[key] = draw(VALUES)
    elif how == "delete":
        del container[key]
    elif how == "move" and isinstance(container, dict):
        container[draw(st.sampled_from(keys) | st.text(max_size=9))] = container.pop(key)
    elif how == "exchange":
        other = draw(st.sampled_from(keys))
        container[key], container[other] = container[other], container[key]
    return value


class Contents(bytes):
    def __repr__(self):  # what a test that fails shows
        return f"{bytes(self[:1000])} and so on, {len(self)} bytes"


@st.composite
def damaged(draw, content, name):
    """The contents of a file after a damage; some are well-formed, and say something else."""
    way = draw(st.sampled_from(("bytes", "json", "json in json")))
    if way == "bytes":
        return Contents(draw(damaged_bytes(content)))
    if name == CONFIG:
        nested, other = st.just(b"[" * 100_000), edited(json.loads(content)).map(lambda x: json.dumps(x).encode())
        return Contents(draw(nested | other))
    (n,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + n])
    texts = [key for key, text in header["__metadata__"].items() if text.startswith("{")]
    if way == "json" or not texts:
        header = draw(edited(header))
    else:
        key = draw(st.sampled_from(texts))
        header["__metadata__"][key] = json.dumps(draw(edited(json.loads(header["__metadata__"][key]))))
    text = json.dumps(header).encode()
    return Contents(struct.pack("<Q", len(text)) + text + content[8 + n :])


# ------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A checkpoint after two steps."""
    folder = tmp_path_factory.mktemp("ours")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    sizes = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 2 --steps 2 --sample 1".split()
    gpt.main(["train", "--data", str(text), "--out", str(folder / "out"), *sizes])
    return folder / "out"


@pytest.fixture(scope="module")
def anothers(ours, tmp_path_factory):
    """The same weights as another program writes them: no checksum."""
    folder = tmp_path_factory.mktemp("anothers")
    safetensors.torch.save_file(safetensors.torch.load_file(ours / WEIGHTS), folder / WEIGHTS, {"format": "pt"})
    shutil.copy(ours / CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


def copy_with(damage, name, source, folder):
    """`source` in `folder`, with other contents of one file. -> {file: contents}"""
    contents = {path.name: path.read_bytes() for path in source.iterdir()} | {name: damage}
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    return contents


def weights(model):
    return {name: p.data for name, p in model.named_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert torch.equal(x, b[name]), name


def assert_names_the_file(message, path):
    """A config.json that contradicts the weights is found where they meet: then the weights' file is named."""
    named = (path, path.with_name(WEIGHTS)) if path.name == CONFIG else (path,)
    assert "\n" not in message and any(str(file) in message for file in named), message


@pytest.mark.parametrize("name", (WEIGHTS, CONFIG))
@given(data=st.data())
def test_damaged_checkpoint_loads_as_it_was_or_is_refused_by_name(name, data, ours, folder):
    copy_with(data.draw(damaged((ours / name).read_bytes(), name)), name, ours, folder)
    try:
        model = gpt.GPT.from_pretrained(str(folder))
    except ValueError as error:
        assert_names_the_file(str(error), folder / name)
    else:
        expected = gpt.GPT.from_pretrained(str(ours))
        assert_same(weights(model), weights(expected))
        assert (model.config, model.tokenizer) == (expected.config, expected.tokenizer)


@pytest.mark.parametrize("name", (WEIGHTS, CONFIG))
@given(data=st.data())
def test_damaged_files_of_another_program_load_or_are_refused_by_name(name, data, anothers, folder):
    """Without a checksum a weight with other bits is a weight; of the right number, shape and kind it is all the same."""
    copy_with(data.draw(damaged((anothers / name).read_bytes(), name)), name, anothers, folder)
    try:
        model = gpt.GPT.from_pretrained(str(folder))
    except ValueError as error:
        assert_names_the_file(str(error), folder / name)
    else:
        expected = weights(gpt.GPT.from_pretrained(str(anothers)))
        assert {k: x.shape for k, x in weights(model).items()} == {k: x.shape for k, x in expected.items()}
        assert all(x.isfinite().all() for x in weights(model).values())
        if name == CONFIG:
            assert_same(weights(model), expected)


@pytest.fixture(scope="module")
def resumed(ours, tmp_path_factory):
    """What the third step makes of the checkpoint."""
    folder = tmp_path_factory.mktemp("resumed")
    copy_with((ours / TRAINING).read_bytes(), TRAINING, ours, folder)
    gpt.main(["train", "--resume", "--out", str(folder), "--steps", "3"])
    return {name: safetensors.torch.load_file(folder / name) for name in (TRAINING, WEIGHTS)}


@given(data=st.data())
def test_resuming_a_damaged_run_goes_on_as_it_would_have_or_is_refused_by_name(data, ours, folder, resumed):
    before = copy_with(data.draw(damaged((ours / TRAINING).read_bytes(), TRAINING)), TRAINING, ours, folder)
    try:
        gpt.main(["train", "--resume", "--out", str(folder), "--steps", "3"])
    except SystemExit as end:
        assert isinstance(end.code, str) and "error: " in end.code, end.code
        assert_names_the_file(end.code, folder / TRAINING)
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    else:
        for name, tensors in resumed.items():
            assert_same(tensors, safetensors.torch.load_file(folder / name))
