"""The engine: load a model, draft, verify, accept, observe, plan."""
