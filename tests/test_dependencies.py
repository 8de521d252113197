"""pyproject.toml declares every package that clipjax and its tests import, wherever in a file the import stands, with a range of
releases that was tried.

A package that is only installed because another one needs it may be gone after the other's next release.
"""

import ast
import sys
import tomllib
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from clipjax.data.storage import ranges
from clipjax.evals import caption_metrics
from clipjax.export.compare import reference

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
INSTALLED = metadata.packages_distributions()  # top-level module -> distributions
EXTRAS = {  # room -> the extras that it may need besides `dependencies`
    "data": ("fast", "http"),
    "export": ("torch", "hf"),
    "evals": ("captions",),
    "aot": ("tpu",),
    "metrics": ("wandb",),
    "interop": ("interop", "torch"),
}


def declared(*extras: str) -> set[str]:
    """The distributions in `dependencies` and in the given extras; with those that `jax[tpu]` adds to jax."""
    found = set()
    for text in chain(PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)):
        requirement = Requirement(text)
        found.add(canonicalize_name(requirement.name))
        for more in map(Requirement, metadata.requires(requirement.name) or [] if requirement.extras else []):
            wanted = any(more.marker and more.marker.evaluate({"extra": name}) for name in requirement.extras)
            found |= {canonicalize_name(more.name)} if wanted and not more.marker.evaluate({"extra": ""}) else set()
    return found


def imported(path: Path) -> set[str]:
    """The top-level names of all third-party modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"clipjax"}


def distributions(module: str) -> set[str]:
    return {canonicalize_name(name) for name in INSTALLED.get(module, [module])}


@pytest.mark.parametrize("room", sorted({p.relative_to(ROOT / "clipjax").parts[0] for p in ROOT.glob("clipjax/**/*.py")}))
def test_every_import_is_declared(room):
    path = ROOT / "clipjax" / room
    allowed = declared(*EXTRAS.get(room.removesuffix(".py"), ()))
    modules = {module for file in ([path] if path.is_file() else path.rglob("*.py")) for module in imported(file)}
    assert {module for module in modules if not distributions(module) & allowed} == set()


def test_every_import_of_the_tests_is_declared():
    allowed = set().union(*(declared(extra) for extra in PROJECT["optional-dependencies"]))
    modules = {module for file in (ROOT / "tests").rglob("*.py") for module in imported(file)} & INSTALLED.keys()
    assert {module for module in modules if not distributions(module) & allowed} == set()


@pytest.mark.parametrize(
    ("extra", "modules"),
    [
        *((extra, [module]) for module, extra in dict.fromkeys(ranges.SCHEMES.values())),
        ("fast", ["cykooz_resizer"]),
        ("torch", sorted({module for modules in reference.PACKAGES.values() for module in modules})),
        ("captions", sorted(set(caption_metrics.PACKAGES.values()))),
        ("wandb", ["wandb"]),
    ],
    ids=["gcs", "s3", "http", "hf", "fast", "torch", "captions", "wandb"],
)
def test_what_is_looked_for_by_name_is_declared(extra, modules):
    assert {module for module in modules if not distributions(module) & declared(extra)} == set()


def requirements() -> list[Requirement]:
    """All of pyproject.toml, but for the extras that one extra takes from another."""
    texts = [*PYPROJECT["build-system"]["requires"], *PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
    return [requirement for requirement in map(Requirement, texts) if requirement.name != PROJECT["name"]]


def pins() -> dict[str, Version]:
    lines = (ROOT / "launch/constraints.txt").read_text().split()
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_a_dependency_has_a_tried_range(requirement):
    """Its ends are told, the tests' own release lies within, and the next major release does not."""
    assert {specifier.operator for specifier in requirement.specifier} == {">=", "<"}
    pin = pins()[canonicalize_name(requirement.name)]
    assert pin in requirement.specifier
    assert Version(f"{pin.major + 1}") not in requirement.specifier


@pytest.mark.parametrize("name", sorted({requirement.name for requirement in requirements()}))
def test_a_dependency_has_one_range(name):
    assert len({requirement.specifier for requirement in requirements() if requirement.name == name}) == 1


def test_the_pythons_that_were_tried_are_told():
    told = {text.rpartition(" ")[2] for text in PROJECT["classifiers"] if text.startswith("Programming Language :: Python :: 3.")}
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in told
    assert all(SpecifierSet(PROJECT["requires-python"]).contains(version) for version in told)
