"""The article in HTML, as Typst exports it, as pages for Sphinx.

Typst keeps words, formulas (as MathML), tables, and numbers with their links. What is added here are the numbers of
equations, the picture of the idea, links from results and notebooks to their pages, and a division in two pages.
"""

import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

import typst
from bs4 import BeautifulSoup, Tag
from bs4.element import PageElement
from results import Result

from chassis_utils.files import ROOT

PAPER = ROOT / "paper"
OVERVIEW = (
    "A frozen model as a row of blocks and a head, from text to the next token. A small edit is plugged into every "
    "block and into the last state. An expert with another tokenizer joins the output from above, by bytes."
)
NUMERIC = re.compile(r"(rounding|[−-]?\d[^A-Za-z]*)(\s*(of|to)[^A-Za-z]*)?|–")  # what a cell of numbers says
RESULT = re.compile(r"(tables|figures)/(real/)?\w+")
NOTEBOOK = re.compile(r"\d\d_\w+")
FENCE = "~" * 12


def compile_typst(path: Path, kind: str) -> bytes:
    """A Typst source as HTML or SVG."""
    return typst.compile(path, root=ROOT, format=kind, ignore_system_fonts=True)


def write_article(source: Path) -> None:
    """Write article and appendix, the picture of the idea and Typst's style sheet where Sphinx reads them."""
    soup = BeautifulSoup(compile_typst(PAPER / "paper.typ", "html"), "html.parser")
    (source / "static" / "typst.css").write_text(soup.style.string, encoding="utf-8")
    (source / "extra" / "overview.svg").write_bytes(compile_typst(PAPER / "site" / "overview.typ", "svg"))
    set_equations(soup)
    refer_to_files(soup)
    set_front(soup)
    link_names(soup)
    set_tables(soup)
    nodes = list(soup.body.children)
    end = nodes.index(soup.find("h2", string="References").find_next("h2"))
    pages = {"article": nodes[:end], "appendix": nodes[end:]}
    link_pages(pages)
    for page, found in pages.items():
        (source / f"{page}.md").write_text(f"# The {page}\n\n{markdown(found)}", encoding="utf-8")


def set_front(soup: BeautifulSoup) -> None:
    """Set the title above the abstract and the picture of the idea below it, which Typst leaves out of HTML."""
    title, _, subtitle = soup.title.string.partition(": ")
    named = f"<p><strong>{escape(title)}</strong><br>{escape(subtitle[0].upper() + subtitle[1:])}</p>"
    picture = f'<img class="overview" src="overview.svg" alt="{OVERVIEW}" width="728" height="208">'
    abstract = soup.body.div
    abstract.insert_before(parsed(named), parsed('<p><a href="paper.pdf">The same as PDF</a></p>'))
    abstract.insert_after(parsed(f'<div class="scroll" tabindex="0">{picture}</div>'))


def parsed(html: str) -> Tag:
    """One element."""
    return BeautifulSoup(html, "html.parser").contents[0]


def set_equations(soup: BeautifulSoup) -> None:
    """Set the number of each equation beside it, as in the PDF, and bars where browsers place them over a letter."""
    for bar in soup("mo", string="\N{COMBINING MACRON}"):
        bar.string = "\N{MACRON}"
    for k, formula in enumerate(soup.select('math[display="block"]'), 1):
        line = formula.wrap(soup.new_tag("div", attrs={"class": "equation"}))
        line.append(parsed(f"<span>({k})</span>"))


def refer_to_files(soup: BeautifulSoup) -> None:
    """Show the committed picture of a figure in place of the one that is written into the page."""
    for image in soup("img"):
        name = image.find_parent("figure").figcaption("code")[-1].string
        size = {side: str(round(int(image[side]) * 4 / 3)) for side in ("width", "height")}  # points in pixels
        image.attrs = {"src": f"{name}.png", "alt": image["alt"], "loading": "lazy", **size}


def link_names(soup: BeautifulSoup) -> None:
    """Link the names of results and notebooks, where they are not links to the provenance already."""
    for code in soup("code"):
        name = code.get_text()
        if code.find_parent("a"):
            continue
        if RESULT.fullmatch(name):
            code.wrap(soup.new_tag("a", href=Result(PAPER, name).address))
        elif NOTEBOOK.fullmatch(name):
            code.wrap(soup.new_tag("a", href=f"notebooks/{name}.html"))


def set_tables(soup: BeautifulSoup) -> None:
    """Align numbers, and let a table that is wider than the screen be moved within it."""
    for cell in soup("td"):
        if NUMERIC.fullmatch(cell.get_text().strip()):
            cell["class"] = "number"
    for table in soup("table"):
        head, last = table.tr("th"), table("tr")[-1]("td")
        for title, cell in zip(head, last, strict=False):
            title["class"] = cell.get("class", "")
        table.wrap(soup.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))
    for section in soup("section"):  # around the references
        section.unwrap()


def link_pages(pages: dict[str, list[PageElement]]) -> None:
    """Let links that lead to the other page say so."""
    tags = {
        page: [tag for node in nodes if isinstance(node, Tag) for tag in (node, *node(True))]
        for page, nodes in pages.items()
    }
    home = {tag["id"]: page for page, found in tags.items() for tag in found if tag.get("id")}
    for page, found in tags.items():
        for link in found:
            target = link.get("href", "")
            if target.startswith("#") and home[target[1:]] != page:
                link["href"] = f"{home[target[1:]]}.html{target}"


def markdown(nodes: Iterable[PageElement]) -> str:
    """Headings in Markdown, so that Sphinx knows the sections; all else as it is."""
    parts, waiting = [], ""
    for node in nodes:
        if isinstance(node, Tag) and node.name in ("h2", "h3"):
            target = f"({node['id']})=\n" if node.get("id") else ""
            parts += [raw(waiting), f"{target}{'#' * int(node.name[1])} {node.get_text()}\n\n"]
            waiting = ""
        else:
            waiting += str(node)
    return "".join([*parts, raw(waiting)])


def raw(html: str) -> str:
    """HTML that Sphinx takes as it is."""
    return f"{FENCE}{{raw}} html\n{html}\n{FENCE}\n\n" if html.strip() else ""
