"""What a secret of a destination holds: the variables that imports take from the environment, or a token of the hub.

For object stores the secret is a JSON object of variables, `{"AWS_ACCESS_KEY_ID": "...", ...}`, or a Google service
account's own JSON key; for the hub it is the token as it stands. Endpoints and regions that it does not name are the
operator's, from the environment; credentials never are.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping

from luthier_trainer.errors import TrainingError

_PREFIXES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
# What tells the store who writes. One of these must be in the secret, and none is taken from the environment.
_IDENTITIES = {
    "s3": (
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_TOKEN", "AWS_SKIP_SIGNATURE"),
        *("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN", "AWS_ROLE_SESSION_NAME", "AWS_METADATA_ENDPOINT"),
        *("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    ),
    "gs": (
        *("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "GOOGLE_SERVICE_ACCOUNT_KEY"),
        *("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_BEARER_TOKEN"),
    ),
    "az": (
        *("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY"),
        *("AZURE_STORAGE_MASTER_KEY", "AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_TOKEN"),
        *("AZURE_STORAGE_CLIENT_ID", "AZURE_STORAGE_CLIENT_SECRET", "AZURE_STORAGE_TENANT_ID", "AZURE_SKIP_SIGNATURE"),
        *("AZURE_STORAGE_AUTHORITY_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET", "AZURE_TENANT_ID"),
        *("AZURE_AUTHORITY_ID", "AZURE_FEDERATED_TOKEN_FILE", "AZURE_MSI_ENDPOINT", "AZURE_IDENTITY_ENDPOINT"),
        *("AZURE_OBJECT_ID", "AZURE_MSI_RESOURCE_ID", "AZURE_USE_AZURE_CLI"),
    ),
}


def variables(scheme: str, secret: str, name: str) -> Mapping[str, str]:
    """The variables of an object store's secret. name: the secret's, for messages. Raises TrainingError
    DESTINATION_FAILED, which repeats nothing of the secret."""
    if not secret.strip():
        raise missing(scheme, name)
    try:
        found = json.loads(secret)
    except ValueError:
        found = None
    if scheme == "gs" and isinstance(found, dict) and found.get("type") == "service_account":
        return {"GOOGLE_SERVICE_ACCOUNT_KEY": secret}
    prefix = _PREFIXES[scheme]
    if not isinstance(found, dict) or not all(
        key.startswith(prefix) and isinstance(value, str) for key, value in found.items()
    ):
        raise _unusable(
            name, f'must hold a JSON object of {prefix}* variables, as in {{"{_IDENTITIES[scheme][0]}": "..."}}'
        )
    if not any(found.get(key) for key in _IDENTITIES[scheme]):
        raise _unusable(name, f"holds no credentials for {scheme}://")
    return found


def token(secret: str, name: str) -> str:
    """The token of a secret for the hub. Raises TrainingError DESTINATION_FAILED, which repeats nothing of it."""
    found = secret.strip()
    if not found:
        raise missing("hf", name)
    if not found.isascii() or not found.isprintable() or set(' "{}') & set(found):
        raise _unusable(name, "must hold a token of the hub and nothing else")
    return found


@contextlib.contextmanager
def nobody(scheme: str) -> Iterator[None]:
    """For the time of the block, the environment tells no object store who writes."""
    hidden = {name: os.environ.pop(name) for name in _IDENTITIES[scheme] if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def missing(scheme: str, name: str) -> TrainingError:
    """The error of a destination without credentials."""
    if not name:
        message = f"{scheme}:// is written with credentials that the operator keeps, and the export names no secret."
        return TrainingError("DESTINATION_FAILED", message, "Name one: credentials_secret.")
    return _unusable(name, "is empty")


def _unusable(name: str, what: str) -> TrainingError:
    return TrainingError("DESTINATION_FAILED", f"The secret {name!r} {what}.", "Tell the operator.")
