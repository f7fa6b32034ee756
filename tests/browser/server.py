"""A Jupyter server of its own: nothing of the user's is read or written."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat

START = 240  # seconds a server may take to answer
SETTINGS = Path("config", "lab", "user-settings", "@jupyterlab", "apputils-extension")


@contextmanager
def jupyter(folder: Path, cells: dict[str, list[str]], theme: str = "JupyterLab Light") -> Iterator[str]:
    """The address of a server on a free port, whose root holds the notebooks, given as cells by name."""
    root, settings = folder / "notebooks", folder / SETTINGS
    root.mkdir(parents=True)
    for name, sources in cells.items():
        nbformat.write(notebook(sources), root / name)
    settings.mkdir(parents=True)
    (settings / "themes.jupyterlab-settings").write_text(json.dumps({"theme": theme}))
    (settings / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false"}))
    port = free_port()
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command(root, port), env=surroundings(folder), stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(f"{address}/api/status", server, folder / "server.log")
            yield address
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def notebook(sources: list[str]) -> Any:
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    written = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    written.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    return written


def command(root: Path, port: int) -> list[str]:
    return [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--IdentityProvider.token=",
        "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={root}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.expose_app_in_browser=True", "--JupyterNotebookApp.expose_app_in_browser=True",
    ]  # fmt: skip


def surroundings(folder: Path) -> dict[str, str]:
    own = {
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython", "HOME": "home", "REPE_CACHE": "cache",
    }  # fmt: skip
    for name in own.values():
        (folder / name).mkdir(exist_ok=True)
    rest = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}
    return rest | {variable: str(folder / name) for variable, name in own.items()}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a loopback address needs no proxy
    end = time.monotonic() + START
    while time.monotonic() < end and server.poll() is None:
        try:
            with opener.open(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"Jupyter did not start:\n{log.read_text()[-2000:]}")
