"""The chat page in headless Chromium, driven over its DevTools pipe. Skipped where there is no Chromium."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.serve.running import ECHO

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")


class Browser:
    """One page of a headless Chromium."""

    def __init__(self, profile: Path) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()

        def move_pipes() -> None:  # to the numbers that --remote-debugging-pipe means
            os.dup2(theirs_in, 198), os.dup2(theirs_out, 199)
            os.dup2(198, 3), os.dup2(199, 4)

        self.process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--remote-debugging-pipe", f"--user-data-dir={profile}", "--window-size=1200,900", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=move_pipes, close_fds=False,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out = os.fdopen(ours_in, "rb", 0), os.fdopen(ours_out, "wb", 0)
        self._buffer, self._count, self._session = b"", 0, None
        self.events: list[dict] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                data = self._in.read(1 << 16)
                assert data, "chromium has ended"
                self._buffer += data
            line, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def run(self, code: str):
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, code: str, seconds: float = 120):
        end = time.monotonic() + seconds
        while not (value := self.run(code)):
            assert time.monotonic() < end, f"{code} is {value!r}; the page: {self.run('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && document.querySelector('#model option') !== null")

    def say(self, text: str) -> None:
        self.run(f"document.querySelector('#input').value = {json.dumps(text)}")
        self.run("document.querySelector('#send').click()")

    def answer(self) -> None:
        """Waits until the last answer is there."""
        self.until("document.querySelector('#stop').hidden && !document.querySelector('.writing')")

    def screenshot(self, name: str) -> None:
        """Kept where LLMCORE_ARTEFACTS says, if anywhere."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        assert data.startswith(b"\x89PNG")
        assert len(data) > 5000
        if folder := os.environ.get("LLMCORE_ARTEFACTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / name).write_bytes(data)

    def problems(self) -> list[str]:
        """What the page complained of: exceptions, errors, breaches of its own policy."""
        self.run("1")
        found = []
        for event in self.events:
            if event.get("method") == "Runtime.exceptionThrown" or (
                event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error"
            ):
                found.append(json.dumps(event["params"]))
        return found

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._out.close()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._in.close()


@pytest.fixture
def browser(tmp_path):
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


@needs_chromium
def test_a_chat(browser, echo):
    browser.open(echo.url)
    links = "- a *rat*\n- [a link](https://example.org/)"
    browser.say(f"«The **cat** sat `on` the mat:\n\n{links}\n\n```python\nx = [1]\n```»")
    browser.answer()
    last = "document.querySelector('.message.assistant:last-child')"
    assert browser.run(f"{last}.querySelector('strong').textContent") == "cat"
    assert browser.run(f"{last}.querySelectorAll('li').length") == 2
    assert browser.run(f"{last}.querySelector('pre code').textContent") == "x = [1]"
    assert browser.run(f"{last}.querySelector('a').href") == "https://example.org/"
    assert "tokens in" in browser.run("document.querySelector('#status').textContent")
    browser.say("«And **again**»")
    browser.answer()
    assert browser.run("document.querySelectorAll('.message').length") == 4
    browser.screenshot("chat.png")
    browser.run("document.querySelector('#new').click()")
    assert browser.run("document.querySelectorAll('.message').length") == 0
    assert browser.problems() == []


ATTACK = """<script>window.hit = 1</script>
<img src=x onerror="window.hit = 2">
<svg onload="window.hit = 3"></svg> **<b onclick="window.hit=4">bold</b>**
[click](javascript:window.hit=5) [data](data:text/html,<script>1</script>)
`<script>window.hit = 6</script>`

```html
<script>window.hit = 7</script><img src=x onerror=window.hit=8>
```

| <img src=x onerror=window.hit=9> | b |
| --- | --- |
| <iframe src="javascript:window.hit=10"></iframe> | c |

> <style>* { display: none }</style>
"""


@needs_chromium
def test_what_a_model_writes_is_text(browser, echo):
    """Markup in an answer, and in what the user says, is shown and does nothing."""
    browser.open(echo.url)
    browser.say(f"«{ATTACK}»")
    browser.answer()
    shown = browser.run("document.querySelector('#messages').textContent")
    for part in ("<script>window.hit = 1</script>", 'onerror="window.hit = 2"', "<svg onload", "<iframe", "<style>"):
        assert shown.count(part) == 2, part  # in what was said and in the answer
    assert "javascript:window.hit=5" in shown  # not made a link
    elements = "script, img, svg, iframe, style, [onerror], [onload], [onclick], a"
    assert browser.run(f"document.querySelectorAll('#messages :is({elements})').length") == 0
    time.sleep(0.3)
    assert browser.run("window.hit === undefined")
    browser.screenshot("markup.png")
    assert browser.problems() == []


@needs_chromium
def test_the_policy_holds_where_the_page_would_fail(browser, echo):
    """Even markup that got into the document could run nothing."""
    browser.open(echo.url)
    browser.run("document.querySelector('#messages').innerHTML = '<img src=x onerror=\"window.hit = 1\">'")
    script = "s = document.createElement('script'); s.textContent = 'window.hit = 2'; document.body.append(s)"
    browser.run(f"(() => {{ const {script} }})()")
    time.sleep(0.5)
    assert browser.run("window.hit === undefined")
    assert any("Content Security Policy" in problem for problem in browser.problems())


@needs_chromium
def test_stop_settings_and_errors(browser, start):
    server = start(ECHO, "--delay", 0.05, "--api_keys", "sesame", "--max_tokens", 600)
    browser.call("Page.navigate", url=server.url)
    browser.until("document.querySelector('#status')?.classList.contains('error')")
    browser.run("document.querySelector('#key').value = 'sesame'; "
                "document.querySelector('#key').dispatchEvent(new Event('change'))")  # fmt: skip
    browser.until("document.querySelector('#model option') !== null")
    browser.say("«" + "the cat sat on the mat " * 20 + "»")
    browser.until("document.querySelector('.message.assistant')?.textContent.length > 8")  # while it is written
    assert browser.run("!document.querySelector('#stop').hidden")
    browser.run("document.querySelector('#stop').click()")
    browser.answer()
    assert browser.run("document.querySelector('#status').textContent") == "stopped"
    server.idle()
    length = browser.run("document.querySelector('.message.assistant').textContent.length")
    assert 8 < length < 400
    browser.run("document.querySelector('#max_tokens').value = 2")
    browser.say("«the cat sat on the mat»")
    browser.answer()
    assert "2 tokens" in browser.run("document.querySelector('#status').textContent")
    browser.run("document.querySelector('#max_tokens').value = 100000")
    browser.say("«the cat»")
    browser.answer()
    assert "max_tokens is 100000" in browser.run("document.querySelector('.message.error').textContent")


def test_the_page_is_served_strictly(echo):
    for path, kind in (("/", "text/html"), ("/page.js", "javascript"), ("/page.css", "text/css")):
        status, headers, body = echo.request("GET", path)
        assert status == 200
        assert kind in headers["content-type"]
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert body
    page = echo.request("GET", "/page.js")[2].decode()
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert word not in page
    for path in ("/?file=/etc/passwd", "/page.js?file=/etc/passwd"):
        assert b"root:" not in echo.request("GET", path)[2]
    assert echo.request("GET", "/../app.py")[0] == 404
    assert echo.request("GET", "/%2e%2e/app.py")[0] == 404
