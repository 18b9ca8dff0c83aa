"""The site of these pages: make docs."""

import re

from axolotl_cvloss import __version__

project, author = "axolotl_cvloss", "the authors of axolotl_cvloss"
release = __version__
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3  # as on GitHub: page.md#heading
suppress_warnings = ["myst.header"]  # tables that stand on several pages bring their headings along
nitpicky = True
html_theme = "furo"
html_title = f"axolotl_cvloss {release}"
html_copy_source = False
html_show_copyright = False


def setup(app):
    app.connect("source-read", _leaving)


def _leaving(app, page, source):
    """Links from the pages to Markdown beside them are files to take along, as the site has no such pages."""
    if "/" not in page:
        source[0] = re.sub(r"(\[[^]]*\])\((\.\./[^)]*\.md)\)", r"\1(path:\2)", source[0])
