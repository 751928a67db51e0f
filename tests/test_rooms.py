"""The packages import downwards only, and none of them is crowded."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
# From top to bottom: each imports only what stands below it. "" is gcfast/__init__.py, the public
# names. A new package or a new module beside the packages takes its place here.
ORDER = (
    "__main__",
    "cli",
    "adapters",
    "serve",
    "ray",
    "demo",
    "evaluation",
    "images",
    "",
    "explain",
    "metrics",
    "search",
    "builder",
    "database",
    "method",
    "model",
    "ops",
    "kernels",
    "reference",
    "_checks",
    "_extras",
    "_progress",
    "_log",
    "errors",
    "_core",
)
MOST_MODULES = 12  # of a package, without its __init__.py


class Import(NamedTuple):
    """A line of one room that imports from another."""

    path: Path
    line: int
    text: str
    importer: str
    imported: str

    def __str__(self) -> str:
        importer, imported = (f"gcfast.{r}".rstrip(".") for r in (self.importer, self.imported))
        return f"{self.path}:{self.line}: {self.text}    ({importer} stands below {imported})"


def room(module: str) -> str:
    """The package or top-level module that a dotted name below ``gcfast`` is in."""
    return module.split(".")[1] if "." in module else ""


def sources(root: Path) -> dict[str, Path]:
    """The files of gcfast by dotted name; ``kernels/`` is installed as gcfast.kernels."""
    found = {}
    for folder, prefix in ((root / "gcfast", "gcfast"), (root / "kernels", "gcfast.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((prefix, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


def imports(root: Path) -> Iterator[Import]:
    """What each room imports from others, wherever in a file, also for type checking alone."""
    files = sources(root)
    for module, path in files.items():
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            for name in imported_names(node, module, path.name == "__init__.py"):
                if name.split(".")[0] == "gcfast" and room(name) != room(module):
                    assert isinstance(node, ast.stmt | ast.expr)
                    line = text.splitlines()[node.lineno - 1].strip()
                    where = path.relative_to(root)
                    yield Import(where, node.lineno, line, room(module), room(name))


def imported_names(node: ast.AST, module: str, is_package: bool) -> list[str]:
    """Dotted names that a node imports, down to the module or the name in it."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=source, names=names, level=level):
            if level:
                above = module.split(".")[: len(module.split(".")) - level + is_package]
                source = ".".join([*above, *([source] if source else [])])
            # Of `from gcfast import x` only a room x is one; other names are gcfast's own.
            if source == "gcfast":
                return [f"gcfast.{a.name}" if a.name in ORDER else "gcfast" for a in names]
            return [str(source)]
        case ast.Call(func=ast.Name("import_module") | ast.Attribute(attr="import_module")):
            return [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
    return []


def drawn(found: list[Import]) -> str:
    """The graph, a room a line with the rooms it imports, both from top to bottom."""
    lines = []
    for importer in ORDER:
        below = {i.imported for i in found if i.importer == importer}
        if below:
            named = ", ".join(name or "gcfast" for name in ORDER if name in below)
            lines.append(f"{importer or 'gcfast':>12} -> {named}")
    return "\n".join(lines)


def upward(found: list[Import]) -> list[str]:
    """The imports that do not go down, one of them at least in any cycle."""
    return [str(i) for i in found if ORDER.index(i.importer) > ORDER.index(i.imported)]


def test_every_room_has_its_place() -> None:
    rooms = {room(name) for name in sources(ROOT)}
    assert rooms <= set(ORDER), f"give {sorted(rooms - set(ORDER))} a place in ORDER"


def test_imports_go_down() -> None:
    found = list(imports(ROOT))
    wrong = upward(found)
    assert not wrong, "\n".join(["imports that go up:", *wrong, "", "the graph:", drawn(found)])


def test_no_package_is_crowded() -> None:
    modules: dict[Path, int] = {}
    for path in sources(ROOT).values():
        folder = path.relative_to(ROOT).parent
        if folder != Path("gcfast"):
            modules[folder] = modules.get(folder, 0) + (path.name != "__init__.py")
    crowded = [f"{folder}: {n} modules" for folder, n in modules.items() if n > MOST_MODULES]
    assert not crowded, f"more than {MOST_MODULES} modules in a package: {crowded}"


@pytest.mark.parametrize(
    "text",
    [
        "from gcfast.explain.maps import Tables",
        "import gcfast.explain.maps",
        "from gcfast import explain",
        "from gcfast import Explainer",
        "from ..explain import maps",
        "if TYPE_CHECKING:\n    from gcfast.explain.maps import Tables",
        "def f():\n    import gcfast.explain",
        "import_module('gcfast.explain.maps')",
        "importlib.import_module('gcfast.explain')",
    ],
)
def test_an_import_that_goes_up_is_found(tmp_path: Path, text: str) -> None:
    package = tmp_path / "gcfast" / "database"
    package.mkdir(parents=True)
    (package / "rows.py").write_text(f"import gcfast.errors\n{text}\n")
    (wrong,) = upward(list(imports(tmp_path)))
    line = 1 + len(text.splitlines())
    assert wrong.startswith(f"gcfast/database/rows.py:{line}: {text.splitlines()[-1].strip()} ")
