"""Try a model in the browser: one page on the loopback interface that segments pictures itself (no torch).

python -m pseudoseg_fast.demo model.onnx
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from pseudoseg_fast.data.decode import IMAGE_MODES
from pseudoseg_fast.deploy.model import Model

RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_FILES = {
    "ort.wasm.min.js": "faece07e84faa9001f5104bbe4e5c70861d06cb2376a0dea1fa0ad33a67adc81",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
"""SHA-256 of what the page loads of the npm package."""
NPM_SECONDS = 300
_PAGE = {"": "index.html", "page.css": "page.css", "page.js": "page.js"}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
    ".json": "application/json",
}
_HEADERS = {
    # The page may load nothing from, and send nothing to, any other place.
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; worker-src 'self' blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    # Threads in WebAssembly need memory that they share, which browsers give to isolated pages alone.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Asset(NamedTuple):
    """What one address answers.

    Attributes:
        kind: its media type.
        content: its bytes.
    """

    kind: str
    content: bytes


def assets(model: Path, runtime: Path) -> dict[str, Asset]:
    """Return everything that the page needs, by path; nothing else is ever served.

    Raises:
        ValueError, OSError: see :class:`~pseudoseg_fast.deploy.model.Model`; or a file of the runtime is missing.
    """
    metadata = Model(model, "cpu").metadata
    if metadata.channels not in IMAGE_MODES:
        raise ValueError(
            f"{model} takes {metadata.channels} channels; expected 1 or 3, all that a browser reads"
        )
    names = ("classes", "palette", "output", "background", "channels", "short_side")
    page = resources.files("pseudoseg_fast.deploy") / "page"
    found = {path: _asset(name, (page / name).read_bytes()) for path, name in _PAGE.items()}
    found["metadata.json"] = _asset(
        "metadata.json", json.dumps({name: getattr(metadata, name) for name in names}).encode()
    )
    found["model.onnx"] = _asset("model.onnx", model.read_bytes())
    for name in RUNTIME_FILES:
        found[f"runtime/{name}"] = _asset(name, (runtime / name).read_bytes())
    return {f"/{path}": asset for path, asset in found.items()}


def _asset(name: str, content: bytes) -> Asset:
    return Asset(_TYPES.get(Path(name).suffix, "application/octet-stream"), content)


def make_server(served: dict[str, Asset], port: int = 0) -> ThreadingHTTPServer:
    """Return a server of ``served`` on 127.0.0.1 that answers GET alone; port 0 takes a free one.

    Raises:
        OSError: the port cannot be had.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page of another site whose name was made to point here would have that name as its host.
            host = self.headers.get("Host", "").partition(":")[0]
            asset = served.get(self.path.partition("?")[0]) if host in ("127.0.0.1", "localhost") else None
            if asset is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", asset.kind)
            self.send_header("Content-Length", str(len(asset.content)))
            for name, value in _HEADERS.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(asset.content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OSError(f"--port {port} cannot be had ({reason}); give another, or 0 for a free one") from error


def find_runtime(folder: Path | None) -> Path:
    """Return the folder of onnxruntime-web: the given one, or the cache, filled by npm at the first use.

    Raises:
        FileNotFoundError: the given folder lacks a file.
        RuntimeError: there is no npm, or it fails, or what it brings is not what is expected.
    """
    if folder is not None:
        if missing := [name for name in RUNTIME_FILES if not (folder / name).is_file()]:
            raise FileNotFoundError(
                f"--runtime expects the folder dist of the npm package {RUNTIME}, {folder} lacks {', '.join(missing)}"
            )
        return folder
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    cache = Path(os.environ.get("PSEUDOSEG_CACHE") or user / "pseudoseg_fast")
    target = cache / RUNTIME
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        _fetch_runtime(target)
    return target


def _fetch_runtime(target: Path) -> None:
    """Let npm download the package, and keep of it what the page loads; the folder appears complete or not at all."""
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(
            f"the page needs the npm package {RUNTIME} and there is no npm to fetch it: install Node.js, or unpack the "
            "package elsewhere and give its folder dist as --runtime"
        )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        command = [npm, "pack", "--silent", "--fetch-retries=1", RUNTIME]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=NPM_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(
                f"npm pack {RUNTIME} took longer than {NPM_SECONDS} s; check the network, or give the package's folder "
                "dist as --runtime"
            ) from error
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            raise RuntimeError(
                f"npm pack {RUNTIME} failed: {done.stderr.strip()[-500:] or 'no archive came'}"
            )
        complete = Path(folder, "complete")
        complete.mkdir()
        for name, digest in RUNTIME_FILES.items():
            content = _member(archives[0], f"package/dist/{name}")
            if hashlib.sha256(content).hexdigest() != digest:
                raise RuntimeError(f"{name} of {RUNTIME} is not the expected file; nothing was kept")
            (complete / name).write_bytes(content)
        try:
            complete.rename(target)
        except OSError:
            if not target.is_dir():  # another process was faster
                raise


def _member(archive: Path, name: str) -> bytes:
    """Return a file's bytes, or none where the archive does not hold it."""
    try:
        with tarfile.open(archive) as files:
            file = files.extractfile(name)
            return file.read() if file else b""
    except (KeyError, tarfile.TarError):
        return b""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line: status 0 after Ctrl-C, 2 if it cannot start."""
    parser = argparse.ArgumentParser(
        prog="python -m pseudoseg_fast.demo", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, help="file that python -m pseudoseg_fast.export made")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one; default %(default)s")
    parser.add_argument(
        "--runtime", type=Path, help=f"folder dist of {RUNTIME}; default: npm fetches it once"
    )
    options = parser.parse_args(arguments)
    try:
        served = assets(options.model, find_runtime(options.runtime))
        server = make_server(served, options.port)
    except (ValueError, RuntimeError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    with server:
        print(
            f"http://127.0.0.1:{server.server_address[1]}/ segments pictures with {options.model}; Ctrl-C ends it"
        )
        sys.stdout.flush()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
