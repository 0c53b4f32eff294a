"""All studies as ``gpu-layers study all --quick --out DIR`` runs them, and the page in a real browser."""

import json
import os
import re
import shutil
from dataclasses import replace

import pytest

from gpu_layers.cli import main
from gpu_layers.cli import study as command
from gpu_layers.study import STUDIES
from gpu_layers.study.claims import judge
from gpu_layers.study.snippets import MOST_LINES

CLAIMS = [(study.name, claim.name) for study in STUDIES.values() for claim in study.claims]
CHINESE = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a quick run of everything, and its reports by name."""
    folder, reports = tmp_path_factory.mktemp("study") / "page", {}

    def recorded(*arguments, **options):
        for report in run(*arguments, **options):
            reports[report.study.name] = report
            yield report

    run = command.run_studies
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "run_studies", recorded)
        # One process: the tests beside this one have the other processors.
        status = main(["study", "all", "--quick", "--jobs", "1", "--device", "cpu", "--out", str(folder)])
    return folder, reports, status


@pytest.fixture(scope="module")
def page(built):
    return (built[0] / "index.html").read_text(encoding="utf-8")


def test_every_check_holds(built):
    _, reports, status = built
    assert list(reports) == list(STUDIES)
    failed = [(name, one.claim.name, one.measured) for name, r in reports.items() for one in r.outcomes if one.failed]
    assert failed == []
    assert status == 0


def test_every_figure_is_drawn(built):
    figures = [figure for report in built[1].values() for figure in report.findings.figures]
    assert len(figures) >= 10
    assert [(figure.name, figure.failure) for figure in figures if figure.failure] == []


@pytest.mark.parametrize(("study", "claim"), CLAIMS)
def test_a_falsified_measurement_fails_its_check_and_no_other(built, study, claim):
    report = built[1][study]
    (honest,) = (one for one in report.outcomes if one.claim.name == claim)
    criterion = honest.claim.criterion
    beyond = criterion.bound + (-1 if criterion.relation == ">=" else 1)
    for false in (float("nan"), beyond):
        findings = replace(report.findings, measured={**report.findings.measured, claim: false})
        judged = judge(report.study, findings, {})
        assert judged.failed != honest.claim.is_question
        assert {one.claim.name for one in judged.outcomes if one.holds != criterion_holds(report, one)} <= {claim}


def criterion_holds(report, outcome):
    return next(one.holds for one in report.outcomes if one.claim.name == outcome.claim.name)


def test_snippets_ran_and_are_short(built):
    for report in built[1].values():
        for outcome in report.outcomes:
            lines = [
                line for line in outcome.claim.code.splitlines() if line and not line.startswith(("from ", "import "))
            ]
            assert len(lines) <= MOST_LINES, outcome.claim.name
            assert outcome.printed, outcome.claim.name


def test_results_for_programs(built):
    results = json.loads((built[0] / "results.json").read_text())
    assert (results["quick"], results["device"], list(results["studies"])) == (True, "cpu", list(STUDIES))
    claims = results["studies"]["pooling"]["claims"]
    assert claims["one-byte"] | {"statement": ""} == {
        "statement": "",
        "is_question": False,
        "measured": 1.0,
        "relation": "==",
        "bound": 1,
        "holds": True,
    }


def test_page_holds_everything_and_loads_nothing(built, page):
    _, reports, _ = built
    for name, claim in CLAIMS:
        assert f'id="{name}-{claim}"' in page
    figures = [f"{name}-{figure.name}" for name, report in reports.items() for figure in report.findings.figures]
    for figure in figures:
        assert f'id="figure-{figure}"' in page
        assert (built[0] / "figures" / f"{figure}.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert page.count('<svg class="formula"') == len(CLAIMS)
    assert re.findall(r'(?:src|href)="(?!data:|#)', page) == []
    assert re.findall(r"@import|url\(", page) == []
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_everything_said_is_said_in_both_languages(built):
    for report in built[1].values():
        said = [report.study.title, report.study.summary]
        for claim in report.study.claims:
            said += [claim.statement, claim.quantity, claim.criterion.reason]
        said += [figure.caption for figure in report.findings.figures]
        said += [table.title for table in report.findings.tables]
        for text in said:
            assert CHINESE.search(text.zh), text
            assert not CHINESE.search(text.en), text


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium on the screen of a phone; Debian's package, or one that is called the same."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        if os.environ.get("CI"):
            pytest.fail("CI needs chromium and chromedriver: see .ci/run")
        pytest.skip("browser: no chromium and chromedriver here (on Debian: apt install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    service = pytest.importorskip("selenium.webdriver.chrome.service").Service
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # No sandbox: it cannot be had as root, as which containers run; the page is ours.
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--lang=en-US"):
        options.add_argument(argument)
    options.add_experimental_option("mobileEmulation", {"deviceMetrics": {"width": 390, "height": 844}})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=service(driver))
    yield running
    running.quit()


def shown(browser, selector):
    """Elements that take up room on the screen."""
    script = "return [...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length).length"
    return browser.execute_script(script, selector)


def test_in_a_browser(built, browser):
    """No error on the console, every figure visible, both languages, nothing wider than a phone."""
    folder, reports, _ = built
    figures = sum(len(report.findings.figures) for report in reports.values())
    browser.get((folder / "index.html").as_uri())
    title = {"en": "What dropout", "zh": "随机失活"}
    for language, other in (("en", "zh"), ("zh", "en"), ("en", "zh")):
        browser.find_element("css selector", f"button[data-language={language}]").click()
        assert shown(browser, f"figure img.{language}") == figures
        assert shown(browser, f".{other}") == 0
        assert browser.execute_script("return document.documentElement.lang").startswith(language)
        assert title[language] in browser.find_element("css selector", "h1").text
        broken = (
            "return [...document.querySelectorAll('figure img')].filter(e => e.getClientRects().length"
            " && !(e.complete && e.naturalWidth > 0 && e.clientHeight > 100)).map(e => e.alt)"
        )
        assert browser.execute_script(broken) == []
        assert shown(browser, "svg.formula") == len(CLAIMS)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    assert browser.get_log("browser") == []
