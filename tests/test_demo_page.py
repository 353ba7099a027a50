"""The browser demo: what its server answers, and the page in headless Chromium where there is one."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import tiny
from deployed import make_model
from PIL import Image

from pseudoseg_fast import demo

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model.onnx", background=0)


@pytest.fixture
def stand_in(tmp_path):
    """A folder with the names of the runtime's files."""
    folder = tmp_path / "dist"
    folder.mkdir()
    for name in demo.RUNTIME_FILES:
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def serve():
    """Start a server of some assets; returns its address."""
    servers = []

    def start(served):
        server = demo.make_server(served)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def status(url, **options):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, **options), timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_server_answers_its_page_on_loopback_and_nothing_else(model, stand_in, serve):
    url = serve(demo.assets(model, stand_in))
    with urllib.request.urlopen(f"{url}/") as answer:
        assert b"Drop a picture here" in answer.read()
        assert "connect-src 'self'" in answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    with urllib.request.urlopen(f"{url}/metadata.json") as answer:
        assert json.load(answer)["classes"] == list(tiny.CLASSES)
    with urllib.request.urlopen(f"{url}/model.onnx") as answer:
        assert answer.read() == model.read_bytes()
    assert status(f"{url}/runtime/ort.wasm.min.js") == 200
    assert status(f"{url}/runtime/../../model.onnx") == 404
    assert status(f"{url}/page.py") == 404
    assert status(f"{url}/", headers={"Host": "elsewhere.example:80"}) == 404
    assert status(f"{url}/", headers={"Host": "127.0.0.1"}) == 200  # as on port 80
    assert status(f"{url}/", method="POST", data=b"picture") == 501


def test_a_runtime_that_is_not_whole_is_refused(model, stand_in, capsys):
    (stand_in / "ort.wasm.min.js").unlink()
    assert tiny.status(demo.main, [str(model), "--runtime", str(stand_in)]) == 2
    assert "lacks ort.wasm.min.js" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "there is no npm to fetch it"),
        ("echo no such package >&2; exit 1", "failed: no such package"),
        (
            "mkdir -p package/dist; echo x > package/dist/ort.wasm.min.js; tar czf x.tgz package",
            "not the expected",
        ),
        ("mkdir package; tar czf x.tgz package", "not the expected"),
        ("echo x > x.tgz", "not the expected"),
    ],
    ids=["no npm", "npm fails", "another package", "empty package", "no archive"],
)
def test_what_npm_brings_is_checked(tmp_path, monkeypatch, script, message):
    monkeypatch.setenv("PSEUDOSEG_CACHE", str(tmp_path / "cache"))
    npm = tmp_path / "npm"
    if script is not None:
        npm.write_text(f"#!/bin/sh\n{script}\n")
        npm.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(npm) if script is not None else None)
    with pytest.raises(RuntimeError, match=message):
        demo.find_runtime(None)
    assert not any(path.name == demo.RUNTIME for path in (tmp_path / "cache").rglob("*"))


# Chromium reads from descriptor 3 and writes to 4.
ON_PIPES = """
import os, sys
for given, high in ((int(sys.argv[1]), 100), (int(sys.argv[2]), 101)):
    os.dup2(given, high)
os.dup2(100, 3)
os.dup2(101, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """Headless Chromium, spoken to in the DevTools protocol over a pair of pipes."""

    def __init__(self, folder):
        child_reads, self._write = os.pipe()
        self._read, child_writes = os.pipe()
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", ON_PIPES, str(child_reads), str(child_writes), *command],
            pass_fds=(child_reads, child_writes),
            stderr=subprocess.DEVNULL,
        )
        os.close(child_reads)
        os.close(child_writes)
        self._answers = os.fdopen(self._read, "rb")
        self._count = 0
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]

    def send(self, method, **parameters):
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            text = bytearray()
            while (byte := self._answers.read(1)) != b"\0":
                assert byte, "Chromium ended"
                text += byte
            answer = json.loads(text)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def evaluate(self, expression):
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression, seconds=60):
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, self.evaluate("document.body.innerText")
            time.sleep(0.1)
        return value

    def close(self):
        self._process.kill()
        self._process.wait()
        self._answers.close()
        os.close(self._write)


@pytest.fixture
def runtime():
    try:
        return demo.find_runtime(None)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.skipif(CHROMIUM is None or sys.platform == "win32", reason="needs Chromium")
def test_the_page_segments_a_picture_by_itself(model, runtime, serve, tmp_path):
    pixels, ids = tiny.picture(0)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    (tmp_path / "text.png").write_text("no picture")
    browser = Browser(tmp_path / "profile")
    try:
        browser.send("Page.navigate", url=serve(demo.assets(model, runtime)))
        browser.wait("document.getElementById('status')?.textContent === 'Ready.'")
        for name, end in (
            ("text.png", "no picture that this browser can read"),
            ("picture.png", "48 x 40 pixels"),
        ):
            root = browser.send("DOM.getDocument")["root"]["nodeId"]
            node = browser.send("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
            browser.send("DOM.setFileInputFiles", nodeId=node, files=[str(tmp_path / name)])
            browser.wait(f"document.getElementById('status').textContent.includes('{end}')")
        browser.evaluate(
            "document.getElementById('opacity').value = 100;"
            "document.getElementById('opacity').dispatchEvent(new Event('input'))"
        )
        drawn = browser.evaluate(
            "Array.from(document.getElementById('picture').getContext('2d').getImageData(0, 0, 48, 40).data)"
        )
        shares = browser.evaluate("document.getElementById('legend').innerText")
    finally:
        browser.close()
    drawn = np.array(drawn).reshape(40, 48, 4)[..., :3]
    expected = np.where(ids[..., None] == 0, pixels, tiny.COLORS[ids])
    assert np.abs(drawn - expected).mean() < 1
    assert f"{100 * (ids == 1).mean():.1f} %" in shares
