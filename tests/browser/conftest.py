"A real browser: Debian's Chromium, driven by playwright. `make test-browser` installs it."
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def playwright():
    if CHROMIUM is None: pytest.fail("There is no Chromium: `make test-browser` installs Debian's, elsewhere install Chromium or Chrome.")
    with sync_playwright() as p: yield p


@pytest.fixture(scope="session")
def chromium(playwright):
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    yield browser
    browser.close()


class Said(list):
    "What a page complains about: errors on its console and exceptions; and what it asked the network for."
    def listen(self, page):
        page.on("console", lambda m: self.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: self.append(str(e)))
        return self


@pytest.fixture
def open_file(chromium):
    "Opens a file with the network cut off; returns the page and what went wrong on it."
    contexts = []
    def opened(path, **context):
        contexts.append(chromium.new_context(**{"viewport": {"width": 1200, "height": 900}, **context}))
        page, said = contexts[-1].new_page(), Said()
        said.listen(page)
        def only_files(route):
            if route.request.url.startswith(("file:", "data:", "blob:")): return route.continue_()
            said.append(f"asked for {route.request.url}")
            route.abort()
        contexts[-1].route("**/*", only_files)
        page.goto(Path(path).as_uri())
        page.wait_for_selector("[data-name=matrix]")
        return page, said
    yield opened
    for c in contexts: c.close()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    "A JupyterLab in a folder of its own: (address, folder)."
    here = tmp_path_factory.mktemp("lab")
    folder, log = here / "work", here / "log"
    folder.mkdir()
    own = {f"JUPYTER_{name}_DIR": str(here / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")} | {"IPYTHONDIR": str(here / "ipython")}
    own["JUPYTER_PREFER_ENV_PATH"] = "1"
    port = free_port()
    with log.open("w") as out:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password=", f"--ServerApp.root_dir={folder}",
                                   "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--ServerApp.terminals_enabled=False"],
                                  stdout=out, stderr=subprocess.STDOUT, cwd=folder, env={**os.environ, **own})
    try:
        address, until = f"http://127.0.0.1:{port}", time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=5).read()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
                time.sleep(0.3)
        yield address, folder
    finally:
        server.terminate()
        try: server.wait(30)
        except subprocess.TimeoutExpired: server.kill()


def kernels(address): return json.load(urllib.request.urlopen(f"{address}/api/kernels", timeout=30))
