"""How Sphinx builds the documentation: `python -m sphinx -W docs docs/_build`. It reads only files of this repository."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import clipjax  # noqa: E402

project = "clipjax"
copyright = "The clipjax developers"
release = clipjax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "command_line",  # this and the rest are in _ext
    "config_reference",
    "docstrings",
    "formulas",
    "inline_svg",
]
smartquotes = False  # `--json` in a table keeps both of its dashes
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_inline"]
myst_heading_anchors = 4
myst_url_schemes = {
    "http": None,
    "https": None,
    "arxiv": {"url": "https://arxiv.org/abs/{{path}}", "title": "arXiv:{{path}}"},
}

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False

html_theme = "furo"
html_title = f"clipjax {release}"
html_static_path = ["_static"]
html_css_files = ["clipjax.css"]
html_copy_source = False
html_show_sourcelink = False
copybutton_exclude = ".linenos, .gp, .go"
linkcheck_timeout = 20
linkcheck_anchors = False
