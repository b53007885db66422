"""The live page in a real browser, with a robot that is simulated behind it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from narrowboat.errors import BeyondContractError, ConflictError
from serve_page_kit import DESKTOP, PHONE, LiveServer, browser_path, launched, pictures, robot_server

pytest.importorskip("playwright")
if browser_path() is None:
    pytest.skip("there is no chromium on this machine", allow_module_level=True)

MIB = 1 << 20
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as found:
        yield found


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with robot_server() as live:
        yield live


@pytest.fixture
def live(server: LiveServer) -> LiveServer:
    """The server, as it was at first."""

    def fresh(gateway: Any) -> None:
        gateway.budget, gateway.subscribers, gateway.token, gateway.broken = 256 * MIB, 8, "", []
        gateway.changes.clear()
        gateway._refusals.clear()
        gateway.state = "serving"

    server.call(fresh)
    return server


@pytest.fixture
def opened(browser: Any, live: LiveServer) -> Iterator[Open]:
    """Pages that are watched: no error, no warning, and no request to anybody else may come of them.

    ``opened(allow=(409,))`` expects answers of that status, which a browser reports on its console by itself.
    """
    said: list[str] = []
    allowed: list[int] = []
    contexts: list[Any] = []

    def console(message: Any) -> None:
        refused = re.search(r"responded with a status of (\d+)", message.text)
        if message.type in ("error", "warning") and not (refused and int(refused[1]) in allowed):
            said.append(f"{message.type}: {message.text}")

    def request(asked: Any) -> None:
        if not asked.url.startswith((live.url, "data:", f"blob:{live.url}")):
            said.append(f"asked {asked.url}")

    def make(allow: tuple[int, ...] = (), **options: Any) -> Any:
        allowed.extend(allow)
        contexts.append(browser.new_context(**{"viewport": DESKTOP, "color_scheme": "light", **options}))
        page = contexts[-1].new_page()
        page.set_default_timeout(8_000)
        page.on("console", console)
        page.on("pageerror", lambda error: said.append(f"thrown: {error}"))
        page.on("request", request)
        page.goto(live.url)
        return page

    yield make
    for context in contexts:
        context.close()
    assert not said


def serving(page: Any) -> Any:
    page.wait_for_selector("#gateway-state[data-is=good]")
    page.wait_for_selector("#tasks tbody tr")
    return page


def expect(found: Any) -> Any:
    from playwright.sync_api import expect as that

    return that(found, "on the page")


def drawn(page: Any, canvas: str) -> str:
    """What a canvas shows, to compare."""
    return str(page.locator(canvas).evaluate("canvas => canvas.toDataURL()"))


def colours(page: Any, canvas: str) -> int:
    """How many different pixels a canvas has."""
    return int(
        page.locator(canvas).evaluate(
            "canvas => new Set(new Uint32Array(canvas.getContext('2d')"
            ".getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size"
        )
    )


def test_live_data_appears_and_changes(opened: Open) -> None:
    page = serving(opened())
    expect(page.locator("#guarantee")).to_have_text("valid")
    expect(page.locator("#figure-held")).to_have_text(re.compile(r"^\d+ MiB$"))
    expect(page.locator("#figure-budget")).to_have_text("of 256 MiB")
    rows = page.locator("#responses tbody tr")
    expect(rows).to_have_count(5)
    before = page.locator("#figure-done").inner_text()
    first = {canvas: drawn(page, canvas) for canvas in ("#memory-chart", "#gantt-chart", "#responses canvas >> nth=1")}
    expect(page.locator("#figure-done")).not_to_have_text(before)
    page.wait_for_timeout(400)
    for canvas, was in first.items():
        page.locator(canvas).scroll_into_view_if_needed()
        assert drawn(page, canvas) != was, canvas
        assert colours(page, canvas) > 8, canvas
    expect(rows.nth(0)).to_contain_text(re.compile(r"detector.*deadline 400 ms.*0\.\d\d.*of 331 ms", re.DOTALL))
    expect(rows.nth(4)).to_contain_text(re.compile(r"writer.*best effort.*skipped", re.DOTALL))
    plan = page.locator("#plan li")
    expect(plan).to_have_count(5)
    expect(plan.nth(3)).to_contain_text("all resident")
    expect(plan.nth(0)).to_contain_text(re.compile(r"[1-9]\d* of 11 in"))


def test_every_chart_has_its_numbers_as_a_table(opened: Open) -> None:
    page = serving(opened())
    for table, column in (("memory-table", "Swapped in"), ("gantt-table", "Engine"), ("plan-table", "Coming")):
        button = page.locator(f"[data-table={table}]")
        button.click()
        expect(button).to_have_attribute("aria-expanded", "true")
        expect(page.locator(f"#{table} thead")).to_contain_text(column)
        assert page.locator(f"#{table} tbody tr").count() >= 4
        button.click()
        expect(page.locator(f"#{table}")).to_be_hidden()


def test_the_engines_can_be_paused_zoomed_and_looked_back_at(opened: Open) -> None:
    page = serving(opened())
    chart = page.locator("#gantt-chart")
    chart.scroll_into_view_if_needed()
    page.get_by_role("button", name="Pause").click()
    page.wait_for_timeout(150)
    still = drawn(page, "#gantt-chart")
    page.wait_for_timeout(400)
    assert drawn(page, "#gantt-chart") == still
    page.get_by_role("button", name="Earlier").click()
    page.wait_for_timeout(150)
    assert drawn(page, "#gantt-chart") != still
    expect(page.locator("#gantt-span")).to_have_text("2 s")
    page.get_by_role("button", name="Zoom in").click()
    expect(page.locator("#gantt-span")).to_have_text("1 s")
    box = chart.bounding_box()
    for x in range(80, 700, 12):
        page.mouse.move(box["x"] + x, box["y"] + 20)
        if "block" in page.locator("#gantt-readout").inner_text():
            break
    expect(page.locator("#gantt-readout")).to_have_text(re.compile(r"\w+ #\d+: compute block \d+, [\d.]+ ms"))


def test_the_slider_tells_what_it_would_do_and_changes_only_what_is_applied(opened: Open, live: LiveServer) -> None:
    page = serving(opened())
    page.locator("#budget-slider").fill(str(200 * MIB))
    preview = page.locator("#budget-preview")
    expect(preview).to_contain_text("Admitted")
    expect(preview).to_contain_text("pauses the tasks for up to 38 ms")
    expect(preview.get_by_role("row", name="detector")).to_contain_text(re.compile(r"331 ms.*360 ms.*\+9 %.*400 ms"))
    assert live.call(lambda gateway: gateway.changes) == []
    page.get_by_role("button", name="Apply").click()
    dialog = page.get_by_role("dialog", name="Change the budget?")
    expect(dialog).to_contain_text("share 200 MiB instead of 256 MiB")
    dialog.get_by_role("button", name="Cancel").click()
    assert live.call(lambda gateway: gateway.changes) == []
    page.get_by_role("button", name="Apply").click()
    dialog.get_by_role("button", name="Change to 200 MiB").click()
    expect(page.locator("#budget-told")).to_contain_text("The budget is 200 MiB now")
    expect(page.locator("#figure-budget")).to_have_text("of 200 MiB")
    expect(page.locator("#budget-number")).to_have_value("200")
    assert live.call(lambda gateway: gateway.changes) == [("set_budget", 200 * MIB)]


def test_a_budget_that_is_too_small_is_explained_and_cannot_be_applied(opened: Open) -> None:
    page = serving(opened())
    page.locator("#budget-number").fill("100")
    preview = page.locator("#budget-preview")
    expect(preview).to_contain_text("Refused")
    expect(preview).to_contain_text("are needed")
    expect(page.locator("#budget-apply")).to_be_disabled()
    preview.get_by_role("button", name="Look at").click()
    expect(preview).to_contain_text("Admitted")
    expect(page.locator("#budget-apply")).to_be_enabled()
    page.locator("#budget-number").fill("-3")
    expect(page.locator("#budget-number")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#budget-apply")).to_be_disabled()


def test_a_refusal_on_the_way_is_shown_with_its_reasons(opened: Open, live: LiveServer) -> None:
    page = serving(opened(allow=(409,)))
    page.locator("#budget-slider").fill(str(220 * MIB))
    expect(page.locator("#budget-preview")).to_contain_text("Admitted")
    details: dict[str, object] = {"reasons": ["<b>the pause</b> is too long"], "suggestions": ["wait for the writer"]}
    live.call(lambda gateway: gateway.refuse(ConflictError("the pause is too long", details=details)))
    page.get_by_role("button", name="Apply").click()
    page.locator("#ask-yes").click()
    told = page.locator("#budget-told")
    expect(told).to_contain_text("Not changed")
    expect(told).to_contain_text("<b>the pause</b> is too long")
    expect(told).to_contain_text("wait for the writer")
    expect(page.locator("#figure-budget")).to_have_text("of 256 MiB")


def test_what_if_answers_for_a_new_task_of_blocks_or_of_a_known_model(opened: Open) -> None:
    page = serving(opened())
    answer = page.locator("#what-if-answer")
    page.get_by_label("Name").fill("arm")
    page.get_by_role("button", name="Ask").click()
    expect(answer).to_contain_text("Admitted")
    expect(answer.get_by_role("row", name="arm")).to_contain_text("not there")
    page.get_by_role("button", name="Add a block").click()
    page.get_by_label("Size in MiB of block 2").fill("400")
    page.get_by_role("button", name="Ask").click()
    expect(answer).to_contain_text("Refused")
    expect(answer).to_contain_text("What would help")
    page.get_by_role("button", name="Remove block 2").click()
    page.get_by_label("Load in ms of block 1").fill("")
    page.get_by_role("button", name="Ask").click()
    expect(answer).to_contain_text("Load of block 1 has to be a number")
    page.get_by_label("a model that is known here").check()
    page.get_by_label("Model", exact=True).select_option("zoo:fcn")
    page.get_by_role("button", name="Ask").click()
    expect(answer).to_contain_text("Admitted")


def test_tasks_are_loaded_and_unloaded_and_a_refusal_is_explained(opened: Open, live: LiveServer) -> None:
    page = serving(opened(allow=(409,)))
    told = page.locator("#tasks-told")
    details: dict[str, object] = {"reasons": ["no room for segmenter"], "suggestions": ["budget: 300 MiB"]}
    live.call(lambda gateway: gateway.refuse(ConflictError("no room", details=details)))
    page.get_by_role("button", name="Load segmenter").click()
    expect(told).to_contain_text("segmenter was not loaded")
    expect(told).to_contain_text("no room for segmenter")
    page.get_by_role("button", name="Load segmenter").click()
    expect(told).to_contain_text("segmenter was admitted, and runs")
    expect(page.locator("#plan li")).to_have_count(6)
    page.get_by_role("button", name="Unload segmenter").click()
    page.get_by_role("button", name="Unload it").click()
    expect(told).to_contain_text("segmenter is unloaded")
    expect(page.locator("#plan li")).to_have_count(5)


def test_a_hand_tried_image_gets_its_label(opened: Open, live: LiveServer) -> None:
    page = serving(opened(allow=(429,)))
    result = page.locator("#trial-result")
    page.get_by_label("Task", exact=True).select_option("recogniser")
    for label in ("astronaut", "tabby cat"):
        photograph = {"name": "photo.png", "mimeType": "image/png", "buffer": pictures()[label]}
        page.locator("#trial-file").set_input_files(photograph)
        expect(page.locator("#trial-picture")).to_be_visible()
        page.get_by_role("button", name="Try it").click()
        expect(result.locator("li").first).to_contain_text(label)
        expect(result).to_contain_text(re.compile(r"Admitted\s*yes.*Bound\s*187 ms.*Deadline\s*250 ms.*Met\s*✓", re.S))
    live.call(lambda gateway: gateway.fail("recogniser", BeyondContractError("too soon", retry_after=2)))
    page.get_by_role("button", name="Try it").click()
    expect(result).to_contain_text("too soon. Try again in 2 s.")


def test_a_prompt_is_continued_and_tensors_go_through(opened: Open) -> None:
    page = serving(opened())
    result = page.locator("#trial-result")
    page.get_by_label("Task", exact=True).select_option("writer")
    page.get_by_label("Prompt").fill("Think of")
    page.get_by_label("Tokens at most").fill("3")
    page.get_by_role("button", name="Try it").click()
    expect(result.locator(".text-out")).to_have_text("Think of a boat that")
    expect(result).to_contain_text("Worst response")
    page.get_by_label("Task", exact=True).select_option("detector")
    page.get_by_role("button", name="Try it").click()
    expect(result.get_by_role("row", name="FP32")).to_contain_text("[1, 3, 8, 8]")
    page.get_by_label("Inputs as JSON").fill("{")
    page.get_by_role("button", name="Try it").click()
    expect(result).to_contain_text("These are no inputs")


def test_a_token_is_asked_for_kept_in_the_tab_and_forgotten(opened: Open, live: LiveServer) -> None:
    live.call(lambda gateway: setattr(gateway, "token", "s3cret"))
    page = opened(allow=(401,))
    login = page.get_by_role("dialog", name="This gateway wants a token")
    login.get_by_label("Token").fill("wrong")
    login.get_by_role("button", name="Use it").click()
    expect(page.locator("#login-note")).to_contain_text("not known here")
    login.get_by_label("Token").fill("s3cret")
    login.get_by_role("button", name="Use it").click()
    serving(page)
    assert page.evaluate("[sessionStorage.length, Object.values(localStorage).includes('s3cret')]") == [1, False]
    page.reload()
    serving(page)
    page.get_by_role("button", name="Log out").click()
    expect(login).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def test_a_lost_stream_is_told_and_comes_back_without_counting_twice(opened: Open, live: LiveServer) -> None:
    page = serving(opened(allow=(503,)))

    def cut(gateway: Any) -> None:
        gateway.subscribers = 0
        for feed in list(gateway.feeds):
            feed.close()

    live.call(cut)
    expect(page.locator("#gateway-state")).to_have_text("reconnecting")
    expect(page.locator("#said")).to_contain_text("what is shown is from before")
    live.call(lambda gateway: setattr(gateway, "subscribers", 8))
    serving(page)
    live.call(lambda gateway: gateway.set_state("restarting", "the executor was killed"))
    expect(page.locator("#gateway-state")).to_have_text("restarting")
    expect(page.locator("#said")).to_contain_text("the executor was killed")
    live.call(lambda gateway: gateway.set_state("serving"))
    expect(page.locator("#gateway-state")).to_have_text("serving")


def test_a_broken_guarantee_is_named(opened: Open, live: LiveServer) -> None:
    broken = {"premise": "segments", "means": "segments are within their budgets", "said": "load of floor block 3"}
    live.call(lambda gateway: gateway.broken.append(broken))
    page = serving(opened())
    expect(page.locator("#guarantee")).to_have_text("not valid")
    expect(page.locator("#said")).to_contain_text("segments are within their budgets (load of floor block 3)")


def test_the_theme_follows_the_system_until_it_is_chosen(opened: Open) -> None:
    page = serving(opened(color_scheme="dark"))
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    assert page.evaluate(ground) != dark
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate(ground) == dark
    page.reload()
    serving(page)
    assert page.evaluate(ground) == dark
    expect(page.get_by_role("button", name="Light theme")).to_be_visible()


def test_the_page_is_worked_by_keyboard_alone(opened: Open, live: LiveServer) -> None:
    page = serving(opened())

    def tab_to(selector: str, most: int = 40) -> None:
        for _ in range(most):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", f"nobody sees that {selector} has the focus"
                return
        raise AssertionError(f"{selector} is not reached")

    tab_to(".skip", 1)
    tab_to("#theme")
    page.keyboard.press("Enter")
    tab_to("[data-table=memory-table]")
    page.keyboard.press("Space")
    expect(page.locator("#memory-table")).to_be_visible()
    tab_to("#gantt-pause")
    page.keyboard.press("Space")
    expect(page.locator("#gantt-pause")).to_have_attribute("aria-pressed", "true")
    tab_to("#budget-slider")
    for _ in range(4):
        page.keyboard.press("PageUp")
    expect(page.locator("#budget-preview")).to_contain_text("Admitted")
    expect(page.locator("#budget-apply")).to_be_enabled()
    tab_to("#budget-apply")
    page.keyboard.press("Enter")
    tab_to("#ask-yes", 4)
    page.keyboard.press("Enter")
    expect(page.locator("#budget-told")).to_contain_text("The budget is")
    tab_to("#what-if-ask")
    page.keyboard.press("Enter")
    expect(page.locator("#what-if-answer")).to_contain_text("Admitted")
    tab_to("#trial-go")
    assert len(live.call(lambda gateway: gateway.changes)) == 1


def test_a_phone_shows_all_without_scrolling_sideways(opened: Open) -> None:
    page = serving(opened(viewport=PHONE, has_touch=True, is_mobile=True))
    page.locator("#budget-number").fill("100")
    expect(page.locator("#budget-preview")).to_contain_text("Refused")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#what-if-answer")).to_contain_text("Admitted")
    for button in page.locator("[data-table]").all():
        button.click()
    wide = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.table-box, .unseen, .skip, thead')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 120))"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 360 and not wide
    texts = page.evaluate(
        "[...document.querySelectorAll('button, select, input')].filter(e => e.offsetParent)"
        ".map(e => e.getBoundingClientRect().height).filter(height => height < 24 && height > 14)"
    )
    assert not texts, "too small to be touched"


@pytest.mark.parametrize(
    "options", [{}, {"color_scheme": "dark"}, {"viewport": PHONE}], ids=["light", "dark", "phone"]
)
def test_axe_finds_no_violation(opened: Open, options: dict[str, Any]) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = serving(opened(**options))
    for button in page.locator("[data-table]").all():
        button.click()
    page.locator("#budget-number").fill("100")
    expect(page.locator("#budget-preview")).to_contain_text("Refused")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#what-if-answer")).to_contain_text("Admitted")
    found = axe.run(page).response["violations"]
    assert not [(one["id"], one["help"], [node["html"][:150] for node in one["nodes"][:4]]) for one in found]


def test_what_the_page_keeps_does_not_grow_and_a_day_costs_what_a_minute_costs(opened: Open, live: LiveServer) -> None:
    page = serving(opened())

    def heap() -> int:
        session = page.context.new_cdp_session(page)
        session.send("HeapProfiler.collectGarbage")
        return int(session.send("Runtime.getHeapUsage")["usedSize"])

    def hours(gateway: Any) -> None:
        """Twenty seconds' ticks of a thousand segments, all at once, as fast as they can be taken."""
        last = gateway.ticks[-1]
        for number in range(60):
            now = last["now_us"] + number
            segments = [["compute", "compute", "floor", number, k % 9, now + k, now + k + 1, 0] for k in range(1000)]
            gateway.push({**last, "time": last["time"] + number * 1e-3, "segments": segments})

    def rounds(count: int) -> None:
        for _ in range(count):
            live.call(hours)
            page.wait_for_timeout(250)

    rounds(3)
    nodes, before = page.evaluate("document.querySelectorAll('*').length"), heap()
    rounds(6)
    assert heap() - before < 3_000_000
    assert abs(page.evaluate("document.querySelectorAll('*').length") - nodes) < 10
