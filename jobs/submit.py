"""Submission: a project goes to a cluster as a Ray job, with heliograph's own code, and comes out as a run in its storage.

A job's name is its run's: STORAGE/runs/NAME. So whatever ends the job (a cancel, a lost client, a lost head), submitting the same
project under the same name goes on where it was. What cannot be placed is refused here, where Ray would wait for it for ever.
"""

import json
import os
import re
import shlex
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Any

from ..cluster import local
from ..cluster.bill import bill
from ..cluster.runtime import JOINED, quieten
from ..cluster.spec import KIND, SECONDS_TO_SAVE, Capacity, Cluster
from ..errors import ClusterError, ProjectError
from ..project import FILE, NAME, Project
from .queue import PLACE, Place

LEFT_HERE = ("runs", "registry", "keys", "__pycache__", ".git", ".venv", "storage")
"""Folders of a project that are not sent."""
RAYS_OWN = re.compile(r"\S+ \S+\s+(INFO|WARNING) \S+\.py:\d+ -- |Running entrypoint for job ")
"""Lines of a job's log that are not the job's."""
SECONDS_WITHOUT_AN_ANSWER = 600
SECONDS_BETWEEN_LOOKS = 5
"""At whether a job's node lives."""
SECONDS_TO_TAKE = 6
"""A job, of a head that is up."""
MOST_TRIES = 4
MOST_SENT_BYTES = 256 << 20


class Jobs:
    """The job API of a cluster that is up."""

    def __init__(self, address: str, token: str):
        from ray.job_submission import JobSubmissionClient

        quieten()
        self.address, self._headers = address, {"Authorization": f"Bearer {token}"} if token else {}
        self.patience = 0.0
        """Seconds in which a head that is away may come back before that is an error."""
        try:
            with _unset("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # they would go before the address that is asked for
                self._client = JobSubmissionClient(address, headers=self._headers)
        except Exception as error:
            raise ClusterError(f"{address}: cannot be reached as a Ray cluster ({_said(error)}): is it up?") from None

    def latest(self, name: str) -> Any:
        """Ray's details of the last job that a run had; None where it had none."""
        return next((job for job in reversed(self.all()) if _run_of(job) == name), None)

    def all(self) -> list[Any]:
        """Ray's details of all jobs that were submitted, the oldest first. Raises ClusterError where nobody answers."""
        end = time.monotonic() + self.patience
        while True:
            try:
                return sorted((j for j in self._client.list_jobs() if j.submission_id), key=lambda j: j.start_time or 0)
            except Exception as error:
                if time.monotonic() >= end:
                    raise ClusterError(f"{self.address}: does not answer ({_said(error)}): is the cluster up?") from None
            time.sleep(2)

    def submit(
        self, project: Project, folder: Path, capacity: Capacity, storage: Path, place: Place, what: "What", run: str
    ) -> None:
        """Send the project, to do something in the run's folder in the storage.

        Raises ClusterError where a job of that name is under way, or the project is too large to send."""
        name = place.run
        earlier = [job for job in self.all() if _run_of(job) == name]
        if earlier and not (known := earlier[-1]).status.is_terminal() and not self._lost(known):
            raise ClusterError(f"{name}: is under way ({known.status.value.lower()}): `heliograph attach {name}` follows it")
        if project.keys and not Path(project.keys).is_absolute():
            raise ProjectError(
                f"{folder / FILE}: keys: `{project.keys}` stays here: name a folder that all nodes have, from / on"
            )
        with _shipped(folder) as (working, code):
            self._send(
                f"{name}.{len(earlier) + 1}",
                entrypoint=entrypoint(".", str(storage), run, what),
                runtime_env={
                    "working_dir": str(working),
                    "py_modules": [str(code)],
                    "env_vars": {JOINED: capacity.dumps(), PLACE: json.dumps(asdict(place))},
                },
                metadata={"run": name, "project": project.name},
            )

    def _send(self, job: str, **how: Any) -> None:
        """Submit a job once, though a head that just came back may drop a connection, or go again. Raises ClusterError."""
        end = time.monotonic() + max(SECONDS_TO_TAKE, self.patience)
        while True:
            try:
                self._client.submit_job(submission_id=job, **how)
                return
            except OSError as error:  # as `requests` has it
                if time.monotonic() >= end:
                    raise ClusterError(f"{self.address}: does not take the job ({_said(error)}): is the cluster up?") from None
                time.sleep(2)
            with suppress(ClusterError):
                if any(known.submission_id == job for known in self.all()):  # it was taken, and its answer was lost
                    return

    def follow(self, name: str, say: Callable[[str], None], again: Callable[[], None] | None = None) -> int:
        """Say what a job says, from its beginning, until it ends; its exit code.

        again: sends it anew where it was lost with the cluster's head. Raises ClusterError where there is none, or it was lost
        for good."""
        for _ in range(MOST_TRIES):
            code = self._followed(self._known(name).submission_id, say)
            if code is not None:
                return code
            if again is None:
                raise ClusterError(f"{name}: was lost with the head of the cluster: submit it again, and it goes on where it was")
            say(f"{name}: was lost with the head of the cluster, which is back: it is sent again, and goes on where it was")
            self.patience = SECONDS_WITHOUT_AN_ANSWER  # it may be lost once more before it has taken the job
            again()
        raise ClusterError(f"{name}: was lost {MOST_TRIES} times with the head of the cluster")

    def _followed(self, job: str, say: Callable[[str], None]) -> int | None:
        """The exit code of a job; None where it was lost with the cluster's head."""
        shown, heard, looked = 0, time.monotonic(), 0.0
        while True:
            try:
                status = self._client.get_job_info(job)
                over = status.status.is_terminal()
                if over or time.monotonic() - looked > SECONDS_BETWEEN_LOOKS:
                    looked = time.monotonic()
                    if self._lost(status):  # and its log with it
                        return None
                text = self._client.get_job_logs(job)
            except Exception as error:  # a network or a head that is away for a while
                if "does not exist" in str(error):  # a head that is new knows nothing of it
                    return None
                if time.monotonic() - heard > SECONDS_WITHOUT_AN_ANSWER:
                    raise ClusterError(f"{self.address}: does not answer any more ({_said(error)})") from None
                time.sleep(1)
                continue
            heard = time.monotonic()
            upto = len(text) if over else text.rfind("\n") + 1
            for line in text[shown:upto].splitlines():
                if not RAYS_OWN.match(line):
                    say(line)
            shown = max(shown, upto)
            if over:
                return _exit_code(status)
            time.sleep(0.5 + len(text) / 2e6)  # each answer holds the whole log

    def cancel(self, name: str) -> str:
        """Tell a job to save a checkpoint and end; what became of it."""
        known = self._known(name)
        if known.status.is_terminal():
            raise ClusterError(f"{name}: has ended already ({known.status.value.lower()})")
        self._client.stop_job(known.submission_id)
        end = time.monotonic() + SECONDS_TO_SAVE + 30
        while time.monotonic() < end:
            if self._client.get_job_info(known.submission_id).status.is_terminal():
                return f"{name}: stopped; submitting it again goes on from its last checkpoint"
            time.sleep(0.5)
        raise ClusterError(f"{name}: did not end within {SECONDS_TO_SAVE + 30} s: `heliograph attach {name}` shows why")

    def overview(self, name: str, capacity: Capacity) -> list[str]:
        """Nodes and their cost so far, then a line for each run."""
        nodes = self.nodes()
        now = time.time()
        alive = Counter(kind for kind, _, end in nodes if not end)
        spent: dict[str, float] = {}
        for kind, start, end in nodes:
            spent[kind] = spent.get(kind, 0.0) + (end or now) - start
        gpus = sum(g.resources.get("GPU", 0) * alive[g.name] for g in capacity.groups)
        workers = [f"{alive[g.name]} {g.name} of {g.most}" for g in capacity.groups]
        dollars, rate = bill(capacity, spent), capacity.price({g.name: alive[g.name] for g in capacity.groups})
        cost = "unknown (a node has no price)" if dollars is None else f"${dollars:.2f} so far, ${rate or 0:.2f} per hour now"
        out = [f"{name}: the head and {', '.join(workers)}; {gpus:g} GPUs", f"cost: {cost}"]
        for job in self.all():
            took = ((job.end_time or 1000 * now) - (job.start_time or 1000 * now)) / 1000
            out.append(f"{_run_of(job) or job.submission_id}: {job.status.value.lower()}, {took:.0f} s")
        return out

    def nodes(self) -> list[tuple[str, float, float]]:
        """(kind, since, until) of every node that there was, in seconds since 1970; until is 0 while it lives."""
        found = self._asked()
        return [(n["labels"].get(KIND, "head"), n["start_time_ms"] / 1000, (n["end_time_ms"] or 0) / 1000) for n in found]

    def _asked(self) -> list[dict[str, Any]]:
        """What Ray tells of every node that there was."""
        import httpx

        try:
            answer = httpx.get(f"{self.address}/api/v0/nodes?detail=1&limit=10000", headers=self._headers, timeout=30)
            return answer.raise_for_status().json()["data"]["result"]["result"]
        except (httpx.HTTPError, KeyError, ValueError) as error:
            raise ClusterError(f"{self.address}: says nothing of its nodes ({_said(error)})") from None

    def _lost(self, job: Any) -> bool:
        """Whether its process ended with its node. A head that is back says that it runs, or failed."""
        if job.status.value not in ("RUNNING", "FAILED") or job.driver_exit_code is not None:
            return False
        return job.driver_node_id in {node["node_id"] for node in self._asked() if node["state"] == "DEAD"}

    def _known(self, name: str) -> Any:
        known = self.latest(name)
        if known is None:
            names = ", ".join(dict.fromkeys(_run_of(job) for job in self.all()))
            raise ClusterError(f"{name}: no such run on {self.address}: {f'it knows {names}' if names else 'it had none yet'}")
        return known


class What(StrEnum):
    """To do with a project, by the command's name."""

    RUN = "run"
    TUNE = "tune"
    SERVE = "serve"

    def job(self, run: str) -> str:
        """The name that a job goes by: its run's, unless the run is to be served while others train it."""
        return f"{run}-endpoint" if self is What.SERVE else run


def entrypoint(folder: str, storage: str, run: str, what: What) -> str:
    """What a cluster is to do for a run. folder: of the project, there."""
    registry = [] if what is What.TUNE else ["--registry", f"{storage}/registry"]
    return shlex.join(["python", "-m", "heliograph", what.value, folder, *registry, "--run", f"{storage}/runs/{run}"])


def reach(spec: Cluster, file: Path, address: str | None, token: str | None) -> Jobs:
    """The job API of a cluster: of one that runs here, or at an address that is given.

    Raises ClusterError where it is not up."""
    if address:
        return Jobs(address.rstrip("/"), token or "")
    if spec.provider != "local":
        raise ClusterError(f"{file}: where does {spec.name} answer? give --address http://HOST:8265 (and RAY_AUTH_TOKEN)")
    up = local.found(spec, file)
    if up is None:
        raise ClusterError(f"{file}: {spec.name} is not up: `heliograph cluster up {file}` starts it")
    return Jobs(up.jobs, up.token)


@contextmanager
def _unset(*names: str) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def run_name(project: Project, given: str | None) -> str:
    """Raises ProjectError for a name that cannot be one."""
    name = given or project.name
    if not re.fullmatch(NAME, name):
        raise ProjectError(f"--name {name}: a run's name is made of lower-case letters, digits, `-` and `_`")
    return name


@contextmanager
def _shipped(folder: Path) -> Iterator[tuple[Path, Path]]:
    """(the project without what stays here, heliograph's own code), as Ray sends them."""
    with tempfile.TemporaryDirectory() as made:
        working, code = Path(made) / "project", Path(made) / "heliograph"
        shutil.copytree(folder, working, ignore=shutil.ignore_patterns(*LEFT_HERE))
        size = sum(file.stat().st_size for file in working.rglob("*") if file.is_file())
        if size > MOST_SENT_BYTES:
            raise ClusterError(
                f"{folder}: {size >> 20} MiB would be sent with every run: put the data where all nodes can read it, "
                "and name it in data.source from / on"
            )
        root = Path(__file__).parent.parent
        code.mkdir()
        for file in root.glob("*.py"):
            shutil.copyfile(file, code / file.name)
        for room in ("cluster", "commands", "datasets", "jobs", "serve"):
            shutil.copytree(root / room, code / room, ignore=shutil.ignore_patterns("__pycache__"))
        yield working, code


def _run_of(job: Any) -> str:
    """The run that a job is of; empty where heliograph did not submit it."""
    return (job.metadata or {}).get("run", "")


def _exit_code(status: Any) -> int:
    """The job's own; 128 + SIGTERM where it was stopped."""
    if status.status.value == "STOPPED":
        return 128 + signal.SIGTERM
    if status.driver_exit_code is not None:
        return int(status.driver_exit_code)
    return 0 if status.status.value == "SUCCEEDED" else 1


def _said(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
