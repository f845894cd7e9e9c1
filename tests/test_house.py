"""The rules of the house (CONTRIBUTING.md), read from the files themselves."""

import ast
import re
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_bert_tp.config.load import load_any
from megatron_bert_tp.config.schema import Config
from megatron_bert_tp.config.settings import all_settings
from megatron_bert_tp.config.task_schema import TaskRun
from tests.sources import PACKAGE, ROOT, assert_none, functions, markdown_files, source_files

LONGEST_FUNCTION = 60
MEDIAN_FUNCTION = 10
LONGEST_FILE = 400
ENVIRONMENT = f"{PACKAGE}/config/environment.py"

# Whatever runs code that a file holds: none of it may stand in the package.
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "torch.distributed.checkpoint", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}

TOP_LEVEL = {
    "pyproject.toml", PACKAGE, "configs", "launch", "tests", "benchmarks", "docs", "Dockerfile", "README.md",
    "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "constraints.txt",
}  # fmt: skip
PROCESSES = {"demo.yaml": 4, "345m.yaml": 8}  # as the comments of the two files start them

CODE = source_files(PACKAGE)
ALL_CODE = source_files(PACKAGE, "tests", "benchmarks")
DOCUMENTS = markdown_files()


# Size


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def long_functions(text: str) -> list[str]:
    found = ((num_lines(function), function) for function in functions(ast.parse(text)))
    return [f"{function.name} has {size} lines" for size, function in found if size > LONGEST_FUNCTION]


@pytest.mark.parametrize("path", ALL_CODE)
def test_no_file_and_no_function_is_too_long(path):
    assert len(ALL_CODE[path].splitlines()) < LONGEST_FILE
    assert_none(long_functions(ALL_CODE[path]))


def test_half_of_the_functions_are_short():
    sizes = [num_lines(function) for text in CODE.values() for function in functions(ast.parse(text))]
    assert statistics.median(sizes) < MEDIAN_FUNCTION


def test_a_long_function_is_told():
    body = "    pass\n"
    assert long_functions("def f():\n" + (LONGEST_FUNCTION - 1) * body) == []
    assert long_functions("class A:\n def f():\n" + LONGEST_FUNCTION * body) == ["f has 61 lines"]


# Hidden state and unsafe reading


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an attribute chain that begins with a name; else empty."""
    if isinstance(node, ast.Name):
        return node.id
    parent = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{parent}.{node.attr}" if parent and isinstance(node, ast.Attribute) else ""


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)


def global_state(text: str) -> list[str]:
    return [f"line {n.lineno}: global" for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Global)]


def environment_reads(text: str) -> list[str]:
    """Uses of the environment; setting a variable for a child process is none."""
    tree = ast.parse(text)
    names = {"environ", "environb", "getenv", "getenvb"}
    written = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
    }
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node not in written]
    found = [(node.lineno, node.attr) for node in uses if dotted(node) in {f"os.{name}" for name in names}]
    found += [(line, name) for line, name in imported_names(tree) if name in {f"os.{each}" for each in names}]
    return [f"line {line}: {name}" for line, name in sorted(found)]


def unsafe_reads(text: str) -> list[str]:
    """Ways to read a file that can run what it holds; ``torch.load(weights_only=True)`` cannot."""
    tree = ast.parse(text)
    harmless = {id(node.func) for node in ast.walk(tree) if _is_harmless_load(node)}
    imports = [(line, name) for line, name in imported_names(tree) if name.split(".")[0] in PICKLES]
    imports += [(line, name) for line, name in imported_names(tree) if _is_unsafe(name)]
    chains = [
        (node.lineno, dotted(node))
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and id(node) not in harmless
    ]
    calls = [(line, name) for line, name in chains if _is_unsafe(name) or name.split(".")[0] in PICKLES]
    keywords = [
        (node.value.lineno, "allow_pickle")
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle"
    ]
    builtins = [
        (node.lineno, dotted(node.func))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and dotted(node.func) in {"eval", "exec"}
    ]
    return [f"line {line}: {name}" for line, name in sorted({*imports, *calls, *keywords, *builtins})]


def _is_harmless_load(node: ast.AST) -> bool:
    """A call of torch.load that says ``weights_only=True`` itself, and no settings that come from elsewhere."""
    if not isinstance(node, ast.Call) or dotted(node.func) != "torch.load":
        return False
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    value = given.get("weights_only")
    return None not in given and isinstance(value, ast.Constant) and value.value is True


def _is_unsafe(name: str) -> bool:
    return any(name == unsafe or name.startswith(f"{unsafe}.") for unsafe in UNSAFE_CALLS)


@pytest.mark.parametrize("path", CODE)
def test_there_is_no_global_state_and_no_unsafe_reading(path):
    assert_none(global_state(CODE[path]))
    assert_none(unsafe_reads(CODE[path]))


@pytest.mark.parametrize("path", sorted(CODE.keys() - {ENVIRONMENT}))
def test_the_environment_is_read_in_one_place(path):
    assert_none(environment_reads(CODE[path]))


@pytest.mark.parametrize(
    ("rule", "text", "told"),
    [
        (global_state, "def f():\n    global x\n    x = 1", ["line 2: global"]),
        (environment_reads, "import os\nos.environ['A']", ["line 2: environ"]),
        (environment_reads, "import os\nos.environ.get('A')\nos.environ['A'] = 'b'", ["line 2: environ"]),
        (environment_reads, "from os import getenv\nprint(getenv('A'))", ["line 1: os.getenv"]),
        (unsafe_reads, "import pickle", ["line 1: pickle"]),
        (unsafe_reads, "from torch import load", ["line 1: torch.load"]),
        (unsafe_reads, "import torch\ntorch.load(path)", ["line 2: torch.load"]),
        (unsafe_reads, "import torch\ntorch.load(path, weights_only=True)", []),
        (unsafe_reads, "import torch\ntorch.load(path, weights_only=flag)", ["line 2: torch.load"]),
        (unsafe_reads, "import torch\ntorch.load(path, weights_only=True, **more)", ["line 2: torch.load"]),
        (unsafe_reads, "import torch.distributed.checkpoint as dcp", ["line 1: torch.distributed.checkpoint"]),
        (unsafe_reads, "import numpy as np\nnp.load(path, allow_pickle=True)", ["line 2: allow_pickle"]),
        (unsafe_reads, "import yaml\nyaml.load(text)\neval(text)", ["line 2: yaml.load", "line 3: eval"]),
        (unsafe_reads, "import yaml\nyaml.compose(text, Loader=yaml.SafeLoader)", []),
    ],
)
def test_a_broken_rule_is_told(rule, text, told):
    assert rule(text) == told


# Public functions


def public_members(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Classes, functions and methods whose name and whose holders' names are public."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public_members(node.body, f"{prefix}{node.name}.")


def untyped(function: ast.FunctionDef) -> list[str]:
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
    return [*missing, *(["return"] if function.returns is None else [])]


def undescribed(text: str) -> list[str]:
    """Public members without types or docstring, and a module without docstring."""
    tree = ast.parse(text)
    found = [] if ast.get_docstring(tree) else ["the module has no docstring"]
    for name, node in public_members(tree.body):
        if not ast.get_docstring(node):
            found.append(f"{name} has no docstring")
        if isinstance(node, ast.FunctionDef) and untyped(node):
            found.append(f"{name} has no type for {', '.join(untyped(node))}")
    return found


@pytest.mark.parametrize("path", CODE)
def test_public_members_are_typed_and_documented(path):
    assert_none(undescribed(CODE[path]))


def test_a_public_member_without_types_or_docstring_is_told():
    text = '"""Module."""\nclass A:\n    """Doc."""\n    def f(self, x, *, y: int): pass\ndef _g(x): pass'
    assert undescribed(text) == ["A.f has no docstring", "A.f has no type for x, return"]
    assert undescribed("") == ["the module has no docstring"]


# The repository


def test_the_top_level_is_as_agreed():
    """Dot-files are free, and so is what git does not track: environments, runs, builds."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {path.partition("/")[0] for path in listed.split("\0") if path}
    assert_none(f"{name} is not agreed" for name in tracked - TOP_LEVEL if not name.startswith("."))
    assert_none(f"{name} is missing" for name in TOP_LEVEL if not (ROOT / name).exists())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_settings_file_loads(path):
    assert load_any(path, world_size=PROCESSES.get(path.name)).run.directory


# The documents

FENCE = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
QUOTED_PATH = re.compile(rf"`((?:{PACKAGE}|configs|launch|tests|benchmarks|docs)/[\w./-]+)`")
OVERRIDE = re.compile(r"\b((?:model|task|data|objective|optimizer|parallel|run)\.[a-z_.0-9]+)=")


def anchor_of(heading: str) -> str:
    """Anchor that a heading gets on the usual hosts: lower case, hyphens, no other punctuation."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def dead_links(path: str, text: str) -> list[str]:
    """Links to files or headings of the repository that are not there."""
    targets = [t for t in LINK.findall(FENCE.sub("", text)) if "://" not in t and not t.startswith("mailto:")]
    return [target for target in targets if not _leads_somewhere(target, path, text)]


def _leads_somewhere(target: str, path: str, text: str) -> bool:
    name, _, anchor = target.partition("#")
    file = (ROOT / path).parent / name
    if name and not file.exists():
        return False
    return not anchor or anchor in anchors(file.read_text(encoding="utf-8") if name else text)


def anchors(text: str) -> set[str]:
    return {anchor_of(line.lstrip("#")) for line in FENCE.sub("", text).splitlines() if line.startswith("#")}


def unknown_paths(text: str) -> list[str]:
    return sorted({path for path in QUOTED_PATH.findall(text) if not (ROOT / path).exists()})


def unknown_settings(text: str) -> list[str]:
    """Overrides of settings that do not exist; a line with a prompt may show what goes wrong."""
    lines = [line for line in text.splitlines() if not line.startswith("$ ")]
    known = all_settings(Config).keys() | all_settings(TaskRun).keys()
    return sorted(set(OVERRIDE.findall("\n".join(lines))) - known)


@pytest.mark.parametrize("path", DOCUMENTS)
def test_documents_speak_of_what_exists(path):
    assert_none(dead_links(path, DOCUMENTS[path]))
    assert_none(unknown_paths(DOCUMENTS[path]))
    assert_none(unknown_settings(DOCUMENTS[path]))


def test_a_document_that_speaks_of_what_does_not_exist_is_told():
    text = "# One Two\n[a](README.md) [b](no.md) [c](#one-two) [d](#three) [e](https://example.org)\n"
    assert dead_links("README.md", text) == ["no.md", "#three"]
    assert unknown_paths("`docs/no.md` and `configs/demo.yaml`") == ["docs/no.md"]
    assert unknown_settings("run.resume=never run.nothing=1") == ["run.nothing"]


def test_all_settings_files_and_documents_are_seen():
    assert {Path(path).name for path in DOCUMENTS} >= {"README.md", "architecture.md", "CONTRIBUTING.md"}
    assert {path.name for path in (ROOT / "configs").rglob("*.yaml")} >= PROCESSES.keys()
