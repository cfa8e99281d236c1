from __future__ import annotations

import pytest

from moespac.config import PolicyConfig
from moespac.errors import ConfigError
from moespac.policy.base import Sensor
from moespac.policy.registry import ENGINE_POLICIES, SIMULATOR_POLICIES, make_policy
from moespac.types import Capacity
from tests.policy.small import SHAPE, make

SPECULATIVE = {"moe-spac", "llama.cpp+sd", "sp-moe", "specter", "lru", "lfu", "arc", "belady"}
SENSORS = {
    "mixtral-offloading": Sensor.NEXT_GATE,
    "fate": Sensor.NEXT_GATE,
    "sp-moe": Sensor.DRAFT_ROUTING,
    "specter": Sensor.DRAFT_ROUTING,
    "belady": Sensor.FUTURE,
}


@pytest.mark.parametrize("name", SIMULATOR_POLICIES)
def test_each_policy_is_what_its_system_is(name: str) -> None:
    policy = make(name, Capacity(4))
    assert policy.name == name
    assert policy.speculates == (name in SPECULATIVE)
    assert policy.sensors == ({SENSORS[name]} if name in SENSORS else set())


def test_only_the_simulator_knows_the_future() -> None:
    assert set(SIMULATOR_POLICIES) - set(ENGINE_POLICIES) == {"belady"}
    with pytest.raises(ConfigError, match=r"'belady' needs the future: only `moespac simulate`"):
        make_policy("belady", SHAPE, Capacity(4), PolicyConfig())


@pytest.mark.parametrize("simulated", [True, False])
def test_an_unknown_policy_is_a_config_error_that_names_the_known(simulated: bool) -> None:
    with pytest.raises(ConfigError, match="accelerate, arc") as error:
        make_policy("magic", SHAPE, Capacity(4), PolicyConfig(), simulated)
    assert ("belady" in str(error.value)) == simulated
