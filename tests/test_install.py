"""The project as it is installed, editable or not: what other folders see of it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastgpt
import fastgpt.__main__
import gpt

TOP = Path(__file__).parent.parent


@pytest.mark.slow
def test_folders_of_the_same_names_do_not_hide_it(tmp_path):
    # as where the project was cloned, one folder up
    for name in ("gpt", "fastgpt"):
        (tmp_path / name).mkdir()
    code = "import gpt, fastgpt; print(gpt.__file__); print(fastgpt.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.stdout.splitlines() == [gpt.__file__, fastgpt.__file__], run.stderr


@pytest.mark.slow
def test_gpt_py_needs_nothing_of_the_project(tmp_path):
    # README: copy it to an empty folder and it trains; so the copy there is what is imported
    shutil.copy(gpt.__file__, tmp_path)
    code = "import gpt, sys; print(gpt.__file__); assert 'fastgpt' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == str(tmp_path / "gpt.py"), run.stderr


@pytest.mark.slow
def test_the_readmes_python_runs():
    blocks = re.findall(r"```python\n(.*?)```", (TOP / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("page", [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_commands_that_a_page_names_exist(page):
    named = re.findall(r"(?:^|&& |`)fastgpt ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= {*fastgpt.__main__.COMMANDS}
    if page.name == "README.md":
        assert "demo" in named
