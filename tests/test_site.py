"""The site: every page is built, in strict mode; its links resolve, and it asks nothing of a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from planside import ROOT

pytestmark = pytest.mark.skipif(find_spec("mkdocs") is None, reason='needs mkdocs: pip install "nsteer[docs]"')

LOADED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src")}

SAMPLE = "sample-report.html"


class Page(HTMLParser):
    """What a page loads, where it leads, and which anchors it has."""

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.leads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if (tag, name) in LOADED:
                self.loads.append(value)
            elif (tag, name) == ("a", "href"):
                self.leads.append(value)
            elif name == "id":
                self.anchors.add(value)


def outside(page: Page) -> list[str]:
    """What a page would load from somewhere else."""
    return [url for url in page.loads if urlsplit(url).netloc]


def broken(pages: dict[Path, Page]) -> list[str]:
    """Links between pages that lead to no file, or to no anchor in one."""
    wrong = []
    for file, page in pages.items():
        for link in [*page.leads, *page.loads]:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (file.parent / unquote(url.path)).resolve() if url.path else file
            anchors = pages[target].anchors if target in pages else {url.fragment}
            if not target.is_file() or (url.fragment and unquote(url.fragment) not in anchors):
                wrong.append(f"{file.name}: {link}")
    return wrong


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site as it is built; without `--quiet`, under which mkdocs counts no warning."""
    folder = (tmp_path_factory.mktemp("site") / "built").resolve()
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ROOT / "mkdocs.yml", "-d", folder],
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    """All but 404.html, whose links are those of a server's root, and the report that is shown as a sample."""
    files = [file for file in site.rglob("*.html") if file.name not in ("404.html", SAMPLE)]
    return {file: Page(file.read_text(encoding="utf-8")) for file in files}


def test_every_page_is_there_and_can_be_reached(site, pages):
    named = (file.relative_to(ROOT / "docs").with_suffix(".html") for file in (ROOT / "docs").rglob("*.md"))
    wanted = {site / (file.with_name("index.html") if file.stem == "README" else file) for file in named}
    assert set(pages) == wanted
    index = site / "index.html"
    assert {(site / urlsplit(link).path).resolve() for link in pages[index].leads if ":" not in link} >= wanted - {
        index
    }


def test_nothing_comes_from_elsewhere(site, pages):
    assert {file.name: addresses for file, page in pages.items() if (addresses := outside(page))} == {}
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"url\(\s*[\"']?(https?:)?//|@import\s+(url\()?[\"']?(https?:)?//", text), sheet.name


def test_links_resolve(pages):
    assert broken(pages) == []


def test_blocks_and_tables_are_shown_as_such(pages):
    for file in pages:
        text = re.sub(r"<(pre|code)\b.*?</\1>", "", file.read_text(encoding="utf-8"), flags=re.S)
        assert "```" not in text and "|---" not in text, file.name


def test_the_first_page_shows_what_it_is_about(site):
    """A picture, commands, a plan in colour, a figure, and a report to look at."""
    text = (site / "index.html").read_text(encoding="utf-8")
    assert 'src="figures/first.svg"' in text and 'src="figures/smollm2-accuracy.svg"' in text
    assert '<div class="codehilite">' in text and '<span class="nt">name</span>' in text
    assert f'href="{SAMPLE}"' in text and (site / SAMPLE).stat().st_size < 400_000
    assert "http" not in Page((site / SAMPLE).read_text(encoding="utf-8")).loads


def test_what_is_wrong_is_seen(tmp_path):
    file = tmp_path / "a.html"
    file.write_text("")
    page = Page('<p id="b"><a href="#b"></a><a href="a.html#c"></a><a href="d.html"></a><script src="//e.org/f.js">')
    assert broken({file: page}) == ["a.html: a.html#c", "a.html: d.html"]
    assert outside(page) == ["//e.org/f.js"]


# ---- in a browser, from disk ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(site, browser):
    """A browser, and the address of a page of the site on disk."""
    return browser, lambda page: (site / page).as_uri()


def hits(browser, query: str) -> list[str]:
    """What the search lists, by title."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.execute_script(
        "const box = document.getElementById('mkdocs-search-query'); box.value = arguments[0];"
        "document.getElementById('mkdocs-search-results').textContent = '';"
        "box.dispatchEvent(new KeyboardEvent('keyup'))",
        query,
    )
    listed = (
        "return [...document.querySelectorAll('#mkdocs-search-results > *')].map(e => e.innerText || e.textContent)"
    )
    return WebDriverWait(browser, 30).until(lambda b: b.execute_script(listed))


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("page", ["index.html", "howto/claims.html"])
def test_search_works_from_disk_without_an_error(opened, page):
    from selenium.webdriver.support.ui import WebDriverWait

    browser, address = opened
    browser.get(address(page))
    first = hits(browser, "noise ceiling")
    assert len(first) > 1 and any("ceiling" in hit for hit in first)
    assert "No results found" in hits(browser, "zzyzx")[0]
    hits(browser, "title:")  # half a query is no error
    hits(browser, "stream_norm")
    link = browser.execute_script("return document.querySelector('#mkdocs-search-results a').href")
    browser.get(link)
    WebDriverWait(browser, 60).until(lambda b: b.execute_script("return document.querySelector('h1') !== null"))
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []


@pytest.mark.browser
@pytest.mark.slow
def test_nothing_is_wider_than_a_phone(site, opened):
    browser, address = opened
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for file in (path for path in site.rglob("*.html") if path.name != "404.html"):
            browser.get(address(file.relative_to(site)))
            wide = browser.execute_script("return document.documentElement.scrollWidth")
            assert wide <= 390, (file.name, wide)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.browser
@pytest.mark.slow
def test_colours_can_be_chosen(opened):
    browser, address = opened
    browser.get(address("index.html"))
    browser.get_log("browser")  # what other pages logged before
    for mode in ("dark", "light"):
        browser.execute_script(f"document.querySelector('[data-bs-theme-value={mode}]').click()")
        assert browser.execute_script("return document.documentElement.getAttribute('data-bs-theme')") == mode
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
