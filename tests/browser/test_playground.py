"""The playground in a real browser: a slider moved there changes the steered text, and no other.

Pictures of it are kept in build/browser.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright

from tests.browser.chromium import find
from tests.browser.server import jupyter

PICTURES = Path(__file__).parents[2] / "build" / "browser"
QUESTION, SCENE = "Name the trade of Abrin Tolva.", "How does it go on? Greta brings a saddle to the school."
CELLS = [
    "import repe\nfrom repe.widgets import playground\n\nmodel, tokenizer = repe.load()\n"
    f'playground(model, tokenizer, ["honesty", "happiness"], prompt="{QUESTION}")',
    'print("attached:", repe.status(model))',
]
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
ENDS = (-2, 2)  # of the sliders
PATIENCE = 120_000  # milliseconds, for a kernel that loads torch on a busy machine
# a cell that is run before has none to run in
KERNEL_IS_READY = """() => {
    const session = globalThis.jupyterapp?.shell.currentWidget?.sessionContext;
    return session?.isReady && session.session?.kernel?.status === "idle";
}"""
FACES = {
    "lab": ("/lab/tree/playground.ipynb", "JupyterLab Light", 1280),
    "lab-dark": ("/lab/tree/playground.ipynb", "JupyterLab Dark", 1280),
    "notebook": ("/notebooks/playground.ipynb", "JupyterLab Light", 1280),
    "notebook-narrow": ("/notebooks/playground.ipynb", "JupyterLab Dark", 640),
}


@dataclass
class Notebook:
    """The notebook with the playground, opened in one of Jupyter's faces."""

    page: Page
    face: str

    def run(self, number: int) -> Locator:
        """Runs a cell until it is done, and returns it."""
        cell = self.page.locator(".jp-CodeCell").nth(number)
        cell.locator(".cm-content").click()
        self.page.keyboard.press("Control+Enter")
        expect(cell.locator(".jp-InputPrompt")).to_have_text(re.compile(r"\[\d+\]"))
        return cell

    def keep(self, name: str) -> None:
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=PICTURES / f"{self.face}-{name}.png")


@pytest.fixture(params=FACES)
def notebook(request, tmp_path):
    path, theme, width = FACES[request.param]
    with (
        jupyter(tmp_path, {"playground.ipynb": CELLS}, theme) as address,
        sync_playwright() as player,
        player.chromium.launch_persistent_context(
            str(tmp_path / "browser"), executable_path=find(), headless=True, args=list(QUIET),
            viewport={"width": width, "height": 900}, timeout=PATIENCE,
        ) as browser,
    ):  # fmt: skip
        expect.set_options(timeout=PATIENCE)
        browser.set_default_timeout(PATIENCE)
        page = browser.new_page()
        page.goto(address + path)
        page.wait_for_function(KERNEL_IS_READY)
        opened = Notebook(page, request.param)
        yield opened
        opened.keep("at-the-end")


def drag(playground: Locator, concept: str, alpha: float) -> None:
    """Takes a slider by the mouse to an alpha."""
    slider, mouse = playground.locator(".widget-hslider").filter(has_text=concept), playground.page.mouse
    slider.locator(".noUi-handle").hover()
    mouse.down()
    track = slider.locator(".noUi-base").bounding_box()
    x = track["x"] + (alpha - ENDS[0]) / (ENDS[1] - ENDS[0]) * track["width"]
    mouse.move(x, track["y"] + track["height"] / 2, steps=8)
    mouse.up()


def written(playground: Locator, prompt: str, honesty: float, happiness: float) -> Locator:
    """What says that both texts are written to their ends, and that they are those of this prompt and these alphas."""
    return playground.locator(f'.repe-done[data-prompt="{prompt}"][data-alphas="{honesty:g} {happiness:g}"]')


def test_a_slider_moved_changes_the_steered_text_and_its_costs_alone(notebook):
    playground = notebook.run(0)
    unsteered, steered = (playground.locator(f".repe-{name} .repe-said") for name in ("unsteered", "steered"))
    kl = playground.locator(".repe-steered .repe-costs")
    expect(playground.locator(".repe-ready")).to_be_visible()

    playground.get_by_role("button", name="Write").click()
    expect(written(playground, QUESTION, 0, 0)).to_be_visible()
    truth = unsteered.inner_text().strip()
    assert truth
    expect(steered).to_have_text(truth)
    expect(kl).to_contain_text("KL 0.000")

    drag(playground, "honesty", -1.2)
    expect(written(playground, QUESTION, -1.2, 0)).to_be_visible()
    expect(steered).to_have_text(re.compile(r"\w"))
    expect(steered).not_to_have_text(truth)
    expect(unsteered).to_have_text(truth)
    expect(kl).not_to_contain_text("KL 0.000")
    notebook.keep("honesty")

    playground.get_by_role("button", name="All to 0").click()
    expect(written(playground, QUESTION, 0, 0)).to_be_visible()
    expect(steered).to_have_text(truth)

    prompt = playground.locator(".widget-textarea textarea")
    prompt.fill(SCENE)
    prompt.blur()  # which writes anew, once
    expect(written(playground, SCENE, 0, 0)).to_be_visible()
    scene = unsteered.inner_text()
    assert "saddle" in scene
    drag(playground, "happiness", -1.2)
    playground.get_by_label("Scores of").select_option("happiness")
    expect(written(playground, SCENE, 0, -1.2)).to_be_visible()
    expect(playground.locator(".repe-steered")).to_contain_text("happiness")
    expect(steered).not_to_have_text(scene)
    expect(unsteered).to_have_text(scene)
    notebook.keep("happiness")

    expect(notebook.run(1).locator(".jp-OutputArea-output")).to_contain_text("attached: []")
