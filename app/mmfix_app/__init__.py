"""The Gradio demo of mmfix. The application itself is not part of this version; the package reserves the name."""
