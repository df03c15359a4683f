"""The page of a long run."""

from tests.fault.page import Run, drawn


def test_the_page_tells_what_failed_with_its_seed() -> None:
    """Who reads it wants to run exactly that again."""
    page = drawn([_run(seed=1), _run(seed=37, failed="InvariantBrokenError: I1 lost: <a>")])

    assert "seed 37: InvariantBrokenError: I1 lost: &lt;a&gt;" in page
    assert "<b>2</b>runs" in page
    assert "<b>1</b>runs failed" in page
    assert "kill all1 (12 in the outbox)" in page


def test_a_negative_control_that_finds_nothing_stands_out() -> None:
    """Its test fails then, and nothing of what held can be believed."""
    found = _run(negative_control=True, violations=("I1 lost: committed, never delivered: a.",))
    missed = _run(negative_control=True, failed="Failed: DID NOT RAISE", scenario="another")

    page = drawn([found, missed])

    assert "I1 lost: committed, never delivered: a." in page
    assert "not found out" in page


def _run(
    *,
    seed: int = 1,
    failed: str | None = None,
    negative_control: bool = False,
    violations: tuple[str, ...] = (),
    scenario: str = "a relay is killed",
) -> Run:
    return Run(
        fault="F1",
        scenario=scenario,
        negative_control=negative_control,
        setup="postgres-log",
        seed=seed,
        failed=failed,
        violations=violations,
        blows=[{"at": 1.0, "what": "kill all1", "in_flight": 12}],
        recovery_s=0.5,
        committed=120,
        delivered=130,
        samples=[(0.0, 0, 0), (0.5, 60, 10), (1.0, None, 10), (1.5, 3, 90)],
    )
