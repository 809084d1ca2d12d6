"""No file and no template crashes the server, hangs it, or leads out of it: some of what `make mutate` throws."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mutations.mutant import File, Mutant, Template
from mutations.site import Outcome, Site
from mutations.table import TABLE, is_template, mutant, mutation_of

# Each is thrown by name, so that none is left to chance; the rest are the first numbers.
_HEAVY = [(name, number) for number, (name, plan) in enumerate(TABLE.items()) if plan.heavy]
_TEMPLATES = [(name, 0) for name in TABLE if is_template(name)]
_FILES = 200


@pytest.fixture
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    made = Site(tmp_path / "site", real=request.param)
    try:
        yield made.start()
    finally:
        made.close()


def thrown(site: Site, mutants: list[Mutant], at_once: int) -> list[Outcome]:
    with ThreadPoolExecutor(at_once) as pool:
        outcomes = list(pool.map(site.throw, mutants))
    violations = [
        f"{each.mutant.number} ({each.mutant.mutation}): {text}" for each in outcomes for text in each.violations
    ]
    violations += site.settled()
    assert not violations, "\n".join(violations)
    return outcomes


@pytest.mark.parametrize("site", [False], indirect=True, ids=["files"])
def test_no_file_crashes_hangs_or_leads_out_of_the_server(site: Site) -> None:
    light = (
        number
        for number in itertools.count()
        if not is_template(mutation_of(number)) and not TABLE[mutation_of(number)].heavy
    )
    mutants = [mutant(number) for number in itertools.islice(light, _FILES)]
    outcomes = thrown(site, [*mutants, *(mutant(number, name) for name, number in _HEAVY)], 3)
    kinds = {each.kind for each in outcomes}
    assert kinds == {"sound", "findings", "refused"}
    assert sum(each.kind != "sound" for each in outcomes) > _FILES / 2


@pytest.mark.parametrize("site", [True], indirect=True, ids=["templates"])
def test_no_template_crashes_hangs_or_leads_out_of_the_server(site: Site) -> None:
    thrown(site, [mutant(number, name) for name, number in _TEMPLATES], 2)


def test_a_mutant_is_made_again_from_its_number() -> None:
    for number in range(0, 300, 7):
        assert mutant(number) == mutant(number)
        assert isinstance(mutant(number).what, Template if is_template(mutation_of(number)) else File)


@pytest.mark.parametrize("site", [False], indirect=True, ids=["files"])
def test_what_must_not_be_is_seen(site: Site) -> None:
    assert not site.settled(0)
    (site.folder / "canary" / "new").touch()
    (site.daemon.data_dir / "blobs" / "incoming" / "left").touch()
    (site.daemon.data_dir / "blobs" / "more").touch()
    with open(site.daemon.data_dir / "luthierd.log", "a") as log:
        log.write("Traceback (most recent call last):\n")
    said = "\n".join(site.settled(0))
    for part in ("canary/new", "incoming still has left", "blobs/ has", "the log says"):
        assert part in said
    site.daemon.process.kill()
    site.daemon.process.wait()
    outcome = site.throw(mutant(0, "crumbs"))
    assert any("does not answer" in text for text in outcome.violations)
    assert any("UNAVAILABLE" in text for text in outcome.violations)
    assert any("ended with code" in text for text in site.settled(0))
