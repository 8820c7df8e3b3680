"""A headless Chromium, spoken to over a pipe by the DevTools protocol: what pages look like, without any package.

https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"
ANSWERS_WITHIN = 120  # seconds, on a machine that does other things too

# A page's pictures, whether it scrolls sideways, and the text that is cut off or too small to read.
MEASURE = """(() => {
  const box = x => { const r = x.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const texts = [...document.querySelectorAll("svg text")];
  const outside = texts.filter(t => {
    const [l, u, r, d] = box(t), [L, U, R, D] = box(t.ownerSVGElement);
    return l < L - 1 || u < U - 1 || r > R + 1 || d > D + 1;
  });
  const scale = s => s.getBoundingClientRect().width / s.viewBox.baseVal.width;
  return {
    pictures: [...document.querySelectorAll("svg")].map(s => ({
      label: s.getAttribute("aria-label"), box: box(s), texts: s.querySelectorAll("text").length,
      shapes: s.querySelectorAll("polyline, polygon, rect").length, scale: scale(s)})),
    scrolls_by: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    outside: outside.map(t => t.textContent + " in " + t.ownerSVGElement.getAttribute("aria-label")),
    background: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    text_ink: [...new Set(texts.map(t => getComputedStyle(t).fill))],
  };
})()"""


def find_browser():
    """The path of a Chromium or Chrome, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Look:
    """What a browser made of a page: errors it reported, and what `MEASURE` found."""

    errors: list
    measured: dict


class Browser:
    """One process for several pages."""

    def __init__(self, path):
        self._path = path
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._last, self._buffer, self._events = 0, b"", []

    def __enter__(self):
        read_theirs, self._write = os.pipe()
        self._read, write_theirs = os.pipe()
        command = [
            self._path,
            "--headless",
            "--remote-debugging-pipe",  # on file descriptors 3 and 4
            "--no-sandbox",  # which containers do not allow; it opens nothing but our own file
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            f"--user-data-dir={self._profile.name}",
        ]
        redirected = f'exec "$0" "$@" 3<&{read_theirs} 4>&{write_theirs}'
        self._process = subprocess.Popen(
            ["bash", "-c", redirected, *command],
            pass_fds=(read_theirs, write_theirs),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_theirs)
        os.close(write_theirs)
        return self

    def __exit__(self, *exception):
        try:
            self._send("Browser.close")
            self._process.wait(timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def look(self, page, width, dark=False, picture=None, height=900):
        """Open a file of HTML at a width in pixels; optionally write a PNG of the whole of it."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable", session)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", session, **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", session, features=[scheme])
        self._events.clear()
        self._call("Page.navigate", session, url=Path(page).resolve().as_uri())
        if not any(map(_is_load, self._events)):  # which may come before the answer to the call
            self._wait_for(_is_load)
        result = self._call("Runtime.evaluate", session, expression=MEASURE, returnByValue=True)["result"]
        if picture is not None:
            shot = self._call("Page.captureScreenshot", session, captureBeyondViewport=True, format="png")
            Path(picture).write_bytes(base64.b64decode(shot["data"]))
        errors = [text for message in self._events if (text := _error_of(message))]
        self._call("Target.closeTarget", targetId=target)
        return Look(errors, result["value"])

    def _call(self, method, session=None, **params):
        number = self._send(method, session, **params)
        answer = self._wait_for(lambda message: message.get("id") == number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _send(self, method, session=None, **params):
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        return self._last

    def _wait_for(self, is_it):
        end = time.monotonic() + ANSWERS_WITHIN
        while True:
            while b"\0" in self._buffer:
                line, _, self._buffer = self._buffer.partition(b"\0")
                message = json.loads(line)
                self._events.append(message)
                if is_it(message):
                    return message
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            chunk = os.read(self._read, 1 << 20) if ready else b""
            assert chunk, f"{self._path} said nothing for {ANSWERS_WITHIN} s, or ended"
            self._buffer += chunk


def _is_load(message):
    return message.get("method") == "Page.loadEventFired"


def _error_of(message):
    """The text of what a browser's console shows as an error or a warning, or of a request that failed; else None."""
    method, params = message.get("method"), message.get("params", {})
    if method == "Runtime.exceptionThrown":
        return params["exceptionDetails"].get("text", "exception")
    if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
        return " ".join(str(argument.get("value")) for argument in params["args"])
    if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
        return params["entry"]["text"]
    if method == "Network.loadingFailed":
        return params["errorText"]
    return None
