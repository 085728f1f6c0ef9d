"""A committed table or figure with its provenance, and the HTML that shows them."""

import json
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

BAR = re.compile(r"(?<!\\)\|")  # that divides the cells of a Markdown table
PROFILES = {"micro": "shipped models", "real": "real models"}


@dataclass(frozen=True)
class Result:
    """A result by its name, `figures/rank_sweep` or `tables/real/rank_sweep`, in the folder of downloads."""

    folder: Path
    name: str

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What the run that made it wrote beside it."""
        return json.loads(self.file(".json").read_text(encoding="utf-8"))

    @property
    def kind(self) -> str:
        """Whether it is a table or a figure."""
        return "table" if self.name.startswith("tables/") else "figure"

    @property
    def anchor(self) -> str:
        """Its name without slashes, an id on the page of figures."""
        return self.name.partition("/")[2].replace("/", "-")

    @property
    def address(self) -> str:
        """Where the site shows it; a table stands on one page with its twin on real models."""
        return f"tables/{Path(self.name).name}.html" if self.kind == "table" else f"figures.html#{self.anchor}"

    def file(self, suffix: str) -> Path:
        """One of its files."""
        return self.folder / f"{self.name}{suffix}"

    def downloads(self, up: str = "") -> str:
        """Links to its files, from a page that lies `up` from the top."""
        suffixes = (".csv", ".tex", ".md", ".json") if self.kind == "table" else (".png", ".pdf", ".json")
        links = (f'<a href="{up}{self.name}{suffix}" download>{suffix[1:].upper()}</a>' for suffix in suffixes)
        return " · ".join(links)

    def made_by(self, up: str = "", notebook: bool = True) -> str:
        """The profile, the notebook, the hash of all that decided the result, and the models."""
        made = self.provenance
        words = [PROFILES[made["profile"]]]
        if notebook:
            words.append(f'notebook <a href="{up}notebooks/{made["notebook"]}.html">{made["notebook"]}</a>')
        words.append(f"content <code>{made['content']}</code>")
        words += [escape(model.rpartition("/")[2]) for model in made["models"]]
        return " · ".join(words)


def image_html(figure: Result) -> str:
    """The picture, at half its pixels so that it is sharp on dense screens."""
    width, height = struct.unpack(">II", figure.file(".png").read_bytes()[16:24])
    alt = escape(figure.provenance["alt"])
    size = f'width="{width // 2}" height="{height // 2}"'
    return f'<img src="{figure.name}.png" alt="{alt}" {size} loading="lazy">'


def figure_html(figure: Result) -> tuple[str, str]:
    """What stands before and behind the words of a figure."""
    opening = (
        f'<figure class="result" id="{figure.anchor}"><a href="{figure.name}.png">{image_html(figure)}</a><figcaption>'
    )
    closing = f'<p class="provenance">{figure.made_by()} · {figure.downloads()}</p>'
    return opening, f"{closing}</figcaption></figure>\n"


def read_cell(cell: str) -> str:
    """A cell of a Markdown table as text."""
    return cell.strip().replace(r"\|", "|").replace("&lt;", "<")


def table_html(table: Result) -> str:
    """The rounded table, from its Markdown."""
    lines = table.file(".md").read_text(encoding="utf-8").splitlines()
    head, alignment, *body = [[read_cell(cell) for cell in BAR.split(line)[1:-1]] for line in lines]
    right = [cell.startswith("-") and cell.endswith(":") for cell in alignment]

    def row(cells: list[str], tag: str) -> str:
        kinds = [' class="number"' if number else "" for number in right]
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))

    rows = "\n".join(f"<tr>{row(cells, 'td')}</tr>" for cells in body)
    return scrolled(f"<thead><tr>{row(head, 'th')}</tr></thead>\n<tbody>{rows}</tbody>", "scroll tall")


def scrolled(rows: str, look: str = "scroll") -> str:
    """A table that is moved within itself where the screen is small; keys reach it too."""
    return f'<div class="{look}" tabindex="0"><table>{rows}</table></div>'
