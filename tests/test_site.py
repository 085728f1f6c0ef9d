"""The site as a reader gets it: built from what is committed, checked page by page, and opened from files."""

import filecmp
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree.ElementTree import Element

import pytest

from chassis_utils.files import ROOT

INSTALL = "`make site` installs it"
html5lib = pytest.importorskip("html5lib", reason=INSTALL)
playwright = pytest.importorskip("playwright.sync_api", reason=INSTALL)
pytest.importorskip("myst_nb", reason=INSTALL)

LOADED = {"img": "src", "script": "src", "link": "href", "source": "src", "iframe": "src", "object": "data"}
OUTSIDE = re.compile(r"(?:url\(|@import)\s*[\"']?\s*(?:https?:)?//")  # what a style sheet would fetch
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1300, "height": 1000}


@dataclass(frozen=True)
class Page:
    """One page as a browser reads it."""

    path: Path
    tree: Element
    errors: list[object]

    @classmethod
    def read(cls, path: Path, text: str) -> "Page":
        """Parse it, and keep what the parser had to mend."""
        parser = html5lib.HTMLParser(namespaceHTMLElements=False)
        return cls(path, parser.parse(text), parser.errors)

    @cached_property
    def ids(self) -> list[str]:
        """Places that a link can lead to."""
        return [element.get("id", "") for element in self.tree.iter() if element.get("id")]

    def addresses(self, *tags: str) -> list[str]:
        """What elements of these kinds lead to or load."""
        keys = LOADED | {"a": "href"}
        return [
            element.get(keys[element.tag], "")
            for element in self.tree.iter()
            if element.tag in tags and element.get(keys[element.tag])
        ]


def broken_links(pages: dict[Path, Page], page: Page) -> list[str]:
    """Addresses within the site that lead to no file, or to no place on their page."""
    found = []
    for address in page.addresses("a", *LOADED):
        parts = urlsplit(address)
        target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
        missing = parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids
        if not (parts.scheme or parts.netloc) and (not target.is_file() or missing):
            found.append(address)
    return found


def loaded_from_outside(page: Page) -> list[str]:
    """What a page would fetch from another host."""
    return [address for address in page.addresses(*LOADED) if urlsplit(address).netloc]


def without_words(page: Page) -> list[str]:
    """Pictures that say nothing to those who cannot see them."""
    return [image.get("src", "") for image in page.tree.iter("img") if not image.get("alt", "").strip()]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    code = "import sys; from pathlib import Path; from build import build; sys.exit(build(Path(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, cwd=ROOT / "paper" / "site", capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page.read(path, path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def test_every_notebook_and_every_table_has_its_page(site: Path, pages: dict[Path, Page]) -> None:
    notebooks = {site / "notebooks" / f"{path.stem}.html" for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    tables = {site / "tables" / f"{path.stem}.html" for path in (ROOT / "paper" / "tables").glob("*.csv")}
    named = {site / f"{name}.html" for name in ("index", "article", "appendix", "figures", "tables", "reproduce")}
    assert notebooks | tables | named | {site / "search.html"} == pages.keys()


def test_every_page_is_html_without_errors(pages: dict[Path, Page]) -> None:
    assert {str(path): page.errors[:3] for path, page in pages.items() if page.errors} == {}
    twice = {path: [name for name, count in Counter(page.ids).items() if count > 1] for path, page in pages.items()}
    assert {str(path): names for path, names in twice.items() if names} == {}


def test_every_link_leads_somewhere(pages: dict[Path, Page]) -> None:
    broken = {str(path): broken_links(pages, page) for path, page in pages.items()}
    assert {path: links for path, links in broken.items() if links} == {}


def test_nothing_is_loaded_from_another_host(site: Path, pages: dict[Path, Page]) -> None:
    assert {str(path): found for path, page in pages.items() if (found := loaded_from_outside(page))} == {}
    sheets = [path for path in site.rglob("*.css") if OUTSIDE.search(path.read_text(encoding="utf-8"))]
    assert sheets == []


def test_every_picture_has_words(site: Path, pages: dict[Path, Page]) -> None:
    assert {str(path): found for path, page in pages.items() if (found := without_words(page))} == {}
    shown = {image.get("src"): image.get("alt") for image in pages[site / "figures.html"].tree.iter("img")}
    stored = {
        str(path.relative_to(ROOT).with_suffix(".png")): json.loads(path.read_text(encoding="utf-8"))["alt"]
        for path in (ROOT / "figures").rglob("*.json")
    }
    assert shown == stored


def test_every_table_is_there_to_be_downloaded(site: Path, pages: dict[Path, Page]) -> None:
    linked = set(pages[site / "tables.html"].addresses("a"))
    for folder in (ROOT / "paper" / "tables", ROOT / "paper" / "reported"):
        for path in folder.rglob("*.csv"):
            name = path.relative_to(ROOT / "paper").as_posix()
            assert name in linked and filecmp.cmp(path, site / name, shallow=False), name
    assert filecmp.cmp(ROOT / "paper" / "paper.pdf", site / "paper.pdf", shallow=False)


def test_equations_have_the_numbers_by_which_the_text_calls_them(site: Path, pages: dict[Path, Page]) -> None:
    both = [pages[site / f"{name}.html"].tree for name in ("article", "appendix")]
    equations = [line for tree in both for line in tree.iter("div") if line.get("class") == "equation"]
    numbers = {line[0].get("id"): "".join(line[1].itertext()).strip("()") for line in equations}
    links = [
        (link.get("href", "").partition("#")[2], "".join(link.itertext())) for tree in both for link in tree.iter("a")
    ]
    called = {(name, words.split()[1]) for name, words in links if words.startswith("Equation")}
    assert called and called <= set(numbers.items())


FAULTS = {
    '<a href="nowhere.html">there</a>': broken_links,
    '<a href="#nowhere">there</a>': broken_links,
    '<img src="//example.org/a.png" alt="a">': lambda pages, page: loaded_from_outside(page),
    '<img src="figures/rank_sweep.png" alt=" ">': lambda pages, page: without_words(page),
    "<p><div></p>": lambda pages, page: page.errors,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, site: Path, pages: dict[Path, Page]) -> None:
    path = site / "index.html"
    planted = Page.read(path, path.read_text(encoding="utf-8").replace("</article>", f"{fault}</article>", 1))
    assert not FAULTS[fault](pages, pages[path]) and FAULTS[fault](pages, planted)


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed: on Debian, `apt-get install chromium`")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def reader(browser: "playwright.Browser") -> Iterator["playwright.Page"]:
    """A page in a fresh window; ends with the check that nothing failed in it and nothing came from elsewhere."""
    context = browser.new_context(viewport=DESKTOP)
    page, complaints = context.new_page(), []
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or complaints.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: message.type != "error" or complaints.append(message.text))
    yield page
    context.close()
    assert complaints == []


def test_a_search_from_a_file_finds_a_word(site: Path, reader: "playwright.Page") -> None:
    reader.goto((site / "index.html").as_uri())
    reader.get_by_role("textbox", name="Search").fill("block-circulant")
    reader.keyboard.press("Enter")
    reader.locator("#search-results").get_by_text("Replacing MLPs by block-circulant layers").first.click()
    playwright.expect(reader.locator("h1")).to_contain_text("Replacing MLPs by block-circulant layers")
    assert urlsplit(reader.url).path == str(site / "notebooks" / "10_fft_patching.html")


@pytest.mark.parametrize("name", ["index", "article", "figures", "notebooks/22_rank_sweep"])
def test_every_figure_of_a_page_is_drawn(name: str, site: Path, reader: "playwright.Page") -> None:
    reader.goto((site / f"{name}.html").as_uri())
    widths = reader.evaluate(
        """async () => {
            const images = [...document.querySelectorAll("article img")];
            await Promise.all(images.map(image => { image.loading = "eager"; return image.decode(); }));
            return images.map(image => image.naturalWidth);
        }"""
    )
    assert widths and min(widths) > 0


def test_a_table_is_downloaded(site: Path, reader: "playwright.Page", tmp_path: Path) -> None:
    reader.goto((site / "tables.html").as_uri())
    with reader.expect_download() as download:
        reader.locator('a[href="tables/real/rank_sweep.csv"]').click()
    download.value.save_as(tmp_path / "taken.csv")
    assert filecmp.cmp(tmp_path / "taken.csv", ROOT / "paper" / "tables" / "real" / "rank_sweep.csv", shallow=False)


def test_no_page_is_wider_than_a_phone(site: Path, pages: dict[Path, Page], reader: "playwright.Page") -> None:
    reader.set_viewport_size(PHONE)
    widest = {}
    for path in (*site.glob("*.html"), *site.glob("notebooks/*.html"), site / "tables" / "fft_tokens.html"):
        reader.goto(path.as_uri(), wait_until="domcontentloaded")
        widest[path.name] = reader.evaluate("document.documentElement.scrollWidth")
    assert {name: width for name, width in widest.items() if width > PHONE["width"]} == {}


def test_the_page_is_dark_for_those_who_ask_for_it(site: Path, reader: "playwright.Page") -> None:
    brightness = []
    for scheme in ("light", "dark"):
        reader.emulate_media(color_scheme=scheme)
        reader.goto((site / "index.html").as_uri())
        colour = reader.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness.append(sum(map(int, re.findall(r"\d+", colour)[:3])))
    assert brightness[0] > 700 and brightness[1] < 100
