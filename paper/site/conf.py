"""The site's settings for Sphinx, formulas as MathML, and a directive for a figure with its provenance.

`build.py` copies this folder beside the pages that it generates, and runs Sphinx there.
"""

from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from results import Result, figure_html
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

project = "Closed-form adapters"
author = "The Chassis authors"
language = "en"
extensions = ["myst_nb"]
nb_execution_mode = "off"  # what is shown are the stored outputs
myst_enable_extensions = ["dollarmath"]

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = project
html_favicon = "static/icon.svg"
html_static_path = ["static"]
html_css_files = ["typst.css", "site.css"]
html_js_files = ["site.js"]
html_extra_path = ["extra"]  # downloads, each where its name says
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
html_use_index = False


class ResultDirective(SphinxDirective):
    """A committed figure with its alternative text, the words below it, and where it comes from."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """The figure as HTML around the words that stand in the directive."""
        figure = Result(Path(self.env.srcdir) / "extra", f"figures/{self.arguments[0]}")
        opening, closing = figure_html(figure)
        words = nodes.container()
        self.state.nested_parse(self.content, self.content_offset, words)
        return [nodes.raw("", opening, format="html"), *words.children, nodes.raw("", closing, format="html")]


def inline_math(translator: nodes.NodeVisitor, node: nodes.math) -> None:
    """A formula in a line, as MathML."""
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def display_math(translator: nodes.NodeVisitor, node: nodes.math_block) -> None:
    """A formula on a line of its own, as MathML."""
    translator.body.append(convert(node.astext(), display="block"))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register the directive and the formulas."""
    app.add_directive("result", ResultDirective)
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))
