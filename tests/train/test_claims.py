"""Claims are decided by the numbers: each can fail, and the report then says so."""

import copy
import math

import pytest
from demo_results import LAYERS, needles, results

from train import claims
from train.claims import CLAIMS, Claim, check


def verdict(name, runs):
    return {v.claim.name: v for v in check(CLAIMS, runs)}[name]


@pytest.fixture
def run():
    return copy.deepcopy(results()["runs"][0])


def test_good_numbers_hold_but_for_the_full_scale_bar(run):
    failed = {v.claim.name for v in check(CLAIMS, [run]) if not v.holds}
    assert failed == {"full_scale_gap"}


def set_loss(rung, value):
    def change(run):
        run["ladder"][rung]["cross_entropy"] = value

    return change


def set_quoted(rung, value):
    return lambda run: run["ladder"][rung].update(quoted_loss=value)


def set_layers(rung, metric, values):
    def change(run):
        run["ladder"][rung]["layers"][metric] = values

    return change


def set_check(name, value):
    return lambda run: run["checks"].update({name: value})


def set_far_recall(run):
    run["long_ladder"]["sparse"]["mass_recall/buckets"][1][-1] = 0.71  # of 0.8: 0.8875


# The claim, a change that breaks it, and the value it must then show.
BREAKS = [
    ("ordering", set_loss("recent", 2.30), 2.30 - 2.31),
    ("ordering", set_loss("oracle", 2.20), 2.20 - 2.21),
    ("warmed_near_oracle", set_loss("warmed", 2.42), 2.42 - 2.31),
    ("looks_back", set_quoted("warmed", 3.65), 2 * 2.86 - 2 - 3.65),
    ("sparse_near_control", set_loss("control", 2.10), 2.21 - 2.10),
    ("recovery", set_loss("control", 2.05), (2.32 - 2.21) - (2.17 - 2.05)),
    ("kl_fall", set_layers("warmed_all", "kl", [0.1, 0.5, 0.1]), 1.91 / 0.5),
    ("recall", set_layers("warmed", "mass_recall", [0.9, 0.68, 0.9]), 0.68 / 0.85),
    ("recency", set_layers("sparse", "selected_local", [0.3, 0.3, 0.6]), 0.6 - 0.44),
    ("longer_rows", set_far_recall, 0.71 / 0.8),
    ("all_keys", set_check("all_keys_differing_rows", 0.03), 0.03),
    ("frozen", set_check("changed_frozen_arrays", 2), 2.0),
]


@pytest.mark.parametrize(("name", "change", "value"), BREAKS)
def test_a_broken_claim_is_found(run, name, change, value):
    assert verdict(name, [run]).holds
    change(run)
    found = verdict(name, [run])
    assert not found.holds
    assert found.values == pytest.approx((value,))


def test_every_claim_is_tested():
    assert {name for name, *_ in BREAKS} | {"full_scale_gap"} == {c.name for c in CLAIMS}
    assert LAYERS == 3


def test_one_bad_seed_of_three_is_enough(run):
    other = copy.deepcopy(run)
    set_loss("warmed", 2.42)(other)
    found = verdict("warmed_near_oracle", [run, other, run])
    assert not found.holds
    assert found.worst == pytest.approx(0.11)


def test_nan_and_no_run_never_hold():
    claim = Claim("x", "x", lambda run: run["x"], "<=", 1.0, "")
    assert not check([claim], [{"x": math.nan}])[0].holds
    assert not check([claim], [])[0].holds
    assert check([claim], [{"x": 1.0}])[0].holds


def test_mean_and_range():
    assert claims.mean_and_range([2.0]) == "2.000"
    assert claims.mean_and_range([1.0, 2.0, 4.0]) == "2.333 ± 1.500"
    assert claims.mean_and_range([1.0, math.nan]) == "n/a"
    assert claims.number(3e-6) == "3.0e-06"
    assert claims.number(0.0) == "0.000"


# --- needles, and bf16 ----------------------------------------------------------------------------


@pytest.fixture
def asked():
    data = results()
    for run in data["runs"]:
        run["needles"] = needles()
    return data


def failed(data):
    verdicts = check(claims.of(data), data["runs"])
    return {v.claim.name for v in verdicts if not v.holds} - {"full_scale_gap"}


def test_needles_add_their_claims_only_where_they_were_asked_for(asked):
    assert claims.of(results()) == CLAIMS
    names = {claim.name for claim in claims.of(asked)} - {claim.name for claim in CLAIMS}
    assert names == {"dense_finds", "controls_miss", "warmed_finds", "sparse_finds"}
    assert failed(asked) == set()


@pytest.mark.parametrize(
    ("rung", "share", "claim"),
    [
        ("dense", 0.85, "dense_finds"),
        ("untrained", 0.2, "controls_miss"),
        ("random", 0.2, "controls_miss"),
        ("recent", 0.2, "controls_miss"),
        ("warmed", 0.87, "warmed_finds"),
        ("sparse", 0.95, "sparse_finds"),
    ],
)
def test_each_needle_claim_can_fail(asked, rung, share, claim):
    # The longer documents are as good as ever: they decide nothing.
    asked["runs"][0]["needles"]["accuracy"][rung][0] = [share] * 3
    assert failed(asked) == {claim}


def test_in_bf16_the_mean_loss_with_all_keys_decides(asked):
    asked["compute_dtype"] = "bfloat16"
    checks = asked["runs"][0]["checks"]
    checks |= {"all_keys_differing_rows": 1.0, "all_keys_loss": 0.004}
    assert failed(asked) == set()
    checks["all_keys_loss"] = 0.006
    assert failed(asked) == {"all_keys"}
