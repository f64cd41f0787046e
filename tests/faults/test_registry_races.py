"""Registries when several work there at once, and when a publisher is killed: nothing is lost, nothing dangles.

A few rounds here; registry_racing.py and registry_crashing.py run hundreds by hand.
"""

from __future__ import annotations

from pathlib import Path

from children import Child
from registry_racing import race, write_variants
from servers import Bucket

CRASHING = Path(__file__).with_name("registry_crashing.py")
ROUNDS = 6
KILLS = 12


def test_two_publishers_and_a_sweeper_lose_nothing_in_a_folder(tmp_path: Path) -> None:
    tally = race(str(tmp_path / "registry"), {}, write_variants(tmp_path), ROUNDS, seed=1)
    assert tally.wrong == []
    assert tally.chunks_removed > 0
    assert tally.published + tally.conflicts == 2 * ROUNDS


def test_two_publishers_and_a_sweeper_lose_nothing_on_s3(tmp_path: Path, bucket: Bucket) -> None:
    options = bucket.server.storage_options()
    tally = race(f"{bucket.url}/registry", options, write_variants(tmp_path), ROUNDS, seed=2)
    assert tally.wrong == []
    assert tally.chunks_removed > 0


def test_a_killed_publisher_leaves_a_sound_registry(tmp_path: Path) -> None:
    folder = write_variants(tmp_path)[0]
    with Child(CRASHING, folder, tmp_path / "registries", KILLS, 3) as child:
        found = child.hear(timeout_s=300)
    assert found["wrong"] == []
    assert found["kills"] > 0
