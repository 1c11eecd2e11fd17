# SPDX-License-Identifier: Apache-2.0
"""The table of the README: which class works in which way with which version of transformers, as test_matrix.py found.

`--write-matrix` (see conftest.py) stores what passed with the installed version, and writes the table of all versions.
"""

import json
import re
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parents[1]
README, FILE = ROOT / "README.md", ROOT / "eval" / "results" / "compatibility.json"
BEGIN, END = "<!-- compatibility -->", "<!-- /compatibility -->"


def passed(config, name, path):
    """Note in pytest's `config` that the class `name` passed the check of the call path `path`."""
    config.stash.setdefault(passed, set()).add((name, path))


def read():
    """{version of transformers: [[class, call path]]} of what passed."""
    return json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}


def table(found, classes, paths):
    """Markdown: a row for each class, a column for each call path; versions are named where not all passed."""
    lines = [f"| | {' | '.join(paths)} |", "|---" + "|:-:" * len(paths) + "|"]
    for name in classes:
        cells = []
        for path in paths:
            versions = [version for version, cases in found.items() if [name, path] in cases]
            cells.append("✓" if len(versions) == len(found) else ", ".join(versions))
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    versions = " and ".join(found)
    return "\n".join([f"Passed with transformers {versions}:", "", *lines])


def write(config):
    """Store what passed in this run for the installed version, and put the table of all versions into the README."""
    from test_matrix import HEADS, PATHS

    found = read()
    found[transformers.__version__] = sorted(map(list, config.stash.get(passed, ())))
    found = dict(sorted(found.items()))
    rows = {version: ",\n  ".join(map(json.dumps, cases)) for version, cases in found.items()}
    text = ",\n".join(f'"{version}": [\n  {cases}\n]' for version, cases in rows.items())
    FILE.write_text(f"{{\n{text}\n}}\n", "utf-8")
    shown = f"{BEGIN}\n{table(found, HEADS, PATHS)}\n{END}"
    readme = README.read_text("utf-8")
    README.write_text(re.sub(f"{BEGIN}.*{END}", lambda match: shown, readme, flags=re.DOTALL), "utf-8")
