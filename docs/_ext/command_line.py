"""The command line's reference, made from clipjax.options while the pages are built; command-line.md says where it goes."""

from collections.abc import Iterator

from sphinx.application import Sphinx

from clipjax.declared import Argument, Command
from clipjax.options import COMMANDS

PAGE = "command-line"
MARK = "<!-- command-line -->"


def arguments_of(command: Command) -> Iterator[Argument]:
    for entry in command.arguments:
        yield from (entry,) if isinstance(entry, Argument) else entry


def shown(argument: Argument) -> str:
    """The argument as it is typed: `RUN`, `--data SPEC`, `--to open_clip|transformers`, `--verify`."""
    keywords = argument.keywords
    if keywords.get("action") == "store_true":
        return argument.name
    choices = keywords.get("choices")
    default = argument.name.lstrip("-").upper().replace("-", "_")
    value = "|".join(map(str, choices)) if choices else str(keywords.get("metavar") or default)
    value += " ..." if keywords.get("nargs") == "+" else ""
    return f"{argument.name} {value}" if argument.name.startswith("-") else value


def default(argument: Argument) -> str:
    keywords = argument.keywords
    value = keywords.get("default")
    if isinstance(value, list | tuple):
        value = " ".join(map(str, value))
    optional = argument.name.startswith("-") and not keywords.get("required")
    if value is None:
        return "" if optional or keywords.get("nargs") == "?" else "needed"
    return f"`{value}`"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def section(command: Command) -> list[str]:
    lines = [f"## clipjax {command.name}", "", f"{command.help[0].upper()}{command.help[1:]}.", ""]
    rows = [(shown(a), default(a), a.keywords.get("help", "")) for a in arguments_of(command)]
    if command.fields:
        rows.insert(0, ("CONFIG.py|NAME", "needed", "a Python file with `config()`, or a name that `clipjax configs` lists"))
        rows.append(("--any.field VALUE", "", "any field of the configuration, as [here](configuration.md)"))
    lines += ["| Argument | Default | Meaning |", "| --- | --- | --- |"]
    return [*lines, *(f"| `{cell(name)}` | {value} | {cell(text)} |" for name, value, text in rows), ""]


def insert(_app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == PAGE:
        text = "\n".join(line for command in COMMANDS for line in section(command))
        source[0] = source[0].replace(MARK, text)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", insert)
    return {"parallel_read_safe": True}
