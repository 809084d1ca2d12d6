"""Fetches a dataset's file: `python -m luthier_trainer.data.fetch REQUEST_FILE OUTPUT_FILE`.

REQUEST_FILE is JSON: what to fetch and what the operator allows (`fetching.request.Request`). A token comes in the
variable LUTHIER_FETCH_TOKEN alone, and goes to the host that was asked for first alone. OUTPUT_FILE holds the file when
the last message says so, and is of no use otherwise. Standard output carries length-prefixed (32 bits, little endian)
`luthier.trainer.v1.FetchReport` messages: progress, then one end. Exits with 0 whatever the end is, with 2 when it is
called wrongly. SIGTERM ends it at once, and so does a reader of its output that is gone; what it left then are
OUTPUT_FILE and OUTPUT_FILE.cache.
"""

import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

from luthier_trainer.data.fetching import https, local, objects
from luthier_trainer.data.fetching.address import Policy
from luthier_trainer.data.fetching.output import Output
from luthier_trainer.data.fetching.reports import Reports, leave_with_the_reader
from luthier_trainer.data.fetching.request import FetchError, HubSource, Request

TOKEN = "LUTHIER_FETCH_TOKEN"
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


def fetch(request: Request, path: Path, token: str, reports: Reports) -> str:
    """Fills the file; returns its source once it is on the disk. Raises FetchError."""
    with Output(path, request.max_bytes) as output:
        source = _fill(request, output, path.with_name(path.name + ".cache"), token, reports)
        if request.sha256 and not isinstance(request.source, HubSource) and output.sha256 != request.sha256:
            message = f"The file's SHA-256 is {output.sha256}, not {request.sha256}."
            raise FetchError("HASH_MISMATCH", message, "Check which version you want, or leave the hash out.")
        output.sync()
    return source


def _fill(request: Request, output: Output, cache: Path, token: str, reports: Reports) -> str:
    if isinstance(request.source, HubSource):
        import luthier_trainer.data.fetching.hub as hub  # it loads much, which takes its time

        shutil.rmtree(cache, ignore_errors=True)
        try:
            cache.mkdir(mode=0o700)
            return hub.fetch(request.source, request, output, cache, token, reports)
        finally:
            shutil.rmtree(cache, ignore_errors=True)
    scheme = request.source.partition(":")[0].lower()
    if scheme in ("https", "http"):
        policy = Policy(request.hosts, request.networks)
        return https.fetch(request.source, policy, output, reports.progress, token)
    if scheme == "file":
        return local.fetch(request.source, request, output, reports)
    if scheme in objects.SCHEMES:
        return objects.fetch(request.source, request, output, reports)
    message = "A dataset is imported from https://, s3://, gs://, az:// or file://, or from the Hugging Face Hub."
    raise FetchError("SCHEME_NOT_ALLOWED", message, "Use one of these, or upload the file.")


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m luthier_trainer.data.fetch REQUEST_FILE OUTPUT_FILE\n")
        return 2
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    token = os.environ.pop(TOKEN, "").strip()
    for name in [each for each in os.environ if each.lower() in _PROXIES]:
        del os.environ[name]  # no library gets to use one
    try:
        request = Request.from_json(Path(arguments[0]).read_bytes())
    except (OSError, ValueError) as error:
        sys.stderr.write(f"cannot read the request: {error}\n")
        return 2
    # Standard output is for reports alone, whatever a library prints.
    descriptor = os.dup(1)
    os.dup2(2, 1)
    leave_with_the_reader(descriptor)
    reports = Reports(descriptor)
    try:
        if not token.isascii() or not token.isprintable():
            raise FetchError(
                "TOKEN_NOT_USABLE", "The secret holds no token: it has characters that a token cannot have."
            )
        reports.fetched(fetch(request, Path(arguments[1]).absolute(), token, reports))
    except FetchError as error:
        reports.failed(error)
    except BrokenPipeError:
        return 1
    except Exception as error:
        text = traceback.format_exc()
        sys.stderr.write(text.replace(token, "***") if token else text)
        message = f"The import failed in a way that it should not ({type(error).__name__})."
        reports.failed(FetchError("FAILED", message, "Try again; if it stays, the server's log says more."))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
