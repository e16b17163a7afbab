"""Parts of all requests to Cloud Storage: the login, retries, and the wording of failures.

Every request is tried again, after random waits that grow, until it succeeds, fails for good or has
failed for too long. Failures leave as the clients' own exceptions; `reason` puts them into words.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from trainer.core import flags
from trainer.core.errors import StorageError

RETRY_SECONDS = 120.0
REQUEST_SECONDS = 60  # without a byte
_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 16.0
_TRANSIENT_CODES = {408, 429, 500, 502, 503, 504}
_PAYER = "GOOGLE_CLOUD_QUOTA_PROJECT"
_CONNECTIONS = 64  # that are kept for the next request

T = TypeVar("T")


class NoBucketError(FileNotFoundError):
    """There is no such bucket."""


class ShortError(ConnectionError):
    """Fewer bytes came than were asked for, or others than are stored."""


# ---- the login -----------------------------------------------------------------------------------


@functools.cache
def client() -> Any:
    """The client of this process, which its threads share; gcsfs uses its credentials, too."""
    try:
        import gcsfs.core  # noqa: F401
        import requests
        from google.auth import exceptions
        from google.cloud import storage
    except ImportError as error:
        raise StorageError(
            f"gs:// paths need Google's client and gcsfs ({error}); "
            "pip install 'stylegan-trainer[gcs]'"
        ) from error
    logging.getLogger("google.auth").setLevel(logging.ERROR)  # without a login is no failure yet
    try:
        client = storage.Client(project=None)  # objects need none; the credentials' own is billed
    except exceptions.DefaultCredentialsError:
        client = storage.Client.create_anonymous_client()  # public data can be read by everybody
    client._http.hooks["response"].append(_check_form)
    client._http.headers.update(billing())
    for scheme in ("https://", "http://"):  # or a line of urllib3's for each thread too many
        client._http.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=_CONNECTIONS))
    return client


def billing() -> dict[str, str]:
    """Headers that name the project that pays for requests to a requester-pays bucket.

    Google's credentials send them by themselves, but not all kinds of them.
    """
    project = flags.env(_PAYER)
    return {"x-goog-user-project": project} if project else {}


def _check_form(response: Any, **unused: Any) -> None:
    """Raises a failure whose body isn't Google's JSON: proxies and balancers answer what they like,
    and Google's client looks into anything that it can parse."""
    from google.api_core import exceptions

    if response.status_code < 400 or response.status_code == 401:  # after 401 it logs in anew
        return
    try:
        known = isinstance(response.json()["error"]["message"], str)
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise exceptions.from_http_status(response.status_code, response.text)


def forget_client() -> None:
    """Lets the next request log in anew, with what the environment says then."""
    client.cache_clear()


os.register_at_fork(after_in_child=forget_client)  # two processes must not share connections


# ---- trying again --------------------------------------------------------------------------------


def tried(request: Callable[[], T], progress: Callable[[], int] = int) -> T:
    """The result of a request that may be made again and again, until it has failed for too long.

    The time counts from the first failure: a request may take as long as it needs.

    Args:
      request: makes it.
      progress: how many bytes have come so far, where a request goes on with what the failed one
        before it has got. The time starts anew after each failure that has brought some.
    """
    from google.api_core import exceptions, retry

    since = None
    while True:
        before = progress()
        try:
            return request()
        except Exception as error:
            if not _is_transient(error):
                raise
            now = time.monotonic()
            if since is None or progress() > before:
                since = now
                waits = retry.exponential_sleep_generator(
                    _FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS
                )
            wait = next(waits)
            if now + wait - since > RETRY_SECONDS:
                raise exceptions.RetryError("tried in vain", error) from error
        time.sleep(wait)


def _is_transient(error: Exception) -> bool:
    import aiohttp
    import requests
    import urllib3
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

    if isinstance(error, InvalidResponse):
        return error.response.status_code in _TRANSIENT_CODES
    if isinstance(error, exceptions.GoogleAPICallError):
        return error.code in _TRANSIENT_CODES
    if isinstance(error, GoogleAuthError):
        return bool(error.retryable)
    wrong = (
        requests.exceptions.InvalidURL,
        requests.exceptions.MissingSchema,
        aiohttp.InvalidURL,
    )
    if isinstance(error, wrong):
        return False
    broken = (
        aiohttp.ClientError,
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
        requests.exceptions.ContentDecodingError,
        urllib3.exceptions.HTTPError,
        ConnectionError,
        TimeoutError,
        DataCorruption,
    )
    return isinstance(error, broken)


# ---- paths and words -----------------------------------------------------------------------------


def split(path: str) -> tuple[str, str]:
    """Bucket and name in it, without a '/' at its end; '' of the bucket itself."""
    bucket, _, name = path.partition("://")[2].partition("/")
    if not bucket:
        raise StorageError(f"{path} names no bucket; write gs://bucket/name")
    return bucket, name.removesuffix("/")


def split_object(path: str) -> tuple[str, str]:
    """The same of an object, not of a bucket."""
    bucket, name = split(path)
    if not name:
        raise IsADirectoryError(f"{path} is a bucket")
    return bucket, name


def missing(error: Exception, path: str) -> Exception:
    """The meaning of 'not found' as an answer to a write, or to a request to a bucket."""
    from google.api_core.exceptions import NotFound

    bucket, _ = split(path)
    return NoBucketError(f"no bucket {bucket}") if isinstance(error, NotFound) else error


def reason(error: BaseException, path: str) -> str | None:
    """Why a request failed and what to do about it, in one line; None if it says it itself."""
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.exceptions import InvalidResponse

    bucket, _ = split(path)
    waited = ""
    if isinstance(error, exceptions.RetryError):
        waited = f" for {RETRY_SECONDS:.0f} s"
        error = error.cause or error
        if isinstance(error, InvalidResponse):
            error = exceptions.from_http_response(error.response)
    if isinstance(error, NoBucketError):
        return f"there is no bucket {bucket}; check its name, or make it"
    if isinstance(error, exceptions.Unauthorized | GoogleAuthError):
        return (
            "Google takes no or only expired credentials from here; log in with 'gcloud auth "
            "application-default login', or set GOOGLE_APPLICATION_CREDENTIALS to a key file"
        )
    said = _said(error)
    if isinstance(error, exceptions.Forbidden) or "user project" in said:
        if "project" in said or "billing" in said:
            return f"wrong project or billing ({said}); choose the project that pays with {_PAYER}"
        return (
            f"permission denied ({said}); give the account a role on bucket {bucket} such as "
            "Storage Object Admin, or log in as another"
        )
    if isinstance(error, exceptions.PreconditionFailed):
        return (
            f"Cloud Storage refused it, as it isn't what it was when this job last looked ({said}); "
            "look whether another job writes there, and run the same command again"
        )
    if isinstance(error, exceptions.GoogleAPICallError) and error.code in _TRANSIENT_CODES:
        return f"Cloud Storage answered {error.code}{waited} ({said}); run the same command again"
    if waited:
        return f"Cloud Storage could not be reached{waited} ({said}); check the network"
    return None


def _said(error: BaseException) -> str:
    """The server's words, without the request that they answer."""
    details = getattr(error, "message", None) or str(error)
    response = getattr(error, "response", None)
    try:
        details = response.json()["error"]["message"] if response is not None else details
    except (KeyError, TypeError, ValueError):
        details = str(details).partition("(Caused by")[0]
    # A proxy's page has its text between tags.
    details = re.sub(r"(?s)<(style|script)\b.*?</\1>|<[^>]*>", " ", str(details))
    return " ".join(details.split())[:200] or "no reason given"
