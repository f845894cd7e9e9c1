"""The floors drawn in docs/architecture.md are the rule: a module imports only from floors below its own."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

import pytest

from megatron_bert_tp.pipeline.schedule import placement_of, programs
from megatron_bert_tp.pipeline.simulate import Durations, simulate
from megatron_bert_tp.pipeline.timeline import draw
from tests.sources import ARCHITECTURE, PACKAGE, ROOT, assert_none, fenced_block, source_files

GROUND = "errors"  # the one name on floor 0 that its neighbours may import too

Sources = Mapping[str, str]
Floors = Mapping[str, int]


@pytest.fixture(scope="module")
def document() -> str:
    return ARCHITECTURE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def floors(document) -> dict[str, int]:
    return read_floors(fenced_block(document, "floors"))


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return source_files(PACKAGE)


def read_floors(block: str) -> dict[str, int]:
    """Floor of every name in lines such as ``2 | pipeline data | what they are``."""
    rows = (line.split("|") for line in block.splitlines() if line.strip())
    return {name: int(floor) for floor, names, _meaning in rows for name in names.split()}


def member_of(path: str) -> str:
    """The name on the floors to which a file belongs; empty for the ``__init__`` of the whole package."""
    first = PurePosixPath(path).relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py").removesuffix("__init__")


def imported_modules(tree: ast.AST, path: str) -> Iterator[str]:
    """Full names of all modules of the package that a file imports, anywhere in it, under any condition."""
    package = PurePosixPath(path).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            if module == PACKAGE:
                yield from (f"{PACKAGE}.{name.name}" for name in node.names)
            elif module.split(".")[0] == PACKAGE:
                yield module


def broken_floors(sources: Sources, floors: Floors) -> list[str]:
    """What is wrong, such as ``model/stage.py (floor 3) imports training (floor 8)``."""
    found = []
    for path, text in sources.items():
        own = member_of(path)
        if own and own not in floors:
            found.append(f"{own} has no floor in docs/architecture.md")
            continue
        short = path.removeprefix(f"{PACKAGE}/")
        for module in imported_modules(ast.parse(text), path):
            other = module.removeprefix(PACKAGE).removeprefix(".").partition(".")[0]
            problem = _problem(short, own, other, floors)
            found += [problem] if problem else []
    return sorted(set(found))


def _problem(short: str, own: str, other: str, floors: Floors) -> str | None:
    if not own:
        return f"{short} imports {other or 'the package'}: the package itself imports nothing"
    if other in (own, GROUND):
        return None
    if other not in floors:
        return f"{short} imports {other or 'the package itself'}, which has no floor"
    if floors[other] < floors[own]:
        return None
    return f"{short} (floor {floors[own]}) imports {other} (floor {floors[other]})"


def test_every_module_imports_only_from_floors_below(sources, floors):
    assert_none(broken_floors(sources, floors))


def test_the_floors_name_nothing_that_does_not_exist(sources, floors):
    assert sorted(floors) == sorted({member_of(path) for path in sources} - {""})


# A building of its own, so that these tests say the same whatever the document says.
PLANTED = {
    "errors": 0,
    "config": 0,
    "parallel": 1,
    "pipeline": 2,
    "data": 2,
    "model": 3,
    "optim": 4,
    "training": 8,
}
UP = "model/stage.py (floor 3) imports training (floor 8)"
SIDEWAYS = "data/sources.py (floor 2) imports pipeline (floor 2)"
INIT = "__init__.py imports model: the package itself imports nothing"
RELATIVE = "data/sources.py (floor 2) imports optim (floor 4)"


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("model/stage.py", "from megatron_bert_tp.training.build import x", UP),
        ("model/stage.py", "def f():\n    import megatron_bert_tp.training", UP),
        ("data/sources.py", "from megatron_bert_tp import pipeline", SIDEWAYS),
        ("data/sources.py", "from ..optim import adamw", RELATIVE),
        ("data/sources.py", "from .. import optim", RELATIVE),
        ("errors.py", "import megatron_bert_tp.config", "errors.py (floor 0) imports config (floor 0)"),
        ("errors.py", "import megatron_bert_tp", "errors.py imports the package itself, which has no floor"),
        (
            "__init__.py",
            "from .model import stage",
            INIT,
        ),
        ("helpers/x.py", "", "helpers has no floor in docs/architecture.md"),
    ],
)
def test_an_import_that_goes_up_is_told(path, text, message):
    assert broken_floors({f"{PACKAGE}/{path}": text}, PLANTED) == [message]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("model/stage.py", "from megatron_bert_tp.parallel.mesh import Axis\nimport torch"),
        ("data/sources.py", "from . import spans\nfrom .spans import build_spans"),
        ("config/load.py", "from megatron_bert_tp.errors import ConfigError"),
    ],
)
def test_an_import_that_goes_down_or_stays_is_allowed(path, text):
    assert broken_floors({f"{PACKAGE}/{path}": text}, PLANTED) == []


# torch set to None makes `import torch` raise; each module is imported in the one process in turn.
IMPORT_WITHOUT_TORCH = """
import importlib, sys
sys.modules["torch"] = None
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"{name}: {error}")
"""


def imports_of_torch(modules: list[str], *, folder=ROOT) -> list[str]:
    """Those of ``modules`` that cannot be imported without torch, with the reason."""
    command = [sys.executable, "-c", IMPORT_WITHOUT_TORCH, *modules]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def modules_of(names: list[str], sources: Sources) -> list[str]:
    """Full module names; ``config.*`` stands for every module of a package, ``*`` for every ``__init__``."""
    known = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in sources]
    packages = [path.removesuffix("/__init__.py").replace("/", ".") for path in sources if "/__init__.py" in path]
    found: list[str] = []
    for name in names:
        full = f"{PACKAGE}.{name}"
        matching = [module for module in known if module == full or module.startswith(full.removesuffix("*"))]
        chosen = packages if name == "*" else matching if name.endswith(".*") else [full]
        assert set(chosen) <= set(known), f"{name} is no module of the package"
        assert chosen, f"{name} stands for no module"
        found += chosen
    return found


def test_modules_that_answer_at_once_do_not_import_torch(document, sources):
    modules = modules_of(fenced_block(document, "no-torch").split(), sources)
    assert len(modules) > 30
    assert_none(imports_of_torch(modules))


def test_an_import_of_torch_is_told(tmp_path):
    (tmp_path / "light.py").write_text("import json\n")
    (tmp_path / "heavy.py").write_text("import torch\n")
    (tmp_path / "above.py").write_text("import heavy\n")
    told = imports_of_torch(["light", "heavy", "above"], folder=tmp_path)
    assert [line.partition(":")[0] for line in told] == ["heavy", "above"]


def test_the_drawn_timeline_is_that_of_the_schedule(document):
    placement = placement_of("1f1b", 4, 1)
    durations = Durations.equal(4, forward=1, backward=2)
    timeline = simulate(programs("1f1b", placement, 8), placement, durations)
    assert fenced_block(document, "timeline") == draw(timeline) + "\n"
