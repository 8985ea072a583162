"""The page: its files, its settings, and what a person does with it in a browser."""

import ast
import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from emlocal.backends.fake import saying
from emlocal.chat.conversation import Conversation
from emlocal.methods import METHODS
from emlocal.serve.page import FILES, SETTINGS
from tests.serve.servers import KEY, Running, endless, running

ROOT = Path(__file__).parents[2]
PAGE = files("emlocal.serve").joinpath("page")
CHROMIUM = shutil.which("chromium")
HOSTILE = (
    '<script>window.hit=1</script><img src=x onerror="window.hit=2">'
    "</span><svg onload=window.hit=3><a href='javascript:window.hit=4'>x</a>"
)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(endless, seconds=0.005) as found:
        yield found


# ---------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("path", [*FILES])
def test_the_files_come_with_type_and_policy(server: Running, path: str) -> None:
    with server.client() as client:
        found = client.get(path)
    assert found.status_code == 200
    name, kind = FILES[path]
    assert found.headers["content-type"] == kind
    assert found.content == PAGE.joinpath(name).read_bytes()
    policy = dict(part.split(" ", 1) for part in found.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert found.headers["x-content-type-options"] == "nosniff"


def test_there_is_no_other_file(server: Running) -> None:
    with server.client() as client:
        for path in (
            "/page.py",
            "/page/",
            "/page/page.js",
            "/page.js%2f..",
            "/%2e%2e/page.py",
            "/index.html",
        ):
            assert client.get(path).status_code == 404, path


def test_all_files_are_in_the_package() -> None:
    assert {each.name for each in PAGE.iterdir()} == {name for name, _ in FILES.values()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["emlocal.serve"]
    assert all(any(fnmatch(f"page/{name}", each) for each in patterns) for name, _ in FILES.values())


def test_the_page_works_offline() -> None:
    """Nothing comes from elsewhere, and no script or style stands in the page."""
    for name, _ in FILES.values():
        found = {*re.findall(r"https?://[^\s'\"]+", PAGE.joinpath(name).read_text())}
        assert found <= {"http://www.w3.org/2000/svg"}, name
    page = PAGE.joinpath("index.html").read_text()
    assert re.findall(r"<script[^>]*>(.*?)</script>", page) == [""]
    assert not re.search(r"<style|\son\w+=|\sstyle=", page)


def test_the_script_makes_no_markup_of_texts() -> None:
    script = PAGE.joinpath("page.js").read_text()
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function",
                 "DOMParser", "createContextualFragment", "srcdoc", "import("):  # fmt: skip
        assert word not in script, word


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_can_be_parsed() -> None:
    script = PAGE.joinpath("page.js").read_bytes()
    found = subprocess.run(
        ["node", "--check", "--input-type=module"],
        input=script,
        capture_output=True,
    )
    assert found.returncode == 0, found.stderr.decode()


# ------------------------------------------------------------------------------------------- the settings


def test_the_settings_are_the_tables(server: Running) -> None:
    with server.client() as client:
        found = client.get("/settings").json()
    assert found["model"] == "fake"
    told = {each["name"]: each for each in found["settings"]}
    assert [*told] == [*SETTINGS.settings]
    for name, known in SETTINGS.settings.items():
        each = told[name]
        assert each["help"] == known.full_help
        assert each["range"] == known.described()
        assert each["default"] == (list(known.default) if isinstance(known.default, tuple) else known.default)
        for bound, value in (("low", known.low), ("high", known.high)):
            assert each[bound] == (None if abs(value) == float("inf") else value)
    assert told["method"]["choices"] == [*METHODS]
    assert not {"allow_code", "pattern"} & told.keys()
    assert "regex" not in told["extraction"]["choices"]


def test_the_settings_say_what_is_in_force() -> None:
    given = {"em_inf": True, "em_threshold": 0.2, "temperature": 0.5, "max_tokens": 9}
    with running(given=given) as found, found.client() as client:
        told = {each["name"]: each["value"] for each in client.get("/settings").json()["settings"]}
    assert {name: told[name] for name in given} == given
    assert told["adaptive_temp"] is False


def test_each_setting_is_taken_by_its_name(server: Running) -> None:
    """A value of the table itself is never an unknown field."""
    for name, value in {
        "top_k": 5,
        "em_inf": True,
        "stop": ["x"],
        "logit_bias": ["97=1"],
        "think": False,
    }.items():
        assert name in SETTINGS.settings
        assert server.chat(**{name: value, "max_tokens": 2})["choices"]


def test_the_key_is_for_the_settings_not_for_the_files() -> None:
    with running(keys=[KEY]) as found, found.client() as client:
        assert all(client.get(path).status_code == 200 for path in FILES)
        assert client.get("/settings").status_code == 401
        bearer = {"Authorization": f"Bearer {KEY.decode()}"}
        assert client.get("/settings", headers=bearer).status_code == 200


# --------------------------------------------------------------------------------------------- a browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with api.sync_playwright() as made:
        found = made.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Any]:
    """A page that must not write errors to its console."""
    made = chromium.new_page()
    wrong: list[str] = []
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    yield made
    made.close()
    assert not [each for each in wrong if "401" not in each]


def opened(tab: Any, server: Running, **settings: Any) -> Any:
    tab.goto(server.url)
    tab.wait_for_selector('#model:text-is("fake")')
    if settings:
        tab.click("#open-settings")
        for name, value in settings.items():
            field = tab.locator(f"#set-{name}")
            if not field.is_visible():
                tab.locator("details", has=field).locator("summary").click()
            field.fill(str(value))
        tab.click("#settings button.main")
    return tab


def ask(tab: Any, question: str) -> None:
    tab.fill("#question", question)
    tab.press("#question", "Enter")


def ended(tab: Any) -> None:
    tab.wait_for_selector("#stop", state="hidden", timeout=20_000)


@pytest.mark.browser
def test_send_numbers_and_keys(server: Running, tab: Any) -> None:
    opened(tab, server, seed=5, max_tokens=12)
    ask(tab, "Hello")
    ended(tab)
    expected = server.text(seed=5, max_tokens=12)
    assert tab.text_content(".answer .said") == expected
    tokens = tab.locator(".answer .t")
    assert all(
        re.search(r"\be[0-4]\b", each) for each in tokens.evaluate_all("all => all.map(n => n.className)")
    )
    tokens.nth(0).hover()
    assert re.search(r"Entropy\d\.\d\d nats", tab.text_content("#card"))
    tokens.nth(0).focus()
    tab.keyboard.press("ArrowRight")
    assert tokens.nth(1).evaluate("node => node === document.activeElement")
    assert "Entropy" in tab.text_content("#live")
    tab.keyboard.press("Enter")
    assert tab.locator("#card li").count() == 5
    assert tab.locator("#card").evaluate("node => node.contains(document.activeElement)")
    tab.keyboard.press("Escape")
    assert tab.locator("#card").is_hidden()
    assert tokens.nth(1).evaluate("node => node === document.activeElement")
    assert "Entropy along the answer" in tab.get_attribute("svg.curve", "aria-label")


@pytest.mark.browser
def test_stop_ends_the_request(tab: Any) -> None:
    with running(endless, seconds=0.01) as slow:
        opened(tab, slow)
        ask(tab, "Hello")
        tab.wait_for_selector(".answer .t")
        tab.click("#stop")
        ended(tab)
        slow.wait(slow.idle)
        assert "stopped" in tab.text_content(".foot")
        assert tab.text_content(".answer .said")


@pytest.mark.browser
def test_compare_branch_and_reload(server: Running, tab: Any) -> None:
    opened(tab, server, seed=3, max_tokens=20)
    tab.check("#compare")
    ask(tab, "Hello")
    ended(tab)
    both = [
        server.chat(seed=3, max_tokens=20, em_inf=on)["choices"][0]["message"]["content"]
        for on in (False, True)
    ]
    texts = tab.locator(".answer .said")
    spoken = "≠ first difference "
    assert [texts.nth(i).text_content().replace(spoken, "") for i in (0, 1)] == both
    assert tab.locator(".differs").count() == 2
    before = [texts.nth(i).text_content().split(spoken)[0] for i in (0, 1)]
    assert before[0] == before[1]
    tab.locator(".answer").nth(0).locator(".t").nth(1).click()
    other = tab.locator("#card li button:not([disabled])").first
    chosen = other.locator("code").text_content()
    other.click()
    ended(tab)
    assert tab.text_content(".answer .picked") == chosen
    begun = both[0][0] + tab.locator(".picked").text_content()
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": begun}]
    rest = server.text(messages=messages, seed=3, max_tokens=20, em_inf=False)
    shown = texts.nth(0).text_content().replace(spoken, "")
    assert shown == begun + rest
    tab.reload()
    tab.wait_for_selector(".answer .said")
    assert tab.text_content(".answer .said") == shown
    assert tab.is_checked("#compare")


@pytest.mark.browser
def test_a_conversation_is_the_file_of_chat(tab: Any, tmp_path: Path) -> None:
    with running(saying("One.", "Two.")) as speaker:
        opened(tab, speaker, system="Be short.")
        for question in ("First?", "Second?"):
            ask(tab, question)
            ended(tab)
        with tab.expect_download() as download:
            tab.click("#save")
        path = tmp_path / "chat.json"
        download.value.save_as(path)
        loaded = Conversation.load(path)
        assert loaded == Conversation("Be short.", [("First?", "One."), ("Second?", "Two.")])
        tab.click("#new")
        assert tab.locator(".exchange").count() == 0
        loaded.exchanges.append(("Third <b>?", HOSTILE))
        loaded.save(path, "fake")
        tab.set_input_files("#file", path)
        tab.wait_for_selector(".exchange:nth-of-type(4)")  # after the welcome
        assert tab.locator(".answer .said").nth(2).text_content() == HOSTILE
        path.write_text('{"format": "emlocal-chat-1", "exchanges": [{"question": 1}]}')
        tab.set_input_files("#file", path)
        tab.wait_for_selector("#status.bad")
        assert tab.locator(".exchange").count() == 3


@pytest.mark.browser
def test_hostile_texts_do_nothing(tab: Any) -> None:
    with running(saying(HOSTILE)) as speaker:
        opened(tab, speaker)
        ask(tab, HOSTILE)
        ended(tab)
        assert tab.text_content(".answer .said") == HOSTILE
        assert tab.text_content(".asked") == HOSTILE
        long = "<b>" + "x" * 200_000
        token = {"token": long, "logprob": -1.0, "bytes": [*long.encode()], "top_logprobs": [],
                 "emlocal": {"token_id": 1, "entropy_before": 1.0, "entropy_after": 1.0, "steps": 0,
                             "logprob_after": -1.0, "changed": False}}  # fmt: skip
        choice = {
            "index": 0,
            "delta": {"content": long},
            "finish_reason": "stop",
            "logprobs": {"content": [token]},
        }
        stream = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
        tab.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(body=stream, content_type="text/event-stream"),
        )
        ask(tab, "Long?")
        ended(tab)
        assert tab.locator(".answer .said").nth(1).text_content() == long
        assert tab.evaluate("window.hit") is None
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert tab.locator(".exchange :is(b, img, a, script)").count() == 0


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen(server: Running, chromium: Any, scheme: str) -> None:
    tab = chromium.new_page(viewport={"width": 360, "height": 640}, color_scheme=scheme)
    opened(tab, server, max_tokens=40)
    tab.check("#compare")
    ask(tab, "Hello")
    ended(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    one, two = (tab.locator(".answer").nth(i).bounding_box() for i in (0, 1))
    assert two["y"] >= one["y"] + one["height"]
    ink = ast.literal_eval(tab.evaluate("getComputedStyle(document.body).color").removeprefix("rgb"))
    assert (sum(ink) > 380) == (scheme == "dark")
    tab.close()


@pytest.mark.browser
def test_the_page_asks_for_the_key(tab: Any) -> None:
    with running(saying("Yes."), keys=[KEY]) as locked:
        tab.goto(locked.url)
        tab.fill("#key-text", KEY.decode())
        tab.press("#key-text", "Enter")
        tab.wait_for_selector('#model:text-is("fake")')
        ask(tab, "Hello")
        ended(tab)
        assert tab.text_content(".answer .said") == "Yes."
