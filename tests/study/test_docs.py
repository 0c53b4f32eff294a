"""``docs/study`` is what ``make study`` writes: it has the studies of today, and every check in it held."""

import html
import json
from pathlib import Path

import pytest

from gpu_layers.study import STUDIES

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "study"
ADVICE = "make study writes it anew"


@pytest.fixture(scope="module")
def results():
    return json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))


def test_of_a_whole_run(results):
    assert (results["quick"], list(results["studies"])) == (False, list(STUDIES)), ADVICE


@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda study: study.name)
def test_claims_are_those_of_today(results, study):
    page = html.unescape((FOLDER / "index.html").read_text(encoding="utf-8"))
    written = results["studies"][study.name]["claims"]
    assert list(written) == [claim.name for claim in study.claims], ADVICE
    for claim in study.claims:
        entry = written[claim.name]
        assert (entry["statement"], entry["relation"], entry["bound"], entry["is_question"]) == (
            claim.statement.en,
            claim.criterion.relation,
            claim.criterion.bound,
            claim.is_question,
        ), ADVICE
        assert entry["holds"] == claim.criterion.holds(entry["measured"])
        assert entry["holds"] or claim.is_question
        assert f'id="{study.name}-{claim.name}"' in page
        assert claim.code in page, ADVICE
