"""The OpenAPI document: FastAPI writes the GET routes, the POST endpoints of the front are added here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from apps.recsys.serve.schema import schemas

_ERRORS = {
    "400": "not JSON, or not HTTP",
    "401": "no key, or an unknown one",
    "403": "not allowed in this service",
    "404": "an unknown user or item",
    "405": "another method is wanted",
    "408": "the request did not arrive in time",
    "409": "the same is under way already",
    "413": "the body is too large",
    "415": "the body is not application/json",
    "422": "JSON that means nothing here; `error.field` says where",
    "429": "too many requests of this key; `retry-after` says when to come back",
    "431": "the headers are too large",
    "503": "overloaded or stopping; `retry-after` says when to come back",
}
_EXAMPLES = {
    "RecommendRequest": {"user_id": "196", "k": 10},
    "EventsRequest": {"events": [{"user_id": "196", "item_id": "242"}]},
    "ReloadRequest": {},
}


def describe(application: FastAPI) -> None:
    """Give an application the document of everything that is served."""
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not document:
            document.update(_document(application))
        return document

    application.openapi = openapi  # type: ignore[method-assign]


def _document(application: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=application.title, version=application.version, routes=application.routes)
    references, components = schemas()
    parts = document.setdefault("components", {})
    parts.setdefault("schemas", {}).update(components)
    for unused in ("HTTPValidationError", "ValidationError"):  # errors have one shape here
        parts["schemas"].pop(unused, None)
    parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    failure = {"application/json": {"schema": references["Failure"]}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            codes = ["400", "404", "405", "408", "422", "431", "503"]
            codes += ["401", "429"] if path.startswith("/v1/") else []
            operation["responses"] |= {code: {"description": _ERRORS[code], "content": failure} for code in codes}
    recommended = {"oneOf": [references["Recommended"], references["BatchRecommended"]]}
    asked = {"oneOf": [references["RecommendRequest"], references["Batch"]]}
    posts = {
        "/v1/recommend": ("Recommend to one user, or to each of a list", asked, recommended, "RecommendRequest"),
        "/v1/events": (
            "Store interactions durably",
            references["EventsRequest"],
            references["Stored"],
            "EventsRequest",
        ),
        "/v1/reload": (
            "Read the model folder again, in every worker, without failing a request",
            references["ReloadRequest"],
            references["Reloaded"],
            "ReloadRequest",
        ),
    }
    for path, (summary, body, answer, example) in posts.items():
        document["paths"][path] = {
            "post": {
                "summary": summary,
                "operationId": path.rpartition("/")[2],
                "tags": ["recommend"],
                "security": [{"key": []}, {}],
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": body, "example": _EXAMPLES[example]}},
                },
                "responses": {
                    "200": {"description": "done", "content": {"application/json": {"schema": answer}}},
                    **{code: {"description": text, "content": failure} for code, text in _ERRORS.items()},
                },
            }
        }
    return document
