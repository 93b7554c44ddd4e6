"""``mmfix serve``: an OpenAI-compatible server, so that any client can use a model with a method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmfix_evals.cli.options import Device, Dtype, Model, Revision

EXAMPLE = "Example: mmfix serve --model tiny --method vhr --allow greedy,var"


def serve_command(
    model: Model = "tiny",
    method: Annotated[
        str, typer.Option(help="The server's method: greedy, a name, name:field=value,…, several joined by +.")
    ] = "greedy",
    allow: Annotated[
        str | None,
        typer.Option(
            help="Further methods that a request may choose, separated by commas; name:* allows any parameters."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Name of the model for clients; default: the model's own.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of one answer, and the default.")] = 512,
    max_images: Annotated[int, typer.Option(help="Most images of one request.")] = 4,
    max_image_mb: Annotated[float, typer.Option(help="Most megabytes of one image file.")] = 10.0,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; further ones are refused (429).")] = 16,
    allow_remote_images: Annotated[
        bool, typer.Option("--allow-remote-images", help="Fetch http(s) images from public addresses.")
    ] = False,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the token that requests must carry.")
    ] = None,
    allow_anyone: Annotated[bool, typer.Option("--allow-anyone", help="Listen on a network without a token.")] = False,
    grace: Annotated[float, typer.Option(help="Seconds for requests under way when the server is stopped.")] = 30.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Log errors only.")] = False,
) -> None:
    """Serve a model with a method to any OpenAI client: chat completions with images, streamed or not.

    One answer is generated at a time. Ctrl-C lets the requests under way end, then stops.
    """
    _require()
    from mmfix_evals.arms import split_methods
    from mmfix_evals.serve.catalogue import Catalogue
    from mmfix_evals.serve.settings import Settings, check_exposure, check_port, is_loopback, read_api_key

    key = read_api_key(api_key_env)
    check_port(port)
    check_exposure(host, key, allow_anyone)
    settings = Settings(
        name=name or _served_name(model),
        max_tokens=max_tokens,
        max_images=max_images,
        max_image_mb=max_image_mb,
        max_queue=max_queue,
        allow_remote_images=allow_remote_images,
        api_key=key,
        local=is_loopback(host),
    )
    allowed = split_methods(allow) if allow else []
    Catalogue(settings.name, method, allowed)  # before minutes of loading
    from mmfix_decoding import Decoder
    from mmfix_evals.cli.quiet import hush
    from mmfix_evals.serve.server import bind, run
    from mmfix_evals.serve.service import Service

    hush(quiet)
    with bind(host, port) as sock:
        decoder = Decoder.from_pretrained(model, device=device, dtype=dtype, revision=revision)
        catalogue = Catalogue(settings.name, method, allowed, decoder.model)
        run(Service(decoder, catalogue, settings), sock, grace, quiet)


def _served_name(model: str) -> str:
    """A hub id or bundled name as it is; of a folder its last part, so that clients see no path."""
    folder = Path(model).expanduser()
    from mmfix_decoding import bundled

    return folder.resolve().name if model not in bundled() and folder.is_dir() else model


def _require() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        from mmfix_evals.errors import MissingDependency

        raise MissingDependency(f"mmfix serve needs {error.name}: pip install 'mmfix[serve]'") from error
