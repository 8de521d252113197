"""Docstrings as they are written in clipjax, for autodoc: single backticks are code, (2103.00020) is a paper of arXiv.

Signatures come from the source, where a shape reads as it was written: `zimg: Float[Array, "b e"]`.
"""

import ast
import inspect
import re
import textwrap
from typing import Any

from sphinx.application import Sphinx

CODE = re.compile(r"(`[^`]+`)")
ARXIV = re.compile(r"(?<![\w./])(\d{4}\.\d{4,5})(?![\w])")
SPECIAL = re.compile(r"([*|\\]|_(?=\W|$))")


def to_rst(line: str) -> str:
    """A line of prose: what reStructuredText would take for markup is escaped."""
    parts = CODE.split(line)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"`{part}`"
        else:
            parts[i] = ARXIV.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", SPECIAL.sub(r"\\\1", part))
    return "".join(parts)


def docstring(_app: Sphinx, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    text, literal = [], False
    for line in lines:
        indented = line.startswith("    ") and line.strip()
        if indented and not literal:  # a block of code or a formula
            text += ["::", ""]
        literal = bool(indented) or (literal and not line.strip())
        text.append(line if literal else to_rst(line))
    lines[:] = text


def signature(
    _app: Sphinx, what: str, name: str, obj: Any, _options: Any, _signature: str | None, _returns: str | None
) -> tuple[str, str | None] | None:
    """The arguments and the result as the source writes them. A configuration's fields have a page of their own."""
    if what == "exception":
        return None
    if what == "class" and name.startswith("clipjax.config."):
        return "(**fields)", None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(obj)))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if isinstance(tree, ast.ClassDef):
        made = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if made is None:
            fields = [ast.unparse(n) for n in tree.body if isinstance(n, ast.AnnAssign)]
            return f"({', '.join(fields)})", None
        tree = made
    if not isinstance(tree, ast.FunctionDef):
        return None
    arguments = tree.args
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        arguments.args = arguments.args[1:]
    returns = None if tree.returns is None or what == "class" else ast.unparse(tree.returns).strip("'")
    return f"({ast.unparse(arguments)})", returns


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", docstring)
    app.connect("autodoc-process-signature", signature)
    return {"parallel_read_safe": True}
