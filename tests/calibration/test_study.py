"""The study of the thresholds: what is stored is of the thresholds that are in use."""

import json
from dataclasses import asdict
from pathlib import Path

from bnfreeze.calibration.fit import THRESHOLDS

STUDY = json.loads(
    (Path(__file__).parents[2] / "benchmarks/results/calibration.json").read_text(encoding="utf-8")
)


def test_the_thresholds_in_use_are_those_that_were_chosen_and_judged():
    assert STUDY["thresholds"]["chosen"] == STUDY["shipped"]
    assert STUDY["shipped"] == {name: asdict(THRESHOLDS)[name] for name in ("mean", "ratio")}
    assert not STUDY["quick"]


def test_few_false_alarms_and_shifts_that_matter_are_found():
    judged = STUDY["judged"]
    for verdicts in judged["none"].values():
        assert verdicts["shifted"] <= 0.01
    for what in ("mean off by 0.3 σ", "variance × 2.0"):
        assert judged[what]["256"]["shifted"] > 0.95
        assert all(verdicts["fits"] < 0.01 for verdicts in judged[what].values())
    for seen in STUDY["batch_noise_seen_over_reported"].values():
        assert 0.98 < seen["median"] < 1.02
