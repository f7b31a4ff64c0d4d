"""A run as a live page: what is done, what is at work, the curves so far, what was odd, the end of the log; then its report.

The page asks for its content every two seconds and puts it in place when it has changed. It is served on 127.0.0.1 alone, and
reads the run's folder; the run knows nothing of it.
"""

import contextlib
import hashlib
import html
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

from ..cluster.runtime import LOOPBACK
from ..cluster.storage import read_json
from ..errors import PortInUse
from .drawing import BLUE, ORANGE, page, svg, table
from .report import curves
from .watch import EVENTS, METRICS, STEPS, read_lines

LOG_LINES = 12
MOST_STEPS = 400
"""Points of the curve of single steps."""
SCRIPT = """<script>
let seen = "";
async function look() {
  try {
    const answer = await fetch("part", {headers: {"if-none-match": seen}});
    if (answer.status === 200) {
      seen = answer.headers.get("etag");
      document.getElementById("part").innerHTML = await answer.text();
      if (answer.headers.get("run-ended")) { location.href = "report.html"; return; }
    }
    document.getElementById("gone").hidden = true;
  } catch { document.getElementById("gone").hidden = false; }
  setTimeout(look, 2000);
}
look();
</script>"""


def part(folder: Path) -> tuple[str, bool]:
    """The page's content (HTML), and whether the run has ended with a report that is newer than all that it is about."""
    records = sorted((folder / "stages").glob("*.json"), key=lambda f: f.stat().st_mtime)
    report, working = folder / "report.html", _working(folder)
    ended = report.exists() and not working and all(report.stat().st_mtime >= r.stat().st_mtime for r in records)
    rows = [(r["name"], f"{r['seconds']:.1f} s") for r in map(read_json, records)]
    rows += [(name, f"at work for {time.time() - since:.0f} s") for name, since, _ in working]
    said = f"{working[0][0]} is at work" if working else "ended" if ended else "nothing is at work"
    parts = [
        f"<h1>{html.escape(folder.parent.parent.name)}</h1><p class=lead>{html.escape(said)}</p>",
        table(("stage", ""), rows),
    ]
    places = [place for _, _, place in working if (place / METRICS).exists() or (place / STEPS).exists()]
    for place in places or [folder / "train"]:
        parts.append(_training(place))
    parts.append(_log(folder))
    return "".join(parts), ended


def _working(folder: Path) -> list[tuple[str, float, Path]]:
    """(stage, since when, its folder) of what is at work, as far as the lock tells that anything is."""
    if not _held(folder):
        return []
    found = [p for p in (folder / ".work").glob("*-*") if p.is_dir() and not p.with_name(f"{p.name}.done").exists()]
    return [(p.name.rpartition("-")[0], p.stat().st_ctime, p) for p in found]


def _held(folder: Path) -> bool:
    """Whether the process that its lock names lives. The lock itself is left alone: a run that begins now must get it."""
    with contextlib.suppress(OSError, ValueError):
        return psutil.pid_exists(int((folder / ".lock").read_text()))
    return False


def _training(place: Path) -> str:
    history, steps, events = (read_lines(place / name) for name in (METRICS, STEPS, EVENTS))
    if not history and not steps:
        return ""
    parts = ["<h2>Training</h2>", curves(history) if history else ""]
    if steps:
        odd = {line["step"] for line in events if line["kind"] == "anomaly"}
        parts.append(_steps(steps, odd))
        last = steps[-1]
        parts.append(
            f"<p>Step {last['step']:,} of {last['end']:,}, epoch {last['epoch']}: loss {last['loss']:.4g}, "
            f"{last['rows_per_second']:,.0f} rows a second.</p>"
        )
    if events:
        parts.append(table(("step", "what happened"), [(line.get("step", ""), line["text"]) for line in events[-LOG_LINES:]]))
    return "".join(parts)


def _steps(steps: list[dict[str, Any]], odd: set[int]) -> str:
    """The loss of single steps; where something was odd, a mark."""
    some = steps[:: max(1, len(steps) // MOST_STEPS)]
    values = [{"step": s["step"], "loss": s["loss"]} for s in some if s["loss"] is not None]
    x = {"field": "step", "type": "quantitative"}
    line = {
        "mark": {"type": "line", "color": BLUE},
        "encoding": {"x": x, "y": {"field": "loss", "type": "quantitative", "scale": {"zero": False}}},
        "data": {"values": values},
    }
    marks = {"mark": {"type": "rule", "color": ORANGE, "strokeDash": [4, 3]}, "encoding": {"x": x},
             "data": {"values": [{"step": step} for step in sorted(odd)]}}  # fmt: skip
    return svg({"layer": [line, marks] if odd else [line], "width": 600, "height": 140, "title": "Loss by step"})


def _log(folder: Path) -> str:
    log = folder / "run.log"
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").splitlines()[-LOG_LINES:]
    return f"<h2>Log</h2><pre tabindex=0>{html.escape(chr(10).join(lines))}</pre>"


@contextlib.contextmanager
def served(folder: Path, port: int) -> Iterator[str]:
    """Serve the page of a run's folder until the block ends; its URL. Raises PortInUse."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            match self.path:
                case "/":
                    gone = "<p id=gone hidden role=alert>The page's server has ended.</p>"
                    self._send(page("heliograph", f"{gone}<div id=part aria-live=polite></div>{SCRIPT}"))
                case "/part":
                    text, ended = part(folder)
                    tag = f'"{hashlib.sha256(text.encode()).hexdigest()[:16]}"'
                    if self.headers.get("if-none-match") == tag and not ended:
                        self.send_response(304)
                        self.end_headers()
                    else:
                        self._send(text, {"etag": tag} | ({"run-ended": "yes"} if ended else {}))
                case "/report.html" if (folder / "report.html").exists():
                    self._send((folder / "report.html").read_text())
                case _:
                    self.send_error(404)

        def _send(self, text: str, headers: dict[str, str] | None = None) -> None:
            body = text.encode()
            self.send_response(200)
            self.send_header("content-type", "text/html; charset=utf-8")
            self.send_header("content-length", str(len(body)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None: ...

    try:
        server = ThreadingHTTPServer((LOOPBACK, port), Handler)
    except OSError:
        raise PortInUse(f"port {port} on {LOOPBACK} is in use: name another one with --port") from None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{LOOPBACK}:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
