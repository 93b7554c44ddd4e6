"""Metrics: pure functions of (questions or ground truth, responses, options). No model, no network, no torch."""
