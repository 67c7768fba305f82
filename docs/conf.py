"""The documentation site: Sphinx over the Markdown pages, the docstrings and the examples.

`python docs/make.py` builds it, with warnings as errors, and checks its links.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pages
from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

import curvopt

project = "curvopt"
author = "curvopt contributors"
copyright = "2026, curvopt contributors"
version = release = curvopt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
root_doc = "index"
exclude_patterns = ["_build", "gallery/*.txt"]
default_role = "py:obj"  # a name in single backticks is a link where it is one of ours
suppress_warnings = ["misc.highlighting_failure"]  # printed output is no Python

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # types stand in the signature of the source, meaning in the docstring
maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
add_module_names = False

html_theme = "furo"
html_math_renderer = "mathml"  # which browsers draw themselves, without a network
html_title = "curvopt"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_show_sphinx = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def formula(self, node):
    """A formula in MathML."""
    block = node.tagname == "math_block"
    tex = node.astext()
    if block and ("\\\\" in tex or "&" in tex):
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    found = tex2mathml(tex, as_block=block)
    self.body.append(f'<div class="math">{found}</div>' if block else found)
    raise SkipNode


def setup(app):
    """Make the pages that come from elsewhere, and mend the links of all."""
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.connect("builder-inited", lambda app: pages.generate())
    app.connect("source-read", pages.mend)
