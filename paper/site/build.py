"""Build the site into `build/site`: `python paper/site/build.py`.

What stands in this folder, the article, the stored notebooks, and a page of each table and figure are put together in a
folder beside the site, and Sphinx makes HTML of it. Nothing is executed.
"""

import json
import re
import shutil
import sys
from importlib.resources import files
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from article import raw, write_article
from fontTools import subset
from results import Result, scrolled, table_html
from sphinx.cmd.build import build_main

from chassis_utils.files import BUILD, ROOT

HERE = Path(__file__).parent
SCOPED_STYLE = re.compile(r"<style scoped>.*?</style>\n?", re.DOTALL)
MATHEMATICS = (  # characters of formulas: letters, accents, arrows, operators, brackets, styled alphabets
    *((0x20, 0x17F), (0x300, 0x36F), (0x391, 0x3F6), (0x2010, 0x2063), (0x2100, 0x214F), (0x2190, 0x22FF)),
    *((0x2308, 0x230B), (0x27E6, 0x27EF), (0xFE00, 0xFE00), (0x1D400, 0x1D7FF)),
)


def build(site: Path) -> int:
    """Make the folder `site` anew; returns the status of Sphinx, 0 where it had nothing to complain of."""
    source = site.with_name(f"{site.name}-source")
    for old in (site, source):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(HERE, source, ignore=shutil.ignore_patterns("__pycache__", "overview.typ"))
    shutil.copytree(ROOT / "figures", source / "extra" / "figures")
    shutil.copytree(ROOT / "paper" / "tables", source / "extra" / "tables")
    shutil.copytree(ROOT / "paper" / "reported", source / "extra" / "reported")
    shutil.copy(ROOT / "paper" / "paper.pdf", source / "extra")
    write_font(source / "static" / "mathematics.woff")
    write_article(source)
    titles = write_notebooks(source)
    write_figures(source, titles)
    write_tables(source, titles)
    return build_main(["-q", "-W", "--keep-going", "-d", str(source / "doctrees"), str(source), str(site)])


def write_font(path: Path) -> None:
    """Write the part of STIX Two Math that formulas need: few phones have a font for them."""
    options = subset.Options(flavor="woff", layout_features=["*"], name_IDs=["*"])
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=chain.from_iterable(range(first, last + 1) for first, last in MATHEMATICS))
    font = subset.load_font(files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf", options)
    subsetter.subset(font)
    subset.save_font(font, path, options)


def results(source: Path, kind: str) -> list[Result]:
    """The tables or the figures on the shipped models, in the order of their notebooks."""
    names = sorted(path.stem for path in (source / "extra" / kind).glob("*.json"))
    found = [Result(source / "extra", f"{kind}/{name}") for name in names]
    return sorted(found, key=lambda result: result.provenance["notebook"])


def on_real_models(result: Result) -> Result:
    """The same result on the models that others trained."""
    return Result(result.folder, result.name.replace("/", "/real/", 1))


def write_notebooks(source: Path) -> dict[str, str]:
    """Write the notebooks, each with a line on its results, and return their titles."""
    titles = {}
    for folder in (source / "notebooks", source / "extra" / "notebooks"):
        folder.mkdir()
    made = [*results(source, "tables"), *results(source, "figures")]
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        shutil.copy(path, source / "extra" / "notebooks")
        notebook = json.loads(path.read_text(encoding="utf-8"))
        titles[path.stem] = "".join(notebook["cells"][0]["source"]).splitlines()[0].removeprefix("# ")
        for cell in notebook["cells"]:
            prepare(cell)
        line = about(path.name, [result for result in made if result.provenance["notebook"] == path.stem])
        notebook["cells"].insert(1, {"cell_type": "markdown", "id": "about", "metadata": {}, "source": line})
        (source / "notebooks" / path.name).write_text(json.dumps(notebook), encoding="utf-8")
    return titles


def prepare(cell: dict[str, Any]) -> None:
    """Give the pictures of a cell their alternative text, and leave the look of its tables to the site."""
    for output in cell.get("outputs", []):
        for picture in filter(None, [output.get("metadata", {}).get("image/png")]):
            cell["metadata"]["mystnb"] = {"image": {"alt": picture["alt"]}}
        if "text/html" in output.get("data", {}):
            table = SCOPED_STYLE.sub("", "".join(output["data"]["text/html"])).replace('border="1" ', "")
            output["data"]["text/html"] = f'<div class="scroll" tabindex="0">{table}</div>'


def about(file: str, made: list[Result]) -> str:
    """A line on what a notebook has made, from what, and where to take it."""
    links = [f'{result.kind} <a href="../{result.address}">{result.anchor}</a>' for result in made]
    words = [made[0].made_by(notebook=False), *links, f'<a href="{file}" download>download this notebook</a>']
    return f'<p class="provenance">{" · ".join(words)}</p>'


def write_figures(source: Path, titles: dict[str, str]) -> None:
    """Write the page of all figures."""
    lines = ["# Figures\n", "The figures of all notebooks, first on the shipped models, then on real ones.\n"]
    for notebook, figures in groupby(results(source, "figures"), lambda figure: figure.provenance["notebook"]):
        lines.append(f"## {titles[notebook]}\n")
        for figure in figures:
            for shown in (figure, on_real_models(figure)):
                lines.append(f"```{{result}} {shown.name.partition('/')[2]}\n{shown.provenance['alt']}\n```\n")
    (source / "figures.md").write_text("\n".join(lines), encoding="utf-8")


def write_tables(source: Path, titles: dict[str, str]) -> None:
    """Write one page for each table, and the page that lists them."""
    (source / "tables").mkdir()
    tables = results(source, "tables")
    for table in tables:
        notebook = table.provenance["notebook"]
        parts = [
            f"# Table {table.anchor}\n",
            f"From the notebook [{titles[notebook]}](../notebooks/{notebook}.ipynb).\n",
        ]
        for shown, models in ((table, "the shipped models"), (on_real_models(table), "real models")):
            line = f'<p class="provenance">{shown.made_by("../")} · {shown.downloads("../")}</p>'
            parts += [f"## On {models}\n", raw(line + table_html(shown))]
        (source / "tables" / f"{table.anchor}.md").write_text("\n".join(parts), encoding="utf-8")
    reported = sorted(path.name for path in (source / "extra" / "reported").iterdir())
    files = "\n".join(f'<li><a href="reported/{name}" download>{name}</a></li>' for name in reported)
    pages = "\n".join(f"{table.anchor} <{table.name}>" for table in tables)
    listed = (source / "tables.md").read_text(encoding="utf-8")
    listed = listed.format(measured=raw(list_html(tables)), reported=raw(f"<ul>{files}</ul>"), pages=pages)
    (source / "tables.md").write_text(listed, encoding="utf-8")


def list_html(tables: list[Result]) -> str:
    """A row for each table: its page, its notebook, and its files."""
    rows = ["<tr><th>table</th><th>notebook</th><th>shipped models</th><th>real models</th></tr>"]
    for table in tables:
        notebook = table.provenance["notebook"]
        cells = [f'<a href="{table.address}">{table.anchor}</a>', f'<a href="notebooks/{notebook}.html">{notebook}</a>']
        cells += [f'<a href="{shown.name}.csv" download>CSV</a>' for shown in (table, on_real_models(table))]
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return scrolled("\n".join(rows))


if __name__ == "__main__":
    sys.exit(build(BUILD / "site"))
