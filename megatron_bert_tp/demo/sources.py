"""Where the text of the demo corpus comes from: installed Python source files, read without importing them."""

import ast
import gc
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from megatron_bert_tp.demo.prose import prose_sentences

PACKAGES = ("torch", "numpy", "sympy", "networkx")
EXCLUDED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "__pycache__"}
)
_TOPICS = ("pydoc_data", "topics.py")

Document = list[str]
"""Sentences of one source file or topic."""


@dataclass(frozen=True)
class Source:
    """A package, or the standard library: its name, its version, its folder."""

    name: str
    version: str
    root: Path

    def files(self) -> list[Path]:
        """Its source files in the order of their paths; tests and packages installed inside are left out."""
        found = (path.relative_to(self.root) for path in self.root.rglob("*.py"))
        kept = (path for path in found if not EXCLUDED.intersection(path.parts))
        return [self.root / path for path in sorted(kept, key=lambda path: path.as_posix())]


def installed_sources() -> tuple[list[Source], list[str]]:
    """The standard library and those of `PACKAGES` that are installed; and the names of the others."""
    library = Source("python", platform.python_version(), _root("argparse"))
    found = [name for name in PACKAGES if find_spec(name) is not None]
    missing = [name for name in PACKAGES if name not in found]
    return [library, *(Source(name, version(name), _root(name)) for name in found)], missing


def _root(module: str) -> Path:
    """Folder of the source of a top-level module, which is found but not run."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def read_documents(path: Path) -> list[Document]:
    """Documents of one source file: one of all its docstrings, or one for each topic of the language reference.

    A file that this Python cannot parse (written for another version, or a template) has none.
    """
    content = path.read_bytes()
    if b'"""' not in content and b"'''" not in content and path.parts[-2:] != _TOPICS:
        return []
    with _quietly():
        try:
            tree = ast.parse(content)
        except (SyntaxError, ValueError):
            return []
        texts = _topics(tree) if path.parts[-2:] == _TOPICS else [list(_docstrings(tree))]
    return [[sentence for text in parts for sentence in prose_sentences(text)] for parts in texts]


@contextmanager
def _quietly() -> Iterator[None]:
    """No warnings about the parsed source, and no garbage collection, which doubles the time of parsing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if was_enabled:
            gc.enable()


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings of the module, its classes and functions, nested ones too, from top to bottom."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from filter(None, [ast.get_docstring(node)])
        statements = (child for child in ast.iter_child_nodes(node) if isinstance(child, _HOLDERS))
        pending += reversed(list(statements))


_HOLDERS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.If, ast.Try, ast.ExceptHandler, ast.With)


def _topics(tree: ast.Module) -> list[list[str]]:
    """Texts of the language reference in the order of their names: the one dict that the file assigns."""
    dicts = [node.value for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    topics = ast.literal_eval(dicts[-1]) if dicts and isinstance(dicts[-1], ast.Dict) else {}
    return [[topics[name]] for name in sorted(topics)]
