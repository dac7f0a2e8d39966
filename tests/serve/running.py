"""Server processes for the tests, and a way to talk to them without a client that corrects what it is given."""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent.parent
ECHO = [sys.executable, str(Path(__file__).parent / "echo_server.py")]
SERVE = [sys.executable, "-m", "llmcore", "serve"]


class Server:
    """A server process, from its first line to its exit."""

    def __init__(self, command: list[str], **environment: str) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([p for p in sys.path if p]), **environment}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)
        self.log: list[str] = []
        lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(lines,), daemon=True)
        self._reader.start()
        while True:
            line = lines.get(timeout=600)
            assert line is not None, f"the server ended: {''.join(self.log)}"
            if found := re.match(r"serving (\S+) at (http://\S+)", line):
                self.name, self.url = found.groups()
                break
        self.host, self.port = urlsplit(self.url).hostname, urlsplit(self.url).port

    def _read(self, lines: queue.Queue) -> None:
        for line in self.process.stderr:
            self.log.append(line)
            lines.put(line)
        lines.put(None)

    def client(self, **options):
        import openai

        options = {"api_key": "none", "max_retries": 0, "timeout": 300} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def request(self, method: str, path: str, body: bytes | None = None, headers: dict | None = None):
        """(status, headers, body) of one request on a connection of its own."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=300)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def post(self, path: str, value, **headers):
        """(status, parsed body) of a JSON request; bytes go as they are."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        status, _, data = self.request("POST", path, body, {"Content-Type": "application/json"} | headers)
        return status, json.loads(data)

    def metrics(self) -> dict[str, float]:
        _, _, text = self.request("GET", "/metrics")
        lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def idle(self, seconds: float = 120) -> dict[str, float]:
        """The metrics, once nothing runs any more and no block is held."""
        end = time.monotonic() + seconds
        while True:
            metrics = self.metrics()
            names = ("requests_in_flight", "requests_running", "requests_waiting", "cache_blocks_used")
            if not any(metrics[f"llmcore_{name}"] for name in names):
                return metrics
            assert time.monotonic() < end, {name: metrics[f"llmcore_{name}"] for name in names}
            time.sleep(0.05)

    def resident(self) -> int:
        """Bytes of main memory that the process holds."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self, sig: int = signal.SIGTERM, timeout: float = 300) -> int:
        self.process.send_signal(sig)
        return self.process.wait(timeout)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stderr.close()
