"""What the service is asked and what it answers: requests as typed structs, errors as one shape."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

# ids of any log fit; what is longer is not an id
MAX_ID = 512
MAX_K, MAX_IDS, MAX_BATCH, MAX_EVENTS = 1000, 10_000, 256, 1000

Text = Annotated[str, Meta(min_length=1, max_length=MAX_ID)]
Whole = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Identifier = Text | Whole
# what is stored: a database takes no NUL
_STORED = r"^[^\x00]*$"
StoredIdentifier = Annotated[str, Meta(min_length=1, max_length=MAX_ID, pattern=_STORED)] | Whole
Identifiers = Annotated[list[Identifier], Meta(max_length=MAX_IDS)]


class RecommendRequest(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """One user to recommend to: by id, by the items of a history, or neither (then what is popular)."""

    user_id: Identifier | None = None
    # items of somebody without an id, oldest first
    history: Identifiers | None = None
    k: Annotated[int, Meta(ge=1, le=MAX_K)] = 10
    # leave out what the user had, in the data, in stored events or in the history given
    exclude_seen: bool = True
    exclude: Identifiers = msgspec.field(default_factory=list)
    # only these may be recommended
    candidates: Identifiers | None = None
    # only items of any of these categories
    categories: Annotated[list[Text], Meta(min_length=1, max_length=64)] | None = None
    # feature and value of somebody nothing else is known of, such as {"gender": "F"}
    segment: Annotated[dict[str, Text], Meta(max_length=16)] | None = None
    # what an unknown user_id gets
    unknown_user: Literal["error", "popular"] = "error"
    # pass over items of history and candidates that the model does not know, instead of refusing them
    skip_unknown: bool = False
    # say which items of the history are nearest to each recommended one
    why: bool = False


Batch = Annotated[list[RecommendRequest], Meta(min_length=1, max_length=MAX_BATCH)]


class EventRequest(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """One interaction that happened."""

    user_id: StoredIdentifier
    item_id: StoredIdentifier
    # seconds since 1970; None: now
    timestamp: Annotated[float, Meta(ge=0, le=1e11)] | None = None
    kind: Annotated[str, Meta(min_length=1, max_length=64, pattern=_STORED)] = "interaction"
    rating: Annotated[float, Meta(ge=-1e6, le=1e6)] | None = None
    # stored once however often it is sent
    event_id: Annotated[str, Meta(min_length=1, max_length=128, pattern=_STORED)] | None = None


class EventsRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Interactions to store."""

    events: Annotated[list[EventRequest], Meta(min_length=1, max_length=MAX_EVENTS)]


class ReloadRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Nothing to say: the service reads its own model folder again."""


class Why(msgspec.Struct):
    """An item of the history that is near to a recommended one."""

    item_id: str | int
    # cosine of the two item vectors
    similarity: float
    title: str | None = None


class Item(msgspec.Struct, omit_defaults=True):
    """One recommended item."""

    item_id: str | int
    score: float
    title: str | msgspec.UnsetType = msgspec.UNSET
    why: list[Why] | msgspec.UnsetType = msgspec.UNSET


class Recommended(msgspec.Struct):
    """The answer to one request, best item first; ``source`` says what the scores come from."""

    items: list[Item]
    source: Literal["user", "history", "popular"]
    model_version: str
    request_id: str


class Problem(msgspec.Struct, omit_defaults=True):
    """What is wrong, for a program (code), for a person (message), and where."""

    code: str
    message: str
    field: str | None = None


class OneResult(msgspec.Struct, omit_defaults=True):
    """The answer to one request of a batch: items or an error."""

    items: list[Item] | msgspec.UnsetType = msgspec.UNSET
    source: Literal["user", "history", "popular"] | msgspec.UnsetType = msgspec.UNSET
    error: Problem | msgspec.UnsetType = msgspec.UNSET


class BatchRecommended(msgspec.Struct):
    """The answers to a batch, in the order of its requests."""

    results: list[OneResult]
    model_version: str
    request_id: str


class Stored(msgspec.Struct):
    """Interactions are on disk: ``received`` in all, ``stored`` that were not there before."""

    received: int
    stored: int
    model_version: str
    request_id: str


class Reloaded(msgspec.Struct):
    """All workers answer with this model version."""

    workers: int
    previous_version: str
    model_version: str
    request_id: str


class Failure(msgspec.Struct, omit_defaults=True):
    """Every answer that is not 2xx."""

    error: Problem
    request_id: str
    model_version: str | None = None


class ServiceError(Exception):
    """An answer that is no success: HTTP status, code, message, the field it is about, and headers to add."""

    def __init__(
        self, status: int, code: str, message: str, field: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.field, self.headers = status, code, message, field, headers or {}

    def problem(self) -> Problem:
        """Return what a program reads."""
        return Problem(self.code, self.message, self.field)


def invalid(message: str, field: str | None = None) -> ServiceError:
    """Return the error of a request that is well-formed JSON and means nothing here."""
    return ServiceError(422, "invalid", message, field)


def decode_error(error: Exception) -> ServiceError:
    """Return the answer to a body that is not the JSON wanted; msgspec says where in it."""
    message = str(error)
    if isinstance(error, msgspec.ValidationError):
        what, _, place = message.partition(" - at `")
        field = place.rstrip("`").removeprefix("$").removeprefix(".") or None
        return invalid(what, field)
    if isinstance(error, RecursionError):
        return ServiceError(400, "bad_json", "the JSON is nested too deeply")
    return ServiceError(400, "bad_json", f"not JSON: {message}")


def schemas() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (name -> reference, components) of everything above, for the OpenAPI document."""
    types: list[Any] = [RecommendRequest, Batch, EventsRequest, ReloadRequest]
    types += [Recommended, BatchRecommended, Stored, Reloaded, Failure]
    names = ["RecommendRequest", "Batch", "EventsRequest", "ReloadRequest"]
    names += ["Recommended", "BatchRecommended", "Stored", "Reloaded", "Failure"]
    references, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    return dict(zip(names, references, strict=True)), components
