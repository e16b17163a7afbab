"""What can go wrong with a request, and what is remembered of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Faults:
    """What the local Cloud Storage does to requests. Rates are of all requests, from 0 to 1.

    Attributes:
      match: regular expression; only requests whose 'METHOD kind bucket/object' it is found in are
        touched (`kind` as in `Request`). Empty: all.
      latency_sec: each request waits so long before it is served.
      bandwidth: bytes a second of each answer's and each upload's body; 0: no limit.
      error_rate: answered 503 or 429, and not carried out.
      fail_next: the next so many are answered 503, and not carried out.
      reset_rate: the connection is reset; half of these after the request was carried out.
      truncate_rate: of a body only the first half arrives, then the connection is closed.
      expired_token: all are answered 401, as for credentials whose time is up.
      forbidden: all are answered 403, as for an account without permission.
      requester_pays: all that name no project that pays are answered 400.
      left_out: fields and headers that answers lack, by their names in Google's documents, such as
        'crc32c', which listings lack where objects are under a key of the customer's.
      pages: 'html' or 'text': refusals have such a body, as those of proxies and balancers, not
        Google's JSON.
      seed: of the draws.
    """

    match: str = ""
    latency_sec: float = 0.0
    bandwidth: float = 0.0
    error_rate: float = 0.0
    fail_next: int = 0
    reset_rate: float = 0.0
    truncate_rate: float = 0.0
    expired_token: bool = False
    forbidden: bool = False
    requester_pays: bool = False
    left_out: Sequence[str] = ()
    pages: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """One request that the local Cloud Storage got.

    Attributes:
      time: Unix seconds at its start.
      method: of HTTP.
      kind: 'read' (content), 'stat', 'list', 'write' (content, or the start of an upload in
        parts: then the parts are 'part'), 'delete', 'copy', 'compose', 'bucket', or 'other'.
      object: bucket/name, as far as there is one.
      status: of the answer; 0 if none was given.
      received: bytes of the request's body.
      sent: bytes of the answer's body.
      fault: what was done to it: 'error', 'reset', 'truncated', 'expired', 'forbidden',
        'unpaid', or ''.
    """

    time: float
    method: str
    kind: str
    object: str
    status: int
    received: int
    sent: int
    fault: str

    def to_json(self) -> list[Any]:
        """For `Request(*...)`."""
        return list(dataclasses.astuple(self))
