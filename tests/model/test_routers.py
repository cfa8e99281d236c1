"""Every promised family's router is found and says where it would send hidden states."""

from __future__ import annotations

import pytest
import torch

from moespac.model.routers import ask_router, find_routers
from moespac.model.skeleton import _is_experts
from tests.families import FAMILIES, build_model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_answers_as_it_routes(family: str) -> None:
    model = build_model(family)
    experts = [module for module in model.modules() if _is_experts(module)]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for module in experts:
        module.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0], inputs[1])))
    with torch.inference_mode():
        model(torch.tensor([[5, 17, 3, 60]]))
        routers = find_routers(model, experts)
        assert len(routers) == len(experts) == len(seen)
        for router, (x, chosen) in zip(routers, seen, strict=True):
            answer = ask_router(router, x)
            assert torch.equal(answer.sort(dim=-1).values, chosen.sort(dim=-1).values)
