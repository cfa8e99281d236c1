"""schemathesis: requests made up from the app's own schema, good and bad, get what the schema says they may."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks

from tests.serve.running import MODEL

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
OPERATIONS = {
    "GET /v1/models": 2,
    "GET /v1/models/{model}": 20,
    "POST /v1/chat/completions": 60,
    "POST /v1/completions": 60,
    "GET /health": 2,
    "GET /metrics": 2,
}  # how many requests to make up for each


@pytest.fixture(scope="module")
def described(server):
    return schemathesis.openapi.from_url(server.base + "/openapi.json")


def test_all_operations_are_tried(described) -> None:
    assert {result.ok().label for result in described.get_all_operations()} == set(OPERATIONS)


@pytest.mark.parametrize(
    ("label", "mode"),
    [(label, GenerationMode.POSITIVE) for label in OPERATIONS]
    + [(label, GenerationMode.NEGATIVE) for label in OPERATIONS if "POST" in label],
)
def test_every_answer_is_one_that_the_schema_knows(
    described, server, label: str, mode: GenerationMode
) -> None:
    operation = next(r.ok() for r in described.get_all_operations() if r.ok().label == label)
    seen = set()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=OPERATIONS[label], suppress_health_check=list(HealthCheck), print_blob=False)
    def run(case) -> None:
        if isinstance(case.body, dict):
            if isinstance(case.body.get("model"), str):
                case.body["model"] = MODEL  # a guess never is it
            if isinstance(case.body.get("max_tokens"), int):
                case.body["max_tokens"] = min(case.body["max_tokens"], 3)  # tokens cost time
            elif case.body.get("max_completion_tokens") is None and "messages" in case.body:
                case.body["max_tokens"] = 3
        response = case.call_and_validate(checks=CHECKS)
        seen.add(response.status_code)

    run()
    assert seen <= {200, 400, 404, 405, 413}
    if "POST" in label:
        assert 400 in seen if mode is GenerationMode.NEGATIVE else 200 in seen
    assert server.get("/health").json()["status"] == "ok"
