"""The report of one run in a real browser, from `file://`: mouse, keyboard, pictures, contrast, inert texts, size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odedit.storage.location import at
from pipeline.report.cloud import HiddenStates
from pipeline.report.page import Arm, write_comparison
from pipeline.report.run_page import Baseline, write_run_report
from pipeline.run_folder.rows import EDITED, Row
from pipeline.run_folder.workspace import Workspace, read_json
from tests.support.browser import CONTRAST, chromium
from tests.support.finished_runs import SCRIPT, write_run


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


_CLOUD = np.random.default_rng(0).normal(size=(3, 5, 16))
STATES = HiddenStates(tuple(f"vqa-{number:06d}" for number in range(5)), ("rel", "t_gen", "m_gen"), _CLOUD, _CLOUD + 1)


def hostile(row: Row) -> None:
    if row["status"] == EDITED:
        row["answers"]["t_gen"]["after"] = SCRIPT
    else:
        row["error"] += SCRIPT


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    baseline = Baseline.of("base", write_run(folder / "base", 60))
    return written(write_run(folder / "run", 60, hostile), baseline=baseline, states=STATES)


def written(workspace: Workspace, **drawn: Any) -> Path:
    return Path(write_run_report(workspace, read_json(workspace.summary), **drawn))


@pytest.fixture
def page(browser: Any, page_file: Path) -> Iterator[Any]:
    """The opened report; afterwards, nothing may have gone wrong in it."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    opened, problems = context.new_page(), []
    opened.on("console", lambda message: problems.append(message.text))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda request: problems.extend([request.url] * request.url.startswith("http")))
    opened.set_default_timeout(20_000)
    opened.goto(page_file.as_uri())
    yield opened
    assert not problems
    assert opened.title() == "run: report", "a text of a record was run"
    context.close()


def ids(page: Any) -> list[str]:
    return [each.removeprefix("edit-") for each in page.locator(".edit").evaluate_all("all => all.map(e => e.id)")]


def is_counted(page: Any, text: str) -> None:
    from playwright.sync_api import expect

    expect(page.locator("#count")).to_have_text(f"{text} of 62 records")


def test_filters_and_sorting_by_mouse(page: Any) -> None:
    assert ids(page)[0] == "vqa-000000" and len(ids(page)) == 25, "the rest comes into view later"
    page.select_option("[name=outcome]", "wrong")
    is_counted(page, "24")
    page.select_option("[name=probe]", label="rel: reliability")
    is_counted(page, "15")
    page.select_option("[name=task]", "caption")
    is_counted(page, "5")
    page.select_option("[name=outcome]", "failed")
    page.select_option("[name=task]", "")
    is_counted(page, "1")
    page.select_option("[name=probe]", "")
    page.select_option("[name=outcome]", "")
    is_counted(page, "62")
    page.fill("[name=text]", "OBJECT 17?")
    is_counted(page, "1")
    assert ids(page) == ["vqa-000017"]
    page.fill("[name=text]", "")
    is_counted(page, "62")
    page.select_option("[name=sort]", "steps")
    steps = [int(text.split()[0]) for text in page.locator(".meta span", has_text=" steps").all_text_contents()]
    assert steps == sorted(steps) and len(set(steps)) > 1
    page.click("#order")
    assert page.locator(".meta span", has_text=" steps").first.text_content() == "16 steps"
    page.select_option("[name=outcome]", "worse")
    is_counted(page, "0")


def test_filters_and_edits_by_keyboard(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the edits"
    page.focus("[name=outcome]")
    page.keyboard.type("wrong")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type("vqa-000008")
    is_counted(page, "1")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.get_attribute("#order", "aria-pressed") == "true"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    # The browser reports the new address after the key.
    page.wait_for_url("**#edit=vqa-000008")
    page.wait_for_function("document.activeElement.id === 'edit-vqa-000008'")


def test_all_edits_come_into_view_and_each_has_a_link(page: Any, page_file: Path) -> None:
    while (count := len(ids(page))) < 62:
        page.mouse.wheel(0, 100_000)
        page.wait_for_function("count => document.querySelectorAll('.edit').length > count", arg=count)
    assert len(set(ids(page))) == len(ids(page)) == 62 and page.locator("#more").is_hidden()
    last = ids(page)[-3]
    page.goto(f"{page_file.as_uri()}#edit={last}")
    page.reload()
    assert page.evaluate("document.activeElement.id") == f"edit-{last}"
    page.click("#before")
    assert len(ids(page)) > 3 and ids(page)[-3] == last


def test_a_hidden_state_leads_to_its_edit_and_settings_unfold(page: Any) -> None:
    assert page.locator(".clouds svg").count() == 2 and page.locator(".clouds circle").count() == 10
    page.locator(".clouds svg").nth(1).locator("a circle").nth(3).click()
    page.wait_for_function("document.activeElement.id === 'edit-vqa-000003'")
    assert not page.locator("#resources pre").is_visible()
    page.locator("#resources summary").click()
    assert "name: ftl" in page.locator("#resources pre").text_content()
    assert page.locator("#resources pre").is_visible()


def test_pictures_load_and_have_texts_and_curves_open(page: Any) -> None:
    first = page.locator(".edit").first
    first.scroll_into_view_if_needed()
    page.wait_for_load_state("networkidle")
    images = first.locator("img")
    assert images.count() == 5
    assert all(images.evaluate_all("all => all.map(i => i.complete && i.naturalWidth > 0 && i.alt.length > 10)"))
    first.locator("summary").click()
    assert first.locator("polyline").first.get_attribute("points").count(",") == 3
    assert first.locator("svg").first.get_attribute("aria-label") == "rel: from 3 to 0.5"
    shown = page.locator(".after .answer", has_text="<script>").first
    assert SCRIPT in shown.text_content(), "markup of a record is shown as text"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough_and_a_phone_needs_no_scrolling_sideways(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate(CONTRAST) == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 27)"}[scheme]
    page.set_viewport_size({"width": 390, "height": 844})
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
    assert page.evaluate(
        "[...document.querySelectorAll('.edit')].every(e => e.getBoundingClientRect().right <= innerWidth)"
    )
    assert page.evaluate(CONTRAST) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_several_runs_is_readable_and_leads_to_their_edits(
    browser: Any, tmp_path: Path, scheme: str
) -> None:
    arms = []
    for name in ("one", "another"):
        workspace = write_run(tmp_path / name, 8, hostile)
        written(workspace)
        arms.append(Arm(name, workspace, read_json(workspace.summary)))
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme, offline=True)
    page, problems = context.new_page(), []
    page.on("console", lambda message: problems.append(message.text))
    page.goto(Path(write_comparison(at(tmp_path), arms)).as_uri())
    assert page.evaluate(CONTRAST) == [] and page.title() == "one against another"
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
    page.click("nav a:has-text('another')")
    assert page.title() == "another: report" and page.locator(".edit").count() == 10 and not problems
    context.close()


def test_ten_thousand_edits_open_at_once(browser: Any, tmp_path: Path) -> None:
    file = written(write_run(tmp_path / "run", 10_000, pictures=40))
    assert file.stat().st_size < 20_000_000
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    session = page.context.new_cdp_session(page)
    # Processor time of the page: other work on the machine does not count.
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(file.as_uri())
    assert page.locator(".edit").count() == 25
    used = {each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]}
    assert used["TaskDuration"] < 2.0
    page.fill("[name=text]", "object 9876?")
    page.locator("#edit-vqa-009876").wait_for()
    assert page.locator("#count").text_content() == "1 of 10,000 records"
    page.close()
