"""The page at /docs: the OpenAPI document for people. HTML and one style sheet, no scripts, no network."""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from html import escape
from typing import Any

from service.openapi import openapi
from service.pages import inline, page
from service.problems import MEDIA_TYPE

Node = Mapping[str, Any]


@cache
def reference(version: str) -> str:
    """The reference of `openapi(version)` as HTML."""
    document = openapi(version)
    operations = [
        (path, method, operation) for path, item in document["paths"].items() for method, operation in item.items()
    ]
    body = [_text(document["info"]["description"])]
    body.append('<p><a href="/openapi.json">OpenAPI document</a> · <a href="/problems">Problems</a></p>')
    body.append("<nav><ul>")
    body += [
        f'<li><a href="#{operation["operationId"]}">{escape(operation["summary"].rstrip("."))}</a></li>'
        for _, _, operation in operations
    ]
    body.append('<li><a href="#schemas">Schemas</a></li></ul></nav>')
    for tag in document["tags"]:
        body.append(f"<h2>{escape(tag['name'])}</h2>")
        body += [_operation(document, *entry) for entry in operations if tag["name"] in entry[2]["tags"]]
    body.append('<h2 id="schemas">Schemas</h2>')
    body += [
        f'<details id="schema-{escape(name)}"><summary><code>{escape(name)}</code></summary>{_pre(schema)}</details>'
        for name, schema in document["components"]["schemas"].items()
    ]
    return page(f"Reference of version {version}", "\n".join(body))


def _operation(document: Node, path: str, method: str, operation: Node) -> str:
    heading = f'<code><span class="method">{method.upper()}</span> {escape(path)}</code>'
    parts = [f'<section id="{operation["operationId"]}">\n<h3>{heading}</h3>', _text(operation["summary"])]
    if "description" in operation:
        parts.append(_text(operation["description"]))
    parameters = [_resolved(document, node) for node in operation["parameters"]]
    if parameters:
        parts.append(_parameters(parameters))
    if "requestBody" in operation:
        needed = "" if operation["requestBody"]["required"] else " (may be left out)"
        parts.append(f"<h4>Body{needed}</h4>{_contents(operation['requestBody']['content'])}")
    errors = []
    for status, answer in operation["responses"].items():
        if MEDIA_TYPE in answer.get("content", {}):
            errors += _errors(status, answer)
        else:
            parts.append(_answer(status, answer))
    rows = "".join(errors)
    parts.append(f"<h4>Errors</h4><table><tbody>{rows}</tbody></table>\n</section>")
    return "\n".join(parts)


def _parameters(parameters: Iterable[Node]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(node['name'])}</code></td><td>{node['in']}</td><td>{inline(node['description'])}"
        f"{_bounds(node['schema'])}</td><td><code>{escape(_word(node['example']))}</code></td></tr>"
        for node in parameters
    )
    head = "<tr><th>Parameter</th><th>In</th><th>Meaning</th><th>Example</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


_BOUNDS = {"enum": "one of", "minimum": "at least", "exclusiveMinimum": "greater than", "maximum": "at most"}


def _bounds(schema: Node) -> str:
    words = [f"{words} {_word(schema[name])}" for name, words in _BOUNDS.items() if name in schema]
    if "default" in schema:
        words.append(f"default {_word(schema['default'])}")
    return f" <small>({escape(', '.join(words))})</small>" if words else ""


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _answer(status: str, answer: Node) -> str:
    headers = "".join(f" <code>{escape(name)}</code>" for name in answer.get("headers", {}))
    told = f"<p>Headers:{headers}</p>" if headers else ""
    return f"<h4>{status}</h4>{_text(answer['description'])}{told}{_contents(answer.get('content', {}))}"


def _contents(contents: Node) -> str:
    parts = []
    for media, content in contents.items():
        name = content["schema"]["$ref"].rpartition("/")[2]
        parts.append(f'<p><code>{escape(media)}</code>, <a href="#schema-{escape(name)}">{escape(name)}</a></p>')
        parts += [_example(example) for example in content["examples"].values()]
    return "".join(parts)


def _example(example: Node) -> str:
    return f"<details><summary>Example: {escape(example['summary'])}</summary>{_pre(example['value'])}</details>"


def _errors(status: str, answer: Node) -> list[str]:
    examples = answer["content"][MEDIA_TYPE]["examples"]
    return [
        f'<tr><td>{status}</td><td><a href="/problems/{slug}"><code>{slug}</code></a></td>'
        f"<td><details><summary>{escape(example['summary'])}</summary>{_pre(example['value'])}</details></td></tr>"
        for slug, example in examples.items()
    ]


def _resolved(document: Node, node: Node) -> Node:
    found: Any = document
    for part in node["$ref"].split("/")[1:]:
        found = found[part]
    resolved: Node = found
    return resolved


def _pre(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
    return f'<pre tabindex="0">{escape(text)}</pre>'


def _text(text: str) -> str:
    return "".join(f"<p>{inline(paragraph)}</p>" for paragraph in text.strip().split("\n\n"))
