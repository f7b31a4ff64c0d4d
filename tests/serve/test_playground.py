"""The page that every endpoint shows, in a real browser: draw, fill in, drop a file; sealed in the page, opened in the page."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from heliograph.cluster.keys import KeyStore
from heliograph.cluster.runtime import free_port
from heliograph.jobs.registry import Registry
from heliograph.names import Verb
from heliograph.project import Serve
from heliograph.serve.access import Tokens
from heliograph.serve.endpoint import Endpoint
from heliograph.serve.messages import Request
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from ..tools import tool
from .served import TABLE, Room, write_bundle

SEVEN = [(0.25, 0.2), (0.5, 0.2), (0.72, 0.2), (0.6, 0.45), (0.45, 0.85)]
ONE = [(0.5, 0.1), (0.5, 0.5), (0.5, 0.9)]


@pytest.fixture(scope="module")
def url(digits, tmp_path_factory, cluster, served) -> Iterator[str]:
    run, folder = digits / "runs" / "default", tmp_path_factory.mktemp("playground")
    models, keys = Registry(folder / "registry"), KeyStore(run / "keys")
    models.add("digits", run / "bundle")
    models.add("rents", write_bundle(folder / "rents", keys, "rents", TABLE, [[2.0], [-1.0]]))
    with served(Endpoint("digits", models, keys, Serve(port=free_port()))) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=tool("chromium"), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser, url) -> Iterator[Page]:
    """Where nothing may be loaded from elsewhere, and nothing may go wrong."""
    page, complaints = browser.new_page(), []
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request", lambda request: complaints.append(request.url) if not request.url.startswith((url, "data:", "blob:")) else None
    )
    page.goto(f"{url}/docs")
    yield page
    page.close()
    assert complaints == []


def part(page: Page, model: str) -> Locator:
    return page.locator("section").filter(has=page.get_by_role("heading", name=model))


def draw(page: Page, points: list[tuple[float, float]]) -> None:
    box = part(page, "digits").locator("canvas").first.bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()


def test_a_drawn_digit_is_recognised_and_nobody_between_can_read_it(page):
    sent = []
    page.on("request", lambda request: sent.append(request) if request.method == "POST" else None)
    digits = part(page, "digits")
    for points, digit in ((SEVEN, "7"), (ONE, "1")):
        digits.get_by_role("button", name="clear").click()
        draw(page, points)
        digits.get_by_role("button", name="seal and predict").click()
        expect(digits.locator(".answer strong")).to_have_text(digit)
        expect(digits.locator(".out .heat")).to_be_visible()
    assert {request.url.rsplit(":")[-1] for request in sent} == {"predict", "explain"}
    for request in sent:
        assert request.headers["content-type"] == "message/ohttp-req"
        assert b"instances" not in request.post_data_buffer
        assert b"image" not in request.post_data_buffer
    shown = digits.locator("pre.sent").inner_text().split()[:16]
    assert bytes.fromhex("".join(shown)) == next(r for r in reversed(sent) if r.url.endswith("predict")).post_data_buffer[:16]


def test_numbers_can_be_typed_instead_of_drawn(page):
    digits = part(page, "digits")
    digits.get_by_text("its numbers").click()
    rows = digits.get_by_label("8 rows of 8 numbers")
    rows.fill(str([[0, 0, 0, 12, 12, 0, 0, 0]] * 8))
    rows.blur()
    digits.get_by_role("button", name="seal and predict").click()
    expect(digits.locator(".answer strong")).to_have_text("1")


def test_a_form_follows_the_schema_and_a_refusal_is_shown(page):
    rents = part(page, "rents")
    rents.get_by_label("size").fill("4")
    rents.get_by_label("age").fill("1.5")
    rents.get_by_label("explain the answer").uncheck()
    button = rents.get_by_role("button", name="seal and predict")
    button.click()
    expect(rents.locator(".answer strong")).to_have_text("6.5")
    rents.get_by_label("size").fill("")
    button.click()
    expect(rents.get_by_role("alert")).to_contain_text("`size`")
    rents.get_by_label("size").fill("1")
    rents.get_by_label("age").fill("")
    button.click()
    expect(rents.locator(".answer strong")).to_have_text("2")


def test_rows_of_a_file_are_answered_in_one_table(page, tmp_path):
    (tmp_path / "rents.csv").write_text('size,age,street\n1,2,"High, Street"\n3,,x\n')
    rents = part(page, "rents")
    rents.get_by_text("rows of a file").click()
    rents.get_by_label("file of rows").set_input_files(tmp_path / "rents.csv")
    expect(rents.locator(".out tbody tr")).to_have_text(["10", "26"])
    (tmp_path / "rents.json").write_text('{"instances": [{"size": 2, "age": 1}]}')
    rents.get_by_label("file of rows").set_input_files(tmp_path / "rents.json")
    expect(rents.locator(".out tbody tr")).to_have_text(["13"])


def test_a_page_behind_tokens_asks_for_one_and_predicts_with_it(browser, tmp_path):
    room = Room(tmp_path, access="tokens")
    room.add("rents", TABLE, [[2.0], [-1.0]])
    tokens = Tokens(room.keys)
    reader = tokens.add("ann", [], [Verb.READ, Verb.PREDICT], None, None)
    asker = tokens.add("bob", [], [Verb.PREDICT], None, None)
    sent = []

    def answer(route: Route) -> None:
        """By the application itself: Playwright's loop is this thread's, so the application's is another's."""
        of, path = route.request, urlsplit(route.request.url).path
        sent.append(of)
        kind, token = of.headers.get("content-type", ""), of.headers.get("authorization", "")
        asked = Request(of.method, path, kind, of.post_data_buffer or b"", None, token)
        said = aside.submit(room.request, asked).result()
        route.fulfill(status=said.status, body=bytes(said.body), headers={"content-type": said.type, **said.headers})

    with ThreadPoolExecutor(1) as aside:
        aside.submit(room.follow).result()
        page = browser.new_page()
        page.route("**/*", answer)
        assert page.goto("http://127.0.0.1:8000/").status == 401
        assert "rents" not in page.content()
        for token, said in (("nobody's", "not valid here"), (asker, "may not read"), (reader, None)):
            page.get_by_label("access token").fill(token)
            page.get_by_role("button", name="open").click()
            if said:
                expect(page.get_by_role("alert")).to_contain_text(said)
        rents = part(page, "rents")
        rents.get_by_label("size").fill("4")
        rents.get_by_label("explain the answer").uncheck()
        rents.get_by_role("button", name="seal and predict").click()
        expect(rents.locator(".answer strong")).to_have_text("8")
        assert reader.encode() not in sent[-1].post_data_buffer
        found = Axe().run(page).response["violations"]
        assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []
        page.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1100), ("dark", 1100), ("light", 400)])
def test_axe_finds_no_serious_violation_and_nothing_sticks_out(page, scheme, width):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    draw(page, ONE)
    digits = part(page, "digits")
    digits.get_by_role("button", name="seal and predict").click()
    expect(digits.locator(".out .heat")).to_be_visible()
    found = Axe().run(page).response["violations"]
    assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(("scheme", "width"), [("light", 1000), ("dark", 1000), ("light", 400)])
def test_a_report_is_whole_without_a_network_and_open_to_everybody(browser, digits, scheme, width):
    page, complaints = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900}), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", lambda request: complaints.append(request.url) if not request.url.startswith("file:") else None)
    page.goto((digits / "runs" / "default" / "report.html").as_uri())
    expect(page.locator("svg")).to_have_count(6)
    found = Axe().run(page).response["violations"]
    assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert complaints == []
    page.close()
