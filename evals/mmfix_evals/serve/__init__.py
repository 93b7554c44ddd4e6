"""An OpenAI-compatible server for one model with methods against hallucination: ``mmfix serve``."""
