"""The target's KV cache, of whatever kind the model keeps, and whether rejected tokens can be taken out again."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, PreTrainedModel


class KvCache:
    """Keys and values of one sequence. ``rewinds`` once it can forget tokens, which is known after the prefill."""

    survives = False  # some layers have grown then and others not; recurrent ones cannot go back

    def __init__(self, model: PreTrainedModel) -> None:
        self.rewinds = False
        self._recording = False
        # A few models (minimax) insist on a cache class of their own and make it when they are given none.
        network: Any = model
        own = not network._supports_default_dynamic_cache()
        self._cache: Any = None if own else DynamicCache(config=model.config.get_text_config(decoder=True))

    @property
    def past_key_values(self) -> Any:
        """What the model's forward takes."""
        return self._cache

    def update(self, past_key_values: Any) -> None:
        """What the model's forward gave back."""
        self._cache = past_key_values

    def allow_rewind(self) -> None:
        """From now on remember enough to forget: layers with a sliding window keep what has just left it.

        After the prefill, whose end no layer with a short memory would otherwise see. Recurrent layers cannot.
        """
        if not self._recording and getattr(self._cache, "is_croppable", False):
            self._cache.activate_past_recording()
            self._recording = self.rewinds = True

    def rewind(self, tokens: int) -> None:
        """Forget the last ``tokens``; 0 too, as layers with a sliding window then drop what they kept for it."""
        if self._recording:
            self._cache.crop(-tokens)


class FullCache:
    """Keys and values of all tokens in every layer, so that any number can be forgotten.

    A sliding layer that dropped old keys could not; so its window is left to the attention mask.
    """

    rewinds = True
    survives = False  # some layers have grown then and others not

    def __init__(self) -> None:
        self.past_key_values: Any = DynamicCache()

    def update(self, past_key_values: Any) -> None:
        """What the model's forward gave back."""
        self.past_key_values = past_key_values

    def allow_rewind(self) -> None:
        """It always can."""

    def rewind(self, tokens: int) -> None:
        """Forget the last ``tokens``."""
        if tokens:
            self.past_key_values.crop(-tokens)
