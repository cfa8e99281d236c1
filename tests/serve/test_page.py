"""The page in a real browser."""

from __future__ import annotations

import json
import shutil
import time

import pytest

from moespac.config import ServeConfig
from tests.serve.running import in_thread

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser):
    context = browser.new_context(viewport={"width": 1300, "height": 820}, color_scheme="light")
    context.set_default_timeout(30_000)
    yield context
    context.close()


@pytest.fixture
def page(context, server):
    """The page, on which nothing may go wrong."""
    page = context.new_page()
    wrong: list[str] = []
    page.on(
        "console",
        lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None,
    )
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(server.base)
    yield page
    assert [text for text in wrong if "400 (Bad Request)" not in text] == []


def set_up(page, **settings: str) -> None:
    page.click("#tune")
    for name, value in settings.items():
        page.fill(f"#{name}", value)
    page.click("#settings button.main")


def ask(page, text: str) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")


def answered(page) -> str:
    page.wait_for_selector(".turn.its:not(.writing) .note:not(:empty)")
    return page.locator(".turn.its .body").last.inner_text()


def until(page, expression: str, seconds: float = 30) -> None:
    """Wait for it to be true. (The page's own policy forbids Playwright's way, which evaluates strings.)"""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(30)


def pixels(page, canvas: str) -> int:
    """Distinct colours on a canvas: 1 where nothing is drawn."""
    return page.evaluate(
        """id => {
            const c = document.getElementById(id), seen = c.getContext("2d").getImageData(0, 0, c.width, c.height);
            return new Set(new Uint32Array(seen.data.buffer)).size;
        }""",
        canvas,
    )


def test_an_answer_streams_in_and_is_the_models(page, server) -> None:
    question = "How many legs have 3 dogs?"
    set_up(page, temperature="0", max_tokens="40")
    ask(page, question)
    shown = answered(page)
    expected = server.chat(question, max_tokens=40).json()
    assert " ".join(shown.split()) == " ".join(
        expected["choices"][0]["message"]["content"].replace("#### ", "").split()
    )
    assert page.locator(".turn.mine .body").inner_text() == question
    assert f"{expected['usage']['completion_tokens']} tokens" in page.locator(".turn.its .note").inner_text()
    ask(page, "And 4 dogs?")  # the conversation goes on
    until(page, "document.querySelectorAll('.turn.its:not(.writing)').length === 2")
    assert page.locator(".turn.mine").count() == 2
    page.click("#fresh")
    assert page.locator(".turn").count() == 0 and page.locator(".empty").is_visible()


def test_memory_is_shown_live(page, server) -> None:
    until(page, "document.getElementById('shape').textContent.includes('8 layers × 32 experts')")
    assert page.locator("#model").inner_text() == "moespac-demo"
    answers = [server.complete("The sea", max_tokens=150, stream=True) for _ in range(2)]
    until(page, "document.getElementById('span').textContent.startsWith('4 passes')")
    until(page, "document.getElementById('model').className.includes('busy')")
    assert float(page.locator("#speed").inner_text()) > 0
    assert page.locator("#hits").inner_text().endswith("%")
    assert pixels(page, "heat") > 5 and pixels(page, "lanes") > 5
    assert "used by the last pass" in page.get_attribute("#heat", "aria-label")
    assert "host experts" in page.get_attribute("#lanes", "aria-label")
    assert page.locator("#tiers .bar").count() == 2
    for answer in answers:
        answer.close()
    page.focus("#heat")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.locator("#about").inner_text().startswith("layer 1, expert 0, level ")
    page.hover("#heat", position={"x": 3, "y": 3})
    assert page.locator("#about").inner_text().startswith("layer 0, expert 0, level ")


def test_escape_and_the_button_stop_an_answer(page, server) -> None:
    set_up(page, temperature="1", top_k="0", max_tokens="1500", seed="3")
    for stop in (lambda: page.keyboard.press("Escape"), lambda: page.click("#stop")):
        page.click("#fresh")
        page.evaluate("settings.system = 'word '.repeat(200)")  # the embedded model then goes on and on
        ask(page, "Tell me of a storm.")
        page.wait_for_selector("#stop:not([hidden])")
        stop()
        page.wait_for_selector("#stop", state="hidden")
        assert page.locator("#send").is_enabled()
        server.settled()
    assert page.evaluate("document.activeElement.id") == "question"


def test_nothing_a_model_says_is_markup(page) -> None:
    text = (
        "<img src=x onerror='window.bad=1'><script>window.bad=1</script>\n\n**bold** `co<b>de` *it*\n\n"
        "- one\n- two\n\n```\n<i>x</i>\n```\n# head"
    )
    events = "data: " + json.dumps({"choices": [{"delta": {"content": text}}]}) + "\n\ndata: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=events)
    )
    ask(page, "<b>hello</b>")
    shown = answered(page)
    assert "<img src=x onerror=" in shown and "<script>" in shown and "<i>x</i>" in shown
    assert page.evaluate("window.bad") is None
    body = page.locator(".turn.its .body")
    assert body.locator("img, script, i, b").count() == 0
    assert body.locator("strong").inner_text() == "bold" and body.locator("p code").inner_text() == "co<b>de"
    assert body.locator("em").inner_text() == "it" and body.locator("li").count() == 2
    assert body.locator("pre code").inner_text() == "<i>x</i>" and body.locator("h3").inner_text() == "head"
    assert page.locator(".turn.mine .body").inner_text() == "<b>hello</b>"


def test_an_error_is_said_and_the_page_goes_on(page, server) -> None:
    set_up(page, max_tokens="100000")
    ask(page, "Hello")
    page.wait_for_selector(".turn.its .fail")
    assert "the context holds 2048 tokens" in page.locator(".turn.its .fail").inner_text()
    set_up(page, max_tokens="4")
    ask(page, "Hello")
    until(page, "document.querySelectorAll('.turn.its .note:not(.fail):not(:empty)').length === 1")


def test_dark_light_and_the_choice_stays(context, server) -> None:
    page = context.new_page()
    page.emulate_media(color_scheme="dark")
    page.goto(server.base)
    theme = "document.documentElement.dataset.theme"
    assert page.evaluate(theme) == "dark"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="light")
    until(page, theme + " === 'light'")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    page.click("#theme")
    page.reload()
    assert page.evaluate(theme) == "dark"


@pytest.mark.parametrize("width", [320, 400, 768])
def test_narrow_screens(browser, server, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 740}, has_touch=True)
    page = context.new_page()
    page.goto(server.base)
    for view, shown in (("memory", "#heat"), ("chat", "#question")):
        page.click(f".switch button[data-view={view}]")
        page.wait_for_selector(shown, state="visible")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
        outside = page.evaluate(
            """() => [...document.querySelectorAll("button, textarea, .card, .tile")].filter(e => {
                const box = e.getBoundingClientRect();
                return box.width && (box.right > innerWidth + 1 || box.left < -1);
            }).map(e => e.id || e.className)"""
        )
        assert outside == []
    context.close()


def test_the_key_is_asked_for_and_used(engine, context) -> None:
    with in_thread(engine, ServeConfig(), key="sesame") as server:
        page = context.new_page()
        page.goto(server.base)
        page.wait_for_selector("#locked[open]")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        until(page, "document.getElementById('key-note').textContent === 'That key is wrong.'")
        page.wait_for_selector("#locked[open]")
        page.fill("#key", "sesame")
        page.keyboard.press("Enter")
        until(page, "document.getElementById('model').textContent === 'moespac-demo'")
        set_up(page, max_tokens="4")
        ask(page, "Hello")
        assert answered(page) is not None
        page.close()


def test_everything_can_be_reached_by_keyboard_and_has_a_name(page) -> None:
    names = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, canvas[tabindex], [role=img]")].map(e =>
        e.getAttribute("aria-label") || e.labels?.[0]?.textContent || e.textContent.trim())"""
    )
    assert all(names)
    page.focus("#question")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#question") == "one\ntwo"
    reached = set()
    page.evaluate("document.activeElement.blur()")
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"fresh", "tune", "theme", "log", "question", "send", "heat"} <= reached
