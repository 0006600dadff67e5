"""Measure the seconds from a click to five images on the page, in a headless Chromium: `python benchmarks/page.py`."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from playwright.sync_api import sync_playwright

READY = """moves => document.querySelector("#status")?.innerText.includes(`Moves so far: ${moves}. Select`)
  && document.querySelectorAll("#candidates img").length == 5 && !document.querySelector("#move").disabled"""


def main() -> None:
    """Move to the third candidate ten times."""
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        command = [
            sys.executable,
            "-u",
            "train.py",
            "fit",
            "--config",
            "configs/human_feedback.yaml",
            "--run",
            f"{scratch}/run",
        ]
        command += ["--data.prompts", "a dog on a blue background", "--model.chooser.show", "false"]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        address = next(
            found[0] for line in run.stdout or [] if (found := re.search(r"http://127\.0\.0\.1:\d+/\S+/", line))
        )
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page, seconds = browser.new_page(), []
        page.goto(address)
        page.wait_for_function(READY, arg=0)
        for move in range(1, 11):
            page.keyboard.press("3")
            page.wait_for_function("document.querySelectorAll('#candidate input')[2].checked")
            page.wait_for_selector("#preview img")
            begun = time.perf_counter()
            page.click("#move")
            page.wait_for_function(READY, arg=move)
            seconds.append(time.perf_counter() - begun)
        page.click("#finish")
        run.wait()
        browser.close()
    print(f"median {statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s, of {len(seconds)} clicks")


if __name__ == "__main__":
    main()
