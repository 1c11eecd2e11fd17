# SPDX-License-Identifier: Apache-2.0
"""The rules of the house, each defined here once; pre-commit runs this file.

Walls between the parts of the project, and limits on what may be committed: CONTRIBUTING.md says why they exist.
"""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = {".py", ".h", ".cpp", ".cu", ".cuh"}
TEXT = CODE | {".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".csv", ".cff", ""}
MIB = 1 << 20


def _committed_files():
    """Files that are committed, or would be by `git add --all`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("the rules hold for a git checkout", allow_module_level=True)
    return sorted({ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()})


FILES = _committed_files()


def _name(path):
    return path.relative_to(ROOT).as_posix()


def _lines_with(pattern, files):
    regex = re.compile(pattern)
    return [
        f"{_name(path)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if regex.search(line)
    ]


# rule: (pattern, folder it is looked for in, files and folders where it may stand)
WALLS = {
    "asm only under kernels/hopper and kernels/ampere": (
        r"\b(asm|__asm__)\s*(volatile|goto|\()",
        "kernels/",
        ("kernels/hopper/", "kernels/ampere/"),
    ),
    "torch headers only in kernels/op.h": (r"#\s*include\s*[<\"](torch|ATen|c10)/", "kernels/", ("kernels/op.h",)),
    "torch.ops.flash_models only in ops.py, _layout_ops.py and fused/kernels.py": (
        r"torch\.ops\.flash_models",
        "flash_models/",
        ("flash_models/ops.py", "flash_models/_layout_ops.py", "flash_models/fused/kernels.py"),
    ),
    "transformers only in hf.py, models/, long_context.py, checkpoints.py": (
        r"^\s*(from|import)\s+transformers\b|import_module\(.transformers",
        "flash_models/",
        (
            "flash_models/hf.py",
            "flash_models/models/",
            "flash_models/long_context.py",
            "flash_models/checkpoints.py",
        ),
    ),
    "weights are safetensors; nothing is unpickled": (
        r"\btorch\.load\(|\b(pickle|dill|joblib)\.loads?\(|allow_pickle\s*=\s*True",
        "",
        ("tests/",),
    ),
}


@pytest.mark.parametrize("rule", WALLS)
def test_wall(rule):
    pattern, folder, allowed = WALLS[rule]
    files = [p for p in FILES if p.suffix in CODE and _name(p).startswith(folder) and not _name(p).startswith(allowed)]
    assert not _lines_with(pattern, files), rule


SYNCHRONISES = re.compile(
    r"\b(mbarrier|fence|membar|bar(rier)?\.|cp\.async|cp\.reduce|wgmma\.(fence|commit|wait)|griddepcontrol|st\.|red\.|atom\.)"
)


def test_synchronising_asm_clobbers_memory():
    """Without "memory" the compiler may move a load or store across the instruction."""
    missing = []
    for path in FILES:
        if path.suffix not in {".h", ".cuh", ".cu", ".cpp"}:
            continue
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"\basm\b(?:\s*volatile)?\s*\((.*?)\)\s*;", text, re.DOTALL):
            if SYNCHRONISES.search(match[1]) and '"memory"' not in match[1]:
                missing.append(
                    f"{_name(path)}:{text.count(chr(10), 0, match.start()) + 1}: {match[1].split(chr(10))[0]}"
                )
    assert not missing


def test_source_files_name_their_licence():
    sources = [p for p in FILES if p.suffix in CODE or p.name in ("CMakeLists.txt", "Makefile")]
    missing = [
        _name(path)
        for path in sources
        if not any("SPDX-License-Identifier: Apache-2.0" in line for line in path.read_text("utf-8").splitlines()[:2])
    ]
    assert not missing


LINE_CAPS = {".py": 300, ".h": 400, ".cuh": 400, ".cpp": 400, ".cu": 400, ".md": 200}
GROWING = ("CHANGELOG.md", "LOG.md")


def test_files_are_short():
    """A file over its cap holds two ideas."""
    lengths = {path: len(path.read_bytes().splitlines()) for path in FILES if path.name not in GROWING}
    assert not {_name(p): lines for p, lines in lengths.items() if lines > LINE_CAPS.get(p.suffix, lines)}


def test_committed_files_are_small():
    sizes = {_name(path): path.stat().st_size for path in FILES}
    assert not {name: size for name, size in sizes.items() if size > 15 * MIB}, "one file is at most 15 MiB"
    assert sum(sizes.values()) < 56 * MIB, "the whole tree is at most 56 MiB"


def test_no_path_of_somebodys_machine():
    pattern = r"(?<![\w.~}-])/(work|root|home|Users|mnt)/\w"
    texts = [p for p in FILES if p.suffix in TEXT and p.name != "test_house.py" and p.stat().st_size < MIB]
    assert not _lines_with(pattern, texts)


def test_top_level_is_fixed():
    folders = {_name(path).split("/")[0] for path in FILES if "/" in _name(path)}
    assert folders <= {"flash_models", "kernels", "eval", "tests", "model_cards", ".ci"}
