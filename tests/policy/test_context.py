from __future__ import annotations

import numpy as np

from moespac.config import ContextConfig
from moespac.policy.context import Context
from moespac.types import ModelShape

SHAPE = ModelShape(layers=2, experts=4, top_k=1, record_bytes=1)
EVEN = np.full(SHAPE.total, 0.25, np.float32)


def _texts(windows: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Two kinds of text: (windows, experts) what was routed lately, and the (true) rates that follow."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 2, windows)[:, None]
    lately = np.where(kind, [0.7, 0.1, 0.1, 0.1] * 2, [0.1, 0.1, 0.1, 0.7] * 2)
    true = np.where(kind, [0.1, 0.6, 0.2, 0.1] * 2, [0.1, 0.2, 0.6, 0.1] * 2)
    return (lately * rng.uniform(0.8, 1.2, lately.shape)).astype(np.float32), true.astype(np.float32)


def test_nothing_is_corrected_before_anything_was_learned() -> None:
    context = Context(SHAPE, views=2, config=ContextConfig())
    np.testing.assert_array_equal(context.correct(EVEN, context.features(EVEN, EVEN)), EVEN)


def test_experts_are_foreseen_from_what_others_did() -> None:
    context = Context(SHAPE, views=1, config=ContextConfig(block=8, ridge=0.1))
    for lately, true in zip(*_texts(80), strict=True):
        context.learn(context.features(lately), lately, true, tokens=5)
    for lately, true in zip(*_texts(10, seed=4), strict=True):
        assert abs(lately - true).max() > 0.3
        assert abs(context.correct(lately, context.features(lately)) - true).max() < 0.1


def test_learning_in_blocks_in_a_basis_that_turns_is_ridge_regression() -> None:
    """With as many directions as experts the basis loses nothing, and ridge regression knows no basis."""
    config = ContextConfig(directions=SHAPE.total, block=16, ridge=0.5, floor=0.01)
    context, rng = Context(SHAPE, views=2, config=config), np.random.default_rng(2)
    features, missed = [], []
    for window in range(64):
        one, two, true = rng.uniform(0.05, 1, (3, SHAPE.total)).astype(np.float32)
        context.learn(context.features(one, two), one, true, tokens=3)
        roots = np.sqrt(np.concatenate([one, two])) / np.sqrt(2)
        features.append(np.append(roots if window >= 16 else 0 * roots, 1))  # no basis in the first block
        missed.append((true - one) / np.sqrt(one + 0.01))
    x, y = np.array(features), np.array(missed)
    weights = np.linalg.solve(3 * x.T @ x + 0.5 * np.eye(x.shape[1]), 3 * x.T @ y)
    one, two = rng.uniform(0.05, 1, (2, SHAPE.total)).astype(np.float32)
    roots = np.append(np.sqrt(np.concatenate([one, two])) / np.sqrt(2), 1)
    direct = np.maximum(one + np.sqrt(one + 0.01) * (roots @ weights), one / 10)
    np.testing.assert_allclose(context.correct(one, context.features(one, two)), direct, rtol=2e-3)


def test_the_basis_is_orthonormal_and_holds_what_varies() -> None:
    context = Context(SHAPE, views=1, config=ContextConfig(directions=3, block=8))
    for lately, true in zip(*_texts(80), strict=True):
        context.learn(context.features(lately), lately, true, tokens=5)
    basis = context.state()["basis"]
    np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=1e-4)
    roots = np.sqrt(_texts(20, seed=5)[0])
    left = roots - roots @ basis.T @ basis
    assert np.linalg.norm(left) < 0.1 * np.linalg.norm(roots)


def test_fewer_directions_than_asked_for_are_no_trouble() -> None:
    context = Context(SHAPE, views=1, config=ContextConfig(directions=100, block=4))
    for _ in range(12):
        context.learn(context.features(EVEN), EVEN, EVEN, tokens=1)
    corrected = context.correct(EVEN, context.features(EVEN))
    np.testing.assert_allclose(corrected, EVEN, atol=1e-6)


def test_no_expert_is_given_up() -> None:
    context = Context(SHAPE, views=1, config=ContextConfig(block=4, ridge=1e-3))
    never = np.zeros_like(EVEN)
    for _ in range(40):
        context.learn(context.features(EVEN), EVEN, never, tokens=5)
    np.testing.assert_allclose(context.correct(EVEN, context.features(EVEN)), EVEN / 10)


def test_a_state_is_taken_over() -> None:
    taught, fresh = (Context(SHAPE, views=1, config=ContextConfig(block=8)) for _ in range(2))
    for lately, true in zip(*_texts(16), strict=True):
        taught.learn(taught.features(lately), EVEN, true, tokens=5)
    fresh.restore(taught.state())
    lately = _texts(1, seed=6)[0][0]
    expected = taught.correct(EVEN, taught.features(lately))
    np.testing.assert_array_equal(fresh.correct(EVEN, fresh.features(lately)), expected)
    assert abs(expected - EVEN).max() > 0.05
