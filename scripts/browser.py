"""Drives a headless Chromium by its DevTools protocol over a pipe, with the standard library alone.

    with Browser(find()) as browser:
        page = browser.page(url, width=390, dark=True)
        page.value("document.title")
        page.screenshot(Path("report.png"))
        page.problems()

https://chromedevtools.github.io/devtools-protocol/ describes the methods.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
import zlib
from pathlib import Path

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
SECONDS = 30  # the limit for an answer
HEIGHT = 900


def find():
    """The path of Chromium, or None if there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A running Chromium."""

    def __init__(self, binary):
        self.profile = tempfile.mkdtemp(prefix="check-report-")
        command_read, self.commands = os.pipe()
        self.answers, answer_write = os.pipe()
        # Chromium reads commands from descriptor 3 and writes answers to 4
        shell = f'exec "$@" 3<&{command_read} 4>&{answer_write}'
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += ["--no-first-run", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", binary, *options, f"--user-data-dir={self.profile}"],
            pass_fds=[command_read, answer_write],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read)
        os.close(answer_write)
        self.buffer, self.count, self.events = b"", 0, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.call("Browser.close")
            self.process.wait(10)
        except (OSError, RuntimeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.commands)
        os.close(self.answers)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method, session=None, **parameters):
        """Calls a method and returns its result."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.count:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def read(self):
        """The next message of Chromium."""
        end = time.monotonic() + SECONDS
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.answers], [], [], max(0, end - time.monotonic()))
            new = os.read(self.answers, 1 << 20) if ready else b""
            if not new:
                raise RuntimeError("Chromium does not answer")
            self.buffer += new
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def page(self, url, width, dark=False, media="screen"):
        """Opens a page as a screen of this width, or a printer, shows it."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Page(self, target, session).open(url, width, dark, media)


class Page:
    """A page in a browser."""

    def __init__(self, browser, target, session):
        self.browser, self.target, self.session = browser, target, session

    def call(self, method, **parameters):
        """Calls a method of the page."""
        return self.browser.call(method, self.session, **parameters)

    def open(self, url, width, dark, media):
        """Loads the page."""
        for domain in ["Page", "Log", "Runtime", "Network"]:
            self.call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        size = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=url)
        end = time.monotonic() + SECONDS
        while self.value("document.readyState") != "complete":
            if time.monotonic() > end:
                raise RuntimeError(f"`{url}` is not loaded")
            time.sleep(0.05)
        return self

    def value(self, expression):
        """The value of an expression in JavaScript."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']['text']}")
        return answer["result"].get("value")

    def screenshot(self, file: Path):
        """Writes a picture of the whole page. Returns the share of bytes that are no repetition of
        their neighbours, which is next to 0 for an empty page."""
        height = min(16000, self.value("document.documentElement.scrollHeight"))
        width = self.value("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        answer = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        picture = base64.b64decode(answer["data"])
        file.write_bytes(picture)
        return detail(picture)

    def pdf(self, file: Path):
        """Prints the page into a file."""
        answer = self.call("Page.printToPDF", printBackground=False, preferCSSPageSize=True)
        file.write_bytes(base64.b64decode(answer["data"]))

    def problems(self):
        """Errors and warnings of the page so far, and requests for anything but itself."""
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            method, of = event.get("method"), event.get("params", {})
            if method == "Log.entryAdded" and of["entry"]["level"] in ("error", "warning"):
                found.append(of["entry"]["text"])
            elif method == "Runtime.exceptionThrown":
                found.append(of["exceptionDetails"]["text"])
            elif method == "Runtime.consoleAPICalled" and of["type"] in ("error", "assert"):
                found.append(str(of["args"]))
            elif method == "Network.requestWillBeSent" and of.get("type") != "Document":
                found.append(f"request for {of['request']['url']}")
        return found

    def close(self):
        """Closes the page."""
        self.browser.call("Target.closeTarget", targetId=self.target)


def detail(picture):
    """The share of a PNG's filtered bytes that are not 0 (https://www.w3.org/TR/png/)."""
    place, packed = 8, b""
    while place < len(picture):
        length = int.from_bytes(picture[place : place + 4], "big")
        if picture[place + 4 : place + 8] == b"IDAT":
            packed += picture[place + 8 : place + 8 + length]
        place += 12 + length
    filtered = zlib.decompress(packed)
    return 1 - filtered.count(0) / len(filtered)
