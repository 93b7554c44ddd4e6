"""The lmms-eval plug-in: ``--model mmfix --model_args pretrained=…,method=…``.

The entry point is :func:`mmfix_evals.plugins.lmms_eval.manifest.manifests`; nothing imports lmms-eval, torch or the
rest of mmfix before lmms-eval asks for the model.
"""
