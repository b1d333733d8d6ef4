"""Measures the report page of a store: seconds to write it, its bytes, first paint and search in headless Chromium.

    python bench/page.py                              # a made-up store of 100,000 texts, written without a model
    python bench/page.py --store store/quickstart.zarr

Prints JSON. Needs chromium, chromedriver and selenium for the paint; without them that part is null.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import textstore


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--store", type=Path, help="a store to report on; a made-up one when left out")
    arguments.add_argument("--texts", type=int, default=100_000, help="texts of the made-up store")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = given.store or made_up(Path(folder) / "made-up.zarr", given.texts)
        page = Path(folder) / "report.html"
        measures = {"load_average_before": os.getloadavg()[0], **write(store, page)}
        measures |= {"bytes": page.stat().st_size, **(paint(page) or {"paint": None})}
    print(json.dumps(measures, indent=1))


def made_up(path: Path, texts: int) -> Path:
    """5 models x 3 emotions x 5 strengths x 2 controls, with as many prompts as make up the number of texts."""
    strengths = (0.02, 0.05, 0.1, 0.2, 0.3)
    textstore.make(path, models=5, strengths=strengths, prompts=-(-texts // (5 * 3 * 5 * 2)), words=40)
    return path


def write(store: Path, page: Path) -> dict[str, Any]:
    """Wall and CPU seconds of `nsteer report STORE -o PAGE`."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "nsteer", "report", str(store), "-o", str(page)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(cpu, 1)}


def paint(page: Path) -> dict[str, Any] | None:
    """Milliseconds to first paint, first contentful paint, the first texts, and the answer to a search of all texts."""
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (chromium and driver):
        return None
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.binary_location = chromium
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.set_script_timeout(300)
    try:
        browser.get(page.as_uri())
        rows = "return document.querySelectorAll('#texts-table tbody tr').length"
        WebDriverWait(browser, 300, 0.05).until(lambda b: b.execute_script(rows) == 50)
        measures = {"texts_ms": round(browser.execute_script("return performance.now()"))}
        entries = browser.execute_script("return performance.getEntriesByType('paint').map((e) => e.toJSON())")
        measures |= {f"{entry['name'].replace('-', '_')}_ms": round(entry["startTime"]) for entry in entries}
        measures["rows_in_document"] = browser.execute_script(rows)
        return {**measures, "search_ms": browser.execute_async_script(SEARCH)}
    finally:
        browser.quit()


SEARCH = """
const done = arguments[0], box = document.getElementById('search'), count = document.getElementById('count');
const started = performance.now();
new MutationObserver(() => {
  if (count.textContent.startsWith('0 of')) done(Math.round(performance.now() - started));
}).observe(count, {childList: true, characterData: true, subtree: true});
box.value = 'no text has these words';
box.dispatchEvent(new Event('input'));
"""

if __name__ == "__main__":
    main()
