"""What paths and ranges of the Hub's API mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightcache.daemon.hubwire import (
    Kind,
    Question,
    UnsatisfiableRange,
    paths_form,
    read_paths,
    read_question,
    read_range,
    tree_form,
)
from weightcache.daemon.settings import REPO
from weightcache.reading import ModelFile

FILES = [ModelFile(path, 1, f"{number:040x}") for number, path in enumerate(["a", "b/c", "b/d/e", "f/g"])]


@pytest.mark.parametrize(
    ("path", "question"),
    [
        ("/api/models/org/name", Question(Kind.INFO, "org/name")),
        ("/api/models/gpt2", Question(Kind.INFO, "gpt2")),
        ("/api/models/gpt2/revision/v1", Question(Kind.INFO, "gpt2", "v1")),
        ("/api/models/org/name/revision/refs%2Fpr%2F1", Question(Kind.INFO, "org/name", "refs/pr/1")),
        ("/api/models/org/name/refs", Question(Kind.REFS, "org/name")),
        ("/api/models/org/name/tree/main", Question(Kind.TREE, "org/name", "main")),
        ("/api/models/org/name/tree/main/", Question(Kind.TREE, "org/name", "main")),
        ("/api/models/org/name/tree/main/a%2Fb", Question(Kind.TREE, "org/name", "main", "a/b")),
        ("/api/models/org/name/paths-info/main", Question(Kind.PATHS, "org/name", "main")),
        ("/org/name/resolve/main/a/b%20c.json", Question(Kind.FILE, "org/name", "main", "a/b c.json")),
        ("/gpt2/resolve/main/config.json", Question(Kind.FILE, "gpt2", "main", "config.json")),
        ("/org/name/resolve/main/..%2f..%2fetc/passwd", Question(Kind.FILE, "org/name", "main", "../../etc/passwd")),
        ("/org/name/resolve/main/%252e%252e", Question(Kind.FILE, "org/name", "main", "%2e%2e")),
        ("/org/name/resolve/main", None),
        ("/api/models", None),
        ("/api/models/../name", None),
        ("/api/models/org%2Fname/refs", Question(Kind.REFS, "org/name")),
        ("/api/models/org/na@me", None),
        ("/api/datasets/org/name", None),
        ("/", None),
        ("", None),
        ("//resolve//x", None),
        ("/org/name/resolve/main/" + "x" * 5000, None),
    ],
)
def test_path_asks_for(path: str, question: Question | None) -> None:
    assert read_question(path) == question


@given(st.lists(st.sampled_from(["api", "models", "resolve", "tree", "main", "..", "%2e%2e", "%2f", "a", "", "%ff"])))
def test_any_path_names_a_safe_repository_or_nothing(parts: list[str]) -> None:
    question = read_question("/" + "/".join(parts))
    assert question is None or (REPO.fullmatch(question.repo) and ".." not in question.repo)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("", None),
        ("bytes=0-0", (0, 1)),
        ("bytes=2-", (2, 10)),
        ("bytes=2-99", (2, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-99", (0, 10)),
        ("bytes=5-4", None),
        ("bytes=-", None),
        ("bytes=0-1,3-4", None),
        ("lines=0-1", None),
        ("bytes=١-٢", None),
        ("bytes=" + "9" * 30 + "-", None),
    ],
)
def test_range_means(header: str | None, expected: tuple[int, int] | None) -> None:
    assert read_range(header, 10) == expected


@pytest.mark.parametrize(
    ("header", "nbytes"), [("bytes=10-", 10), ("bytes=10-12", 10), ("bytes=-0", 10), ("bytes=0-", 0)]
)
def test_range_behind_the_end_cannot_be_satisfied(header: str, nbytes: int) -> None:
    with pytest.raises(UnsatisfiableRange):
        read_range(header, nbytes)


@given(st.text(), st.integers(0, 1 << 70))
def test_any_range_lies_in_the_file(header: str, nbytes: int) -> None:
    try:
        found = read_range(f"bytes={header}", nbytes)
    except UnsatisfiableRange:
        return
    assert found is None or 0 <= found[0] < found[1] <= nbytes


def told(forms: list[dict[str, str]] | None) -> list[str] | None:
    return None if forms is None else [f"{form['type'][0]} {form['path']}" for form in forms]


def test_tree_lists_a_folder_or_all_below_it() -> None:
    assert told(tree_form(FILES, "", recursive=False)) == ["f a", "d b", "d f"]
    assert told(tree_form(FILES, "b", recursive=False)) == ["f b/c", "d b/d"]
    assert told(tree_form(FILES, "b", recursive=True)) == ["f b/c", "d b/d", "f b/d/e"]
    assert told(tree_form(FILES, "a", recursive=True)) is None


def test_paths_are_told_as_they_are_asked_for_and_missing_ones_left_out() -> None:
    assert told(paths_form(FILES, ["f/g", "b/", "nothing", "", ".."])) == ["f f/g", "d b"]


@pytest.mark.parametrize(
    ("body", "kind", "paths"),
    [
        (b"paths=a%2Fb&paths=c+d&expand=false", "application/x-www-form-urlencoded", ["a/b", "c d"]),
        (b'{"paths": ["a/b", 1], "expand": true}', "application/json", ["a/b"]),
        (b'{"paths": "a"}', "application/json", []),
        (b"[1]", "application/json", []),
        (b"[" * 100_000, "application/json", []),
        (b"\xff", "text/plain", []),
    ],
)
def test_body_names_paths(body: bytes, kind: str, paths: list[str]) -> None:
    assert read_paths(body, kind) == paths
