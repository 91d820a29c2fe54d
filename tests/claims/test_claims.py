"""The runner of claims: evidence as plain values, one broken claim stops no other, the page says what was measured."""

from __future__ import annotations

import json
import sys
import types

import pytest

from polyhead.claims import Evidence, base, claim_ids, run_claim
from polyhead.claims.report import page, run_all, save_evidence
from polyhead.errors import InputError
from polyhead.papers import catalogue


def evidence(verdict="supported"):
    return Evidence({"gain": 0.25}, {"none": 0.0}, "gain above 0.", (0.125, 0.375), verdict, decides="gain")


@pytest.fixture
def toy(monkeypatch):
    """Two claims of real papers, made up here: one runs, one breaks."""
    good, bad = types.ModuleType("good"), types.ModuleType("bad")
    good.run = lambda scale, seed: evidence()
    bad.run = lambda scale, seed: 1 / 0
    monkeypatch.setitem(sys.modules, "polyhead.claims.mqa", good)
    monkeypatch.setitem(sys.modules, "polyhead.claims.gqa", bad)
    for module in (base, sys.modules["polyhead.claims.report"]):
        monkeypatch.setattr(module, "claim_ids", lambda: ["gqa", "mqa"])


def test_every_claim_file_is_of_a_paper_that_names_it():
    cards = catalogue()
    for id in claim_ids():
        assert cards[id].claim_file == f"claims/{base.module_of(id)}.py"
    assert (base.module_of("cd-t"), base.module_of("2dmse")) == ("cd_t", "paper_2dmse")


def test_evidence_is_plain_and_says_how_it_was_run(toy):
    found = run_claim("mqa", seed=3)
    assert json.loads(json.dumps(found)) == {**found, "interval": [0.125, 0.375]}
    assert (found["seed"], found["scale"], found["verdict"]) == (3, "smoke", "supported")
    assert found["versions"]["torch"]


def test_verdict_rule():
    assert base.verdict_of(0.1, 0.2) == "supported"
    assert base.verdict_of(-0.2, -0.1) == "refuted"
    assert base.verdict_of(-0.1, 0.1) == "inconclusive"
    assert base.verdict_of(0.1, 0.2, more_than=0.3) == "refuted"
    with pytest.raises(InputError, match="verdict is 'true'"):
        evidence("true")


def test_a_broken_claim_is_told_and_stops_nothing(toy, tmp_path):
    told = []
    found, broken = run_all(tell=lambda id, result: told.append(id))
    assert told == ["gqa", "mqa"]
    assert list(found) == ["mqa"]
    assert "ZeroDivisionError" in broken["gqa"]
    save_evidence({**found["mqa"], "scale": "full"}, tmp_path)
    assert '"full"' in save_evidence(found["mqa"], tmp_path).read_text(), "a smoke run replaces no full one"
    text = page(tmp_path)
    assert "| `mqa` | supported | gain 0.25 | none 0 | gain: 0.125 to 0.375 |" in text
    assert "expected gain above 0." in text


def test_unknown_claims_and_scales_are_refused(toy):
    with pytest.raises(InputError, match="No claim 'nope' here; there are gqa, mqa"):
        run_claim("nope")
    with pytest.raises(InputError, match="expected 'smoke' or 'full'"):
        run_claim("mqa", scale="huge")


def test_claims_run_in_several_processes():
    found, broken = run_all(["hrv", "nope"], jobs=2)
    assert list(found) == ["hrv"]
    assert found["hrv"]["measured"] == run_claim("hrv")["measured"]
    assert "No claim 'nope'" in broken["nope"]
