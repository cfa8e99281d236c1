"""The goals of `moespac bench gpu`, from records by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moespac.bench.gpu.contenders import COMPILED, OFFLOAD, RESIDENT
from moespac.bench.gpu.goals import MET, NOT_MEASURED, NOT_MET, Goal, goals_of, pair_ratios
from moespac.bench.gpu.job import EXACT_JOB, PAIR
from moespac.bench.gpu.records import FAILED, GpuRecord
from moespac.bench.gpu.report import markdown
from moespac.bench.paper import OURS, OURS_PLAIN, STANDARD
from tests.bench.small_gpu import figures, record


def standard(rate: float) -> list[GpuRecord]:
    return [record(name, rate, drafted=8 if name == "llama.cpp+sd" else 0) for name in STANDARD]


def goal(records: list[GpuRecord], text: str) -> Goal:
    (found,) = [each for each in goals_of(records) if text in each.text]
    return found


def test_over_the_best_baseline_that_drafted() -> None:
    """Not the fastest of all, not ours, and not one of another share or model."""
    records = [
        record(OURS, 30.0, drafted=8),
        record("moe-spac, fixed K", 29.0, drafted=8),
        record("lru", 20.0, drafted=8),
        record("sp-moe", 10.0, drafted=8),
        record("ktransformers", 25.0),
        record("arc", 50.0, drafted=8, budget=0.5),
        record("arc", 60.0, drafted=8, model=PAIR),
        replace(record("arc", 70.0, drafted=8), status=FAILED),
    ]
    found = goal(records, "best speculative")
    assert (found.value, found.verdict, found.who) == (pytest.approx(1.5), MET, "lru")
    slower = [record(OURS, 28.0, drafted=8), *records[1:]]
    assert goal(slower, "best speculative").verdict == NOT_MET
    assert goal([record(OURS, 30.0)], "best speculative").verdict == NOT_MEASURED


def test_over_the_mean_of_all_standard_baselines() -> None:
    records = [record(OURS, 41.0), *standard(10.0)]
    found = goal(records, "mean of the standard")
    assert (found.value, found.verdict) == (pytest.approx(4.1), MET)
    assert goal([record(OURS, 40.0), *standard(10.0)], "mean of the standard").verdict == NOT_MET
    partly = goal(records[:-1], "mean of the standard")
    assert partly.value == pytest.approx(4.1) and partly.verdict == NOT_MEASURED
    assert f"without {STANDARD[-1]}" in partly.who


def test_over_transformers_with_accelerate() -> None:
    for rate, verdict in ((10.0, MET), (9.9, NOT_MET)):
        found = goal([record(OURS, rate), record(OFFLOAD, 1.0)], f"over {OFFLOAD}")
        assert (found.value, found.verdict) == (pytest.approx(rate), verdict)
    assert goal([record(OFFLOAD, 1.0)], f"over {OFFLOAD}").verdict == NOT_MEASURED


def test_everything_resident() -> None:
    for rate, verdict in ((130.0, MET), (131.0, NOT_MET)):
        records = [record(RESIDENT, 100.0, budget=1.0), record(COMPILED, rate, budget=1.0)]
        found = goal(records, "all resident")
        assert (found.value, found.verdict) == (pytest.approx(rate / 100), verdict)


def test_copies_beside_the_link_alone() -> None:
    """The records copy 900 bytes in a second."""
    for alone, verdict in ((1000.0, MET), (1100.0, NOT_MET)):
        found = goal([record(OURS, 1.0), figures(link_bandwidth=alone)], "copies")
        assert (found.value, found.verdict) == (pytest.approx(900 / alone), verdict)
    assert goal([record(OURS, 1.0)], "copies").verdict == NOT_MEASURED


def test_the_hosts_time_of_a_layer_only_where_it_is_known() -> None:
    ours = record(OURS, 1.0)
    assert ours.result.gauges is not None
    assert goal([ours], "host time").verdict == NOT_MEASURED
    for seconds, verdict in ((149e-6, MET), (150e-6, NOT_MET)):
        gauges = replace(ours.result.gauges, layer_seconds=seconds)
        found = goal([replace(ours, result=replace(ours.result, gauges=gauges))], "host time")
        assert (found.value, found.verdict) == (pytest.approx(seconds * 1e6), verdict)


def test_exactness() -> None:
    for same, off, tokens, logits in ((48, 0.2, MET, MET), (47, 0.21, NOT_MET, NOT_MET)):
        found = [
            record(OURS, 1.0),
            figures(EXACT_JOB, tokens_same=same, tokens_of=48, logits_off=off, logits_rounding=0.1),
        ]
        assert goal(found, "float32").verdict == tokens
        assert goal(found, "bfloat16").verdict == logits
    assert goal([record(OURS, 1.0)], "float32").verdict == NOT_MEASURED


def test_without_a_card_and_in_small_nothing_is_measured() -> None:
    records = [record(OURS, 41.0), *standard(10.0)]
    for changed, why in (({"device": "cpu"}, "no GPU"), ({"quick": True}, "a quick run")):
        setting = replace(records[0].setting, **changed)
        found = goals_of([replace(each, setting=setting) for each in records])
        assert {each.verdict for each in found} == {NOT_MEASURED}
        assert all(each.who.startswith(why) for each in found)
        assert found[1].value == pytest.approx(4.1)


def test_the_latest_record_of_a_contender_counts() -> None:
    records = [record(OURS, 99.0), record(OFFLOAD, 1.0), record(OURS, 5.0)]
    assert goal(records, f"over {OFFLOAD}").value == pytest.approx(5.0)


def test_the_pair_has_ratios_and_no_verdict() -> None:
    records = [record(OURS, 30.0, model=PAIR), record("lru", 20.0, drafted=8, model=PAIR)]
    (found,) = pair_ratios(records)
    assert found.value == pytest.approx(1.5) and found.verdict == NOT_MEASURED


def test_a_report_says_what_was_left_out_and_cut_short() -> None:
    left_out = replace(record("arc", 1.0), status="skipped", reason="no time was left")
    text = markdown([record(OURS, 30.0), record(OURS_PLAIN, 20.0, wanted=20), left_out])
    assert "arc (shape at 17%), skipped: no time was left" in text
    assert f"{OURS_PLAIN} (shape at 17%): its time was up after 10 tokens" in text
    assert "| **moe-spac** | **30.00** | **1.00** |" in text and "48 of 48 layers" in text
    assert "figures say nothing" not in text
