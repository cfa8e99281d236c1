"""Hardware, models and routing that we do not own, and the clock that runs them. No torch."""
