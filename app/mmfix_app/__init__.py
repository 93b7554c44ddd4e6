"""The Gradio demo of mmfix: a baseline and a mitigated answer side by side, and where the model looked.

``mmfix-app`` (or ``python -m mmfix_app``) opens it on 127.0.0.1 with the bundled model.
"""
