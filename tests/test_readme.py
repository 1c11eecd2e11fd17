# SPDX-License-Identifier: Apache-2.0
"""What the documentation says is true: its code runs, its links and commands lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "eval/README.md", "kernels/README.md"]


def _blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)


def test_readme_code_runs(monkeypatch):
    """The blocks run in order and share their names, as a reader would paste them."""
    monkeypatch.chdir(ROOT)
    names = {}
    for number, block in enumerate(_blocks("README.md", "python"), 1):
        exec(compile(block, f"README.md, code block {number}", "exec"), names)
    assert names["hidden"].shape == (1, 4_096, 768)
    assert names["logits"].shape == (1, 2)
    assert names["out"].shape == (2, 1_000, 12, 64)


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    text = (ROOT / page).read_text("utf-8")
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and not target.startswith(("http:", "https:"))]
    assert not [target for target in local if not ((ROOT / page).parent / target).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    """Scripts that the page calls exist and know the options it gives; so do the targets of make."""
    text = (ROOT / page).read_text("utf-8")
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z]+)(?=`|  | *#)", text)) <= set(targets)
    for script, arguments in re.findall(r"(?:python|accelerate launch[^\n`]*?) (\S+\.py)([^\n`]*)", text):
        source = (ROOT / script).read_text("utf-8")
        # some arguments are defined in what the script imports
        for module in re.findall(r"^from (tasks\.\w+|pathx) import", source, re.MULTILINE):
            source += (ROOT / "eval" / f"{module.replace('.', '/')}.py").read_text("utf-8")
        for option in re.findall(r"(?<= )--(\w+)", arguments):
            assert option == "help" or f"--{option}" in source, f"{script} has no --{option}"
