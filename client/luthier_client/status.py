"""From a failed call to an error: reads the google.rpc.Status in the trailing metadata."""

from collections.abc import Iterable
from typing import Any, Protocol

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from luthier_client import endpoint as endpoints
from luthier_client import errors

_DETAILS_KEY = "grpc-status-details-bin"
_TOKEN_HINT = (
    "give the token that the operator of the server gave you: LUTHIER_TOKEN, LUTHIER_TOKEN_FILE, --token-file or token="
)

_BY_CODE: dict[str, type[errors.LuthierError]] = {
    "INVALID_ARGUMENT": errors.InvalidSpec,
    "NOT_FOUND": errors.NotFound,
    "ALREADY_EXISTS": errors.AlreadyExists,
    "FAILED_PRECONDITION": errors.FailedPrecondition,
    "RESOURCE_EXHAUSTED": errors.ResourceExhausted,
    "UNAVAILABLE": errors.Unavailable,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "OUT_OF_RANGE": errors.OutOfRange,
    "ABORTED": errors.Aborted,
    "CANCELLED": errors.CallCancelled,
    "UNIMPLEMENTED": errors.Unimplemented,
    "UNAUTHENTICATED": errors.Unauthenticated,
    "PERMISSION_DENIED": errors.PermissionDenied,
    "DATA_LOSS": errors.DataLoss,
    "INTERNAL": errors.Internal,
    "UNKNOWN": errors.Internal,
}


class FailedCall(Protocol):
    """What grpc's synchronous and asynchronous errors have in common."""

    def code(self) -> Any: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Any: ...


def to_error(failed: FailedCall, endpoint: str, *, tls: bool = False) -> errors.LuthierError:
    """The error that a failed call stands for. `endpoint`, where it was sent, is named when nobody answers; `tls` is
    whether the channel speaks it."""
    code = str(failed.code().name)
    status = _status(failed.trailing_metadata())
    message = (status.message if status else "") or failed.details() or code.lower().replace("_", " ")
    reason = ""
    metadata: dict[str, str] = {}
    violations: list[tuple[str, str]] = []
    retry_delay: float | None = None
    for detail in status.details if status else ():
        if (info := _unpack(detail, error_details_pb2.ErrorInfo)) is not None:
            reason = info.reason
            metadata.update(info.metadata)
        elif (bad := _unpack(detail, error_details_pb2.BadRequest)) is not None:
            violations += [(each.field, each.description) for each in bad.field_violations]
        elif (unmet := _unpack(detail, error_details_pb2.PreconditionFailure)) is not None:
            violations += [(each.subject, each.description) for each in unmet.violations]
        elif (quota := _unpack(detail, error_details_pb2.QuotaFailure)) is not None:
            violations += [(each.subject, each.description) for each in quota.violations]
        elif (resource := _unpack(detail, error_details_pb2.ResourceInfo)) is not None:
            metadata.setdefault("resource_type", resource.resource_type)
            metadata.setdefault("resource_name", resource.resource_name)
        elif (retry := _unpack(detail, error_details_pb2.RetryInfo)) is not None:
            retry_delay = retry.retry_delay.ToTimedelta().total_seconds()
    if code == "UNAVAILABLE" and status is None:
        # gRPC itself says this, not a server: there was no connection, or it broke.
        if tls and (distrusted := _distrust(message, endpoint)) is not None:
            return distrusted
        refused = "connect" in message.lower() and "reset" not in message.lower()
        reason = "UNREACHABLE" if refused else "CONNECTION_LOST"
        broke = f"the connection to {endpoint} broke: {message}"
        message = endpoints.unreachable(endpoint, message, tls=tls) if refused else broke
    if code == "UNIMPLEMENTED" and not reason:
        metadata.setdefault("hint", "the server may be older than this client: luthier version --server")
    if code == "UNAUTHENTICATED":
        metadata.setdefault("hint", _TOKEN_HINT)
    kind = errors.InvalidDataset if reason == "DATASET_INVALID" else _BY_CODE.get(code, errors.Internal)
    return kind(message, reason=reason, code=code, metadata=metadata, violations=violations, retry_delay=retry_delay)


def _distrust(details: str, endpoint: str) -> errors.TlsFailed | None:
    """The error for a handshake that fails however often it is tried, by the words of gRPC; None for any other."""
    if "CERTIFICATE_VERIFY_FAILED" in details:
        cause = details.partition("CERTIFICATE_VERIFY_FAILED: ")[2].removesuffix(": OK") or "it does not verify"
        return errors.TlsFailed(
            f"the certificate of {endpoint} is not trusted: {cause}",
            reason="CERTIFICATE_NOT_TRUSTED",
            code="UNAVAILABLE",
            metadata={"hint": "name the authority that signed it: LUTHIER_TLS_CA, --tls-ca or tls_ca="},
        )
    if "Hostname Verification Check failed" in details:
        return errors.TlsFailed(
            f"the certificate of {endpoint} is for another name",
            reason="CERTIFICATE_OF_ANOTHER_NAME",
            code="UNAVAILABLE",
            metadata={"hint": "use the name that stands in the certificate as the endpoint"},
        )
    if "WRONG_VERSION_NUMBER" in details:
        return errors.TlsFailed(
            f"the server at {endpoint} does not speak TLS",
            reason="NO_TLS",
            code="UNAVAILABLE",
            metadata={"hint": "start it with --tls-cert and --tls-key, or leave TLS off here"},
        )
    return None


def _status(trailers: Iterable[tuple[str, str | bytes]] | None) -> Any:
    for key, value in trailers or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _unpack(detail: Any, kind: Any) -> Any:
    if not detail.Is(kind.DESCRIPTOR):
        return None
    message = kind()
    try:
        detail.Unpack(message)
    except DecodeError:
        return None
    return message
