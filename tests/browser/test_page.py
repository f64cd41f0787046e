"""The page in a browser: what it shows, to whom, by which keys, and what it never does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import daemon_states
import pytest
from chromium import Chromium, OpenPage, Tab
from served_page import Serve

from weightcache import waterfall

CONTROLS = "a[href], button:not([hidden]), summary"
PHONE = {"width": 360, "height": 740}

# WCAG 2.2, 1.4.3: the contrast of each text with what lies behind it, the least first.
CONTRASTS = """
(() => {
  const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1});
  const pen = canvas.getContext("2d", {willReadFrequently: true});
  const rgb = (color) => {
    pen.clearRect(0, 0, 1, 1); pen.fillStyle = color; pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const light = (color) => rgb(color).slice(0, 3).map((each) => each / 255)
    .map((each) => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
    .reduce((sum, each, index) => sum + each * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (rgb(color)[3] === 255) return color;
    }
    return "white";
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!hasText || !element.checkVisibility() || element.closest("svg, noscript")) continue;
    const [ink, bed] = [light(getComputedStyle(element).color), light(behind(element))];
    const contrast = (Math.max(ink, bed) + 0.05) / (Math.min(ink, bed) + 0.05);
    found.push([contrast, element.className + " " + element.textContent.slice(0, 30)]);
  }
  return found.sort((a, b) => a[0] - b[0]);
})()
"""


def shown(tab: Tab, part: str) -> str:
    """Return the text of a part of the page, as it is seen."""
    return " ".join(str(tab.run(f"document.getElementById({part!r}).innerText")).split())


# -- what it shows


def test_state_is_shown_with_units(serve: Serve, open_page: OpenPage) -> None:
    tab = open_page(serve(daemon_states.at_rest()))
    assert "31.44 GB of 64.00 GB · 49 %" in shown(tab, "tiers")
    assert "16.06 GB leased · 32.56 GB free" in shown(tab, "tiers")
    assert "s3://models/llama-3-8b" in shown(tab, "models")
    assert "resident, pinned" in shown(tab, "models")
    assert "Nothing is on its way." in shown(tab, "transfers")
    assert "best from origin 2.01 GB/s" in shown(tab, "loads")
    assert "asked for at about this hour" in shown(tab, "forecast")
    assert "least value: 1 use" in shown(tab, "decisions")
    assert "4.18 USD" in shown(tab, "ledger")
    assert "ready" in shown(tab, "state")
    assert tab.complaints() == []


def test_load_is_shown_lane_by_lane_with_its_bottleneck(serve: Serve, open_page: OpenPage) -> None:
    state = daemon_states.at_rest()
    state["loads"] = [load for load in state["loads"] if load["report"]["bytes"]["origin"]]
    tab = open_page(serve(state))
    assert "origin (reading from where the model was born): busy for" in shown(tab, "loads")
    assert "2.01 GB/s at best on this machine: at its limit" in shown(tab, "loads")
    lanes = "[...document.querySelectorAll('.waterfall .lane-name')].map((each) => each.textContent)"
    assert tab.run(lanes) == ["stage", "origin", "verify", "device", "store"]
    assert tab.run("document.querySelectorAll('.waterfall rect.lane-origin').length") > 10


def test_transfers_show_rate_and_time_left(serve: Serve, open_page: OpenPage) -> None:
    tab = open_page(serve(daemon_states.cold_load()))
    assert "20.87 GB of 47.15 GB · 44 % · 1.91 GB/s · 14 s left" in shown(tab, "transfers")
    assert "filling, 44 %" in shown(tab, "models")


def test_empty_daemon_says_so(serve: Serve, open_page: OpenPage) -> None:
    empty = daemon_states.at_rest() | {name: [] for name in ("models", "loads", "forecast", "decisions")}
    tab = open_page(serve(empty))
    for part, says in (("models", "No model is kept"), ("loads", "Nobody has"), ("decisions", "Nothing was fetched")):
        assert says in shown(tab, part)
    assert tab.run("[...document.querySelectorAll('table')].some((table) => table.checkVisibility())") is False


def test_new_state_keeps_focus_and_what_is_open(serve: Serve, open_page: OpenPage) -> None:
    page = serve(daemon_states.at_rest())
    tab = open_page(page)
    tab.run("[...document.querySelectorAll('details')].at(-1).open = true")
    tab.run("[...document.querySelectorAll('summary')].at(-1).focus()")
    page.state = daemon_states.at_rest()
    page.state["loads"].insert(0, {**page.state["loads"][1], "ended_s": daemon_states.NOW_S})
    page.state["tiers"][0]["used_bytes"] = 1_500_000
    tab.wait("document.getElementById('tiers').innerText.includes('1.50 MB')")
    assert tab.run("document.querySelectorAll('details').length") == 5
    assert tab.run("document.activeElement === [...document.querySelectorAll('summary')].at(-1)")
    assert tab.run("[...document.querySelectorAll('details')].map((each) => each.open)") == [
        False,
        True,
        *[False] * 2,
        True,
    ]


def test_silence_is_said_plainly_and_ends(serve: Serve, open_page: OpenPage) -> None:
    page = serve(daemon_states.at_rest())
    tab = open_page(page)
    page.close()
    tab.wait("document.getElementById('notice').innerText.startsWith('The daemon does not answer')")
    assert shown(tab, "state") == "no answer"
    assert "s3://models/llama-3-8b" in shown(tab, "models")
    serve(daemon_states.cold_load(), port=page.port)
    tab.wait("document.getElementById('notice').innerText === ''")
    assert "mistral" in shown(tab, "transfers")


def test_failure_of_the_daemon_is_said_plainly(serve: Serve, open_page: OpenPage) -> None:
    page = serve(daemon_states.at_rest())
    tab = open_page(page)
    page.state = {}
    tab.wait("document.getElementById('notice').innerText.includes('it answered 500')")


# -- to whom


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(scheme: str, serve: Serve, open_page: OpenPage) -> None:
    tab = open_page(serve(daemon_states.cold_load()), prefers_color_scheme=scheme)
    tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    contrast, where = tab.run(CONTRASTS)[0]
    assert contrast >= 4.5, where


def test_dark_and_light_differ(serve: Serve, open_page: OpenPage) -> None:
    page = serve(daemon_states.at_rest())
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = (open_page(page, prefers_color_scheme=scheme).run(ground) for scheme in ("light", "dark"))
    assert (light, dark) == ("rgb(244, 246, 248)", "rgb(14, 20, 26)")


@pytest.mark.parametrize("state", [daemon_states.at_rest, daemon_states.cold_load, daemon_states.hostile])
def test_phone_needs_no_sideways_scroll(state: Callable[[], dict[str, Any]], serve: Serve, open_page: OpenPage) -> None:
    tab = open_page(serve(state()), **PHONE)
    tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    tab.wait("document.querySelectorAll('.waterfall').length > 0")
    widest = (
        "Math.max(...[...document.querySelectorAll('body *:not(.skip)')].map((e) => e.getBoundingClientRect().right))"
    )
    assert tab.run("document.documentElement.scrollWidth") == PHONE["width"]
    assert tab.run(widest) <= PHONE["width"]


def test_keyboard_reaches_every_control(serve: Serve, open_page: OpenPage) -> None:
    state = daemon_states.at_rest()
    state["loads"] = [{**state["loads"][0], "ended_s": number} for number in range(12)]
    tab = open_page(serve(state))
    n_controls = tab.run(f"document.querySelectorAll({CONTROLS!r}).length")
    tab.run("window.reached = new Set()")
    for _ in range(n_controls):
        tab.press("Tab")
        tab.run("void window.reached.add(document.activeElement)")
    missed = f"[...document.querySelectorAll({CONTROLS!r})].filter((each) => !reached.has(each)).map((each) => each.outerHTML)"
    assert tab.run(missed) == []
    assert n_controls > 25


def test_focus_is_seen(serve: Serve, open_page: OpenPage) -> None:
    tab = open_page(serve(daemon_states.at_rest()))
    tab.press("Tab")
    assert tab.run("document.activeElement.className") == "skip"
    assert tab.run("document.activeElement.getBoundingClientRect().left") >= 0
    assert tab.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_keys_sort_a_table(serve: Serve, open_page: OpenPage) -> None:
    tab = open_page(serve(daemon_states.at_rest()))
    tab.run("[...document.querySelectorAll('#models button')].find((each) => each.textContent === 'Hits').focus()")
    hits = "[...document.querySelectorAll('#models tbody tr')].map((row) => row.children[4].innerText)"
    tab.press("Enter")
    assert tab.run(hits) == ["1,804", "214", "37", "12", "3"]
    assert tab.run("document.activeElement.parentElement.getAttribute('aria-sort')") == "descending"
    tab.press("Space")
    assert tab.run(hits) == ["3", "12", "37", "214", "1,804"]


def test_keys_pause_and_open(serve: Serve, open_page: OpenPage) -> None:
    state = daemon_states.at_rest()
    state["loads"] = [{**state["loads"][0], "ended_s": number} for number in range(12)]
    tab = open_page(serve(state))
    for control, key in (("#pause", "Space"), ("#loads-more", "Enter"), ("details:last-of-type summary", "Enter")):
        tab.run(f"document.querySelector({control!r}).focus()")
        tab.press(key)
    assert shown(tab, "state") == "paused"
    assert tab.run("document.querySelectorAll('details').length") == 12
    assert tab.run("document.querySelector('details:nth-of-type(12)').open")


def test_screen_reader_is_told_names_and_values(serve: Serve, open_page: OpenPage) -> None:
    tab = open_page(serve(daemon_states.cold_load()))
    nodes = [node for node in tab.call("Accessibility.getFullAXTree")["nodes"] if not node.get("ignored")]
    named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]
    assert {"banner", "navigation", "main", "region", "table", "columnheader", "rowheader"} <= {
        role for role, _ in named
    }
    spoken = ("button", "link", "region", "meter", "progressbar", "image", "table")
    assert [role for role, name in named if role in spoken and not name] == []
    meters = [node.get("value", {}).get("value") for node in nodes if node["role"]["value"] == "meter"]
    assert meters[0] in ("44.31 GB of 64.00 GB", 69)


def test_reduced_motion_is_honoured(serve: Serve, open_page: OpenPage) -> None:
    page = serve(daemon_states.at_rest())
    moves = "getComputedStyle(document.querySelector('.used')).transitionDuration"
    for asked, expected in (("reduce", "0s"), ("no-preference", "0.8s")):
        assert open_page(page, prefers_reduced_motion=asked).run(moves) == expected


# -- what it never does


def test_no_request_leaves_the_daemon(serve: Serve, open_page: OpenPage) -> None:
    page = serve(daemon_states.hostile())
    tab = open_page(page)
    requested = tab.requested()
    assert {urlsplit(url).path for url in requested} >= {"/", "/page.css", "/page.js", "/api/state"}
    assert [url for url in requested if not url.startswith(f"{page.url}/")] == []


def test_hostile_text_is_text(serve: Serve, open_page: OpenPage) -> None:
    tab = open_page(serve(daemon_states.hostile()))
    tab.run("document.querySelectorAll('button.more').forEach((each) => { if (!each.hidden) each.click(); })")
    tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    for part in ("tiers", "transfers", "models", "loads", "forecast", "decisions"):
        for text in daemon_states.EVIL[:5]:
            assert text in tab.run(f"document.getElementById({part!r}).textContent"), part
    assert "s3://bucket/\\u{202e}\\u{0}gnp.exe" in shown(tab, "models")
    assert not {"\u202e", "\0"} & set(str(tab.run("document.body.textContent")))
    assert tab.run("document.querySelectorAll('main img, main script, main a, main [onload]').length") == 0
    assert tab.run("window.hacked ?? ''") == ""
    assert tab.complaints() == []


def test_report_file_runs_and_asks_for_nothing(chromium: Chromium, tmp_path: Path) -> None:
    load = daemon_states.at_rest()["loads"][0]
    load["report"] |= {"uri": daemon_states.EVIL[0], "choices": {text: text for text in daemon_states.EVIL}}
    file = tmp_path / "report.html"
    file.write_text(waterfall.page(load["report"]), "utf-8")
    with chromium.open_tab(**PHONE) as tab:
        tab.go(file.as_uri())
        assert tab.run("document.querySelectorAll('rect').length") > 10
        assert tab.run("window.hacked ?? ''") == ""
        assert tab.requested() == [file.as_uri()]
        assert tab.run("document.documentElement.scrollWidth") == PHONE["width"]
        assert tab.run(CONTRASTS)[0][0] >= 4.5
        assert tab.complaints() == []
