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

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def playwright():
    if CHROMIUM is None:
        pytest.fail(
            "There is no Chromium: `make test-browser` installs Debian's, elsewhere install Chromium or Chrome."
        )
    with sync_playwright() as p:
        yield p


@pytest.fixture(scope="session")
def chromium(playwright):
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    yield browser
    browser.close()


class Said(list):
    "What a page complains about: errors on its console and exceptions; and what it asked the network for."

    def listen(self, page):
        page.on("console", self.hear)
        page.on("pageerror", lambda error: self.append(str(error)))
        return self

    def hear(self, message):
        if message.type == "error":
            self.append(message.text)

    def only_files(self, route):
        "Lets a page have what is in files, and nothing from the network."
        if route.request.url.startswith(("file:", "data:", "blob:")):
            return route.continue_()
        self.append(f"asked for {route.request.url}")
        return route.abort()


@pytest.fixture
def open_file(chromium):
    "Opens a file with the network cut off; returns the page and what went wrong on it."
    contexts = []

    def opened(path, **options):
        context = chromium.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        said = Said().listen(page)
        context.route("**/*", said.only_files)
        page.goto(Path(path).as_uri())
        page.wait_for_selector("[data-name=matrix]")
        return page, said

    yield opened
    for context in contexts:
        context.close()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


LAB = [
    "--no-browser",
    "--allow-root",
    "--ServerApp.port_retries=0",
    "--IdentityProvider.token=",
    "--ServerApp.password=",
    "--LabApp.expose_app_in_browser=True",
    "--LabApp.news_url=",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    "--ServerApp.terminals_enabled=False",
]


def own_settings(here):
    "The environment of a Jupyter that finds no settings but those in this folder."
    folders = {f"JUPYTER_{name}_DIR": str(here / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    return os.environ | folders | {"IPYTHONDIR": str(here / "ipython"), "JUPYTER_PREFER_ENV_PATH": "1"}


def answers(address):
    try:
        urllib.request.urlopen(f"{address}/api/status", timeout=5).read()
    except OSError:
        return False
    return True


def wait_for(server, address, log, seconds=90):
    "Waits until the server answers; fails with its log when it ends or takes longer."
    until = time.monotonic() + seconds
    while not answers(address):
        assert server.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.3)


def stop(server):
    server.terminate()
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        server.kill()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    "A JupyterLab in a folder of its own: (address, folder)."
    here = tmp_path_factory.mktemp("lab")
    folder, log, port = here / "work", here / "log", free_port()
    folder.mkdir()
    command = [sys.executable, "-m", "jupyterlab", *LAB, f"--port={port}", f"--ServerApp.root_dir={folder}"]
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder, env=own_settings(here))
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(server, address, log)
        yield address, folder
    finally:
        stop(server)


def kernels(address):
    return json.load(urllib.request.urlopen(f"{address}/api/kernels", timeout=30))
