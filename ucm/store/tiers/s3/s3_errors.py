"""What the S3 client says, in the words of a tier: the one place that turns its errors into
TierError.

Its own texts are long, and hold answers of the server that may show an access key's id: of these
only the code, such as SignatureDoesNotMatch, is taken over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

from ucm.errors import TierError
from ucm.outcome import Outcome

CLIENT_ERRORS = (BaseError, OSError, ValueError)

# Of an answer, or of one of several objects that were to be deleted.
_CODE = re.compile(r"(?:<Code>|\(code: )([A-Za-z0-9.]{1,64})(?:</Code>|\))")
_STATUS = re.compile(r"status code: (\d{3}\b[A-Za-z -]{0,40})")
_METADATA = re.compile(r"(http://169\.254\.|Missing(AccessKeyId|SecretAccessKey)|\bCredential)")
_TIMEOUT = re.compile(r"\b(TimedOut|operation timed out|kind: Timeout|deadline has elapsed)\b")
_CONNECT = re.compile(r"\bkind: Connect\b")
_CERTIFICATE = re.compile(r"(?i)certificate|\btls\b")
# Of an identity that is had from a file, and of the server that makes credentials of it.
_TOKEN_FILE = re.compile(r"Failed to read (?:EKS )?token file ('[^'\n]*': [A-Za-z -]+)")
_ROLE = re.compile(r"Error performing POST REDACTED\b")
_ELSEWHERE = re.compile(r"redirect without LOCATION")
_OF_OUR_FILE = re.compile(r"TierError: (s3_credentials_file: [^\n]*)")
# Some servers say these with another status than 403.
_DENIED = frozenset(
    {
        *("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId"),
        *("SignatureDoesNotMatch", "AuthorizationHeaderMalformed", "RequestTimeTooSkewed"),
        "AccessDenied",
    }
)
# Where it is mostly something else than rights.
_LOOK_AT = {
    "RequestTimeTooSkewed": "this machine's clock",
    "AuthorizationHeaderMalformed": "s3_region and credentials",
}
_FULL = frozenset({"QuotaExceeded", "XMinioStorageFull", "InsufficientCapacity"})
# The client retries these once by itself.
_BUSY = frozenset({"SlowDown", "ServiceUnavailable", "RequestTimeout", "Throttling"})


@dataclass(frozen=True)
class Trouble:
    """`is_unreachable`: the server, or the way to it, and not this request."""

    why: str
    reason: Outcome
    is_unreachable: bool = False


def is_absent(error: Exception) -> bool:
    """There is no such object. Of a bucket that isn't there it is said as well, where the server
    says so in its answer."""
    return isinstance(error, FileNotFoundError) and "<Code>NoSuchBucket</Code>" not in str(error)


def is_empty_object(error: Exception) -> bool:
    """There is one, and it has no byte at the offset that was asked for."""
    return "416 Range Not Satisfiable" in str(error)


def is_denied(error: Exception) -> bool:
    return isinstance(error, PermissionDeniedError)


def is_of_client(error: BaseException) -> bool:
    """Whatever it does, this process and its threads go on. What it calls a panic derives from no
    Exception, and its class can't be imported."""
    return isinstance(error, CLIENT_ERRORS) or type(error).__name__ == _PANIC


def trouble_of(error: BaseException) -> Trouble:
    """Of an error that `is_of_client`."""
    if type(error).__name__ == _PANIC:
        return Trouble("the S3 client failed by itself, and has said why in this log", _IO)
    text = str(error)
    code = _found(_CODE, text)
    status = _found(_STATUS, text)
    said = code or status
    file = _found(_OF_OUR_FILE, text)
    if file:
        return Trouble(file, _IO)
    is_refused = isinstance(error, (PermissionDeniedError, UnauthenticatedError))
    if (is_refused or status[:3] == "403" or code in _DENIED) and not _METADATA.search(text):
        look_at = _LOOK_AT.get(code, "credentials and rights")
        return Trouble(f"access is denied ({said}): look at {look_at}", _IO)
    if code == "NoSuchBucket" or isinstance(error, FileNotFoundError):
        return Trouble("there is no such bucket", _IO)
    if code in _FULL or status[:3] == "507":
        return Trouble(f"storage is full ({said})", Outcome.FULL)
    if _METADATA.search(text):
        return Trouble(_NO_CREDENTIALS, _IO, is_unreachable=True)
    if why := _of_a_role(text):
        return Trouble(why, _IO, is_unreachable=True)
    if _ELSEWHERE.search(text):
        return Trouble("the server sends us elsewhere: is s3_region that of the bucket?", _IO)
    if said:
        is_busy = code in _BUSY or status[:1] == "5"
        return Trouble(f"the server answers {said}", _IO, is_unreachable=is_busy)
    return _of_the_way(text)


def tier_error_of(what: str, doing: str, trouble: Trouble) -> TierError:
    return TierError(f"{what}: {doing}: {trouble.why}", reason=trouble.reason)


def _of_a_role(text: str) -> str:
    """Why there are no credentials, where an identity has to be shown for them."""
    if file := _found(_TOKEN_FILE, text):
        return f"there are no credentials: can't read the token file {file}"
    return _NO_ROLE if _ROLE.search(text) else ""


_PANIC = "PanicException"
_IO = Outcome.IO_ERROR
_NO_ROLE = "there are no credentials: none can be had for AWS_ROLE_ARN by its token"
_NO_CREDENTIALS = (
    "there are no credentials: neither AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, nor "
    "s3_credentials_file, nor an instance's metadata"
)


def _of_the_way(text: str) -> Trouble:
    """Nothing came back."""
    if _TIMEOUT.search(text):
        return Trouble("no answer in time", Outcome.TIMEOUT, is_unreachable=True)
    if _CERTIFICATE.search(text):
        return Trouble("its certificate is not trusted: see s3_tls_ca_file", _IO, True)
    if _CONNECT.search(text):
        return Trouble("can't connect", _IO, is_unreachable=True)
    return Trouble("the connection broke", _IO, is_unreachable=True)


def _found(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return match[1].strip() if match is not None else ""
