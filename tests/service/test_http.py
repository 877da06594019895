"""Headers, queries and bodies as they are read, replies as they are sent, and waits as they end."""

import asyncio
import gzip
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from core.aggregation.ledger import is_name
from service import bodies, http
from service.documents import Precondition, Stamp
from service.errors import InvalidRequest, NotAcceptable, UnsupportedMedia
from service.http import ClientGone, Reply, Request, Waits
from service.problems import RequestTimeout
from service.wire.errors import BodyTooLarge, MalformedEncoding

BOTH: tuple[http.Format, ...] = ("json", "safetensors")


def pointers(refusal: pytest.ExceptionInfo[InvalidRequest]) -> list[str]:
    return [fault.pointer for fault in refusal.value.faults]


# -- Content-Type ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "media", "parameters"),
    [
        ("application/json", "application/json", {}),
        (" Text/CSV ; Charset=UTF-8", "text/csv", {"charset": "UTF-8"}),
        ('a/b;x="1;2";y=3', "a/b", {"x": "1;2", "y": "3"}),
        (r'a/b;x="say \"hi\"; \\"', "a/b", {"x": r'say "hi"; ' + "\\"}),
        ("a/b;", "a/b", {}),
        (";", "", {}),
        ("", "", {}),
    ],
)
def test_media_type(value: str, media: str, parameters: dict[str, str]) -> None:
    assert http.media_type(value) == (media, parameters)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("application/json", "json"),
        ("Application/JSON; charset=utf-8", "json"),
        ('application/json; charset="UTF-8"', "json"),
        ("application/vnd.safetensors", "safetensors"),
        ("application/octet-stream", "safetensors"),
    ],
)
def test_body_formats(value: str, found: str) -> None:
    assert http.body_format(value) == found


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "application/x-www-form-urlencoded",
        "application/json; charset=latin-1",
        "application/jsonp",
        "text/csv",  # a format of replies alone
        "json",
    ],
)
def test_other_content_types_are_refused_with_what_is_accepted(value: str | None) -> None:
    with pytest.raises(UnsupportedMedia) as refusal:
        http.body_format(value)
    assert refusal.value.accepted == ["application/json", "application/vnd.safetensors"]
    assert repr(value or "") in str(refusal.value)


def test_a_format_that_this_call_does_not_take_is_refused() -> None:
    with pytest.raises(UnsupportedMedia) as refusal:
        http.body_format("application/json", ("safetensors",))
    assert refusal.value.accepted == ["application/vnd.safetensors"]


# -- Accept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "request_format", "reply_format"),
    [
        (None, "json", "json"),
        (None, "safetensors", "safetensors"),
        ("", "safetensors", "safetensors"),
        ("*/*", "safetensors", "safetensors"),
        ("application/*", "safetensors", "safetensors"),
        ("application/json", "safetensors", "json"),
        ("Application/JSON ; q=0.1", "safetensors", "json"),
        ("application/octet-stream", "json", "safetensors"),
        ("application/json, application/vnd.safetensors", "safetensors", "safetensors"),
        ("application/json;q=0.2, application/vnd.safetensors;q=0.9", "json", "safetensors"),
        ("text/html, */*;q=0.1", "safetensors", "safetensors"),
        ("application/json;q=0, */*", "json", "safetensors"),  # what is most specific counts
        ("application/*;q=0.5, application/json;q=0.4", "json", "safetensors"),
        ('text/plain;x="a,application/json", application/vnd.safetensors', "json", "safetensors"),
        ("application/json;q=0.5, application/json;q=0.7, */*;q=0.6", "safetensors", "json"),
    ],
)
def test_the_reply_has_the_best_format(accept: str | None, request_format: http.Format, reply_format: str) -> None:
    assert http.negotiate(accept, request_format, BOTH) == reply_format


@pytest.mark.parametrize(
    "accept",
    ["text/html", "application/json;q=0", "*/*;q=0", "application/json;q=2", "application/json;q=.5", ",", "json"],
)
def test_nothing_acceptable(accept: str) -> None:
    with pytest.raises(NotAcceptable) as refusal:
        http.negotiate(accept, "json", ("json",))
    assert refusal.value.offered == ["application/json"]


def test_without_accept_a_format_that_is_not_offered_gives_way_to_the_first() -> None:
    assert http.negotiate(None, "safetensors", ("json", "csv")) == "json"
    assert http.negotiate("text/*", "json", ("json", "csv")) == "csv"


# -- preconditions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("*", Precondition(any=True)),
        ('"41-9f3c"', Precondition(any=False, stamps=((41, "9f3c"),))),
        ('"41"', Precondition(any=False, stamps=((41, None),))),
        (' "1" , "2-ab",', Precondition(any=False, stamps=((1, None), (2, "ab")))),
        ('W/"41"', Precondition(any=False)),  # weak tags never match here (RFC 9110, 13.1.1)
        ('W/"41", "42"', Precondition(any=False, stamps=((42, None),))),
        ('"a,b", "7"', Precondition(any=False, stamps=((7, None),))),
        ('""', Precondition(any=False)),
        ('"041"', Precondition(any=False)),
        ('"' + "9" * 5000 + '"', Precondition(any=False)),
    ],
)
def test_if_match(value: str | None, expected: Precondition | None) -> None:
    assert http.preconditions(value) == expected


def test_weak_tags_match_in_if_none_match() -> None:
    found = http.preconditions('W/"41-ab"', "If-None-Match")
    assert found is not None
    assert found.holds(Stamp(41, "ab"))
    assert not found.holds(Stamp(41, "cd"))


@pytest.mark.parametrize("value", ["", "41", '"41', '41"', '"41" "42"', '*, "41"', '"4 1"', 'w/"41"', "41-9f3c, 42"])
def test_a_malformed_precondition_is_refused_and_not_ignored(value: str) -> None:
    for header in ("If-Match", "If-None-Match"):
        with pytest.raises(InvalidRequest) as refusal:
            http.preconditions(value, header)
        assert pointers(refusal) == ["/headers/" + header]


# -- other headers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, {}),
        ("", {}),
        ("return=minimal", {"return": "minimal"}),
        ('Return = "minimal" ; foo, wait=30', {"return": "minimal", "wait": "30"}),
        ("respond-async, wait=10, wait=20", {"respond-async": "", "wait": "10"}),
        (";;,,=", {"": ""}),
    ],
)
def test_prefer(value: str | None, expected: dict[str, str]) -> None:
    assert http.prefer(value) == expected


@pytest.mark.parametrize("key", [None, "k", " ", "a b~!", "x" * 255])
def test_idempotency_keys(key: str | None) -> None:
    assert http.idempotency_key(key) == key


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb", "ö", "a\x7f"])
def test_other_idempotency_keys_are_refused(key: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        http.idempotency_key(key)
    assert pointers(refusal) == ["/headers/Idempotency-Key"]


def test_workers() -> None:
    assert all(map(is_name, ["a", "A.b_c-9", "x" * 64]))
    assert not any(map(is_name, ["", "x" * 65, "a b", "a/b", "é", "a\n"]))


def test_last_event_id() -> None:
    assert [http.last_event_id(value) for value in (None, "", "0", "41")] == [None, None, 0, 41]
    for value in ("-1", "x", "1.5", "9" * 17, "٤"):
        with pytest.raises(InvalidRequest) as refusal:
            http.last_event_id(value)
        assert pointers(refusal) == ["/headers/Last-Event-ID"]


def test_lists_that_come_in_several_headers_are_joined() -> None:
    scope = {"headers": [(b"if-match", b'"1"'), (b"accept", b"a/b"), (b"if-match", b'"2"')]}
    assert http.headers_of(scope) == {b"if-match": b'"1", "2"', b"accept": b"a/b"}


@pytest.mark.parametrize("name", ["Content-Type", "Idempotency-Key", "Last-Event-ID"])
def test_a_header_that_may_stand_once_is_refused_twice(name: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        http.headers_of({"headers": [(name.lower().encode(), b"a"), (name.lower().encode(), b"a")]})
    assert pointers(refusal) == ["/headers/" + name]


# -- the query -------------------------------------------------------------------------------------------------


def test_query() -> None:
    assert http.query(b"wait=1%2E5&at=&name=%C3%A9+x", ("wait", "at", "name")) == {
        "wait": "1.5",
        "at": "",
        "name": "é x",
    }
    assert Request({"headers": [], "query_string": b""}, never).query() == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"foo=1&a~b/c=2", ["/query/foo", "/query/a~0b~1c"]),
        (b"wait=1&wait=1", ["/query/wait"]),
        (b"wait", ["/query"]),
        (b"wait=%ff", ["/query"]),
        (b"wait=\xff", ["/query"]),
        (b"&", ["/query"]),
    ],
)
def test_a_query_that_is_not_understood_is_refused(text: bytes, expected: list[str]) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        http.query(text, ("wait", "at"))
    assert pointers(refusal) == expected


# -- bodies ----------------------------------------------------------------------------------------------------


async def never() -> http.Message:
    message: http.Message = await asyncio.get_running_loop().create_future()
    return message


def arriving(pieces: Sequence[bytes], then: Callable[[], Awaitable[http.Message]] | None = None) -> http.Receive:
    """A connection on which the body comes in `pieces`; the last one ends it unless something comes `then`."""
    waiting = list(pieces)

    async def receive() -> http.Message:
        if not waiting and then is not None:
            return await then()
        piece = waiting.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(waiting) or then is not None}

    return receive


async def disconnected() -> http.Message:
    return {"type": "http.disconnect"}


def read(receive: http.Receive, limit: int, headers: Iterable[tuple[bytes, bytes]] = ()) -> Any:
    return asyncio.run(http.Request({"headers": list(headers)}, receive).body(limit))


def length(value: int) -> tuple[bytes, bytes]:
    return b"content-length", b"%d" % value


def test_a_body_in_one_piece_is_taken_as_it_is() -> None:
    body = b"x" * 100
    assert read(arriving([body]), 100, [length(100)]) is body


def test_a_long_body_is_put_into_one_aligned_buffer() -> None:
    pieces = [bytes([i]) * (1000 + i) for i in range(20)]
    whole = b"".join(pieces)
    body = read(arriving(pieces), len(whole), [length(len(whole))])
    assert body == whole
    assert np.frombuffer(body, np.uint8).ctypes.data % 64 == 0


def test_a_body_of_unknown_length_grows() -> None:
    assert read(arriving([b"ab", b"", b"cd"]), 4) == b"abcd"


def test_a_length_over_the_limit_is_refused_before_anything_is_read() -> None:
    with pytest.raises(BodyTooLarge):
        read(never, 99, [length(100)])


@pytest.mark.parametrize("pieces", [[b"x" * 100], [b"x" * 50, b"x" * 50]])
def test_a_body_of_unknown_length_is_refused_where_it_passes_the_limit(pieces: list[bytes]) -> None:
    with pytest.raises(BodyTooLarge) as refusal:
        read(arriving(pieces, then=never), 99)
    assert refusal.value.limit == 99


@pytest.mark.parametrize("headers", [[], [length(100)]])
@pytest.mark.parametrize("pieces", [[], [b"x" * 50], [b"x" * 50, b"x" * 20]])
def test_a_client_that_goes_is_told_apart(headers: list[tuple[bytes, bytes]], pieces: list[bytes]) -> None:
    with pytest.raises(ClientGone):
        read(arriving(pieces, then=disconnected), 100, headers)


def test_a_body_that_stops_coming_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "GRACE", 0.01)
    with pytest.raises(RequestTimeout):
        read(arriving([b"x"], then=never), 100, [length(100)])


@pytest.mark.parametrize("coding", [b"gzip", b"GZip", b"x-gzip"])
@pytest.mark.parametrize("size", [10, 300_000])  # the longer one is inflated in a thread
def test_gzip(coding: bytes, size: int) -> None:
    plain = np.random.default_rng(0).bytes(size)
    body = read(arriving([gzip.compress(plain)]), size + 1000, [(b"content-encoding", coding)])
    assert body == plain


def test_the_limit_holds_for_the_inflated_body() -> None:
    with pytest.raises(BodyTooLarge):
        read(arriving([gzip.compress(bytes(1000))]), 999, [(b"content-encoding", b"gzip")])


def test_what_is_not_gzip_is_refused() -> None:
    with pytest.raises(MalformedEncoding):
        read(arriving([b"plain"]), 999, [(b"content-encoding", b"gzip")])


@pytest.mark.parametrize("coding", [b"identity", b"", b" Identity "])
def test_identity(coding: bytes) -> None:
    assert read(arriving([b"plain"]), 5, [(b"content-encoding", coding)]) == b"plain"


@pytest.mark.parametrize("coding", [b"br", b"gzip, gzip", b"deflate", b"\xff"])
def test_other_codings_are_refused_before_anything_is_read(coding: bytes) -> None:
    with pytest.raises(UnsupportedMedia) as refusal:
        read(never, 999, [(b"content-encoding", coding)])
    assert refusal.value.accepted == ["gzip", "identity", "zstd"]


# -- replies ---------------------------------------------------------------------------------------------------


def sent(reply: Reply, *, head: bool = False) -> list[Any]:
    messages: list[Any] = []

    async def send(message: http.Message) -> None:
        messages.append(message)

    asyncio.run(http.send_reply(send, reply, head=head))
    return messages


def test_a_small_reply_is_one_piece() -> None:
    start, body = sent(Reply(200, [(b"etag", b'"1"')], [b"ab", memoryview(b"cd")]))
    assert start == {"type": "http.response.start", "status": 200, "headers": [(b"etag", b'"1"'), length(4)]}
    assert body["body"] == b"abcd"


def test_large_pieces_are_sent_where_they_lie_and_small_ones_together() -> None:
    large = memoryview(np.zeros(200_000, np.uint8).data)
    start, *bodies = sent(Reply(200, [], [b"a" * 10, b"b" * 20, large, b"c" * 40_000, b"d" * 40_000]))
    assert start["headers"] == [length(280_030)]
    assert [len(message["body"]) for message in bodies] == [30, 200_000, 40_000, 40_000, 0]
    assert bodies[1]["body"] is large
    assert [message.get("more_body", False) for message in bodies] == [True, True, True, True, False]


def test_head_gets_all_but_the_body() -> None:
    start, body = sent(Reply(200, [], [b"a" * 100_000]), head=True)
    assert start["headers"] == [length(100_000)]
    assert body["body"] == b""


@pytest.mark.parametrize("status", [204, 304])
def test_replies_without_content_have_no_length(status: int) -> None:
    start, body = sent(Reply(status, []))
    assert start["headers"] == []
    assert body["body"] == b""


# -- waiting ---------------------------------------------------------------------------------------------------


def test_waiting_ends_with_the_work() -> None:
    async def main() -> int | None:
        return await Waits().run(never, asyncio.sleep(0, 41))

    assert asyncio.run(main()) == 41


def test_waiting_ends_with_the_client_and_the_work_is_cancelled() -> None:
    cancelled = []

    async def work() -> None:
        try:
            await never()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def main() -> None:
        await Waits().run(arriving([b""], then=disconnected), work())

    with pytest.raises(ClientGone):
        asyncio.run(main())
    assert cancelled == [True]


def test_waiting_ends_for_all_when_the_server_stops() -> None:
    async def main() -> list[Any]:
        waits = Waits()
        waiting = [asyncio.create_task(waits.run(never, never())) for _ in range(3)]
        await asyncio.sleep(0)
        waits.end()
        late = await waits.run(never, never())
        return [late, *await asyncio.gather(*waiting)]

    assert asyncio.run(main()) == [None] * 4


def test_what_the_work_raises_comes_through() -> None:
    async def work() -> None:
        raise BodyTooLarge(1)

    async def main() -> None:
        await Waits().run(never, work())

    with pytest.raises(BodyTooLarge):
        asyncio.run(main())
