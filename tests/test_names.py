"""The words of the house: no opaque name, no function that is too long or nested too deeply."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "clipjax").rglob("*.py"))
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

# Names that say nothing to a first reader. Words in prose are free.
OPAQUE = {
    *("WHEREVER", "here", "WHOLE", "PART", "PARTED", "each", "apart", "stepper", "Meeting", "home", "everywhere", "cut", "uncut"),
    *("told", "owed", "there", "lies", "alike", "lighter", "Tuned", "Taught", "Written", "Tally"),
}
# Names that once stood for two things or three: at most one definition of each in the whole package.
ONCE = ("Figures", "How", "Keep", "POLICIES", "Plan", "Setting", "Writer", "behind", "compile_step")


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Classes, functions, parameters and constants, with their lines. A constant: a name in capitals, or one of a module."""
    for node in ast.walk(tree):
        if isinstance(node, (*FUNCTION, ast.ClassDef)):
            yield node.name, node.lineno
        if isinstance(node, ast.arg):
            yield node.arg, node.lineno
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id.isupper():
            yield node.id, node.lineno
    for statement in getattr(tree, "body", ()):
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            yield from ((t.id, t.lineno) for target in targets for t in ast.walk(target) if isinstance(t, ast.Name))


def defined() -> list[tuple[str, str]]:
    """(name without leading underscores, `file:line`) of every definition of the package."""
    found = []
    for path in FILES:
        found += [
            (name.lstrip("_"), f"{path.relative_to(ROOT)}:{line}") for name, line in set(names(ast.parse(path.read_text())))
        ]
    return found


def test_no_name_is_opaque():
    assert [f"{where} {name}" for name, where in defined() if name in OPAQUE] == []


@pytest.mark.parametrize("name", ONCE)
def test_a_name_means_one_thing(name):
    places = [where for found, where in defined() if found == name]
    assert len(places) <= 1, places


def depth(node: ast.AST) -> int:
    """How many functions stand within each other below this one."""
    levels = [depth(child) + isinstance(child, FUNCTION) for child in ast.iter_child_nodes(node)]
    return max(levels, default=0)


def test_functions_can_be_held_in_the_head():
    long, deep = [], []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, FUNCTION):
                where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                if node.end_lineno - node.lineno >= 50:
                    long.append(where)
                if depth(node) > 2:
                    deep.append(where)
    assert (long, deep) == ([], [])


def test_what_is_cited_is_in_the_repository():
    """No comment or page sends the reader to a document that only its authors have."""
    tracked = [
        p for folder in ("clipjax", "configs", "docs", "launch", "benchmarks", "tests") for p in (ROOT / folder).rglob("*")
    ]
    pages = [p for p in (*tracked, *ROOT.glob("*.md")) if p.suffix in (".py", ".md", ".sh") and p != Path(__file__)]
    absent = re.compile(r"\b(METHODS(_F)?|DESIGN|JAX_NOTES|PEERS|STYLE|CHIPS|FINETUNE)(\.md|, section| [A-Z]\.?\d| \d)")
    assert [str(p.relative_to(ROOT)) for p in pages if "_build" not in p.parts and absent.search(p.read_text())] == []
