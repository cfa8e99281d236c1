"""The simulator against hand-computed time, and what must hold of any result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moespac.config import EngineConfig, SimulationConfig
from moespac.errors import ConfigError
from moespac.policy.base import Policy, Sensor
from moespac.policy.cost import CostModel
from moespac.policy.registry import SIMULATOR_POLICIES
from moespac.sim.guesses import guess
from moespac.sim.hardware import HardwareProfile
from moespac.sim.result import SimResult
from moespac.sim.simulator import Setting, run, simulate
from moespac.sim.study import Task, simulate_all
from moespac.sim.texts import DrawnText, RecordedText
from moespac.timeline import Timeline
from moespac.trace import TraceRecorder
from moespac.types import Capacity, Observation, Placement, Plan, Window
from tests.sim.small import HOST_ONLY, MACHINE, MODEL, decoded, random_trace

SETTING = Setting(MACHINE, MODEL, Capacity(8, 4), window=2)


class Scripted(Policy):
    """Places and prefetches as it was told, call after call."""

    name = "scripted"

    def __init__(self, capacity: Capacity, placements: list[Placement], plan: Plan | None = None) -> None:
        super().__init__(MODEL.to_model_shape(), capacity, CostModel(EngineConfig().method.cost, 100))
        self.placements = placements
        self.first_plan = plan or Plan()
        self.calls: list[str] = []

    def plan(self, window, residency) -> Plan:
        self.calls.append(f"plan {window.tokens.tolist()}, {window.drafted} drafted")
        plan, self.first_plan = self.first_plan, Plan()
        return plan

    def place(self, layer, counts, residency) -> Placement:
        self.calls.append(f"place {layer}: {counts.tolist()}")
        return self.placements.pop(0) if self.placements else Placement(layer * 4 + np.flatnonzero(counts))

    def retention(self, tier, layer) -> np.ndarray:
        return np.zeros(8)

    def observe(self, observation) -> None:
        self.calls.append(f"observe {observation.window.tokens.tolist()}, {observation.accepted} accepted")


def ids(*experts: int) -> np.ndarray:
    return np.array(experts, np.int64)


# ---- time, by hand -------------------------------------------------------------------------------------


def test_a_pass_by_hand() -> None:
    """One decoded token on host and accelerator; the link works beside both."""
    trace = decoded([[[[0, 1], [0, 1]], [[0, 1], [2, 3]]]])  # a prompt token, a decoded token
    prompt = [Placement(ids(0, 1)), Placement(ids(4, 5))]
    split = [Placement(ids(1), ids(0)), Placement(ids(7), ids(6))]
    timeline = Timeline()
    result = run(
        Scripted(SETTING.capacity, prompt + split), trace, replace(SETTING, window=0), [0], timeline.record
    )
    # 8 experts are loaded in four rounds of 2 reads: 4 s of latency, 8 s of bytes. The prompt's pass takes twice
    # 1 s of trunk and 2 experts of 1 s.
    start = 2 * (4 + 8) + 2 * (1 + 2)
    shown = [
        (e.lane, e.name, round(e.start - start, 6), round(e.duration, 6))
        for e in timeline.events
        if e.start >= start
    ]
    assert shown == [
        ("trunk", "layer 0", 0.0, 1.0),
        # The copy of 0.0 waits its latency of 1 s, while the host's expert 0.1 has the memory to itself.
        ("host experts", "0.1", 1.0, 1.0),
        ("link", "0.0", 1.0, 2.0),
        ("wait", "wait_for_experts", 2.0, 1.0),
        ("accelerator experts", "0.0", 3.0, 0.2),
        ("wait", "wait_for_accelerator", 3.0, 0.2),
        ("trunk", "layer 1", 3.2, 1.0),
        ("host experts", "1.3", 4.2, 1.0),
        ("link", "1.2", 4.2, 2.0),
        ("wait", "wait_for_experts", 5.2, 1.0),
        ("accelerator experts", "1.2", 6.2, 0.2),
        ("wait", "wait_for_accelerator", 6.2, 0.2),
    ]
    assert result.tokens == 1 and result.seconds_per_token == pytest.approx(6.4)
    seconds = {cause: round(spent, 6) for cause, spent in result.seconds.items()}
    assert seconds == {
        "trunk": 2.0,
        "host_experts": 2.0,
        "wait_for_experts": 2.0,  # for the copies, when the host is done
        "wait_for_accelerator": 0.4,
        "accelerator_experts": 0.4,
        "total": 6.4,
    }
    assert result.link_bytes == 200 and result.hit_rate == 0.0


@pytest.mark.parametrize(
    ("policy", "overhead"),
    [("moe-spac", "decide_overhead"), ("lru", "cache_overhead"), ("arc", "ask_overhead")],
)
def test_deciding_takes_its_time_while_memory_lacks_experts(policy: str, overhead: str) -> None:
    trace = random_trace(12)
    for host in (MODEL.layers * MODEL.experts, 3):
        spent = [
            simulate(trace, policy, Setting(machine, MODEL, Capacity(host), window=0)).seconds
            for machine in (HOST_ONLY, replace(HOST_ONLY, **{overhead: 0.5}))
        ]
        passes = 12 - 6  # half of a short text is its prompt
        expected = 0 if host > 3 else passes * MODEL.layers * 0.5
        assert spent[1].get("decide", 0) == pytest.approx(expected)
        assert spent[1]["total"] >= spent[0]["total"] + expected / 2  # reads go on meanwhile


def test_reads_and_the_hosts_experts_slow_each_other_down() -> None:
    """Experts 0 and 1 are there, 2 is read: 2 s of latency and 2 s of bytes, beside 2 s of experts at half speed.
    Those take 4 s, in which the disk, at a quarter of its speed, comes to 1 s of 4; the last expert is alone."""
    hardware = replace(HOST_ONLY, storage_slowdown=0.75, expert_slowdown=0.5)
    model = replace(MODEL, layers=1, top_k=3)
    trace = decoded([[[[0, 1, 0]], [[0, 1, 2]]]])
    timeline = Timeline()
    setting = Setting(hardware, model, Capacity(4), window=0, warm=False)
    policy = Scripted(setting.capacity, [Placement(ids(0, 1)), Placement(ids(0, 1, 2))])
    seconds = run(policy, trace, setting, [0], timeline.record).seconds
    assert seconds["host_experts"] == pytest.approx(4.0 + 1.0)
    assert seconds["wait_for_experts"] == pytest.approx(3.0)
    read = [event for event in timeline.events if event.name == "0.2" and event.lane.startswith("storage")]
    assert read[0].duration == pytest.approx(7.0)


def test_a_copy_and_the_host_share_memory() -> None:
    """Two experts on the host beside a copy: the second one meets the copy's bytes."""
    trace = decoded([[[[0, 1], [0, 1]], [[0, 1], [0, 1]]]])
    prompt = [Placement(ids(0, 1)), Placement(ids(4, 5))]
    placements = [*prompt, Placement(ids(0, 1), prefetch=Plan(accelerator=ids(7))), Placement(ids(4, 5))]
    timeline = Timeline()
    setting = replace(SETTING, window=0)
    run(Scripted(setting.capacity, placements), trace, setting, [0], timeline.record)
    (copy,) = [event for event in timeline.events if event.lane == "link"]
    host = {e.name: e for e in timeline.events if e.lane == "host experts" and e.start >= copy.start}
    assert host["0.0 0.1"].duration == pytest.approx(
        3.0
    )  # one while the copy waits its latency, one at half speed
    assert copy.duration == pytest.approx(1.0 + 2.0)


def _two_misses_a_layer(
    hardware: HardwareProfile, capacity: Capacity
) -> tuple[SimResult, list[tuple], CostModel]:
    trace = decoded([[[[0, 1], [0, 1]], [[2, 3], [2, 3]]]])
    setting = Setting(hardware, MODEL, capacity, window=0, warm=False)
    timeline = Timeline()
    policy = Scripted(setting.capacity, [])
    result = run(policy, trace, setting, [0], timeline.record)
    reads = [
        (e.name, round(e.start, 6), round(e.duration, 6))
        for e in timeline.events
        if e.lane.startswith("storage")
    ]
    return result, reads, policy.costs


def test_with_an_accelerator_reads_share_the_storage_and_wait_together() -> None:
    result, reads, costs = _two_misses_a_layer(MACHINE, Capacity(8, 1))
    # The trunk takes 1 s a layer there. Two reads wait 2 s, then move 2 s of bytes each at half speed.
    assert reads[:2] == [("0.0", 1.0, 6.0), ("0.1", 1.0, 6.0)]
    assert costs.storage == pytest.approx(3.0)  # of 6 s, where two shared it
    # Both decoded layers: 1 s of trunk, 6 s of reading, 2 experts.
    assert result.seconds_per_token == pytest.approx(18.0)
    assert result.seconds["wait_for_experts"] == pytest.approx(12.0)
    assert result.seconds["host_experts"] == pytest.approx(4.0)
    assert result.storage_bytes == 400 and result.hit_rate == 0.0


def test_without_one_a_read_has_the_storage_until_it_is_complete() -> None:
    result, reads, costs = _two_misses_a_layer(HOST_ONLY, Capacity(8))
    # The trunk takes 10 s a layer here. Two reads wait 2 s, then each moves 2 s of bytes.
    assert reads[:2] == [("0.0", 10.0, 4.0), ("0.1", 10.0, 6.0)]
    assert costs.storage == pytest.approx(2.0)  # of the second, since the first was complete
    # Both decoded layers: 10 s of trunk, 4 s until the first expert is there; 1 s of it hides in the second's read.
    assert result.seconds_per_token == pytest.approx(2 * (10 + 4 + 1 + 1 + 1))
    assert result.seconds["wait_for_experts"] == pytest.approx(2 * (4 + 1))
    assert result.seconds["host_experts"] == pytest.approx(4.0)
    assert result.seconds["trunk"] == pytest.approx(20.0)
    assert result.storage_bytes == 400 and result.hit_rate == 0.0


def test_drafting_takes_its_time_and_transfers_go_on() -> None:
    trace = decoded([[[[0, 1], [0, 1]]] * 6])
    setting = replace(SETTING, acceptance=1.0, window=2, governed=frozenset())
    timeline = Timeline()
    policy = Scripted(setting.capacity, [])
    result = run(policy, trace, setting, [0], timeline.record)
    drafts = [e for e in timeline.events if e.name == "draft"]
    assert [e.duration for e in drafts] == [3.0] * result.drafted
    # 5 decoded tokens: a window of 3, then 2 tokens are left, of which one can be drafted.
    assert (result.tokens, result.passes, result.drafted, result.accepted) == (5, 2, 3, 3)
    assert result.seconds["draft"] == pytest.approx(9.0)
    # Two experts a layer on the host whatever the window; 2 s of trunk a pass.
    assert result.seconds_per_token == pytest.approx((9 + 2 * (2 + 4)) / 5)


def test_a_lookup_draft_is_free() -> None:
    setting = replace(SETTING, acceptance=1.0, draft="lookup", governed=frozenset())
    result = run(Scripted(setting.capacity, []), decoded([[[[0, 1], [0, 1]]] * 6]), setting, [0])
    assert result.drafted == 3 and result.seconds.get("draft", 0) == 0


# ---- the order of calls ----------------------------------------------------------------------------------


def test_the_policy_is_called_as_the_engine_calls_it() -> None:
    trace = decoded([[[[0, 1], [2, 3]]] * 3])
    setting = replace(SETTING, acceptance=1.0, window=1, warm=False, governed=frozenset())
    policy = Scripted(setting.capacity, [])
    run(policy, trace, setting, [0])
    assert policy.calls == [
        "place 0: [1, 1, 0, 0]",
        "place 1: [0, 0, 1, 1]",
        "observe [0], 0 accepted",
        "plan [1], 0 drafted",
        "plan [1, 2], 1 drafted",
        "place 0: [2, 2, 0, 0]",
        "place 1: [0, 0, 2, 2]",
        "observe [1, 2], 1 accepted",
    ]


class Sensing(Scripted):
    """Asks for every sensor that the simulator can serve."""

    name = "sensing"
    sensors = frozenset({Sensor.NEXT_GATE, Sensor.DRAFT_ROUTING})

    def foresee_layer(self, layer, counts) -> None:
        self.calls.append(f"layer {layer} will see {counts.tolist()}")

    def foresee_window(self, counts) -> None:
        self.calls.append(f"the draft suggests {counts.tolist()}")


def test_sensors_are_served_in_time() -> None:
    trace = decoded([[[[0, 1], [2, 3]]] * 4])
    sure = SimulationConfig(next_gate_accuracy=1.0, draft_routing_accuracy=1.0)
    setting = replace(SETTING, acceptance=1.0, assumed=sure, warm=False, governed=frozenset())
    policy = Sensing(setting.capacity, [])
    run(policy, trace, setting, [0])
    drafting = policy.calls.index("plan [1], 0 drafted") + 1
    assert policy.calls[drafting : drafting + 7] == [
        "the draft suggests [[1, 1, 0, 0], [0, 0, 1, 1]]",  # from the token before the draft
        "plan [1, 2], 1 drafted",
        "the draft suggests [[2, 2, 0, 0], [0, 0, 2, 2]]",
        "plan [1, 2, 3], 2 drafted",
        "layer 1 will see [0, 0, 3, 3]",
        "place 0: [3, 3, 0, 0]",
        "place 1: [0, 0, 3, 3]",
    ]
    policy = Sensing(setting.capacity, [])
    run(policy, trace, replace(setting, draft="lookup"), [0])
    assert not [call for call in policy.calls if "suggests" in call]  # no drafter, no hidden states


class Clairvoyant(Scripted):
    """Keeps what it is told and what comes."""

    name = "clairvoyant"
    sensors = frozenset({Sensor.FUTURE})

    def reveal(self, passes) -> None:
        self.told = list(passes)
        self.seen: list[np.ndarray] = []

    def observe(self, observation) -> None:
        self.seen.append(observation.routing)


@pytest.mark.parametrize("window", [0, 3])
def test_the_future_is_what_comes(window: int) -> None:
    policy = Clairvoyant(SETTING.capacity, [])
    run(policy, random_trace(50, sequences=2), replace(SETTING, window=window), [1, 0])
    assert len(policy.told) == len(policy.seen) > 15
    for told, seen in zip(policy.told, policy.seen, strict=True):
        np.testing.assert_array_equal(told, seen)


def test_transfers_end_before_the_next_text_begins() -> None:
    text = [[[0, 1], [0, 1]]] * 2
    last = Placement(ids(4, 5), prefetch=Plan(accelerator=ids(0, 1)))
    placements = [Placement(ids(0, 1)), Placement(ids(4, 5)), Placement(ids(0, 1)), last]
    timeline = Timeline()
    setting = replace(SETTING, window=0)
    run(Scripted(setting.capacity, placements), decoded([text, text]), setting, [0, 1], timeline.record)
    copies = [event.start + event.duration for event in timeline.events if event.lane == "link"]
    assert len(copies) == 2
    begins = [event.start for event in timeline.events if event.name == "layer 0"]
    assert begins[2] == pytest.approx(max(copies))  # the second text's prompt; each text has two passes


def test_a_guess_is_as_accurate_as_stated() -> None:
    rng = np.random.default_rng(0)
    routing = rng.random((3, 2000, 16)).argsort(axis=-1)[..., :1]
    routing[0, 0] = -1
    np.testing.assert_array_equal(
        guess(routing, 16, 1.0, rng)[1], np.bincount(routing[1].ravel(), minlength=16)
    )
    same = np.zeros((1, 5000, 1), np.int64)
    counts = guess(same, 16, 0.9, rng)[0]
    assert counts.sum() == 5000 and counts[0] / 5000 == pytest.approx(0.9, abs=0.02)
    assert guess(routing, 16, 0.5, rng)[0].sum() == 1999  # what is not routed is not guessed


# ---- what is played ---------------------------------------------------------------------------------------


def test_acceptance_is_drawn_at_the_stated_rate() -> None:
    trace = random_trace(2000)
    text = DrawnText(trace, 0, None, 0.8, 32, np.random.default_rng(0))
    assert text.upcoming().prefill and len(text.read(4).window.tokens) == 32
    drafted = accepted = decoded_tokens = 0
    whole = trace.decode_tokens(0)
    while text.upcoming() is not None:
        at = 32 + decoded_tokens
        seen = text.read(1)
        kept = 1 + seen.accepted
        np.testing.assert_array_equal(seen.window.tokens[:kept], whole.tokens[at : at + kept])
        np.testing.assert_array_equal(seen.routing[:, :kept].swapaxes(0, 1), whole.routing[at : at + kept])
        drafted, accepted = drafted + seen.window.drafted, accepted + seen.accepted
        decoded_tokens += kept
    assert decoded_tokens == 2000 - 32
    assert accepted / drafted == pytest.approx(0.8, abs=0.03)


def test_a_rejected_draft_is_another_token_of_the_text() -> None:
    trace = random_trace(200)
    text = DrawnText(trace, 0, None, 0.0, 32, np.random.default_rng(0))
    whole, others = trace.decode_tokens(0), 0
    text.read(0)
    for at in range(32, 150):
        seen = text.read(3)
        assert seen.accepted == 0 and seen.window.drafted == 3
        for token, routing in zip(seen.window.tokens[1:], seen.routing.swapaxes(0, 1)[1:], strict=True):
            np.testing.assert_array_equal(whole.routing[token], routing)  # ids are positions here
        others += int((seen.window.tokens[1:] != np.arange(at + 1, at + 4)).any())
    assert others > 110


def test_all_policies_read_the_same_text() -> None:
    """Where a window begins and how long it is does not change which drafts are right."""
    trace = random_trace(300)

    def kept(k: int) -> list[int]:
        text, tokens = DrawnText(trace, 0, None, 0.6, 32, np.random.default_rng(5)), []
        while text.upcoming() is not None:
            seen = text.read(k)
            tokens += seen.window.tokens[
                : len(seen.window.tokens) - seen.window.drafted + seen.accepted
            ].tolist()
        return tokens

    assert kept(0) == kept(1) == kept(5) == list(range(300))


def test_a_look_back_tells_which_drafts_were_right() -> None:
    trace = random_trace(300)
    drafting = DrawnText(trace, 0, None, 0.6, 32, np.random.default_rng(5))
    plain = DrawnText(trace, 0, None, 0.6, 32, np.random.default_rng(5))
    drafting.read(0), plain.read(0)
    for _ in range(60):
        right = drafting.read(1).accepted
        plain.read(0)
        assert plain.look_back(1) == [float(right)]
        if right:
            plain.read(0)  # the bonus has no draft
    assert len(plain.look_back(8)) == 8 and plain.look_back(8)[-1:] == plain.look_back(1)


def test_what_looking_back_takes_is_simulated() -> None:
    """On a machine on which drafts could pay, and never are right: a pass of the drafter every few passes."""
    trace = random_trace(300)
    setting = replace(SETTING, acceptance=0.0, window=4, draft_seconds=1e-6)
    quick = simulate(trace, "moe-spac", setting)
    again = simulate(trace, "moe-spac", setting)
    slow = simulate(trace, "moe-spac", replace(setting, draft_seconds=1e-3))
    assert quick == again
    looked_back = slow.seconds["draft"] - 1e-3 * slow.drafted
    plain = slow.tokens - slow.drafted
    assert looked_back == pytest.approx(1e-3 * plain / EngineConfig().governor.look_back_passes, rel=0.25)


def test_recorded_windows_are_replayed() -> None:
    recorder = TraceRecorder(MODEL.to_model_shape(), "a test")
    recorder.begin_sequence()
    rng = np.random.default_rng(0)
    for tokens, drafted, accepted, prefill in (
        (5, 0, 0, True),
        (1, 0, 0, False),
        (4, 3, 1, False),
        (3, 2, 2, False),
    ):
        routing = rng.random((2, tokens, 4)).argsort(axis=-1)[..., :2]
        recorder(Observation(Window(np.arange(tokens), drafted, prefill), routing, accepted))
    trace = recorder.trace()
    text = RecordedText(trace, 0, None)
    for seen in trace.passes(0):
        np.testing.assert_array_equal(
            text.upcoming().tokens, seen.window.tokens[: len(seen.window.tokens) - seen.window.drafted]
        )
        assert text.room() == seen.window.drafted
        played = text.read(99)
        np.testing.assert_array_equal(played.routing, seen.routing)
        assert played.accepted == seen.accepted
    assert text.upcoming() is None
    result = simulate(trace, "llama.cpp+sd", SETTING)
    assert (result.passes, result.drafted, result.accepted, result.tokens) == (3, 5, 3, 6)
    plain = simulate(trace, "llama.cpp", SETTING)  # does not speculate: the kept tokens one by one
    assert (plain.passes, plain.tokens) == (6, 6)
    assert simulate(trace, "llama.cpp+sd", replace(SETTING, tokens=2)).passes == 2


# ---- any result -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", SIMULATOR_POLICIES)
@pytest.mark.parametrize("capacity", [Capacity(8, 3), Capacity(5, 3), Capacity(4)])
def test_every_policy_runs_and_adds_up(policy: str, capacity: Capacity) -> None:
    trace = random_trace(60, sequences=2)
    hardware = MACHINE if capacity.accelerator else HOST_ONLY
    timeline = Timeline()
    setting = Setting(hardware, MODEL, capacity, window=2)
    result = simulate(trace, policy, setting, record=timeline.record)
    assert result.tokens == 2 * (60 - 30) and result.passes <= result.tokens
    assert result.tokens_per_second == pytest.approx(1 / result.seconds_per_token)
    causes = {
        cause: s for cause, s in result.seconds.items() if cause not in ("total", "accelerator_experts")
    }
    assert sum(causes.values()) == pytest.approx(result.seconds["total"])
    assert result.tokens_per_second * result.seconds["total"] == pytest.approx(result.tokens)
    for name, nbytes in (("link", result.link_bytes), ("storage", result.storage_bytes)):
        moved = sum(event.lane.split()[0] == name for event in timeline.events)
        assert nbytes % MODEL.expert_bytes == 0 and nbytes <= moved * MODEL.expert_bytes
    assert 0 <= result.hit_rate <= 1 and 0 <= result.token_hit_rate <= 1
    _assert_lanes_never_overlap(timeline)
    again = simulate(trace, policy, setting)
    assert again == result


def _assert_lanes_never_overlap(timeline: Timeline) -> None:
    ends: dict[str, float] = {}
    for event in sorted(timeline.events, key=lambda event: event.start):
        assert event.start >= ends.get(event.lane, 0.0) - 1e-9, event
        ends[event.lane] = event.start + event.duration


def test_every_byte_over_the_link_is_a_transfer() -> None:
    """Cold, without a prompt to leave out: bytes are transfers times the record."""
    timeline = Timeline()
    trace = random_trace(40)
    setting = replace(SETTING, warm=False, window=0, assumed=SimulationConfig(prompt_tokens=0))
    result = simulate(trace, "lru", setting, record=timeline.record)
    for lane, nbytes in (("link", result.link_bytes), ("storage", result.storage_bytes)):
        transfers = sum(event.lane.split()[0] == lane for event in timeline.events)
        assert nbytes == transfers * MODEL.expert_bytes > 0


def test_another_seed_is_another_draw() -> None:
    trace = random_trace(200)
    results = [simulate(trace, "llama.cpp+sd", replace(SETTING, seed=seed)) for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("policy", ["lru", "llama.cpp+sd", "moe-infinity", "mixtral-offloading"])
def test_faster_hardware_is_never_slower(policy: str) -> None:
    """Of policies that do not ask what things cost: others may decide otherwise, and not for the better."""
    trace = random_trace(80)
    faster = {
        "host_bandwidth": 400.0,
        "storage_bandwidth": 500.0,
        "accelerator_bandwidth": 1e5,
    }
    capacity = Capacity(6, 3)
    before = simulate(trace, policy, Setting(MACHINE, MODEL, capacity, window=2, governed=frozenset()))
    for name, value in faster.items():
        machine = replace(MACHINE, **{name: value})
        after = simulate(trace, policy, Setting(machine, MODEL, capacity, window=2, governed=frozenset()))
        assert after.tokens_per_second >= before.tokens_per_second * 0.999, name
    all_of_it = replace(MACHINE, link_bandwidth=1000.0, link_latency=0.0, **faster)
    after = simulate(trace, policy, Setting(all_of_it, MODEL, capacity, window=2, governed=frozenset()))
    assert after.tokens_per_second > before.tokens_per_second * 1.5


def test_belady_hits_at_least_as_often_as_lru() -> None:
    for seed in range(3):
        trace = random_trace(120, seed=seed)
        setting = replace(SETTING, window=0, capacity=Capacity(8, 3))
        bound, lru = (simulate(trace, policy, setting) for policy in ("belady", "lru"))
        assert bound.hit_rate >= lru.hit_rate and bound.hit_rate > 0.3


def test_belady_drafts_as_much_as_is_fastest() -> None:
    trace = random_trace(100)
    sure = simulate(trace, "belady", replace(SETTING, acceptance=1.0, draft="lookup", window=3))
    hopeless = simulate(trace, "belady", replace(SETTING, acceptance=0.0, window=3))
    assert sure.mean_accepted > 3 and hopeless.drafted == 0


def test_a_governor_stops_drafting_what_is_never_accepted() -> None:
    trace = random_trace(300)
    setting = replace(SETTING, acceptance=0.0, window=4)
    governed = simulate(trace, "moe-spac", setting)
    fixed = simulate(trace, "moe-spac", replace(setting, governed=frozenset()))
    assert governed.drafted < fixed.drafted / 4
    assert governed.tokens_per_second > fixed.tokens_per_second


def test_a_machine_that_was_just_set_up_holds_what_fits() -> None:
    trace = random_trace(60)
    warm = simulate(trace, "llama.cpp", replace(SETTING, window=0))
    assert warm.storage_bytes == 0 and warm.hit_rate == pytest.approx(0.5)  # one of two layers
    setting = replace(SETTING, window=0, warm=False, tokens=1, assumed=SimulationConfig(prompt_tokens=0))
    cold = simulate(trace, "llama.cpp", setting)
    assert cold.storage_bytes > 0 and cold.hit_rate == 0


def test_processes_change_nothing() -> None:
    trace = random_trace(60)
    tasks = [Task(name, SETTING, (0,)) for name in ("lru", "moe-spac", "llama.cpp")]
    seen: list[tuple[int, int]] = []
    alone = simulate_all(trace, tasks, 1, lambda done, total: seen.append((done, total)))
    together = simulate_all(trace, tasks, 2, lambda done, total: None)
    assert alone == together and seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [result.policy for result in alone] == ["lru", "moe-spac", "llama.cpp"]


# ---- what cannot be -----------------------------------------------------------------------------------------


def test_what_cannot_be_simulated_is_refused() -> None:
    trace = random_trace(10)
    with pytest.raises(ConfigError, match="2 layers of 4 experts, top 2, but tiny 3 of 4, top 2"):
        simulate(trace, "lru", replace(SETTING, model=replace(MODEL, layers=3)))
    with pytest.raises(ConfigError, match="no policy"):
        simulate(trace, "nonsense", SETTING)
    with pytest.raises(ConfigError, match="decodes nothing"):
        simulate(trace, "lru", SETTING, sequences=[])
    with pytest.raises(ConfigError, match="no accelerator"):
        replace(SETTING, hardware=HOST_ONLY)
    with pytest.raises(ConfigError, match="no draft model"):
        replace(SETTING, model=replace(MODEL, drafter_bytes=0))
    with pytest.raises(ConfigError, match="acceptance"):
        replace(SETTING, acceptance=1.1)
