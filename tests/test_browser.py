"""The report page in a real browser: it loads without an error, filters, pages, opens, and runs nothing of a text's."""

from __future__ import annotations

import pytest
import textstore
from click.testing import CliRunner

from nsteer import cli

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SCRIPTED = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
TEXTS = 2 * 3 * 2 * 2 * 30
"""Texts of the store below: several chunks of the page, and many pages of 50."""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of a store with hostile texts, labels and plan."""
    path = tmp_path_factory.mktemp("browser")
    textstore.make(
        path / "s.zarr",
        prompts=30,
        strange={0: SCRIPTED, 1: "the needle is here", 2: "مرحبا 寻找"},
        prompt_label="<script>window.hacked=2</script>{}",
        plan=f"name: made-up\nabout: '{SCRIPTED}'\n",
    )
    done = CliRunner().invoke(cli.main, ["report", str(path / "s.zarr"), "--claims", "-o", str(path / "r.html")])
    assert done.exit_code == 0, done.output
    return path / "r.html"


def emulate(browser, width: int = 1300, scheme: str = "light") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wanted = {"features": [{"name": "prefers-color-scheme", "value": scheme}], "media": ""}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)


def wait(browser, script: str, why: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(lambda b: b.execute_script(f"return {script}"), why)


@pytest.fixture
def page(browser, report):
    """The page as a reader first sees it, loaded again."""
    emulate(browser)
    browser.get(report.as_uri())
    wait(browser, "document.querySelectorAll('#texts-table tbody tr').length === 50", "the first page of texts")
    return browser


def count(page) -> str:
    return page.execute_script("return document.getElementById('count').textContent")


def choose(page, control: str, label: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    Select(page.find_element(By.ID, control)).select_by_visible_text(label)


def cells(page, column: int) -> list[str]:
    script = f"return [...document.querySelectorAll('#texts-table tbody tr')].map((r) => r.cells[{column}].innerText)"
    return page.execute_script(script)


def click(page, selector: str) -> None:
    page.execute_script("document.querySelector(arguments[0]).click()", selector)


# ---- loading --------------------------------------------------------------------------------------------------


def test_it_loads_without_an_error_and_asks_for_nothing(page, report):
    assert page.get_log("browser") == []
    assert count(page) == f"{TEXTS} of {TEXTS} texts; showing 1 to 50."
    fetched = page.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert [url for url in fetched if not url.startswith(("data:", "blob:"))] == []


def test_text_stays_text(page):
    assert page.execute_script("return window.hacked") is None
    assert cells(page, 2)[0] == SCRIPTED and "<script>window.hacked=2</script>0" in cells(page, 1)[0]
    assert page.execute_script("return document.querySelectorAll('main img').length") == 0
    options = page.execute_script("return [...document.getElementById('axis-prompt').options].map((o) => o.text)")
    assert "<script>window.hacked=2</script>3" in options
    assert SCRIPTED in page.execute_script("return document.querySelector('#plans pre').textContent")


def test_the_policy_stops_what_is_put_in_afterwards(page):
    page.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 3'; document.body.append(s);"
        "const d = document.createElement('div'); d.innerHTML = '<p id=late style=\"color: red\">x</p>';"
        "document.body.append(d);"
    )
    assert page.execute_script("return window.hacked") is None
    assert page.execute_script("return getComputedStyle(document.getElementById('late')).color") != "rgb(255, 0, 0)"
    page.get_log("browser")  # the refusals


def test_every_figure_is_visible(page):
    script = "return [...document.querySelectorAll('figure svg')].map((s) => s.getBoundingClientRect().toJSON())"
    boxes = [(box["width"], box["height"]) for box in page.execute_script(script)]
    assert len(boxes) >= 6 and all(width > 100 and height > 50 for width, height in boxes)
    paths = "[...document.querySelectorAll('svg path')]"
    drawn = page.execute_script(f"return {paths}.filter((p) => p.getBBox().width > 0).length")
    assert drawn > 50
    named = "document.getElementById(s.getAttribute('aria-labelledby').split(' ')[0]).textContent"
    assert page.execute_script(f"return [...document.querySelectorAll('svg')].every((s) => {named})")


# ---- texts ----------------------------------------------------------------------------------------------------


def test_filters_narrow_and_reset_widens(page):
    choose(page, "axis-emotion", "sad")
    choose(page, "axis-control", "random")
    wait(page, f"document.getElementById('count').textContent.startsWith('{TEXTS // 6} of')", "a sixth")
    shown = cells(page, 0)
    assert len(shown) == 50 and all("sad" in cell and "control random" in cell for cell in shown)
    choose(page, "regime", "explosive")
    wait(page, "document.getElementById('count').textContent.startsWith('0 of')", "random is never explosive")
    assert cells(page, 0) == []
    click(page, "#filters button[type=reset]")
    wait(page, f"document.getElementById('count').textContent.startsWith('{TEXTS} of')", "all again")


def test_judge_and_measures_are_those_of_the_store(page):
    choose(page, "moved", "moved to the target")
    wait(page, f"document.getElementById('count').textContent.startsWith('{TEXTS // 4} of')", "the strong ones")
    assert all("strength 0.2" in cell and "control none" in cell for cell in cells(page, 0))
    assert cells(page, 4)[0].splitlines() == ["says happy (0.7)", "unsteered: neutral (0.7)", "P(happy) 0.1 → 0.7"]
    assert cells(page, 5)[0].splitlines() == ["repetitive", "repetition 0.89", "perplexity × 30"]


def test_search_finds_one_text_and_says_none(page):
    from selenium.webdriver.common.by import By

    box = page.find_element(By.ID, "search")
    box.send_keys("NEEDLE is")
    wait(page, "document.getElementById('count').textContent.startsWith('1 of')", "one text")
    assert cells(page, 2) == ["the needle is here"]
    box.send_keys(" nowhere")
    wait(page, "document.getElementById('count').textContent.startsWith('0 of')", "none")
    box.clear()
    box.send_keys("寻找")
    wait(page, "document.getElementById('count').textContent.startsWith('1 of')", "another script")


def test_pages_turn(page):
    first = cells(page, 2)
    click(page, "#next")
    wait(page, "document.getElementById('count').textContent.endsWith('51 to 100.')", "the second page")
    assert len(cells(page, 2)) == 50 and cells(page, 2) != first
    click(page, "#last")
    wait(page, f"document.getElementById('count').textContent.endsWith('to {TEXTS}.')", "the last page")
    assert page.execute_script("return document.getElementById('next').disabled")
    page.execute_script("const p = document.getElementById('page'); p.value = 3; p.dispatchEvent(new Event('change'))")
    wait(page, "document.getElementById('count').textContent.endsWith('101 to 150.')", "the third page")
    click(page, "#first")
    wait(page, "document.getElementById('count').textContent.endsWith('1 to 50.')", "the first page")
    assert cells(page, 2) == first


def test_sorting_puts_the_greatest_first(page):
    choose(page, "sort", "perplexity ratio")
    click(page, "#down")
    wait(page, "document.querySelector('#texts-table tbody td:last-child').innerText.includes('× 30')", "the greatest")
    assert all("× 30" in cell for cell in cells(page, 5))


MARKED = """
return [...document.querySelectorAll('#texts-table tbody tr')].map((row) => {
  const copy = row.cells[2].cloneNode(true);
  copy.querySelectorAll('mark').forEach((mark) => mark.remove());
  return [row.cells[2].textContent, row.cells[3].textContent, copy.textContent];
});
"""


def common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = row[:]
        for j, other in enumerate(b):
            row[j + 1] = before[j] + 1 if word == other else max(before[j + 1], row[j])
    return row[-1]


def test_words_that_the_twin_lacks_are_marked(page):
    rows = [[text.split() for text in row] for row in page.execute_script(MARKED)]
    assert any(len(kept) < len(text) for text, _, kept in rows)
    for text, unsteered, kept in rows:
        assert common(kept, unsteered) == len(kept) == common(text, unsteered)
    click(page, "#marks")
    wait(page, "document.querySelectorAll('#texts-table mark').length === 0", "no marks")


# ---- claims ---------------------------------------------------------------------------------------------------


def test_a_claim_opens_and_the_table_sorts(page):
    more = "document.querySelector('#claims-table .more').hidden"
    assert page.execute_script(f"return {more}")
    click(page, "#claims-table .opener")
    assert not page.execute_script(f"return {more}")
    assert page.execute_script("return document.querySelector('.opener').getAttribute('aria-expanded')") == "true"
    bodies = "[...document.querySelectorAll('#claims-table tbody')]"
    values = f"return {bodies}.map((b) => Number(b.rows[0].cells[4].dataset.value))"
    before = page.execute_script(values)
    for ordered in (sorted(before), sorted(before, reverse=True)):
        click(page, "#claims-table thead th:nth-child(5) button")
        assert page.execute_script(values) == ordered
    head = "return document.querySelector('#claims-table thead th:nth-child(5)').getAttribute('aria-sort')"
    assert page.execute_script(head) == "descending"


# ---- looks and reach ------------------------------------------------------------------------------------------


def brightness(page, selector: str, name: str) -> float:
    colour = page.execute_script(f"return getComputedStyle(document.querySelector('{selector}')).{name}")
    return sum(float(x) for x in colour.strip("rgba()").split(",")[:3]) / 3


def test_dark_mode_follows_the_system_and_the_button(page):
    assert brightness(page, "body", "backgroundColor") > 200 > brightness(page, "body", "color")
    emulate(page, scheme="dark")
    assert brightness(page, "body", "backgroundColor") < 60 < brightness(page, "body", "color")
    assert brightness(page, "figure svg text", "color") > 150, "the ink of figures is the page's"
    assert page.execute_script("return document.getElementById('theme').getAttribute('aria-pressed')") == "true"
    click(page, "#theme")
    assert brightness(page, "body", "backgroundColor") > 200
    assert page.execute_script("return document.getElementById('theme').getAttribute('aria-pressed')") == "false"


def test_the_keyboard_reaches_every_control(page):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    page.execute_script(
        "document.querySelectorAll('#claims-table tbody').forEach((b, i) => { if (i > 2) b.remove(); })"
    )
    reached, body = [], page.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    focused = (
        "const e = document.activeElement; return [e.id, e.className, e.tagName, getComputedStyle(e).outlineStyle]"
    )
    for _ in range(80):
        reached.append(page.execute_script(focused))
        page.switch_to.active_element.send_keys(Keys.TAB)
    assert reached[0][1] == "skip"
    ids = {element[0] for element in reached}
    wanted = {
        "theme",
        "search",
        "axis-model",
        "axis-emotion",
        "axis-strength",
        "regime",
        "moved",
        "sort",
        "down",
        "marks",
    }
    assert wanted | {"page", "next", "last"} <= ids
    assert "opener" in {element[1] for element in reached}
    assert all(element[3] != "none" for element in reached if element[2] in ("BUTTON", "A", "SELECT")), "focus is seen"


def test_a_key_opens_a_claim(page):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    page.find_element(By.CSS_SELECTOR, ".opener").send_keys(Keys.ENTER)
    assert not page.execute_script("return document.querySelector('#claims-table .more').hidden")


def test_a_narrow_window_needs_no_sideways_scrolling(page):
    emulate(page, width=400)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 400
    assert all(cell.strip() for cell in cells(page, 2))


def test_it_prints_with_every_claim_open_and_without_controls(page):
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown = "return [...document.querySelectorAll(arguments[0])].some((e) => e.getBoundingClientRect().height > 0)"
    assert not page.execute_script(shown, "#filters, .pager, body > nav, #theme")
    rows = "[...document.querySelectorAll('#claims-table .more')]"
    assert page.execute_script(f"return {rows}.every((e) => e.getBoundingClientRect().height > 0)")
    printed = page.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})["data"]
    assert len(printed) > 10_000
