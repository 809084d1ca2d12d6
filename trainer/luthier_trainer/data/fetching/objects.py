"""Objects of S3, Google Cloud Storage and Azure, in the buckets that the operator allows.

Credentials and endpoints are the operator's: obstore reads them from the environment (AWS_*, GOOGLE_*, AZURE_*).
"""

import os
from collections.abc import Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from luthier_trainer.data.fetching.output import Output
from luthier_trainer.data.fetching.reports import Reports
from luthier_trainer.data.fetching.request import FetchError, Request, too_large

if TYPE_CHECKING:
    from obstore.store import AzureStore, ClientConfig, GCSStore, RetryConfig, S3Store

    Store = S3Store | GCSStore | AzureStore

SCHEMES = ("s3", "gs", "az")
_CHUNK = 1 << 20
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_ENDPOINT", "AZURE_STORAGE_ENDPOINT"),
}


def fetch(url: str, request: Request, output: Output, reports: Reports) -> str:
    """Copies the object that a URL names; returns its source, with its ETag. The library resumes a transfer that breaks
    off. Raises FetchError."""
    scheme, bucket, key = parts(url)
    if not any(_allows(entry, scheme, bucket, key) for entry in request.buckets):
        buckets = ", ".join(sorted(request.buckets)) or "none"
        raise FetchError(
            "BUCKET_NOT_ALLOWED",
            f"This server does not import {scheme}://{bucket}/{key}.",
            f"Ask the operator to add the bucket to import_bucket. Allowed: {buckets}.",
        )
    import obstore
    from obstore.exceptions import BaseError

    try:
        found = obstore.get(opened(scheme, bucket), key)
        size, etag = found.meta["size"], found.meta["e_tag"] or ""
        if size > request.max_bytes:
            raise too_large(request.max_bytes)
        for chunk in found.stream(min_chunk_size=_CHUNK):
            output.write(memoryview(chunk))
            reports.progress(output.size, size, "bytes")
    except BrokenPipeError:
        raise
    except (BaseError, OSError, ValueError) as error:
        raise _failed(error, scheme, bucket, key) from error
    if output.size != size:
        raise FetchError("UNAVAILABLE", f"{bucket} sent {output.size} of {size} bytes.", "Try again later.")
    etag = quote(etag.strip('"'), safe="")
    return f"{scheme}://{bucket}/{quote(key)}" + (f"#etag={etag}" if etag else "")


def parts(url: str) -> tuple[str, str, str]:
    """Scheme, bucket and key; the key is taken as it stands, as `aws s3 cp` does. Raises FetchError."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    scheme = scheme.lower()
    if not bucket or not all(c.isascii() and (c.isalnum() or c in "._-") for c in bucket) or not key:
        raise FetchError("INVALID_URL", f"An object is named as {scheme}://BUCKET/KEY.")
    if any(part in ("", ".", "..") for part in key.split("/")) or not key.isprintable():
        raise FetchError(
            "INVALID_URL", "A key with an empty, `.` or `..` part cannot be imported.", "Rename the object."
        )
    return scheme, bucket, key


def _allows(entry: str, scheme: str, bucket: str, key: str) -> bool:
    """Whether an entry (`s3://BUCKET` or `s3://BUCKET/PREFIX`) covers an object; a prefix ends where a part of the key
    does."""
    entry_scheme, _, rest = entry.partition("://")
    entry_bucket, _, prefix = rest.rstrip("/").partition("/")
    if (entry_scheme.lower(), entry_bucket) != (scheme, bucket):
        return False
    return not prefix or f"{key}/".startswith(f"{prefix}/")


def opened(scheme: str, bucket: str, settings: Mapping[str, str] = MappingProxyType({})) -> "Store":
    """A bucket, to be read or written. settings: variables (`AWS_...`, `GOOGLE_...`, `AZURE_...`) that count before
    those of the environment. Raises obstore's BaseError or ValueError for settings that it cannot use."""
    from obstore.store import AzureStore, GCSStore, S3Store

    endpoint = next((found for name in _ENDPOINTS[scheme] if (found := settings.get(name) or os.environ.get(name))), "")
    # No limit to the whole transfer: a stalled one ends by the read timeout.
    client: ClientConfig = {"connect_timeout": "10s", "read_timeout": "30s", "timeout": "7d", "user_agent": "luthier"}
    if endpoint.lower().startswith("http://"):
        client["allow_http"] = True
    retry: RetryConfig = {"max_retries": 5, "retry_timeout": timedelta(minutes=2)}
    config: Any = {name.lower(): value for name, value in settings.items()}
    if scheme == "s3":
        return S3Store(bucket, config=config, client_options=client, retry_config=retry)
    if scheme == "gs":
        return GCSStore(bucket, config=config, client_options=client, retry_config=retry)
    return AzureStore(bucket, config=config, client_options=client, retry_config=retry)


def _failed(error: Exception, scheme: str, bucket: str, key: str) -> FetchError:
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    if isinstance(error, FileNotFoundError):
        return FetchError("NOT_FOUND", f"There is no {scheme}://{bucket}/{key}.", "Check the bucket and the key.")
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
        message = f"The server's credentials do not give it {scheme}://{bucket}/{key}."
        return FetchError("NOT_PERMITTED", message, "Ask the operator to let the server read it.")
    # The library's text may hold addresses and signed requests.
    message = f"The object store of {scheme}://{bucket} did not answer as it should ({type(error).__name__})."
    return FetchError(
        "UNAVAILABLE", message, "Try again later; the server's endpoint and credentials are the operator's."
    )
