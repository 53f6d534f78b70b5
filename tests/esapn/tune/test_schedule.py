"""Which walk comes next, on losses that are a formula."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from esapn.config import SearchConfig
from esapn.tune.choice import choose, loss_by_order
from esapn.tune.schedule import Listed, Tuning
from esapn.tune.space import SPREAD, ranges, spread
from esapn.tune.walk import Job
from tests.esapn.tune.made import exhaust, make, walked

BEFORE = {"row_lr": 0.05, "row_accumulator": 0.0, "init_std": 0.01}
CONFIG = SearchConfig.of_mode("tuned", method="fixed", fixed_size=4, **BEFORE)
RANGES = ranges(CONFIG)


def tuning(trials=24, orders=(0, 1, 2)) -> Tuning:
    return Tuning("fixed-4", CONFIG, RANGES, trials=trials, orders=orders)


def bowl(job) -> float:
    """Lowest, 0.1, at a rate of 0.4 and a start of 0.03; orders differ by a hundredth."""
    settings = dict(job.settings)
    far = math.log(settings["row_lr"] / 0.4) ** 2
    far += math.log(max(settings["row_accumulator"], 1e-3) / 0.03) ** 2
    return 0.1 + 0.01 * far + 0.01 * job.order


def test_the_first_trial_is_the_modes_own_and_the_next_are_shared_points():
    jobs = exhaust(tuning(trials=SPREAD + 1), bowl)
    settings = {job.trial: dict(job.settings) for job in jobs}
    assert settings["0"] == {name: getattr(CONFIG, name) for name in RANGES}
    for number in range(1, SPREAD + 1):
        assert settings[str(number)] == spread(number - 1, RANGES)


def test_a_third_of_the_trials_walks_each_further_order_and_so_does_the_default():
    tuned = tuning(trials=9)
    walks = Counter(job.order for job in exhaust(tuned, bowl))
    ranked = sorted(tuned.walks, key=lambda t: tuned.walks[t][0].loss)
    assert "0" not in ranked[:3]  # the mode's own settings are among the worse ones here
    assert walks == {0: 9, 1: 3 + 1, 2: 1 + 1}
    assert {t for t in tuned.walks if 1 in tuned.walks[t]} == {*ranked[:3], "0"}
    assert {t for t in tuned.walks if 2 in tuned.walks[t]} == {ranked[0], "0"}


def test_trials_are_put_where_the_loss_is_low():
    tuned = tuning()
    exhaust(tuned, bowl)
    shared = min(bowl_of(tuned, str(k)) for k in range(1, SPREAD + 1))
    found = min(bowl_of(tuned, str(k)) for k in range(SPREAD + 1, 24))
    assert found < 0.1 + (shared - 0.1) / 4
    for settings in tuned.settings.values():
        if settings["row_accumulator"]:
            assert all(RANGES[n].low <= v <= RANGES[n].high for n, v in settings.items())


def bowl_of(tuned, trial) -> float:
    return tuned.walks[trial][0].losses[-1]


def test_a_hopeless_trial_stops_early_and_never_on_a_further_order():
    tuned = tuning()
    jobs = exhaust(tuned, lambda job: 0.1 + int(job.trial) % 2)
    for job in jobs:
        limited = job.limits != (math.inf,) * 4
        assert limited == (job.order == 0 and int(job.trial) > SPREAD)
        if limited:
            assert job.limits[0] == job.limits[3] == math.inf
            before = [w[0].losses for t, w in tuned.walks.items() if int(t) < int(job.trial)]
            seconds = sorted(losses[1] for losses in before)
            middle = len(seconds) // 2
            assert seconds[(len(seconds) - 1) // 2] <= job.limits[1] <= seconds[middle]
    stopped = [w[0] for w in tuned.walks.values() if w[0].stopped]
    assert stopped and all(len(w.losses) == 2 and w.loss == math.inf for w in stopped)
    assert all(len(tuned.walks[w.trial]) == 1 for w in stopped)
    assert {w.trial for w in stopped} <= {str(k) for k in range(SPREAD + 1, 24, 2)}


def test_trials_that_diverge_are_no_choice_and_do_not_end_the_tuning():
    def loss(job):
        if int(job.trial) % 3 == 1:
            return math.nan if job.trial == "1" else math.inf
        return bowl(job)

    tuned = tuning(trials=12)
    exhaust(tuned, loss)
    assert len(tuned.walks) == 12
    choice = choose(tuned)
    assert choice is not None and int(choice.trial) % 3 != 1
    everything = tuning(trials=12)
    exhaust(everything, lambda job: math.nan)
    assert choose(everything) is None


@pytest.mark.parametrize("kept", [0, 5, 13, 27])
def test_a_tuning_goes_on_as_if_it_had_not_been_interrupted(kept):
    whole = tuning(trials=14)
    jobs = exhaust(whole, bowl)
    again = tuning(trials=14)
    for job in jobs[:kept]:
        again.add(make(job, bowl))
    assert exhaust(again, bowl) == jobs[kept:]


def test_walks_that_do_not_depend_on_each_other_may_be_made_at_once():
    tuned = tuning(trials=SPREAD + 3, orders=(5, 6))
    jobs = []
    while (job := tuned.next()) is not None:
        jobs.append(job)
    # The shared points; what follows waits for them, whatever their order.
    assert [job.trial for job in jobs] == [str(k) for k in range(SPREAD + 1)]
    for job in reversed(jobs):
        assert tuned.next() is None
        tuned.add(make(job, bowl))
    one = tuning(trials=SPREAD + 3, orders=(5, 6))
    expected = exhaust(one, bowl)
    for job in expected[SPREAD + 1 : SPREAD + 3]:
        assert tuned.next() == job and tuned.next() is None
        tuned.add(make(job, bowl))
    rest = []
    while (job := tuned.next()) is not None:
        rest.append(job)
    assert rest == expected[SPREAD + 3 :]
    for job in rest:
        tuned.add(make(job, bowl))
    assert choose(tuned) == choose(one)


def test_a_shared_point_that_was_lost_is_made_again_without_limits():
    jobs = exhaust(tuning(trials=14, orders=(0,)), bowl)
    again = tuning(trials=14, orders=(0,))
    for job in jobs[:3] + jobs[4:12]:
        again.add(make(job, bowl))
    assert again.next() == jobs[3]


def test_a_walk_of_other_settings_or_another_trial_does_not_fit():
    tuned = tuning(trials=3)
    job = tuned.next()
    assert job is not None and tuned.fits(make(job, bowl))
    other = Job(job.method, "0", 0, (*job.settings[:-1], ("init_std", 0.5)))
    assert not tuned.fits(make(other, bowl))
    assert tuned.has("2") and not tuned.has("3") and not tuned.has("00") and not tuned.has("own")
    listed = Listed("fixed-4", {"own": {"row_lr": 0.4}}, [3])
    for rate, fits in ((0.4, True), (0.5, False)):
        assert listed.fits(make(Job("fixed-4", "own", 3, (("row_lr", rate),)), bowl_0)) == fits
    assert listed.has("own") and not listed.has("0")


def bowl_0(job) -> float:
    return 0.1


def test_listed_settings_are_walked_on_every_order():
    listed = Listed("fixed-4", {"default": {"row_lr": 0.05}, "own": {"row_lr": 0.4}}, [3, 4])
    jobs = exhaust(listed, lambda job: 0.1 * job.order + dict(job.settings)["row_lr"])
    assert [(j.trial, j.order) for j in jobs] == [
        ("default", 3),
        ("default", 4),
        ("own", 3),
        ("own", 4),
    ]
    assert loss_by_order(listed, "own") == pytest.approx([0.7, 0.8])
    choice = choose(listed, "own")
    assert choice is not None and choice.trial == "default"
    assert choice.less["default"] == pytest.approx([-0.35, -0.35])
    assert choice.less["second"] == pytest.approx([-0.35, -0.35])


def test_a_stopped_walk_has_no_validation_loss():
    job = tuning().next()
    assert job is not None
    assert walked(job, 0.1, 0.2).stopped and walked(job, 0.1, 0.2, 0.3, math.nan).stopped
    assert not walked(job, 0.1, 0.2, 0.3, 0.4).stopped
