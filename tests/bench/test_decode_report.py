"""Records, their figures, ratios and what the report says of them, by hand-computed cases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moespac.bench.decode import plots
from moespac.bench.decode.bound import Needs
from moespac.bench.decode.records import FAILED, MISSING, Record, next_round, read_records
from moespac.bench.decode.report import markdown
from moespac.bench.decode.summary import claims, lines, ratio, share_of_bound
from moespac.config import DecodeBenchConfig
from moespac.errors import ConfigError
from tests.bench.small_decode import SETTING, record, text


def write(records: list[Record], file: Path) -> Path:
    file.write_text("".join(each.to_json() + "\n" for each in records))
    return file


def test_the_first_token_and_loading_do_not_count() -> None:
    texts = (text(2.0, 10), text(3.0, 5, first_seconds=1.5, passes=2, drafted=8, accepted=2))
    each = record("moe-spac", 1.0, texts=texts, load_seconds=99.0)
    assert each.tokens == 15
    assert each.rate == pytest.approx(15 / 5)
    assert each.first_seconds == pytest.approx(1.0)
    assert each.read_per_token == pytest.approx(1000)
    assert each.tokens_per_pass == pytest.approx(15 / 12)
    assert each.acceptance == pytest.approx(0.25)
    assert record("moe-spac", 1.0).acceptance is None


def test_the_bound_is_of_the_round_it_was_measured_in() -> None:
    needs = Needs(misses=5, active=16, tokens=10, slots=2)  # 5 s to read, 2 s to compute
    each = record("moe-spac", 1.5, needs=needs)
    assert each.bound == pytest.approx(2.0)
    assert record("llama.cpp", 1.5).bound is None
    share = share_of_bound(lines([each])[0])
    assert share is not None and share.value == pytest.approx(0.75)


def test_records_survive_their_file(tmp_path: Path) -> None:
    kept = [
        record("moe-spac", 2.0, needs=Needs(1, 2, 3, 4), memory={"left": 5}),
        record("llama.cpp", 1.0, texts=(), limits=None, status=FAILED, reason='it said "no"'),
    ]
    assert read_records(write(kept, tmp_path / "records"), "--json") == kept


@pytest.mark.parametrize("content", ["{", "[]", '{"contender": "moe-spac"}', "\x00"])
def test_what_is_no_record_is_said_so(tmp_path: Path, content: str) -> None:
    file = tmp_path / "records"
    file.write_text(content)
    with pytest.raises(ConfigError, match="holds no records"):
        read_records(file, "--from")


def test_records_of_two_settings_are_not_compared(tmp_path: Path) -> None:
    other = record("lru", 1.0, setting=SETTING | {"threads": 1})
    with pytest.raises(ConfigError, match="another setting \\(threads: 2, not 1\\)"):
        read_records(write([record("moe-spac", 2.0), other], tmp_path / "records"), "--json")


def test_a_ratio_is_taken_within_each_round_first() -> None:
    """The medians are 6 and 4, as 1.5 to 1; round by round it is 4 and 1."""
    records = [
        record("moe-spac", 8.0, round=0),
        record("moe-spac", 4.0, round=1),
        record("llama.cpp", 2.0, round=0),
        record("llama.cpp", 4.0, round=1),
        record("llama.cpp", 100.0, round=2),  # which moe-spac has not had
    ]
    fast, slow = (
        next(line for line in lines(records) if line.name == name) for name in ("moe-spac", "llama.cpp")
    )
    found = ratio(fast, slow)
    assert found is not None
    assert (found.value, found.low, found.high, found.rounds) == pytest.approx((2.5, 1.0, 4.0, 2))
    assert ratio(fast, replace(slow, records=())) is None


def test_rounds_go_on_where_a_file_left_off() -> None:
    records = [record("lru", 1.0), record("lru", 1.0, round=1), record("lru", 1.0, budget=1.0)]
    assert next_round(records, "lru", 0.25) == 2
    assert next_round(records, "lru", 1.0) == 1
    assert next_round(records, "moe-spac", 0.25) == 0


def test_claims_take_the_best_of_each_side() -> None:
    needs = Needs(misses=2, active=0, tokens=10, slots=2)  # at most 5 tokens/s
    records = [
        record("moe-spac", 2.0),
        record("moe-spac+draft", 4.0, needs=needs),
        record("lru", 3.9),  # no speculation: not asked for
        record("lru+draft", 2.0),
        record("hybrimoe+draft", 3.2),
        record("llama.cpp", 0.5),
        record("llama.cpp+draft", 0.8),
    ]
    llama, baseline, bound = claims(lines(records))
    assert [claim.ratio.value for claim in (llama, baseline, bound)] == pytest.approx([5.0, 1.25, 0.8])
    assert [claim.holds for claim in (llama, baseline, bound)] == [True, False, True]
    assert baseline.who == "moe-spac+draft / hybrimoe+draft"


def test_claims_of_everything_in_memory_compare_like_with_like() -> None:
    records = [
        record("moe-spac", 3.0, budget=1.0),
        record("moe-spac+lookup", 4.0, budget=1.0),
        record("llama.cpp-ram", 2.0, budget=1.0),
        record("llama.cpp", 1.0, budget=1.0),
    ]
    plain, drafted = claims(lines(records))
    assert plain.who == "moe-spac / llama.cpp-ram" and plain.ratio is not None
    assert plain.ratio.value == pytest.approx(1.5)
    assert drafted.ratio is None and drafted.holds is None  # llama.cpp with drafts was not measured


def test_the_governor_is_measured_by_the_best_fixed_k() -> None:
    records = [
        record("moe-spac", 1.0),
        record("moe-spac+draft", 1.25),
        record("moe-spac+draft@1", 2.0),
        record("moe-spac+draft@4", 0.5),
    ]
    claim = next(claim for claim in claims(lines(records)) if "governed" in claim.text)
    assert claim.who == "moe-spac+draft / moe-spac+draft@1"
    assert claim.ratio is not None and claim.ratio.value == pytest.approx(0.625) and not claim.holds
    quarter = [*records, record("lru+draft", 1.0)]
    baseline = next(claim for claim in claims(lines(quarter)) if "baseline" in claim.text)
    assert baseline.who == "moe-spac+draft / lru+draft", "a fixed K of ours is no baseline"
    assert not any("governed" in claim.text for claim in claims(lines(records[:2])))


def test_the_report_says_who_is_missing_who_failed_and_who_was_cut_short() -> None:
    records = [
        record("moe-spac", 4.0, texts=(text(2.5, 10, causes={"trunk": 1.0, "nothing": 0.0}),)),
        record("moe-spac", 4.0, budget=1.0),
        record("lru", 2.0, texts=(text(2.0, 4),)),
        record("llama.cpp", 1.0, texts=(), status=MISSING, reason="not installed: gguf (pip install it)"),
        record("transformers+disk", 1.0, texts=(), status=FAILED, reason="was ended by the system"),
    ]
    said = markdown(records)
    assert "- llama.cpp: not installed: gguf (pip install it)" in said
    assert "- transformers+disk at 25%: was ended by the system" in said
    assert "- lru at 25%: its time was up after 4 tokens of 1 prompts" in said
    assert "| lru | 2.00 | 2.00–2.00 | 2.00× |" in said
    assert "| moe-spac | 4.00 | 4.00 |" in said  # the curve
    assert "| moe-spac | 25% | 100.0 |" in said and "nothing" not in said  # 1 s over 10 tokens
    assert f"{DecodeBenchConfig.margin_bytes >> 20} MB" in said and "K = 4" in said


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    causes = {"trunk": 1.0, "host_experts": 2.0}
    records = [
        record(name, rate, budget=budget, texts=(text(10 / rate, causes=causes),), needs=Needs(5, 9, 10, 2))
        for name, rate in (("moe-spac", 4.0), ("lru+draft", 2.0), ("llama.cpp", 1.0))
        for budget in (1.0, 0.25)
    ]
    drawn = plots.draw_all(records, tmp_path / "new")
    assert [file.name for file in drawn] == ["speed-100.png", "speed-25.png", "curve.png", "time.png"]
    assert all(file.stat().st_size > 5000 for file in drawn)
