"""Diagrams are put into the page itself: there their colours follow the theme that the reader chose."""

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx


def inline(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for image in list(doctree.findall(nodes.image)):
        if app.builder.format != "html" or not image["uri"].endswith(".svg"):
            continue
        svg = (Path(app.srcdir) / image["uri"]).read_text(encoding="utf-8")
        svg = svg[svg.index("<svg") :]
        html = f'<div class="diagram">{svg}</div>'
        image.parent.replace(image, nodes.raw("", html, format="html"))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-resolved", inline)
    return {"parallel_read_safe": True}
