"""Sphinx's configuration: sphinx-build -W --keep-going -b html docs docs/_build/html

The reference imports the integrations: transformers, PEFT and TRL have to be there (the extra dev).
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent / "_ext"), str(ROOT)]

project = "structadapt"
author = "the structadapt authors"
release = version = "0.1.0"
html_title = "structadapt"
html_theme = "furo"
html_show_copyright = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "docstrings", "measured"]
exclude_patterns = ["_build", "_ext"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
add_module_names = False
