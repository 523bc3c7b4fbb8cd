"""Random onboardings: no root key reaches a KMS that the documents do not give it to, and checks come in their order.

Both KMS run, each with its webhook and a guest agent that shows any evidence, so each of them judges the other one.
`onboarding_model` says what real ones do; a refusal beside it must be one of `test_decisions.STRICTER`.
`make decisions` draws more.
"""

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.onboarding_cases import OnboardingDraw, Pair, pair
from tests.onboarding_model import Onboarding, questions, refusals
from tests.test_decisions import CASES, SEED, STRICTER

COUNT = CASES // 15


@pytest.fixture(scope="module")
def kms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair(tmp_path_factory.mktemp("onboarding"), SEED) as made:
        yield made


def is_stricter(case: Onboarding, refusal: str) -> bool:
    """Tell whether a rule that is a row of the fidelity page refuses one side's evidence."""
    releases = (case.release, case.handover.release)
    shown = (case.source, case.handover.evidence)
    return any(s.text in refusal and s.holds(e, r) for s in STRICTER for e in shown for r in releases)


def test_no_root_key_is_handed_over_that_the_documents_do_not_hand_over(kms: Pair) -> None:
    laxer, stricter, disordered, outcomes = [], [], [], Counter[bool]()
    for number in range(COUNT):
        case = OnboardingDraw(kms.forger, f"{SEED}/{number}").onboarding()
        expected, (released, refusal) = refusals(case), kms.answers(case)
        outcomes[released] += 1
        if released:
            assert kms.asked() == questions(case)
        if released and expected:
            laxer.append((number, expected, case))
        elif not released and not is_stricter(case, refusal):
            if not expected:
                stricter.append((number, refusal, case))
            elif not any(each.text in refusal for each in expected if each.step == expected[0].step):
                disordered.append((number, refusal, expected))
    assert not laxer, f"{len(laxer)} released: {laxer[:3]}"
    assert not stricter, f"{len(stricter)} refused: {stricter[:3]}"
    assert not disordered, f"{len(disordered)} in another order: {disordered[:3]}"
    assert min(outcomes[True], outcomes[False]) >= COUNT // 8, outcomes
