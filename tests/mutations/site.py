"""A luthierd with a canary beside its data directory, and what must hold whatever is thrown at it.

FOLDER/data      the data directory
FOLDER/canary    files that nobody may read, change or add to
FOLDER/tmp       where the server and its workers put temporary files; empty when all is quiet
FOLDER/run       the directory that they run in; empty
"""

import contextlib
import hashlib
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from daemon import Daemon, puppet, reason
from grpc_health.v1 import health_pb2
from mutations.memory import Watch
from mutations.mutant import MARK, SECRET, SECRET_PATH, File, Mutant, Template

from luthier.v1 import datasets_pb2 as ds
from luthier.v1.dataset_report_pb2 import DatasetReport, FindingLevel

SECONDS = 30
"""In which every call must have ended."""

SERVER_MIB = 256
"""What the server may take for itself."""

WORKER_MIB = 1024
"""What a check may take for itself."""

CHILD_MIB = 4096 + 512
"""What a preview may take for itself: its fence, and what it had."""

_CHUNK = 256 * 1024
_CODE = re.compile(r"[A-Z][A-Z0-9_]{2,40}")
_FORBIDDEN = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE)
_MIB = 1024 * 1024

_ENDED = ("DATA_WORK_FAILED", "DATA_WORK_TOO_LONG")
"""Why a preview is refused whose process had to be ended: what it did could not be interrupted from within."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a mutant. kind: `sound` (no error was found), `findings` (the first error's code is `reason`),
    `refused` (by a status with that reason) or `shown` (a preview)."""

    mutant: Mutant
    kind: str
    reason: str
    seconds: float
    memory_mib: float = 0
    violations: list[str] = field(default_factory=list)


class Site:
    """A server to throw at. real: with a warm trainer host, for previews; else files alone can be thrown."""

    def __init__(self, folder: Path, *, real: bool = False) -> None:
        self.folder = folder
        self._real = real
        flags = ["--threads", "1"] if real else puppet(steps=1)
        self.daemon = Daemon(folder / "data", flags, environment={"TMPDIR": str(folder / "tmp"), "HF_HUB_OFFLINE": "1"})
        self._sending: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        self._read = 0

    def start(self) -> "Site":
        """Starts the server, uploads what must still be there later, notes what lies beside."""
        for name in ("data", "canary", "tmp", "run"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / SECRET_PATH).write_bytes(SECRET)
        here = Path.cwd()
        os.chdir(self.folder / "run")
        try:
            self.daemon.start()
        finally:
            os.chdir(here)
        self.daemon.upload(name="witness")
        self._beside = self._listed()
        self._blobs = sorted(path.name for path in (self.daemon.data_dir / "blobs").iterdir())
        self.watch = Watch(self.daemon.process.pid).start()
        if self._real:
            self.daemon.datasets.PreviewDataset(_preview(), timeout=120)  # returns once the host is warm
        self._health = self.daemon.channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        return self

    def close(self) -> None:
        """Ends the server and its trainer host."""
        if hasattr(self, "watch"):
            self.watch.stop()
        self.daemon.close()

    def throw(self, mutant: Mutant) -> Outcome:
        """Throws a mutant, and judges what came back."""
        what = mutant.what
        if isinstance(what, Template):
            return self._judged(mutant, lambda violations: self._preview(what, violations), "")
        sha256 = hashlib.sha256(what.content).hexdigest()
        with self._guard:
            sending = self._sending.setdefault(sha256, threading.Lock())
        with sending:  # a newer upload of the same bytes would take over
            return self._judged(mutant, lambda violations: self._upload(mutant, what, sha256, violations), sha256)

    def settled(self, patience: float = 15) -> list[str]:
        """What does not hold now that no call is under way; what is on its way out gets `patience` seconds."""
        violations = [
            f"{folder} still has {', '.join(left[:5])}"
            for folder in ("data/blobs/incoming", "data/work", "tmp")
            if (left := _left(self.folder / folder, patience))
        ]
        if (beside := self._listed()) != self._beside:
            violations.append(f"files beside the data directory changed: {sorted(beside ^ self._beside)[:5]}")
        if marked := [str(path) for place in _PLACES for path in place.glob(f"*{MARK}*")]:
            violations.append(f"a name led out of its archive: {', '.join(marked)}")
        blobs = sorted(path.name for path in (self.daemon.data_dir / "blobs").iterdir())
        if blobs != self._blobs:
            violations.append(f"blobs/ has {len(blobs)} names in place of {len(self._blobs)}")
        if self.daemon.process.poll() is not None:
            violations.append(f"luthierd ended with code {self.daemon.process.returncode}")
        for who, most, limit in (
            ("luthierd", self.watch.most_server_mib, SERVER_MIB),
            ("a preview", self.watch.most_other_mib, CHILD_MIB),
        ):
            if most > limit:
                violations.append(f"{who} took {most:.0f} MiB")
        violations += self._said()
        return violations

    def _said(self) -> Iterator[str]:
        """Tracebacks and workers' deaths in what the log has that is new."""
        text = self.daemon.log()
        new, self._read = text[self._read :], len(text)
        for word in ("Traceback", "worker failed", '"bug"', "event=bug", "Segmentation"):
            if word in new:
                at = new.index(word)
                yield f"the log says: {new[max(0, at - 200) : at + 600]}"

    def _listed(self) -> set[tuple[str, int, int]]:
        """Everything in the site but the data directory and the folder for temporary files."""
        found = set()
        for path in self.folder.rglob("*"):
            first = path.relative_to(self.folder).parts[0]
            if first not in ("data", "tmp"):
                stat = path.lstat()
                found.add((str(path.relative_to(self.folder)), stat.st_size, stat.st_mtime_ns if path.is_file() else 0))
        found |= {(f"./{path.name}", 0, 0) for path in self.folder.iterdir()}
        return found

    def _judged(self, mutant: Mutant, call: Callable[[list[str]], tuple[str, str]], sha256: str) -> Outcome:
        violations: list[str] = []
        begin = time.monotonic()
        try:
            kind, why = call(violations)
        except grpc.RpcError as error:
            kind, why = "refused", _reason(error, violations)
        seconds = time.monotonic() - begin
        if seconds > SECONDS:
            violations.append(f"it took {seconds:.1f} s")
        violations += self._alive()
        memory = self.watch.most_of(sha256) if sha256 else 0
        if memory > WORKER_MIB:
            violations.append(f"the check took {memory:.0f} MiB")
        return Outcome(mutant, kind, why, seconds, memory, violations)

    def _upload(self, mutant: Mutant, file: File, sha256: str, violations: list[str]) -> tuple[str, str]:
        metadata = ds.DatasetMetadata(
            name=f"m{mutant.number}",
            sha256=sha256,
            size_bytes=len(file.content),
            reading=file.reading,
            validate_only=not mutant.keep,
        )

        def parts() -> Iterator[ds.UploadDatasetRequest]:
            yield ds.UploadDatasetRequest(metadata=metadata)
            for start in range(0, len(file.content), _CHUNK):
                yield ds.UploadDatasetRequest(chunk=file.content[start : start + _CHUNK])

        response = self.daemon.datasets.UploadDataset(parts(), timeout=SECONDS + 5)
        violations += _judged_report(response.report)
        if mutant.keep:
            found = self.daemon.datasets.GetDataset(ds.GetDatasetRequest(dataset=response.dataset.id), timeout=10)
            if found.dataset.rows != response.report.rows:
                violations.append("a kept dataset has other rows than its report")
            self.daemon.datasets.DeleteDataset(ds.DeleteDatasetRequest(dataset=response.dataset.id), timeout=10)
        errors = [each.code for each in response.report.findings if each.level == FindingLevel.FINDING_LEVEL_ERROR]
        if mutant.keep and errors:
            violations.append(f"a dataset with errors was kept: {errors[0]}")
        return ("findings", errors[0]) if errors else ("sound", "")

    def _preview(self, template: Template, violations: list[str]) -> tuple[str, str]:
        response = self.daemon.datasets.PreviewDataset(_preview(template), timeout=SECONDS + 5)
        if SECRET in response.SerializeToString():
            violations.append("the preview shows what stands beside the data directory")
        codes = [each.code for row in response.rows for each in row.findings]
        return ("findings", codes[0]) if codes else ("shown", "")

    def _alive(self) -> Iterator[str]:
        """What is wrong with a server that should answer as ever."""
        try:
            health = self._health(health_pb2.HealthCheckRequest(), timeout=10)
            if health.status != health_pb2.HealthCheckResponse.SERVING:
                yield f"the server's health is {health.status}"
            found = self.daemon.datasets.GetDataset(ds.GetDatasetRequest(dataset="witness"), timeout=10)
            if found.dataset.rows != 40:
                yield "the server does not know its datasets any more"
        except grpc.RpcError as error:
            yield f"the server does not answer: {_code(error)}"


_PLACES = (Path("/"), Path("/tmp"), Path("/var/tmp"), Path("/etc"), Path("/dev/shm"), Path.home())


def _left(folder: Path, patience: float) -> list[str]:
    """What a folder has in the end. torch makes a folder of its own, and keeps it."""
    deadline = time.monotonic() + patience
    while left := [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return left


def _preview(template: Template | None = None) -> ds.PreviewDatasetRequest:
    request = ds.PreviewDatasetRequest(dataset="witness", base_model="builtin/tiny")
    if template is not None:
        request.tokenization.CopyFrom(template.tokenization)
        request.count = template.rows
        request.max_length = template.max_length
    return request


def _judged_report(report: DatasetReport) -> Iterator[str]:
    """What is wrong with a report, whatever it is of."""
    if len(report.findings) > 1000 or report.ByteSize() > 2 * _MIB:
        yield f"the report has {len(report.findings)} findings and {report.ByteSize():,} bytes"
    for each in report.findings:
        if not _CODE.fullmatch(each.code) or not each.level or not each.message or each.line < 0:
            yield f"a finding is incomplete: {str(each)[:200]}"
        if len(each.message) + len(each.fix) > 1500:
            yield f"a finding has {len(each.message)} characters: {each.code}"
    counts = {(each.code, each.level): each.count for each in report.counts}
    listed = Counter((each.code, each.level) for each in report.findings)
    for key, count in listed.items():
        if counts.get(key, 0) < count:
            yield f"{key[0]} is listed {count} times and counted {counts.get(key, 0)} times"
    if SECRET in report.SerializeToString():
        yield "the report shows what stands beside the data directory"


def _reason(error: grpc.RpcError, violations: list[str]) -> str:
    code = _code(error)
    why = ""
    with contextlib.suppress(KeyError):
        why = reason(error)
    details = str(getattr(error, "details", lambda: "")())
    if (code in _FORBIDDEN and why not in _ENDED) or not why:
        violations.append(f"refused with {code.name} {why}: {details[:300]}")
    if len(details) > 1200:
        violations.append(f"the status has {len(details)} characters")
    return why or code.name


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    code: grpc.StatusCode = error.code()
    return code
