"""Debian's headless Chromium, driven over the DevTools protocol by a pipe.

A tab notes what must not happen: requests to another origin than its own, violations of the
Content-Security-Policy, and errors of scripts. The keyboard is real input, not events that a script makes.
"""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser")
TIMEOUT = 30
"""Seconds until something that is waited for must be true."""

_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowUp": 38, "ArrowDown": 40, "Home": 36, "End": 35}
_NOTING = (
    "addEventListener('securitypolicyviolation', (e) => console.error(`CSP: ${e.violatedDirective} ${e.blockedURI}`))"
)
_FOCUSED = (
    "(({ariaLabel, labels, innerText}) => ariaLabel || labels?.[0]?.innerText || innerText)(document.activeElement)"
)


def program() -> str | None:
    """Return the path of a Chromium on this machine, None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class CommandError(Exception):
    """The browser refused a command."""


class ScriptError(Exception):
    """An expression raised in the page."""


class Tab:
    """One page of a browser."""

    def __init__(self, browser: "Browser", session: str) -> None:
        self._browser, self.session = browser, session
        self.requests: list[str] = []
        self.complaints: list[str] = []
        browser.listeners[session] = self._note
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.send(f"{domain}.enable")
        self.send("Page.addScriptToEvaluateOnNewDocument", source=_NOTING)

    def _note(self, method: str, said: dict[str, Any]) -> None:
        match method:
            case "Network.requestWillBeSent":
                self.requests.append(said["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(said["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if said["type"] in ("error", "warning", "assert"):
                self.complaints.append(json.dumps(said["args"]))
            case "Log.entryAdded" if said["entry"]["source"] in ("security", "violation", "javascript"):
                self.complaints.append(said["entry"]["text"])

    def send(self, method: str, **parameters: Any) -> Any:
        """Send a command, and return its result."""
        return self._browser.send(method, self.session, **parameters)

    def open(self, url: str) -> None:
        """Load an address from anew, and wait until its document is whole: a text may be seen before."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def world(self, name: str) -> int:
        """Return a world of scripts that shares the document with the page, and nothing else."""
        frame = self.send("Page.getFrameTree")["frameTree"]["frame"]["id"]
        return int(self.send("Page.createIsolatedWorld", frameId=frame, worldName=name)["executionContextId"])

    def run(self, expression: str, world: int | None = None) -> Any:
        """Evaluate an expression (its promise is awaited), and return its JSON value; raise `ScriptError`.

        It is evaluated among the page's scripts, or in a `world` of its own.
        """
        place = {} if world is None else {"contextId": world}
        try:
            result = self.send(
                "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, **place
            )
        except CommandError as error:  # the page is replaced by another one
            raise ScriptError(str(error)) from error
        if "exceptionDetails" in result:
            raise ScriptError(json.dumps(result["exceptionDetails"]))
        return result["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + TIMEOUT
        while True:
            with contextlib.suppress(ScriptError):  # the page may be changing
                if self.run(f"Boolean({expression})"):
                    return
            if time.monotonic() > end:
                raise AssertionError(f"{expression} did not become true; the page:\n{self.text()}\n{self.complaints}")
            self._browser.pump(0.05)

    def text(self, selector: str = "body") -> str:
        """Return the visible text of an element, empty if there is none."""
        return str(self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def see(self, text: str, selector: str = "body") -> None:
        """Wait until an element shows a text."""
        self.wait(f"document.querySelector({json.dumps(selector)})?.innerText.includes({json.dumps(text)})")

    def press(self, *keys: str) -> None:
        """Press keys, one after another."""
        for key in keys:
            code = {"key": key, "windowsVirtualKeyCode": _KEYS.get(key, 0), "code": "Space" if key == " " else key}
            text = {"Enter": "\r", " ": " "}.get(key)
            self.send("Input.dispatchKeyEvent", type="keyDown", **code, **({"text": text} if text else {}))
            self.send("Input.dispatchKeyEvent", type="keyUp", **code)

    def write(self, text: str) -> None:
        """Type a text into what has the focus."""
        self.send("Input.insertText", text=text)

    def focused(self) -> str:
        """Return the accessible name, or the text, of what has the focus."""
        return str(self.run(_FOCUSED))

    def tab_to(self, name: str, most: int = 120) -> None:
        """Press Tab until what has the focus begins with a name."""
        seen = []
        for _ in range(most):
            self.press("Tab")
            seen.append(self.focused().strip().split("\n")[0])
            if seen[-1].startswith(name):
                return
        raise AssertionError(f"Tab does not reach {name!r}, but {seen}")

    def unnamed(self) -> list[str]:
        """Return the roles of what takes the focus, but has no accessible name."""
        nodes = self.send("Accessibility.getFullAXTree")["nodes"]
        return [
            f"{node['role']['value']} {node.get('properties')}"
            for node in nodes
            if not node.get("ignored")
            and node.get("role", {}).get("value") not in ("RootWebArea", "generic", "main")
            and any(each["name"] == "focusable" and each["value"].get("value") for each in node.get("properties", ()))
            and not node.get("name", {}).get("value")
        ]

    def screenshot(self, path: Path) -> None:
        """Write a picture (PNG) of the window."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def resize(self, width: int, height: int, *, scale: float = 1, dark: bool = False, mobile: bool = False) -> None:
        """Make the window of that size in CSS pixels, with a preference for dark or light."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )
        self.send("Emulation.setTouchEmulationEnabled", enabled=mobile)  # a finger is a coarse pointer
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=features)


class Browser:
    """A running Chromium, with its messages over two pipes."""

    def __init__(self, process: subprocess.Popen[bytes], reading: int, writing: int) -> None:
        self.process, self._reading, self._writing = process, reading, writing
        self.listeners: dict[str, Callable[[str, dict[str, Any]], None]] = {}
        self._received = b""
        self._count = 0
        self._answers: dict[int, dict[str, Any]] = {}

    def send(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """Send a command, and return its result; raise `CommandError` if it is refused."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + TIMEOUT
        while self._count not in self._answers:
            assert time.monotonic() < end, f"{method}: no answer in {TIMEOUT} seconds"
            self.pump(1)
        answer = self._answers.pop(self._count)
        if "error" in answer:
            raise CommandError(f"{method}: {answer}")
        return answer["result"]

    def pump(self, seconds: float) -> None:
        """Take in what the browser says, for some seconds at most if it says nothing."""
        if not select.select([self._reading], [], [], seconds)[0]:
            return
        read = os.read(self._reading, 1 << 20)
        assert read, "the browser has ended"
        *messages, self._received = (self._received + read).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            elif listener := self.listeners.get(message.get("sessionId", "")):
                listener(message["method"], message["params"])

    def tab(self) -> Tab:
        """Open an empty page, with cookies and storage of its own."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        return Tab(self, self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])


@contextlib.contextmanager
def chromium(folder: Path, home: Path | None = None) -> Iterator[Browser]:
    """Run Chromium, with its profile in a folder, until the block ends; `home` is the home of its user."""
    path = program()
    assert path, "no Chromium: install chromium-headless-shell"
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    command = [
        path,
        "--headless",
        "--no-sandbox",  # the tests may run as root
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-partial-raster",  # what changes is drawn anew in whole, to the same pixels
        "--disable-background-networking",
        "--host-resolver-rules=MAP *.example 127.0.0.1, MAP *.attacker.com 127.0.0.1",  # foreign names that lead here
        f"--user-data-dir={folder}",
        "--remote-debugging-pipe",
        "about:blank",
    ]
    # Chromium reads from descriptor 3 and writes to 4; until then both have numbers that the shell does not use.
    passed = [fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (theirs_in, theirs_out)]
    shell = ["bash", "-c", f'exec "$@" 3<&{passed[0]} 4>&{passed[1]}', "-", *command]
    with (folder / "log").open("wb") as log:
        user = {"HOME": str(home)} if home else {}
        process = subprocess.Popen(shell, pass_fds=passed, stderr=log, stdout=log, env={**os.environ, **user})
    for each in (theirs_in, theirs_out, *passed):
        os.close(each)
    browser = Browser(process, ours_in, ours_out)
    try:
        yield browser
    finally:
        with contextlib.suppress(AssertionError, CommandError, OSError):
            browser.send("Browser.close")
        process.wait(TIMEOUT)
        os.close(ours_in)
        os.close(ours_out)
