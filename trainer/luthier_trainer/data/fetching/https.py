"""Files by https: pinned to an address that was judged, resumed when the transfer breaks off.

Proxies of the environment are not used: a proxy would resolve names itself, out of sight of the rules. Certificates are
verified against the host's name, with the system's authorities or those of SSL_CERT_FILE.
"""

import contextlib
import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from luthier_trainer.data.fetching.address import Origin, Policy, origin
from luthier_trainer.data.fetching.output import Sink
from luthier_trainer.data.fetching.request import FetchError, too_large

MAX_REDIRECTS = 5
MAX_RESUMES = 5
CONNECT_SECONDS = 10.0
STALL_SECONDS = 30.0
CRAWL_SECONDS = 60.0
CRAWL_BYTES = 1 << 14

_CHUNK = 1 << 18
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)", re.ASCII)

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. connect: to open a connection; stall: without a byte; crawl: for the head of a response, and for each
    CRAWL_BYTES of its body; pauses: before each resumption."""

    connect: float = CONNECT_SECONDS
    stall: float = STALL_SECONDS
    crawl: float = CRAWL_SECONDS
    pauses: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)


class _BrokenOffError(Exception):
    """The connection broke, or the server is busy: worth another try. The message says what happened."""


def fetch(
    url: str,
    policy: Policy,
    sink: Sink,
    progress: Progress,
    token: str = "",
    timing: Timing = Timing(),
) -> str:
    """Fills the sink with what the URL leads to; returns its source: the URL without its query, and the ETag.

    token: sent as a bearer to the origin of the URL, and to no other one. Raises FetchError.
    """
    transfer = _Transfer(url, policy, sink, progress, token, timing)
    resumes = 0
    while True:
        try:
            transfer.attempt()
            break
        except _BrokenOffError as error:
            if resumes == MAX_RESUMES or not transfer.has_begun:
                host = origin(url).host
                message = f"The transfer from {host} failed: {error}."
                raise FetchError("UNAVAILABLE", message, "Try again later.") from error
            time.sleep(timing.pauses[min(resumes, len(timing.pauses) - 1)] if timing.pauses else 0)
            resumes += 1
    parts = urlsplit(url)
    name = quote(transfer.validator.removeprefix("W/").strip('"'), safe="")
    return f"{origin(url)}{parts.path}" + (f"#etag={name}" if name and transfer.has_etag else "")


class _Transfer:
    """One file, over as many connections as it takes."""

    def __init__(self, url: str, policy: Policy, sink: Sink, progress: Progress, token: str, timing: Timing) -> None:
        self._url = url
        self._policy = policy
        self._sink = sink
        self._progress = progress
        self._token = token
        self._timing = timing
        self._total = 0
        self.has_begun = False
        self.has_etag = False
        self.validator = ""

    def attempt(self) -> None:
        """Gets what is still missing. Raises FetchError, or _BrokenOffError with the bytes so far in the sink."""
        if self._sink.size and not self._can_resume:
            self._sink.restart()
        with self._response() as response:
            self._begin(response)
            self._copy(response)

    @property
    def _can_resume(self) -> bool:
        """Whether a range can be asked for: what identifies the version must be exact."""
        return bool(self.validator) and not self.validator.startswith("W/")

    @contextlib.contextmanager
    def _response(self) -> Iterator[http.client.HTTPResponse]:
        """The response that the redirects lead to."""
        url, token = self._url, self._token
        first = origin(url)
        for _ in range(MAX_REDIRECTS + 1):
            asked = origin(url)
            if asked != first:
                token = ""  # also for a redirect back: what lies there was not asked for by the caller
            self._policy.admit(asked)
            connection = _Connection(asked, self._policy, self._timing)
            with contextlib.closing(connection):
                try:
                    response = connection.answer(_target(url), self._headers(token))
                except TimeoutError as error:
                    raise _BrokenOffError(f"no answer within {self._timing.stall:g} seconds") from error
                except (OSError, http.client.HTTPException) as error:
                    raise _BrokenOffError(_described(error)) from error
                with contextlib.closing(response):
                    if response.status not in _REDIRECTS:
                        yield response
                        return
                    url = _redirected(url, response)
        raise FetchError("TOO_MANY_REDIRECTS", f"{first.host} redirects more than {MAX_REDIRECTS} times.")

    def _headers(self, token: str) -> Mapping[str, str]:
        headers = {"User-Agent": "luthier", "Accept": "*/*", "Accept-Encoding": "identity", "Connection": "close"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        if self._sink.size:
            headers |= {"Range": f"bytes={self._sink.size}-", "If-Range": self.validator}
        return headers

    def _begin(self, response: http.client.HTTPResponse) -> None:
        """Judges the response, and notes what it is a response of."""
        _judge(response.status, origin(self._url).host, bool(self._token))
        if (encoding := response.headers.get("Content-Encoding", "identity").lower()) != "identity":
            message = f"The server sends the file encoded as {encoding[:40]!r} although it was asked not to."
            raise FetchError("ENCODING_NOT_SUPPORTED", message, "Compress the file itself (.gz, .zst) instead.")
        length = _length(response)
        if response.status == 206:
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if not self._sink.size or found is None or int(found[1]) != self._sink.size:
                raise FetchError("UNAVAILABLE", "The server sent another part of the file than it was asked for.")
        else:
            self._sink.restart()
            etag, modified = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
            self.has_etag = bool(etag)
            self.validator = etag or modified
            self._total = length or 0
        if length is not None and self._sink.size + length > self._sink.max_bytes:
            raise too_large(self._sink.max_bytes)
        self.has_begun = True

    def _copy(self, response: http.client.HTTPResponse) -> None:
        missing = _length(response)
        since, crawled = time.monotonic(), 0
        while missing != 0:
            try:
                # read1 returns what is there; read and readinto wait until they have it all.
                chunk = response.read1(_CHUNK if missing is None else min(_CHUNK, missing))
            except TimeoutError as error:
                raise _BrokenOffError(f"no byte for {self._timing.stall:g} seconds") from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _BrokenOffError(_described(error)) from error
            if not chunk:
                break
            crawled += len(chunk)
            if time.monotonic() - since > self._timing.crawl:
                if crawled < CRAWL_BYTES:
                    raise _BrokenOffError(f"{crawled} bytes in {self._timing.crawl:g} seconds")
                since, crawled = time.monotonic(), 0
            self._sink.write(chunk)
            self._progress(self._sink.size, self._total, "bytes")
            if missing is not None:
                missing -= len(chunk)
        if missing:
            raise _BrokenOffError(f"the connection ended {missing} bytes early")
        if missing is None and not self._sink.size and not response.chunked:
            raise _BrokenOffError("the connection ended before the file began")


class _Connection(http.client.HTTPConnection):
    """A connection to one of an origin's addresses, judged and then connected to; nothing resolves the name again."""

    def __init__(self, asked: Origin, policy: Policy, timing: Timing) -> None:
        super().__init__(asked.host, asked.port, timeout=timing.stall)
        self.default_port = 443 if asked.scheme == "https" else 80  # what the Host header leaves out
        self._asked = asked
        self._policy = policy
        self._timing = timing

    def connect(self) -> None:
        asked = self._asked
        failure: OSError | None = None
        for address in self._policy.addresses(asked.host, asked.port):
            try:
                self.sock = self._open(str(address))
            except OSError as error:
                failure = error
            else:
                return
        message = f"Cannot connect to {asked.host}: {_described(failure)}."
        if isinstance(failure, ssl.SSLCertVerificationError):
            hint = "An authority of your own goes into SSL_CERT_FILE of the server."
            raise FetchError("CERTIFICATE_NOT_VALID", message, hint) from failure
        raise _BrokenOffError(f"cannot connect ({_described(failure)})") from failure

    def answer(self, target: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        """Asks for the target; returns the response when its head is here. A head that drips is cut off."""
        self.connect()
        cut = threading.Event()
        timer = threading.Timer(self._timing.crawl, _hang_up, [self.sock, cut])
        timer.daemon = True
        timer.start()
        try:
            self.request("GET", target, headers=headers)
            response = self.getresponse()
        finally:
            timer.cancel()
        if cut.is_set():  # http.client takes the end of a connection for the end of the head
            response.close()
            raise _BrokenOffError(f"no whole answer within {self._timing.crawl:g} seconds")
        return response

    def _open(self, address: str) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.settimeout(self._timing.connect)
            sock.connect((address, self._asked.port))
            if self._asked.scheme == "https":
                sock = ssl.create_default_context().wrap_socket(sock, server_hostname=self._asked.host)
            sock.settimeout(self._timing.stall)
        except BaseException:
            sock.close()
            raise
        return sock


def _hang_up(sock: socket.socket, cut: threading.Event) -> None:
    cut.set()
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not TLS's own, which another thread is in


def _target(url: str) -> str:
    parts = urlsplit(url)
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _redirected(url: str, response: http.client.HTTPResponse) -> str:
    location = response.headers.get("Location")
    if not location:
        raise FetchError("UNAVAILABLE", f"{origin(url).host} redirects to nowhere.")
    try:
        target = urljoin(url, quote(location, safe="%/:=&?~#+!$,;'@()*[]"))
    except ValueError as error:
        raise FetchError("INVALID_URL", f"{origin(url).host} redirects to what is no URL.") from error
    if origin(url).scheme == "https" and origin(target).scheme != "https":
        message = f"{origin(url).host} redirects from https to http."
        raise FetchError("SCHEME_NOT_ALLOWED", message, "Name an address that stays on https.")
    return target


def _judge(status: int, host: str, has_token: bool) -> None:
    if status in (200, 206):
        return
    if status in (404, 410):
        raise FetchError("NOT_FOUND", f"{host} has no such file (HTTP {status}).", "Check the URL.")
    if status in (401, 403, 407):
        hint = "Check that the token is valid for it." if has_token else "If it needs a token, name it by token_secret."
        raise FetchError("NOT_PERMITTED", f"{host} does not give the file out (HTTP {status}).", hint)
    if status in _BUSY:
        raise _BrokenOffError(f"HTTP {status}")
    raise FetchError("UNAVAILABLE", f"{host} answered with HTTP {status}.", "Check the URL, or try again later.")


def _length(response: http.client.HTTPResponse) -> int | None:
    """What Content-Length says. Raises FetchError when it says nothing that can be trusted."""
    lengths = set(response.headers.get_all("Content-Length", []))
    if not lengths or response.chunked:
        return None
    text = lengths.pop()
    if lengths or not re.fullmatch(r"[0-9]{1,18}", text, re.ASCII):
        raise FetchError("UNAVAILABLE", "The server says two different lengths, or none that is a number.")
    return int(text)


def _described(error: BaseException | None) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, TimeoutError):
        return "timed out"
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
