"""docs/kernels.md: its RMSNorm is taken out of the page, built in a copy of the sources, and proven."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt import _kernels

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "kernels.md"
BLOCK = re.compile(r"<!-- (\S+) (plain|fast|before|after)(?: \"([^\n]*)\")? -->\n```\w+\n(.*?)```\n", re.DOTALL)

PROOF = """
import torch, fastgpt
from fastgpt import check

assert "COPY" in fastgpt.__file__, fastgpt.__file__

def formula(x, weight):
    return x * (x * x).mean(-1, keepdim=True).add(1e-5).rsqrt() * weight

rows = []
for shape in check.CASES["rms_norm"]:
    rows += check.compare("rms_norm", shape)
wide = torch.randn(5, 7, 3, 64, generator=torch.Generator().manual_seed(0))
for x in (wide[:, :, 1, 8:56], wide.transpose(0, 2)[..., :48], wide[::2, 1:, :, 3:51]):
    inputs = dict(x=x, weight=torch.arange(48) / 48)
    rows += check.compare("rms_norm", inputs=inputs, formula=formula, kernel=fastgpt.rms_norm)
    rows += check.compare("rms_norm", inputs=inputs, formula=formula, kernel=fastgpt.rms_norm, dtype=torch.float64)
assert check.report(rows) == 0
without_eps = check.compare("rms_norm", (65, 769), kernel=lambda x, weight: fastgpt.rms_norm(x, weight, 0.0))
assert not all(row.ok for row in without_eps)

args = [torch.randn(3, 11).double().requires_grad_(), torch.randn(11).double().requires_grad_()]
assert torch.autograd.gradcheck(fastgpt.rms_norm, args)
torch.testing.assert_close(fastgpt.rms_norm(*args), torch.nn.functional.rms_norm(args[0], (11,), args[1], 1e-5))
torch.library.opcheck(torch.ops.fastgpt.rms_norm.default, (*args, 1e-5))

args = [torch.randn(999, 768, requires_grad=True), torch.randn(768, requires_grad=True)]
results = []
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    out = fastgpt.rms_norm(*args)
    results.append([out, *torch.autograd.grad(out.square().sum(), args)])
assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))

for x, weight, message in (
    (args[0].half(), args[1], "rms_norm: x has dtype float16, expected float32 or float64"),
    (args[0], args[1][:7], "rms_norm: weight has shape (7,), expected (768,)"),
):
    try:
        fastgpt.rms_norm(x, weight)
        raise AssertionError(message)
    except (TypeError, ValueError) as error:
        assert message in str(error), error
"""


def blocks():
    return [match.groups() for match in BLOCK.finditer(PAGE.read_text())]


def apply(folder, version):
    """Put the page's code into the sources in `folder`, the header in its plain or fast version."""
    headers = {how: code for _, how, _, code in blocks() if how in ("plain", "fast")}
    comment = headers["plain"].split("\n\ntemplate", 1)[0] + "\n\n"
    (folder / "csrc" / "rms_norm.h").write_text(headers["plain"] if version == "plain" else comment + headers["fast"])
    for name, how, anchor, code in blocks():
        if how not in ("before", "after"):
            continue
        lines = (folder / name).read_text().splitlines(keepends=True)
        places = [i for i, line in enumerate(lines) if line.startswith(anchor)]
        assert len(places) == 1, f"docs/kernels.md: {name} has {len(places)} lines that begin with {anchor!r}"
        lines.insert(places[0] + (how == "after"), code)
        (folder / name).write_text("".join(lines))


def start_build(folder, version):
    """-> the process, in a copy of the sources with the page's kernel in them"""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "fastgpt", folder / "fastgpt", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    for name in ("gpt.py", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    apply(folder, version)
    here = _kernels.isas()
    one = "avx2" if "avx2" in here else here[-1]  # of what this processor has
    environment = dict(os.environ) | (dict(FASTGPT_BUILD_ISA=one) if one in ("sse2", "avx2", "avx512", "amx") else {})
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    output = (folder / "build.log").open("w")
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folders = {version: tmp_path_factory.mktemp(version) for version in ("plain", "fast")}
    builds = {version: start_build(folder, version) for version, folder in folders.items()}
    for version, build in builds.items():
        assert build.wait() == 0, (folders[version] / "build.log").read_text()
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("version", ("plain", "fast"))
def test_the_kernel_of_the_page_builds_and_is_as_exact_as_its_formula(version, built):
    folder = built[version]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "FASTGPT_ISA")}
    command = [sys.executable, "-c", PROOF.replace("COPY", folder.name)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_page_counts_its_lines_rightly_and_names_files_that_exist():
    lines = [line for _, how, _, code in blocks() if how in ("before", "after") for line in code.splitlines()]
    count = sum(bool(line.strip()) for line in lines)
    assert f"Beside its header, RMSNorm takes {count} lines of code" in PAGE.read_text()
    for name, how, anchor, _ in blocks():
        if how in ("before", "after"):
            assert [line for line in (ROOT / name).read_text().splitlines() if line.startswith(anchor)], (name, anchor)
