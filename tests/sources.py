"""The repository as the rule tests see it: files, syntax trees, and blocks of the documentation."""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "megatron_bert_tp"
ARCHITECTURE = ROOT / "docs" / "architecture.md"


def source_files(*folders: str) -> dict[str, str]:
    """Text of every Python file of these folders, under its path in the repository."""
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def markdown_files() -> dict[str, str]:
    """Text of every document of the repository, under its path in it."""
    paths = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def fenced_block(text: str, label: str) -> str:
    """Content of the one fenced block of a document that is marked ``label``."""
    found = re.findall(rf"^```{re.escape(label)}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(found) == 1, f"{len(found)} fenced blocks are marked {label}, not one"
    return found[0]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions and methods, nested ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def real_data(name: str) -> Path:
    """A file or folder of the real data beside the checkout; the test is skipped where it is not there."""
    path = ROOT.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"real data ../shared/data/{name} is not on this machine")
    return path


def assert_none(problems: Iterable[str]) -> None:
    """Fail with all problems, one a line; a comparison of lists would cut them short."""
    told = list(problems)
    assert not told, "\n".join(["", *told])
