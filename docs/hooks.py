"""What docstrings hold beside Markdown, for the site: formulas and doctests.

Formulas become MathML, which browsers show without a script or a font from elsewhere.
"""

import re
from typing import Any

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor

_BLOCK = re.compile(r"^\.\. math::(.*(?:\n(?:[ ]+.*)?)*)", re.MULTILINE)
_INLINE = re.compile(r":math:`([^`]+)`")
_DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class _Docstrings(Preprocessor):
    """Writes ``.. math::`` blocks and ``:math:`` roles as MathML, doctests as code."""

    def run(self, lines: list[str]) -> list[str]:
        text = _BLOCK.sub(lambda found: f"\n{self._math(found[1], 'block')}\n\n", "\n".join(lines))
        text = _INLINE.sub(lambda found: self._math(found[1], "inline"), text)
        return _DOCTEST.sub(r"```pycon\n\g<0>\n```", text).split("\n")

    def _math(self, formula: str, display: Any) -> str:
        return self.md.htmlStash.store(convert(" ".join(formula.split()), display=display))


class Docstrings(Extension):
    """Registers `_Docstrings` before fences are read."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Register it."""
        md.preprocessors.register(_Docstrings(md), "docstrings", 27)


def on_config(config: Any) -> None:
    """Read all pages so, and the docstrings in them."""
    config["markdown_extensions"].append(Docstrings())
