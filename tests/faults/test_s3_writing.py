"""What S3 answers to a write on a condition: who was there first, who must try again, and where there is no bucket."""

from __future__ import annotations

import asyncio

import pytest
from hostile import ALWAYS, Answer, HostileServer, Peer

from weightcache.errors import ConflictError, ModelNotFoundError, TransientOriginError, WeightcacheError
from weightcache.origins.pace import throttle
from weightcache.origins.plane import Wiring
from weightcache.origins.s3_writer import WritableS3


def put(status: str, code: str, only_if: str | None) -> WeightcacheError:
    """Put a file at a server that answers so; return the error that must come of it."""

    async def refuse(answer: Answer, peer: Peer) -> None:
        answer.head.start = f"HTTP/1.1 {status} No"
        answer.replace_body(f"<Error><Code>{code}</Code></Error>".encode())
        await peer.answer(answer)

    async def run(endpoint: str) -> None:
        origin = WritableS3(
            "s3://bucket/registry", {"endpoint_url": endpoint, "key": "k", "secret": "s"}, Wiring(5.0), throttle(0)
        )
        try:
            await origin.put("chunks/aa/1", b"content", only_if)
        finally:
            await origin.close()

    with HostileServer({}) as server:
        server.script("^PUT ", refuse, ALWAYS)
        with pytest.raises(WeightcacheError) as caught:
            asyncio.run(run(server.endpoint))
    return caught.value


@pytest.mark.parametrize(
    ("status", "code", "only_if", "kind"),
    [
        ("412", "PreconditionFailed", "", ConflictError),
        ("412", "PreconditionFailed", '"1"', ConflictError),
        ("404", "NoSuchBucket", "", ModelNotFoundError),  # nobody wrote it meanwhile: it would be thought to be there
        ("404", "NoSuchBucket", None, ModelNotFoundError),
        ("409", "ConditionalRequestConflict", "", TransientOriginError),
        ("409", "OperationAborted", '"1"', TransientOriginError),
    ],
)
def test_an_answer_to_a_write_is_told_for_what_it_is(
    status: str, code: str, only_if: str | None, kind: type[WeightcacheError]
) -> None:
    assert type(put(status, code, only_if)) is kind
