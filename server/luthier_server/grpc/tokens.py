"""The tokens that open the server, from a file that is read again when it changes.

In memory there are only their SHA-256 digests. Tokens are long and random, so a plain digest needs no salt and no
stretching.
"""

import hashlib
import hmac
import os
import re
import stat
from pathlib import Path

import structlog

from luthier_server.grpc.changes import stamp

log = structlog.get_logger()

_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")
"""The characters of a bearer token (RFC 6750, section 2.1)."""


class TokenFileError(Exception):
    """A token file that cannot be used; the message says why and holds no token."""


class Tokens:
    """The tokens of one file: one a line; empty lines and lines that begin with `#` do not count.

    A file that was replaced holds from the next call on. One that cannot be used is logged, and the tokens before it
    stay. Raises TokenFileError when there is nothing to start with.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = stamp([path])
        self._digests = _digests(path)

    def opens(self, token: str) -> bool:
        """Whether the token is one of them; takes as long for a wrong one as for a right one."""
        self._refresh()
        asked = hashlib.sha256(token.encode()).digest()
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(digest, asked)
        return found

    def _refresh(self) -> None:
        # Asked before the file is read: what is written meanwhile is a change that the next call sees.
        now = stamp([self._path])
        if now == self._stamp:
            return
        self._stamp = now
        try:
            self._digests = _digests(self._path)
        except TokenFileError as error:
            log.error("the token file was changed and cannot be used: the tokens before it stay", error=str(error))
        else:
            log.info("tokens read again", tokens=len(self._digests))


def _digests(path: Path) -> tuple[bytes, ...]:
    try:
        with open(path) as file:
            # Of the file that is open, not of whatever is at the path by now.
            mode = os.fstat(file.fileno()).st_mode
            if mode & (stat.S_IRWXO | stat.S_IWGRP):
                raise TokenFileError(
                    f"{path} can be read or changed by others ({stat.filemode(mode)}): chmod 600 {path}"
                )
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        # Not the text of a UnicodeDecodeError, which quotes the file.
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise TokenFileError(f"{path} cannot be read: {why}") from None
    tokens = []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        if not _TOKEN.fullmatch(line):
            raise TokenFileError(f"{path}, line {number}: a token has only the characters A-Z a-z 0-9 . _ ~ + / = -")
        tokens.append(hashlib.sha256(line.encode()).digest())
    if not tokens:
        raise TokenFileError(f"{path} holds no token: write one a line, for example from `openssl rand -hex 32`")
    return tuple(tokens)
