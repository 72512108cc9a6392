"""The soak's checks find what must not happen, and its faults depend on the seed alone."""

from collections import defaultdict
from dataclasses import replace

from imagepipeline_tests.end_to_end import soak_history as history
from imagepipeline_tests.end_to_end.soak_faults import Hit, plan_faults
from imagepipeline_tests.end_to_end.soak_history import Evidence
from imagepipeline_tests.end_to_end.soak_provider import Call
from imagepipeline_tests.end_to_end.soak_uploads import Expected

PICTURE = 7


def happened(event, fence, generation=1, run="r1"):
    return {"event": event, "fence": fence, "generation": generation, "run_id": run}


GOOD = Evidence(
    expected={"a": Expected("completed", None, "png", (320, 240), [PICTURE])},
    unreadable=0,
    calls=[Call(1, "alpha", "metadata", PICTURE, asked=10.0, fault=None, answered=11.0)],
    hits=[],
    rows={"a": {"status": "completed", "reason": None, "error": None}},
    history=defaultdict(
        list,
        a=[
            happened("accepted", 0, run=None),
            happened("claimed", 1),
            happened("made", 1, run=None),  # history names a run once
            happened("completed", 1, run=None),
        ],
    ),
    events=[
        {"image_id": "a", "generation": 1, "type": "image.completed", "event_id": "e", "seq": 1}
    ],
    ledger=[{"tokens_in": 1, "outcome": "answered"}],
    variants={},
    results={},
    sums={"calls": 1, "answered": 1, "tokens_in": 1},
)
STREAMED = [
    {"eventId": "e", "imageId": "a", "type": "image.completed", "description": "Picture number 7."}
]


def find_all(seen, streamed=STREAMED):
    return [
        *history.find_lost(seen),
        *history.find_doubles(seen),
        *history.find_wrong_events(seen, streamed),
        *history.find_paid_twice(seen)[0],
        *history.find_unrecorded(seen)[0],
    ]


def test_a_good_history_has_no_faults():
    assert find_all(GOOD) == []
    assert find_all(GOOD, STREAMED * 2) == []  # events come at least once


def test_a_lost_image_is_found():
    failed = {"status": "failed", "reason": "poison", "error": "x"}
    [found] = find_all(replace(GOOD, rows={"a": failed}))
    assert found.startswith("a is failed (poison: x), not completed (None)")
    assert list(history.find_lost(replace(GOOD, rows={}))) == ["a has no row"]


def test_an_image_fails_rightly_if_all_attempts_met_faults_of_the_provider():
    failed = {"status": "failed", "reason": "bad_output", "error": "x"}
    for count, is_right in ((2, False), (3, True)):
        calls = [
            replace(GOOD.calls[0], number=number, fault="html", answered=None)
            for number in range(count)
        ]
        seen = replace(GOOD, rows={"a": failed}, calls=calls)
        assert (list(history.find_lost(seen)) == []) is is_right


def test_two_owners_at_once_are_found():
    events = [*GOOD.history["a"]]
    events.insert(2, happened("claimed", 2, run="r2"))
    events[3:] = [happened("made", 1, run=None), happened("completed", 2, run=None)]
    found = list(history.find_doubles(replace(GOOD, history={"a": events})))
    assert found == [
        "a: r2 claimed it while ('r1', 1) held it",
        "a: the fence fell from 2 to 1",
        "a: fence 1 wrote, ('r2', 2) held it",
    ]


def test_wrong_events_are_found():
    assert find_all(replace(GOOD, events=[])) == ["a: generation 1 has 0 of image.completed"]
    assert find_all(GOOD, []) == ["event e is not on the stream"]
    foreign = [STREAMED[0] | {"description": "Picture number 8."}]
    assert find_all(GOOD, foreign) == [
        "a: an event said 'Picture number 8.', which is another image's"
    ]


def test_a_call_may_be_repeated_only_after_a_fault_that_can_have_lost_its_answer():
    again = Call(2, "beta", "metadata", PICTURE, asked=30.0, fault=None, answered=31.0)
    twice = replace(
        GOOD,
        calls=[*GOOD.calls, again],
        ledger=[{"tokens_in": 2, "outcome": "answered"}],
        sums={"calls": 1, "answered": 1, "tokens_in": 2},
    )
    assert find_all(twice) == [
        "metadata of 7: call 2 repeats 1",
        "call 1 (metadata) is not in the ledger",
    ]
    elsewhere = Hit("kill worker", "beta", 11.1, 11.1)
    assert len(find_all(replace(twice, hits=[elsewhere]))) == 2
    near = Hit("kill worker", "alpha", 11.1, 11.1)
    assert find_all(replace(twice, hits=[near])) == []


def test_faults_are_drawn_from_the_seed():
    plans = [
        plan_faults(seed, 500, 7000, ["alpha", "beta"], lambda kind: kind != "fill disk")
        for seed in (1, 1, 2)
    ]
    assert plans[0] == plans[1] != plans[2]
    kinds = {fault.kind for fault in plans[0]}
    assert "fill disk" not in kinds
    assert {"kill run", "freeze machine", "crash postgres", "provider 429"} <= kinds
