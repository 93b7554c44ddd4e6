"""The inspect_ai plug-in: ``inspect eval … --model mmfix/tiny -M method=vhr``.

The entry point is :mod:`mmfix_evals.plugins.inspect_ai.registry`, which inspect_ai imports; torch and the model library
are imported with the first model.
"""
