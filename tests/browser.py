"""A headless Chromium, driven through its DevTools protocol over a pipe: no package is needed for it.

CHROMIUM names another binary than the first of those on the PATH.
"""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time

_BINARIES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-extensions", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
_SECONDS = 60.0
# The browser reads commands from its file 3 and writes answers to 4; first out of each other's way.
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for end, place in zip(ends, (3, 4)):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find() -> str | None:
    """The path of a Chromium or Chrome, or None."""
    named = os.environ.get("CHROMIUM")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, _BINARIES)), None)


_TEXTS = """(() => {
  const numbers = colour => (colour.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = e => {
    for (; e; e = e.parentElement) {
      const found = numbers(getComputedStyle(e).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {
    const node = walker.currentNode, e = node.parentElement, box = e.getBoundingClientRect();
    if (!node.data.trim() || !box.width || e.closest('.skip-link, title, style, defs')) continue;
    if (!e.checkVisibility()) continue;
    if (e.closest('[id^=figure-embeddings]') && /^\\d+$/.test(node.data.trim())) continue;  // a mark, no text
    const style = getComputedStyle(e), drawn = e instanceof SVGElement;
    const scale = drawn ? Math.abs(e.ownerSVGElement.getScreenCTM().a) : 1;
    const [ink, paper] = [light(numbers(drawn ? style.fill : style.color)), light(ground(e))];
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    found.push([node.data.trim().slice(0, 40), parseFloat(style.fontSize) * scale, ratio]);
  }
  return found;
})()"""


class Page:
    """One tab. `events` holds all that the browser has told of itself, requests and console included."""

    def __init__(self, reading: int, writing: int):
        self._reading, self._writing, self._buffer = reading, writing, b""
        self._numbers, self._session = itertools.count(1), None
        self.events: list[dict] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _message(self) -> dict:
        deadline = time.monotonic() + _SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._reading], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"the browser said nothing for {_SECONDS} s"
            part = os.read(self._reading, 1 << 20)
            assert part, "the browser went away"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def call(self, method: str, **params) -> dict:
        """The result of a DevTools command; AssertionError where it fails."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self.events.append(answer)

    def show(self, url: str, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Load `url` in a window of this width, in a light or dark theme; back when it has loaded."""
        self.events.clear()
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            mobile=phone,
            deviceScaleFactor=2 if phone else 1,
        )
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=theme)
        self.call("Page.navigate", url=url)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._message())

    def run(self, expression: str):
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def texts(self) -> list[tuple[str, float, float]]:
        """(text, its height in CSS pixels as it is shown, contrast to its ground) of all that can be read.

        WCAG's ratio of luminances; the ground is the nearest background that is not transparent. The numbers
        that stand for points in the plane of the embeddings are marks.
        """
        return [tuple(found) for found in self.run(_TEXTS)]

    def complaints(self) -> list[str]:
        """What was written to the console or its log since the page was asked for, exceptions included."""
        self.run("0")  # what has happened has been told by now
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(e["params"]) for e in self.events if e.get("method") in kinds]

    def requests(self) -> list[str]:
        """The URLs that were asked for."""
        sent = (e["params"] for e in self.events if e.get("method") == "Network.requestWillBeSent")
        return [params["request"]["url"] for params in sent]

    def screenshot(self, whole: bool = True) -> bytes:
        """The page as a PNG."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])

    def pdf(self) -> bytes:
        """The page as it is printed, A4."""
        answer = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=False)
        return base64.b64decode(answer["data"])


@contextlib.contextmanager
def page(folder):
    """A `Page` of a browser of its own, whose profile lies in `folder`; it ends with the block."""
    binary = find()
    assert binary is not None
    (child_in, writing), (reading, child_out) = os.pipe(), os.pipe()
    start = [sys.executable, "-c", _START, str(child_in), str(child_out)]
    process = subprocess.Popen(
        [*start, binary, *_FLAGS, f"--user-data-dir={folder}"],
        pass_fds=(child_in, child_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(child_in)
    os.close(child_out)
    try:
        yield Page(reading, writing)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(reading)
        os.close(writing)
