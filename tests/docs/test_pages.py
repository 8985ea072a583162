"""The pages agree with the code and with each other."""

import runpy
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, links


def test_the_reference_is_what_the_code_says() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "reference.py"))["page"]()
    shown = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert shown == page, "docs/cli.md is not what the code says; write it anew: python docs/reference.py"


def test_the_table_of_machines_is_what_the_planner_says() -> None:
    table = runpy.run_path(str(ROOT / "docs" / "machines.py"))["table"]()
    shown = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert table in shown, "the table in docs/models.md is another one than: python docs/machines.py"


def test_the_tables_of_results_are_what_the_evaluations_say() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "result_tables.py"))["page"]()
    shown = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert "| `em-inf` |" in shown
    assert shown == page, "docs/results.md is not what docs/results/ says: python docs/result_tables.py"


def test_the_results_in_the_readme_are_what_the_evaluations_say() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "result_tables.py"))["readme"]()
    shown = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "**EM-INF against sampling**" in shown
    assert shown == page, "README.md is not what docs/results/ says: python docs/result_tables.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}: there is no {target}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}: no such heading"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in links(ROOT / "README.md")}
    missing = {f"docs/{page.name}" for page in PAGES[1:]} - linked
    assert not missing, f"README.md has no link to {sorted(missing)}"
