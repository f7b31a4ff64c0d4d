"""A run as a live page: what is done, what is at work, the curves so far, what was odd, the end of the log; then its report.

The page asks for its content every two seconds and puts it in place when it has changed. It is served on 127.0.0.1 alone, and
reads the run's folder; the run knows nothing of it.
"""

import contextlib
import hashlib
import html
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

from ..cluster.runtime import LOOPBACK
from ..cluster.storage import read_json
from ..errors import PortInUse
from .drawing import BLUE, page, svg, table
from .record import TRIALS
from .traffic_report import LOG, traffic
from .training_report import training
from .watch import EVENTS, METRICS, STEPS, read_lines

LOG_LINES = 12
SCRIPT = """<p id=gone hidden role=alert>The page's server has ended.</p><script>
const gone = document.getElementById("gone");
async function look(what, seen = "") {
  try {
    const answer = await fetch(what, {headers: {"if-none-match": seen}});
    if (answer.status === 200) {
      seen = answer.headers.get("etag");
      document.getElementById(what).innerHTML = await answer.text();
      if (answer.headers.get("run-ended")) { location.href = "report.html"; return; }
    }
    gone.hidden = true;
  } catch { gone.hidden = false; }
  setTimeout(look, 2000, what, seen);
}
look("%s");
</script>"""
"""Of a page; what it shows anew all the time: a path, and the element of that name."""


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
    drawn = [_drawn(training, place, METRICS, STEPS, EVENTS) for place in places or [folder / "train"]]
    parts += [f"<h2>Training</h2>{each}" for each in drawn if each]
    parts += [_drawn(_search, folder, f"tune/{TRIALS}"), _drawn(traffic, folder, LOG), _log(folder)]
    return "".join(parts), ended


_known: dict[tuple[Callable[[Path], str], Path], tuple[list[tuple[int, int]], str]] = {}


def _drawn(draw: Callable[[Path], str], folder: Path, *names: str) -> str:
    """What is drawn of a folder's files: anew when one of them has changed, not each time that a page asks."""
    found = [(folder / name).stat() for name in names if (folder / name).exists()]
    stamps = [(stat.st_mtime_ns, stat.st_size) for stat in found]
    known = _known.get((draw, folder))
    if known is None or known[0] != stamps:
        known = _known[draw, folder] = stamps, draw(folder)
    return known[1]


def _search(folder: Path) -> str:
    """Of a search at work, or of the last one: how many trials there are, and what each came to."""
    trials: dict[int, dict[str, Any]] = {}
    for line in read_lines(folder / "tune" / TRIALS):
        trials[line["number"]] = line
    if not trials:
        return ""
    counts = Counter(line["status"] for line in trials.values())
    values = [
        {"trial": number, "metric": name, "value": value}
        for number, line in sorted(trials.items())
        for name, value in line.get("values", {}).items()
    ]
    drawn = svg({
        "facet": {"field": "metric", "type": "nominal", "title": None},
        "spec": {
            "mark": {"type": "point", "filled": True, "color": BLUE},
            "encoding": {
                "x": {"field": "trial", "type": "quantitative", "axis": {"tickMinStep": 1}},
                "y": {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}},
            },
            "width": 280, "height": 140,
        },
        "columns": 2, "resolve": {"scale": {"y": "independent"}}, "data": {"values": values},
    })  # fmt: skip
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"<h2>Search</h2><p>{len(trials)} trials: {said}.</p>{drawn if values else ''}"


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
                    self._send(page("heliograph", f"{SCRIPT % 'part'}<div id=part aria-live=polite></div>"))
                case "/part":
                    text, ended = part(folder)
                    self._send_changed(text, {"run-ended": "yes"} if ended else {})
                case "/traffic":  # an endpoint may be asked long after the run has ended
                    self._send_changed(_drawn(traffic, folder, LOG), {})
                case "/report.html" if (folder / "report.html").exists():
                    self._send((folder / "report.html").read_text().replace("</main>", f"{SCRIPT % 'traffic'}</main>"))
                case _:
                    self.send_error(404)

        def _send_changed(self, text: str, headers: dict[str, str]) -> None:
            tag = f'"{hashlib.sha256(text.encode()).hexdigest()[:16]}"'
            if self.headers.get("if-none-match") == tag and not headers:
                self.send_response(304)
                self.end_headers()
            else:
                self._send(text, {"etag": tag, **headers})

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
