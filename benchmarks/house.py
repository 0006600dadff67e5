"""Measure the size and the structure of the package: `python benchmarks/house.py`."""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
NAME = "lightning_prompts"

LIMITS = {
    "largest class, lines": 260,
    "largest file, lines": 400,
    "function p90, lines": 25,
    "docstrings of fewer than four words": 0,
    "lines over the declared length": 0,
    "import cycles between packages": 0,
    "upward imports": 0,
    "`Any` on the seams": 0,
    "constructor arguments per group": 12,
}
"""The most that each figure may be."""

LAYERS = (
    *("errors", "setting_types", "typed_module", "entry_points", "unused", "terminal", "embeddings", "optimizers"),
    *("text_settings", "python_values", "parser_errors", "effort", "launchers", "isolation", "distributed"),
    *("data", "emoji", "backbones", "sampling", "objectives", "metrics", "runs", "cache"),
    *("callbacks", "engine", "methods", "runner"),
    *("python_images", "python_settings", "python_search", "api", "commands", "__init__", "__main__"),
)
"""The packages and modules from the bottom to the top; at run time, each imports only from those before it."""

SEAMS = frozenset({"module", "pl_module", "method", "data", "datamodule", "batch", "backbone", "sampler"})
"""Names of the objects through which the layers work together."""


class Source(NamedTuple):
    """A file of the package: its text and its syntax tree."""

    text: str
    tree: ast.Module


Package = dict[str, Source]
"""The files of a package, by their path in it."""


def parsed(folder: Path = ROOT / NAME) -> Package:
    """Parse the files of a package."""
    texts = {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in sorted(folder.rglob("*.py"))}
    return {path: Source(text, ast.parse(text)) for path, text in texts.items()}


def nodes(package: Package, *kinds: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """Yield the nodes of some kinds, with the path of their file."""
    return ((path, node) for path, file in package.items() for node in ast.walk(file.tree) if isinstance(node, kinds))


def lines(node: ast.AST) -> int:
    """Return the number of lines of a class or function."""
    return int(node.end_lineno) - int(node.lineno) + 1  # type: ignore[attr-defined]


def layer(path: str) -> str:
    """Return the package of a file, or its module if it is in none."""
    return path.split("/")[0].removesuffix(".py")


def imports(package: Package) -> Iterator[tuple[str, str]]:
    """Yield each file with a layer that it imports at run time, also within functions, but not for types alone."""
    for path, file in package.items():
        for node in _at_run_time(file.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield from ((path, other) for other in _imported(node) if other != layer(path))


def _at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes below a node, without those that only the type checker sees."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            yield child
            yield from _at_run_time(child)


def _imported(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Return the layers that an import names; what is none of them, such as `__version__`, is in `__init__`."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif node.level:
        raise ValueError("An import is relative, so its layer is not known; write the whole name.")
    else:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    own = [name.split(".")[1:] for name in names if name.split(".")[0] == NAME]
    return {rest[0] if rest and rest[0] in LAYERS else "__init__" for rest in own}


def upward_imports(package: Package) -> list[str]:
    """Return the imports of layers that are above the importing one."""
    height = {name: number for number, name in enumerate(LAYERS)}
    if unknown := {layer(path) for path in package} - height.keys():
        raise ValueError(f"LAYERS lacks {', '.join(sorted(unknown))}; add them above what they import.")
    return [f"{path} imports {other}" for path, other in imports(package) if height[other] > height[layer(path)]]


def cycles(package: Package) -> list[str]:
    """Return the pairs of packages that import each other, also by way of others."""
    edges: dict[str, set[str]] = {}
    for path, other in imports(package):
        edges.setdefault(layer(path), set()).add(other)

    def reached(name: str) -> set[str]:
        seen, queue = set[str](), [name]
        while queue:
            new = edges.get(queue.pop(), set()) - seen
            seen |= new
            queue += new
        return seen

    far = {name: reached(name) for name in edges}
    pairs = sorted((one, other) for one in far for other in far[one] if one < other and one in far.get(other, set()))
    return [f"{one} and {other} import each other" for one, other in pairs]


def untyped_seams(package: Package) -> list[str]:
    """Return the parameters and attributes on the seams that are annotated as Any."""
    places = []
    for path, node in nodes(package, ast.arg, ast.AnnAssign):
        target = node if isinstance(node, ast.arg) else node.target  # type: ignore[attr-defined]
        name = next(value for part in ("arg", "attr", "id", "slice") if (value := getattr(target, part, None)))
        annotation = node.annotation  # type: ignore[attr-defined]
        # A `dict[str, Any]` is none of the objects on the seams.
        if name in SEAMS and annotation and "Any" in ast.unparse(annotation).split(" | "):
            places.append(f"{path}:{node.lineno}: {name} is Any")  # type: ignore[attr-defined]
    return places


def long_lines(package: Package) -> list[str]:
    """Return the lines that are longer than pyproject.toml declares."""
    declared = re.search(r"^line-length = (\d+)", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    most = int(declared[1]) if declared else 0
    numbered = ((path, *pair) for path, file in package.items() for pair in enumerate(file.text.splitlines(), 1))
    return [f"{path}:{number} has {len(line)} characters" for path, number, line in numbered if len(line) > most]


def short_docstrings(package: Package) -> list[str]:
    """Return the docstrings of fewer than four words."""
    documented = nodes(package, ast.FunctionDef, ast.ClassDef, ast.Module)
    docstrings = [(path, ast.get_docstring(node) or "") for path, node in documented]  # type: ignore[arg-type]
    return [f"{path}: {text!r}" for path, text in docstrings if 0 < len(text.split()) < 4]


def constructor_arguments(package: Package) -> dict[str, int]:
    """Return the number of arguments of each class beyond those of its bases, and of settings of each group, by name.

    A group of settings is a class without a constructor of its own, such as a dataclass, that is the default of an
    argument.
    """
    constructors: dict[str, ast.arguments] = {}
    fields: dict[str, int] = {}
    for _, node in nodes(package, ast.ClassDef):
        fields[node.name] = sum(isinstance(each, ast.AnnAssign) for each in node.body)  # type: ignore[attr-defined]
        for each in node.body:  # type: ignore[attr-defined]
            if isinstance(each, ast.FunctionDef) and each.name == "__init__":
                constructors[node.name] = each.args  # type: ignore[attr-defined]
    defaults = [default for args in constructors.values() for default in (*args.defaults, *args.kw_defaults)]
    groups = {ast.unparse(default.func) for default in defaults if isinstance(default, ast.Call)}
    counts = {name: len(args.posonlyargs + args.args + args.kwonlyargs) - 1 for name, args in constructors.items()}
    return {name: fields[name] for name in groups & fields.keys()} | counts


class Figure(NamedTuple):
    """A figure of the package.

    Attributes:
        value: A size, or the number of places.
        most: The most that it may be.
        excess: What exceeds this, a line each.
    """

    value: float
    most: float
    excess: list[str]


def figures(package: Package | None = None) -> dict[str, Figure]:
    """Return the figures that `LIMITS` limits."""
    package = package or parsed()
    functions = [lines(node) for _, node in nodes(package, ast.FunctionDef, ast.AsyncFunctionDef)]
    classes = {f"{path}: {node.name}": lines(node) for path, node in nodes(package, ast.ClassDef)}  # type: ignore[attr-defined]
    sizes: dict[str, Mapping[str, float]] = {
        "largest class, lines": classes,
        "largest file, lines": {path: len(file.text.splitlines()) for path, file in package.items()},
        "function p90, lines": {"the tenth of the functions": statistics.quantiles(functions, n=10)[-1]},
        "constructor arguments per group": constructor_arguments(package),
    }
    places = {
        "docstrings of fewer than four words": short_docstrings(package),
        "lines over the declared length": long_lines(package),
        "import cycles between packages": cycles(package),
        "upward imports": upward_imports(package),
        "`Any` on the seams": untyped_seams(package),
    }
    measured = {name: Figure(len(excess), LIMITS[name], excess) for name, excess in places.items()}
    for name, values in sizes.items():
        excess = [f"{place} has {value:g}" for place, value in values.items() if value > LIMITS[name]]
        measured[name] = Figure(max(values.values(), default=0), LIMITS[name], excess)
    return {name: measured[name] for name in LIMITS}


def main() -> int:
    """Print the figures and what exceeds a limit; return the exit status, 1 if a limit is exceeded."""
    measured = figures()
    for name, (value, most, _) in measured.items():
        print(f"{name:<40} {value:>6.4g}   at most {most}")
    exceeded = [name for name, (value, most, _) in measured.items() if value > most]
    for name in exceeded:
        print(f"\n{name}:")
        for line in measured[name].excess:
            print(f"  {line}")
    return int(bool(exceeded))


if __name__ == "__main__":
    sys.exit(main())
