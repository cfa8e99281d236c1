"""schemathesis: requests made up from the app's own schema, good ones and bad, get what the schema says they may."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import checks

from tests.serve.running import MODEL

schema = schemathesis.pytest.from_fixture("described")

checks.load_all_checks()
CHECKS = checks.CHECKS.get_by_names(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "unsupported_method",
        "allow_header_conformance",
    ]
)


@pytest.fixture
def described(server):
    return schemathesis.openapi.from_url(server.base + "/openapi.json")


@schema.parametrize()
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_one_that_the_schema_knows(case, server) -> None:
    if isinstance(case.body, dict):
        if isinstance(case.body.get("model"), str):
            case.body["model"] = MODEL  # a guess never is it
        if isinstance(case.body.get("max_tokens"), int):
            case.body["max_tokens"] = min(case.body["max_tokens"], 4)  # tokens cost time
    case.call_and_validate(checks=CHECKS)
    assert server.get("/health").json()["status"] == "ok"
