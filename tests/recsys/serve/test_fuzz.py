"""The OpenAPI document that is served says the truth: whatever fits it or does not, no answer is outside it."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from tests.recsys.serve.served import running

ADMIN = "a" * 24


@pytest.fixture(scope="module")
def service(model, tmp_path_factory):
    admin = tmp_path_factory.mktemp("keys") / "admin"
    admin.write_text(ADMIN, encoding="utf-8")
    with running(model, "--admin-key", str(admin), "--log", "errors") as served:
        yield served


@pytest.fixture(scope="module")
def document(service):
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json")


# a valid request may still name somebody unknown: that is 404 or 422, which the document says
UNDUE = [positive_data_acceptance]
OPERATIONS = [
    *(("POST", path) for path in ("/v1/recommend", "/v1/events", "/v1/reload")),
    *(("GET", path) for path in ("/v1/model", "/v1/items", "/v1/users", "/v1/history")),
    *(("GET", path) for path in ("/healthz", "/readyz", "/metrics")),
]


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_answer_is_one_the_document_has(service, document, method, path):
    operation = document[path][method]
    heavy = path in ("/v1/recommend", "/v1/events")
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]

    def fuzz(case):
        response = case.call()
        # a body over the limit is refused before anything of it is looked at
        undue = [*UNDUE, negative_data_rejection] if response.status_code == 413 else UNDUE
        case.validate_response(response, excluded_checks=undue)

    for mode in modes[: 2 if heavy or path == "/v1/items" else 1]:
        quick = settings(
            max_examples=60 if heavy else 10,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            database=None,
        )
        quick(given(case=operation.as_strategy(generation_mode=mode))(fuzz))()
    assert service.process.poll() is None


def test_the_document_covers_what_is_served(service):
    document = httpx.get(f"{service.url}/openapi.json").json()
    wanted = {"/v1/recommend", "/v1/events", "/v1/reload", "/v1/model", "/v1/items", "/v1/users", "/healthz", "/readyz"}
    assert wanted <= set(document["paths"])
    served = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert served == set(OPERATIONS)
    assert '"traceback"' not in service.stderr
