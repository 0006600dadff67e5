"""Measure the size and the structure of the package: `python benchmarks/house.py`."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lightning_prompts"
LIMITS = {
    "largest class, lines": 260,
    "largest file, lines": 400,
    "function p90, lines": 25,
    "docstrings of fewer than four words": 0,
    "import cycles between packages": 0,
    "constructor arguments per group": 12,
}
"""The most that each figure should be."""

Tree = dict[Path, ast.Module]


def parsed(package: Path = PACKAGE) -> Tree:
    """Parse the modules of a package."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))}


def nodes(tree: Tree, *kinds: type[ast.AST]) -> Iterator[tuple[Path, ast.AST]]:
    """Yield the nodes of some kinds, with their file."""
    return ((path, node) for path, module in tree.items() for node in ast.walk(module) if isinstance(node, kinds))


def lines(node: ast.AST) -> int:
    """Return the number of lines of a class or function."""
    return int(node.end_lineno) - int(node.lineno) + 1  # type: ignore[attr-defined]


def imports(tree: Tree, package: Path = PACKAGE) -> dict[str, set[str]]:
    """Return which packages each package imports at run time, by their first name below `lightning_prompts`."""
    edges: dict[str, set[str]] = {}
    for path, module in tree.items():
        own = path.relative_to(package).parts[0].removesuffix(".py")
        for node in _at_run_time(module):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package.name}."):
                edges.setdefault(own, set()).add(str(node.module).split(".")[1])
    return {name: found - {name} for name, found in edges.items()}


def _at_run_time(module: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements that are executed when a module is imported, without those for types alone."""
    for statement in module.body:
        if not (isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.dump(statement.test)):
            yield statement


def cycles(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Return the pairs of packages that import each other, also by way of others."""

    def reached(name: str) -> set[str]:
        seen, queue = set[str](), [name]
        while queue:
            new = edges.get(queue.pop(), set()) - seen
            seen |= new
            queue += new
        return seen

    far = {name: reached(name) for name in edges}
    return sorted((one, other) for one in far for other in far[one] if one < other and one in far.get(other, set()))


def constructor_arguments(tree: Tree) -> dict[str, int]:
    """Return the number of arguments of each class beyond those of its bases, and of settings of each group, by name.

    A group of settings is a class without a constructor of its own, such as a dataclass, that is the default of an
    argument.
    """
    constructors: dict[str, ast.arguments] = {}
    fields: dict[str, int] = {}
    for _, node in nodes(tree, ast.ClassDef):
        fields[node.name] = sum(isinstance(each, ast.AnnAssign) for each in node.body)  # type: ignore[attr-defined]
        for each in node.body:  # type: ignore[attr-defined]
            if isinstance(each, ast.FunctionDef) and each.name == "__init__":
                constructors[node.name] = each.args  # type: ignore[attr-defined]
    defaults = [default for args in constructors.values() for default in (*args.defaults, *args.kw_defaults)]
    groups = {ast.unparse(default.func) for default in defaults if isinstance(default, ast.Call)}
    counts = {name: len(args.posonlyargs + args.args + args.kwonlyargs) - 1 for name, args in constructors.items()}
    return {name: fields[name] for name in groups & fields.keys()} | counts


def figures(tree: Tree | None = None) -> dict[str, float]:
    """Return the figures that `LIMITS` limits."""
    tree = tree or parsed()
    functions = [lines(node) for _, node in nodes(tree, ast.FunctionDef, ast.AsyncFunctionDef)]
    documented = nodes(tree, ast.FunctionDef, ast.ClassDef, ast.Module)
    docstrings = [text for _, node in documented if (text := ast.get_docstring(node))]  # type: ignore[arg-type]
    return {
        "largest class, lines": max(lines(node) for _, node in nodes(tree, ast.ClassDef)),
        "largest file, lines": max(len(path.read_text(encoding="utf-8").splitlines()) for path in tree),
        "function p90, lines": statistics.quantiles(functions, n=10)[-1],
        "docstrings of fewer than four words": sum(len(text.split()) < 4 for text in docstrings),
        "import cycles between packages": len(cycles(imports(tree))),
        "constructor arguments per group": max(constructor_arguments(tree).values()),
    }


def main() -> None:
    """Print the figures, and what exceeds a limit."""
    tree = parsed()
    for name, value in figures(tree).items():
        print(f"{name:<40} {value:>6.4g}   at most {LIMITS[name]}")
    for path in tree:
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > LIMITS["largest file, lines"]:
            print(f"  {path.relative_to(PACKAGE)} has {count} lines")
    for path, node in nodes(tree, ast.ClassDef):
        if lines(node) > LIMITS["largest class, lines"]:
            print(f"  {path.relative_to(PACKAGE)}: {node.name} has {lines(node)} lines")  # type: ignore[attr-defined]
    for path, node in nodes(tree, ast.FunctionDef, ast.ClassDef, ast.Module):
        text = ast.get_docstring(node)  # type: ignore[arg-type]
        if text and len(text.split()) < 4:
            print(f"  {path.relative_to(PACKAGE)}: {text!r}")
    for one, other in cycles(imports(tree)):
        print(f"  {one} and {other} import each other")
    for group, count in constructor_arguments(tree).items():
        if count > LIMITS["constructor arguments per group"]:
            print(f"  {group} takes {count} arguments")


if __name__ == "__main__":
    main()
