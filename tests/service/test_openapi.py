"""The OpenAPI document is whole: every call, examples of all that goes in and out, nothing that leads nowhere."""

import base64
import re
from collections.abc import Iterator
from typing import Any, cast

import pytest
from fastapi.routing import APIRoute

from service import catalogue, contributions, crowd, examples, privacy
from service.control import create_control
from service.engine import Engine
from service.openapi import openapi
from service.operation import SAFETENSORS, Operation
from service.operations import OPERATIONS, PAGES, methods_of
from service.problem_table import PROBLEMS
from service.problems import MEDIA_TYPE
from service.reference import reference
from service.schemas import parse_create, patch
from service.wire import safetensors
from service.wire.json import dumps, loads
from tests.service.test_problems import parsed

DOCUMENT = openapi("1.2.3")
CALLS = [
    pytest.param(path, method, operation, id=operation["operationId"])
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
]


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object of the document that is not inside an example."""
    if isinstance(value, dict):
        yield value
        for name, inner in value.items():
            if name not in ("example", "examples", "default"):
                yield from nodes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from nodes(inner)


def resolved(ref: str) -> Any:
    found: Any = DOCUMENT
    for part in ref.removeprefix("#/").split("/"):
        found = found[part]
    return found


def test_it_is_openapi_3_1_and_plain_json() -> None:
    assert DOCUMENT["openapi"].startswith("3.1.")
    assert DOCUMENT["info"]["version"] == "1.2.3"
    assert loads(dumps(DOCUMENT)) == DOCUMENT


def test_every_reference_leads_somewhere() -> None:
    refs = {node["$ref"] for node in nodes(DOCUMENT) if "$ref" in node}
    refs |= {ref for node in nodes(DOCUMENT) for ref in node.get("discriminator", {}).get("mapping", {}).values()}
    assert len(refs) > 50
    for ref in refs:
        assert ref.startswith("#/components/")
        assert resolved(ref)


def test_every_component_is_used() -> None:
    text = dumps(DOCUMENT).decode()
    for section in ("schemas", "parameters", "headers"):
        unused = [name for name in DOCUMENT["components"][section] if f'"#/components/{section}/{name}"' not in text]
        assert unused == []


def test_links_lead_from_a_new_session_to_all_that_can_be_done_with_it() -> None:
    of_one = {operation.id for operation in OPERATIONS if "{session}" in operation.path}
    made = [
        o["responses"]["201"] for item in DOCUMENT["paths"].values() for o in item.values() if "201" in o["responses"]
    ]
    assert len(made) == 2, "by POST, and as a fork"
    for answer in made:
        assert {link["operationId"] for link in answer["links"].values()} == of_one
        assert all(link["parameters"] == {"session": "$response.body#/id"} for link in answer["links"].values())


def test_operation_ids_are_unique() -> None:
    ids = [operation.id for operation in OPERATIONS]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(("path", "method", "operation"), CALLS)
def test_parameters_of_the_path_are_declared(path: str, method: str, operation: dict[str, Any]) -> None:
    parameters = [resolved(node["$ref"]) for node in operation["parameters"]]
    in_path = {node["name"] for node in parameters if node["in"] == "path"}
    assert in_path == set(re.findall(r"\{(\w+)\}", path))
    assert len({(node["in"], node["name"]) for node in parameters}) == len(parameters)
    assert all("example" in node and node["description"] for node in parameters)


@pytest.mark.parametrize(("path", "method", "operation"), CALLS)
def test_all_that_goes_in_and_out_has_an_example(path: str, method: str, operation: dict[str, Any]) -> None:
    contents = [answer.get("content", {}) for answer in operation["responses"].values()]
    contents.append(operation.get("requestBody", {}).get("content", {}))
    for content in contents:
        for media, body in content.items():
            assert body["examples"]
            for example in body["examples"].values():
                assert example["summary"]
                assert "value" in example
                if media == SAFETENSORS:
                    safetensors.read(base64.b64decode(example["value"]), dtypes=safetensors.STEP_DTYPES)
    for status, answer in operation["responses"].items():
        assert answer["description"]
        assert ("content" in answer) == (status not in ("204", "304"))


@pytest.mark.parametrize(("path", "method", "operation"), CALLS)
def test_errors_are_the_problems_of_the_table(path: str, method: str, operation: dict[str, Any]) -> None:
    (row,) = [row for row in OPERATIONS if row.id == operation["operationId"]]
    told = {}
    for status, answer in operation["responses"].items():
        for slug, example in answer.get("content", {}).get(MEDIA_TYPE, {}).get("examples", {}).items():
            assert example["value"]["status"] == int(status) == PROBLEMS[slug].status
            told[slug] = status
    assert set(told) == set(row.problems)
    assert "internal-error" in told


def test_every_problem_is_one_that_some_call_can_give() -> None:
    given = {slug for operation in OPERATIONS for slug in operation.problems}
    assert set(PROBLEMS) - given == {"method-not-allowed"}


def example_bodies(operation_id: str) -> list[Any]:
    (operation,) = [o for item in DOCUMENT["paths"].values() for o in item.values() if o["operationId"] == operation_id]
    return [
        example["value"] for example in operation["requestBody"]["content"]["application/json"]["examples"].values()
    ]


def test_the_examples_of_requests_are_taken() -> None:
    for body in example_bodies("createSession"):
        parse_create(body)
    document, _ = parse_create(example_bodies("createSession")[0])
    for body in example_bodies("changeSession"):
        assert patch(body)(document) != document
    for body in example_bodies("takeStep"):
        contribution, _ = contributions.of_json(dumps(body))
        assert contribution.gradients.keys() == body[contribution.payload].keys()


def test_the_examples_of_a_session_have_the_members_of_its_schema() -> None:
    schema = DOCUMENT["components"]["schemas"]["Session"]
    answer = DOCUMENT["paths"]["/v1/sessions/{session}"]["get"]["responses"]["200"]
    first, second = (example["value"] for example in answer["content"]["application/json"]["examples"].values())
    assert set(second) == set(schema["properties"])
    assert set(first) == set(schema["properties"]) - {"privacy"}


@pytest.mark.skipif(not privacy.available(), reason="needs the extra `privacy`")
def test_the_example_of_privacy_is_what_is_worked_out() -> None:
    session = examples.private()
    worked_out = crowd.privacy_of(session["aggregation"], session["step"])
    assert worked_out.pop("epsilon") == pytest.approx(session["privacy"]["epsilon"], rel=1e-9)
    assert worked_out.items() <= session["privacy"].items()


# -- the table and the routes ------------------------------------------------------------------------------------------


DATA_PLANE = ("/steps", "/params", "/state", "/events")


def routes() -> set[tuple[str, str]]:
    """What the control plane answers; its engine is asked for nothing."""
    app = create_control(cast("Engine", None), max_body=1, version="1")
    return {
        (method, route.path)
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in (route.methods or ())
        if method != "HEAD"
    }


def is_control(operation: Operation) -> bool:
    return not operation.path.endswith(DATA_PLANE)


def test_the_table_and_the_control_plane_have_the_same_calls() -> None:
    in_table = {(operation.method, operation.path) for operation in OPERATIONS if is_control(operation)}
    in_table |= {("GET", page) for page in PAGES}
    empty = {f"/v1/{family}/{{kind}}" for family, entries in catalogue.FAMILIES.items() if not entries()}
    assert {call for call in routes() if call[1] not in empty} == in_table


def test_allow_covers_both_planes() -> None:
    assert methods_of("/v1/sessions") == ["GET", "HEAD", "OPTIONS", "POST"]
    assert methods_of("/v1/sessions/ses_x") == ["DELETE", "GET", "HEAD", "OPTIONS", "PATCH"]
    assert methods_of("/v1/sessions/ses_x/params") == ["GET", "HEAD", "OPTIONS", "PUT"]
    assert methods_of("/v1/sessions/ses_x/events") == ["GET", "OPTIONS"]
    assert methods_of("/docs") == ["GET", "HEAD", "OPTIONS"]
    assert methods_of("/v1/sessions/a/b") == []


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_reference_shows_every_call_and_loads_nothing() -> None:
    text = reference("1.2.3")
    page = parsed(text)
    for operation in OPERATIONS:
        assert f'id="{operation.id}"' in text
    ids = set(re.findall(r'id="([^"]+)"', text))
    local = {link[1:] for link in page.links if link.startswith("#")}
    assert local <= ids
    pages = {link for link in page.links if link.startswith("/problems/")}
    assert pages == {f"/problems/{slug}" for slug in PROBLEMS if slug != "method-not-allowed"}
    assert not [link for link in page.links if link.startswith("http")]
