"""Evaluation of mmfix methods: the `mmfix` command, tasks, metrics, runs, statistics and TinyWorld."""
