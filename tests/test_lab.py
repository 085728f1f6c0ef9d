"""The lab in a real browser: JupyterLab shows the map with its pictures, and `explore` answers to its controls."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from chassis_utils.files import ROOT

browsing = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: `make install` brings it")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: `apt-get install chromium` brings it")
PATIENCE = 120  # seconds for whatever is waited for: another test may run beside
SCREEN = {"width": 1440, "height": 900}
PICTURES_LOADED = """() => {
    const pictures = [...document.querySelectorAll('.jp-RenderedMarkdown img')];
    return pictures.length >= 7 && pictures.every(picture => picture.complete && picture.naturalWidth > 0);
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab on copies of the two notebooks, without the settings of whoever runs this."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "notebooks").mkdir()
    for name in ("index", "explore"):
        shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", folder / "notebooks")
    shutil.copytree(ROOT / "figures", folder / "figures")  # the server follows no links out of its folder
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--IdentityProvider.token="]
    command += [f"--ServerApp.root_dir={folder}", "--ServerApp.port_retries=0", f"--ServerApp.port={port}"]
    own = {f"JUPYTER_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{kind}_DIR": str(folder / kind) for kind in ("SETTINGS", "WORKSPACES")}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}", server, folder / "log")
        yield f"http://127.0.0.1:{port}/lab/tree/notebooks"
    finally:
        server.terminate()
        server.wait(PATIENCE)


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    """Until the server answers; its log is the error where it ends before."""
    end = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < end:
        try:
            urlopen(f"{address}/api").close()
            return
        except URLError:
            time.sleep(0.2)
    raise RuntimeError(log.read_text())


@pytest.fixture
def page(lab: str) -> Iterator[Any]:
    """An empty page of a browser without a window."""
    with browsing.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport=SCREEN)
        opened.set_default_timeout(1000 * PATIENCE)
        yield opened
        browser.close()


def test_the_map_shows_every_part_with_a_picture(lab: str, page: Any) -> None:
    page.goto(f"{lab}/index.ipynb")
    browsing.expect(page.get_by_role("heading", name="Closed-form adapters")).to_be_visible(timeout=1000 * PATIENCE)
    page.wait_for_function(PICTURES_LOADED)
    assert page.locator(".jp-RenderedMarkdown img:not([alt])").count() == 0
    page.get_by_role("link", name="explore", exact=True).click()
    browsing.expect(page.get_by_role("heading", name="Explore")).to_be_visible(timeout=1000 * PATIENCE)


def changed(page: Any, status: Any, before: str, begins: str) -> str:
    """The status line, once it is another one that begins so."""
    page.wait_for_function(
        "([line, before, begins]) => line.textContent !== before && line.textContent.startsWith(begins)",
        arg=[status.element_handle(), before, begins],
    )
    return status.text_content()


def test_explore_answers_to_its_controls(lab: str, page: Any) -> None:
    page.goto(f"{lab}/explore.ipynb")
    page.get_by_text("| Idle").wait_for()  # the kernel has started
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator("#jp-mainmenu-run").get_by_text("Run All Cells", exact=True).click()
    live = page.locator(".jp-OutputArea-output .widget-vbox")
    status, picture, lines = live.locator(".widget-html-content"), live.locator("img"), live.locator("pre")
    verdict = changed(page, status, "", "On texts kept out of the fit")
    seen = picture.get_attribute("src")
    live.get_by_label("layers").select_option("last state")
    verdict = changed(page, status, verdict, "On texts kept out of the fit")
    assert picture.get_attribute("src") != seen
    live.locator(".noUi-handle").press("ArrowLeft")
    verdict = changed(page, status, verdict, "On texts kept out of the fit")
    said = lines.text_content()
    live.get_by_label("text").fill("Work out 40 + 25.")
    live.get_by_label("text").press("Enter")
    verdict = changed(page, status, verdict, "On texts kept out of the fit")
    assert lines.text_content() != said
    live.get_by_label("text").fill("word " * 2000)
    live.get_by_label("text").press("Enter")
    assert changed(page, status, verdict, "prompt").endswith("shorten it")
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").count() == 0
