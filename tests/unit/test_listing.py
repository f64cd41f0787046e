"""Pages of an S3 listing: what a server may send and what it may not, down to any byte of it."""

from __future__ import annotations

import random
import time
from urllib.parse import quote_plus
from xml.sax.saxutils import escape

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from weightcache.errors import TransientOriginError
from weightcache.origins.base import Stat
from weightcache.origins.listing import DEPTH, parse_page

DECLARATION = "<?xml version='1.0' encoding='UTF-8'?>"
NAMESPACE = ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
OBJECT = (
    "<Contents><Key>model/config.json</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    "<ETag>&quot;1f&quot;</ETag><Size>17</Size><Owner><ID>1</ID><DisplayName>x</DisplayName></Owner>"
    "<StorageClass>STANDARD</StorageClass></Contents>"
)
STAT = Stat("model/config.json", 17, '"1f"')
LOLS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
# What XML 1.0 can spell, without what its readers change: line ends.
XML_TEXT = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufffe\uffff\u0085\u2028"), min_size=1
)


def page(content: str = OBJECT, *, namespace: str = NAMESPACE, before: str = DECLARATION) -> bytes:
    return (
        f"{before}<ListBucketResult{namespace}><Name>bucket</Name><Prefix>model/</Prefix><KeyCount>1</KeyCount>"
        f"<MaxKeys>1000</MaxKeys>{content}</ListBucketResult>"
    ).encode()


def keyed(key: str) -> str:
    return f"<Contents><Key>{key}</Key><ETag>1</ETag><Size>0</Size></Contents>"


# -- good pages


@pytest.mark.parametrize("namespace", [NAMESPACE, "", ' xmlns="urn:other" xmlns:a="urn:a"'])
def test_a_page_gives_its_objects(namespace: str) -> None:
    got = parse_page(page("<IsTruncated>false</IsTruncated>" + OBJECT, namespace=namespace))
    assert (got.objects, got.next_token) == ([STAT], None)


def test_order_and_space_between_elements_mean_nothing() -> None:
    spaced = (
        OBJECT + "<IsTruncated>true</IsTruncated><NextContinuationToken>a&amp;b=</NextContinuationToken>"
    ).replace("><", ">\n  <")
    got = parse_page(page(spaced))
    assert (got.objects, got.next_token) == ([STAT], "a&b=")


def test_an_empty_page_has_no_objects() -> None:
    assert parse_page(page("")).objects == []
    assert parse_page(page("<IsTruncated>false</IsTruncated>")).next_token is None


def test_a_page_may_be_empty_and_not_the_last() -> None:
    got = parse_page(page("<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>"))
    assert (got.objects, got.next_token) == ([], "t")


def test_a_token_on_the_last_page_is_not_followed() -> None:
    got = parse_page(page("<IsTruncated>false</IsTruncated><NextContinuationToken>t</NextContinuationToken>"))
    assert got.next_token is None


def test_what_is_said_of_folders_and_elsewhere_is_no_object() -> None:
    other = "<CommonPrefixes><Prefix>model/sub/</Prefix></CommonPrefixes><Key>no</Key><Owner><Key>no</Key></Owner>"
    nested = OBJECT.replace("<ID>1</ID>", "<Key>no</Key><Size>no</Size>")
    assert parse_page(page(other + nested)).objects == [STAT]


def test_what_is_declared_of_the_encoding_is_not_followed() -> None:
    for encoding in ("utf-7", "utf-32", "idna", "base64", "no-such", "latin-1"):
        declared = page(keyed("größe"), before=DECLARATION.replace("UTF-8", encoding))
        assert parse_page(declared).objects == [Stat("größe", 0, "1")]


@given(XML_TEXT)
@example("a b+c%20d&e=f<g>\"h'")
@example("größe/模型.safetensors")
def test_names_survive(name: str) -> None:
    assert parse_page(page(keyed(escape(name)))).objects == [Stat(name, 0, "1")]


@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1))
@example("a b+c%20d&e=f<g>\"h'")
@example("a\x00\x1f\ufffe\r\n")
def test_names_survive_the_encoding_of_urls(name: str) -> None:
    encoded = "<EncodingType>url</EncodingType>" + keyed(quote_plus(name, safe="/"))
    assert parse_page(page(encoded)).objects == [Stat(name, 0, "1")]


def test_names_are_taken_as_they_are_without_the_encoding_of_urls() -> None:
    assert parse_page(page(keyed("a%20b+c"))).objects == [Stat("a%20b+c", 0, "1")]


# -- what is no page


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<",
        b"not XML",
        b"\x00" * 100,
        b"<!DOCTYPE html><html><body>Please log in</body></html>",
        b"<Error><Code>SlowDown</Code></Error>",
        b"<ListAllMyBucketsResult/>",
        page()[:-1],
        page() + b"<more/>",
        page(keyed("&undefined;")),
        page(keyed("\x01")),
        page().replace(b"config", b"\xff\xfe"),
        page(keyed("a") + "</Contents>"),
        page('<a:b xmlns:a="urn:a"><c:d/></a:b>'),
    ],
    ids=repr,
)
def test_what_is_no_listing_is_refused(body: bytes) -> None:
    with pytest.raises(TransientOriginError, match="listing"):
        parse_page(body)


@pytest.mark.parametrize(
    "entry",
    [
        OBJECT.replace("<Key>model/config.json</Key>", ""),
        OBJECT.replace("model/config.json", ""),
        OBJECT.replace("<Size>17</Size>", ""),
        OBJECT.replace("&quot;1f&quot;", ""),
        *(OBJECT.replace(">17<", f">{size}<") for size in ("", "-1", "+1", "1e3", "1.0", " 17", "٣", "9" * 19, "0x11")),
        *(OBJECT.replace("<Size>", f"<{name}>2</{name}><Size>", 1) for name in ("Size", "Key", "ETag")),
        OBJECT.replace("17</Size>", "1<b>7</b></Size>"),
        OBJECT.replace("model/config.json", "model/<b/>config.json"),
    ],
)
def test_an_object_that_is_not_described_once_is_refused(entry: str) -> None:
    with pytest.raises(TransientOriginError, match="listing"):
        parse_page(page(entry))


@pytest.mark.parametrize(
    "said",
    [
        "<IsTruncated>true</IsTruncated>",
        "<IsTruncated>true</IsTruncated><NextContinuationToken/>",
        "<IsTruncated>maybe</IsTruncated>",
        "<IsTruncated/>",
        "<IsTruncated>false</IsTruncated><IsTruncated>true</IsTruncated>",
        "<IsTruncated>true<b/></IsTruncated>",
        "<NextContinuationToken><a>b</a></NextContinuationToken>",
        "<EncodingType>base64</EncodingType>",
    ],
)
def test_a_page_that_does_not_say_how_it_goes_on_is_refused(said: str) -> None:
    with pytest.raises(TransientOriginError, match="listing"):
        parse_page(page(said))


# -- hostile pages


@pytest.mark.parametrize(
    "doctype",
    [
        f'<!DOCTYPE x [<!ENTITY l0 "lollollollol">{LOLS}]>',
        '<!DOCTYPE x [<!ENTITY l9 SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE x SYSTEM "http://127.0.0.1:9/x.dtd">',
        '<!DOCTYPE x [<!ENTITY % p SYSTEM "file:///etc/passwd"> %p;]>',
        "<!DOCTYPE x>",
    ],
    ids=["billion laughs", "file", "dtd", "parameter", "plain"],
)
def test_g21_a_document_type_is_refused_at_once(doctype: str) -> None:
    began = time.process_time()
    with pytest.raises(TransientOriginError, match="document type"):
        parse_page(page(keyed("&l9;"), before=doctype))
    assert time.process_time() - began < 1.0


def test_g21_deep_nesting_is_refused_at_once() -> None:
    assert parse_page(page("<a>" * (DEPTH - 1) + "</a>" * (DEPTH - 1))).objects == []
    for deep in ("<a>" * DEPTH + "</a>" * DEPTH, "<a>" * 1_000_000):
        began = time.process_time()
        with pytest.raises(TransientOriginError, match="nested"):
            parse_page(page(deep))
        assert time.process_time() - began < 1.0


def test_many_attributes_and_namespaces_are_read_over() -> None:
    many = " ".join(f'a{number}="{number}" xmlns:n{number}="urn:{number}"' for number in range(1000))
    assert parse_page(page(f"<x {many}/>" + OBJECT)).objects == [STAT]


PAGES = [
    page(OBJECT * 2 + "<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>"),
    page("<EncodingType>url</EncodingType>" + keyed("a%20b") + "<CommonPrefixes><Prefix>p/</Prefix></CommonPrefixes>"),
]
PIECES = [
    b"<",
    b">",
    b"</",
    b"/>",
    b"&",
    b";",
    b"&#0;",
    b"<![CDATA[",
    b"]]>",
    b"<!--",
    b"<?",
    b"\x00",
    b"\xff",
    b"=",
    b'"',
]
TAGS = [b"Contents", b"Key", b"Size", b"ETag", b"IsTruncated", b"EncodingType", b"NextContinuationToken", b"b"]
PIECES += [b"<%s>" % tag for tag in TAGS] + [b"</%s>" % tag for tag in TAGS] + [b"<%s/>" % tag for tag in TAGS]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Return a good page in which a few places are cut, doubled or replaced."""
    body = bytearray(draw(st.sampled_from(PAGES)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(body)))
        stop = min(len(body), start + draw(st.integers(0, 40)))
        new = draw(st.one_of(st.sampled_from(PIECES), st.binary(max_size=4), st.just(bytes(body[start:stop]) * 2)))
        body[start:stop] = new
    return bytes(body)


@settings(max_examples=600, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(mutated(), st.binary(max_size=200)))
def test_g21_a_mutated_page_is_a_page_or_a_transient_failure(body: bytes) -> None:
    try:
        got = parse_page(body)
    except TransientOriginError:
        return
    assert all(stat.path and stat.etag and 0 <= stat.nbytes < 10**18 for stat in got.objects)


def test_g21_whole_elements_may_stand_anywhere() -> None:
    """Tags are moved, doubled and left out; what stays well-formed must still be judged, not trip the reader."""
    draw = random.Random(5)
    n_pages = 0
    for _ in range(3000):
        open_tags: list[bytes] = []
        body = b"<ListBucketResult>"
        for _ in range(draw.randrange(12)):
            if open_tags and draw.random() < 0.5:
                body += b"</%s>" % open_tags.pop()
            else:
                open_tags.append(draw.choice(TAGS))
                body += b"<%s>" % open_tags[-1]
            body += draw.choice([b"", b"", b"1", b"true", b"url"])
        body += b"".join(b"</%s>" % tag for tag in reversed(open_tags)) + b"</ListBucketResult>"
        try:
            parse_page(body)
            n_pages += 1
        except TransientOriginError:
            pass
    assert n_pages
