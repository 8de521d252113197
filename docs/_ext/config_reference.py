"""The configuration reference: a table for each dataclass of clipjax.config, made from its source while the pages are built.

A field's meaning is the comment behind it, or the comment lines right above it. configuration.md says by a comment
`<!-- config-reference -->` where the tables go. The role `` {field}`train.batch_size` `` names a field, and
`` {field}`Softmax.weight` `` one of a class. A field without a comment, and a name that clipjax.config does not have, is a
warning, which fails the build.
"""

import ast
import dataclasses
import functools
import inspect
import io
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

from clipjax import config

log = logging.getLogger(__name__)

PAGE = "configuration"
MARK = "<!-- config-reference -->"
DEFAULT = {"free": 0, "bounded": 1}  # functions of clipjax.config.fields that make a field: the place of its default
ARXIV = re.compile(r"(?<![\d./:])(\d{4}\.\d{5})(?!\d)")
COLUMNS = ("Field", "Type", "Default", "On resume", "Meaning")


class Source(NamedTuple):
    """What the source says of one field."""

    default: str  # as it is written; "": the field has none
    meaning: str


class Field(NamedTuple):
    """A row of a table."""

    name: str
    kind: Any  # its type, without Annotated
    default: str
    free: bool
    meaning: str


def source_of(cls: type) -> dict[str, Source]:
    """Default and comment of every field that the class itself declares."""
    text = textwrap.dedent(inspect.getsource(cls))
    lines = text.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    found = {}
    for node in ast.parse(text).body[0].body:  # type: ignore[attr-defined]
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above, line = [], node.lineno - 1
        while line in comments and lines[line - 1].lstrip().startswith("#"):
            above.insert(0, comments[line])
            line -= 1
        behind = comments.get(node.end_lineno or node.lineno, "")
        value = node.value
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in DEFAULT:
            value = next(iter(value.args[DEFAULT[value.func.id] :]), None)
        found[node.target.id] = Source("" if value is None else ast.unparse(value), " ".join([*above, behind]).strip())
    return found


@functools.cache
def fields_of(cls: type) -> tuple[Field, ...]:
    """The fields of a class in their order, those of its bases included."""
    known: dict[str, Source] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            known |= source_of(base)
    hints = typing.get_type_hints(cls)
    return tuple(Field(f.name, hints[f.name], known[f.name].default, "free" in f.metadata, known[f.name].meaning)
                 for f in dataclasses.fields(cls))  # fmt: skip


def members(kind: Any) -> tuple[type, ...]:
    """The dataclasses that a field of this type may hold: one, those of a union, or those of a tuple's elements."""
    if isinstance(kind, type) and "members" in vars(kind):  # a clipjax.config.unions.OpenUnion
        return tuple(member.config for member in kind.members.values())
    if dataclasses.is_dataclass(kind):
        return (typing.cast(type, kind),)
    return tuple(m for part in typing.get_args(kind) for m in members(part))


def type_text(kind: Any, path: str = "") -> str:
    """`int`, `"cls"` or `"mean"`, several `int`: a type in the words of a table. `path`: of the field."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if len(members(kind)) > 1:  # the alternatives are listed there
        return f"{'several of' if origin is tuple else 'one of'} {{field}}`{path}`"
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" if isinstance(value, int) else f'`"{value}"`' for value in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(part, path) for part in args)
    if origin is tuple:
        return f"{'several' if args[-1] is ... else len(args)} {type_text(args[0], path)}"
    if kind is type(None):
        return "`None`"
    return f"{{field}}`{kind.__name__}`" if dataclasses.is_dataclass(kind) else f"`{kind.__name__}`"


def sections() -> Iterator[tuple[str, tuple[type, ...], bool]]:
    """(`data.augment`, its classes, whether it is free) of every part of a Run, outer before inner."""

    def below(prefix: str, cls: type, free: bool) -> Iterator[tuple[str, tuple[type, ...], bool]]:
        for field in fields_of(cls):
            if classes := members(field.kind):
                path = f"{prefix}{field.name}"
                yield path, classes, free or field.free
                for inner in classes:
                    yield from below(f"{path}.", inner, free or field.free)

    yield "", (config.Run,), False
    yield from below("", config.Run, False)


@functools.cache
def names() -> dict[str, str]:
    """Every name that the role takes -> its anchor on the page: `data.spec`, `Data.spec`, `Data`, `data`."""
    found = {}
    for path, classes, _ in sections():
        if path:
            found[path] = classes[0].__name__ if len(classes) == 1 else path
        for cls in classes:
            found[cls.__name__] = cls.__name__
            for field in fields_of(cls):
                anchor = f"{cls.__name__}.{field.name}"
                found[anchor] = anchor
                found.setdefault(f"{path}.{field.name}".lstrip("."), anchor)
    return found


def without_place(name: str) -> str:
    """`objective.0.weight` -> `objective.weight`: a place in a tuple is no name."""
    return ".".join(part for part in name.split(".") if not part.isdecimal())


def linked(text: str) -> str:
    """With papers of arXiv as links."""
    return ARXIV.sub(r"[\1](arxiv:\1)", text)


def cell(text: str) -> str:
    return linked(" ".join(text.split()).replace("|", "\\|").replace("<", "&lt;"))


def row(path: str, cls: type, field: Field, free: bool) -> str:
    """`path`: of the class, "" where it is one of several."""
    name = f"{path}.{field.name}".lstrip(".")
    inner = bool(members(field.kind))
    default = "" if inner and field.default != "None" else f"`{field.default}`" if field.default else "needed"
    resume = "free" if free or field.free else "identity"
    if (cls, field.name) == (config.Train, "steps"):
        resume = "may grow"
    if not field.meaning and field.name != "kind":
        log.warning("clipjax.config.%s.%s: a comment behind it must say what it means", cls.__name__, field.name)
    anchor = f'<span id="{cls.__name__}.{field.name}" class="field"></span>`{name}`'
    parts = (anchor, cell(type_text(field.kind, name)), cell(default), "" if inner else resume, cell(field.meaning))
    return "| " + " | ".join(parts) + " |"


def table(path: str, cls: type, free: bool) -> list[str]:
    fields = [field for field in fields_of(cls) if field.name != "kind" or len(typing.get_args(field.kind)) > 1]
    rule = "| " + " | ".join("---" for _ in COLUMNS) + " |"
    return ["| " + " | ".join(COLUMNS) + " |", rule, *(row(path, cls, field, free) for field in fields), ""]


def title(path: str, classes: tuple[type, ...]) -> str:
    if len(classes) > 1:
        return f"`{path}`, one of {len(classes)} kinds"
    return f"`{path}`: {classes[0].__name__}" if path else "`Run`"


def kind_of(cls: type) -> str:
    return next(field.default for field in fields_of(cls) if field.name == "kind").strip("'")


def markdown() -> str:
    """All sections."""
    lines: list[str] = []
    for path, classes, free in sections():
        union = len(classes) > 1
        lines += [f'<span id="{path}"></span>' if union else "", "", f"## {title(path, classes)}", ""]
        if union:
            lines += [", ".join(f"{{field}}`{cls.__name__}` (`kind` is `{kind_of(cls)}`)" for cls in classes) + ".", ""]
        for cls in classes:
            lines += [f'<span id="{cls.__name__}"></span>', "", *([f"### `{cls.__name__}`", ""] if union else [])]
            lines += [linked(inspect.getdoc(cls) or ""), "", *table("" if union else path, cls, free)]
    return "\n".join(lines)


def insert(_app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == PAGE:
        source[0] = source[0].replace(MARK, markdown())


class FieldRole(SphinxRole):
    """`` {field}`mesh.fsdp` `` and `` {field}`mesh.fsdp=128` ``: a field of the configuration, as a link to its row."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        name = without_place(self.text.partition("=")[0].partition("(")[0].strip())
        code = nodes.literal(self.text, self.text)
        if name not in names():
            return [code], [self.inliner.reporter.warning(f"clipjax.config has no field {name!r}", line=self.lineno)]
        builder = self.env.app.builder
        uri = f"{builder.get_relative_uri(self.env.docname, PAGE)}#{names()[name]}"
        return [nodes.reference("", "", code, internal=True, refuri=uri)], []


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", insert)
    app.add_role("field", FieldRole())
    return {"parallel_read_safe": True}
