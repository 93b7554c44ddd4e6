"""The running app through its programming interface: endpoints, caps, files, MCP."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import gradio.route_utils
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from mmfix_app import cli, gallery, ui
from mmfix_app.limits import Limits
from mmfix_app.service import Decoding, Service

pytestmark = pytest.mark.xdist_group("app")
SCENE = gallery.pictures()[3]
PROMPT = "Please describe this image in detail."


@pytest.fixture(scope="module")
def client(served: tuple[Any, str]) -> Client:
    return Client(served[1], verbose=False)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    SCENE.image.save(path)
    return str(path)


def test_a_client_drives_the_comparison(client: Client, service: Service, picture: str) -> None:
    job = client.submit(
        handle_file(picture), PROMPT, "vhr", {"alpha": 3.0}, {"max_new_tokens": 16}, api_name="/compare"
    )
    found = job.result(timeout=120)
    run = list(service.run(service.request(SCENE.image, PROMPT, "vhr", {"alpha": 3.0}, Decoding(16))))[-1]
    for side in ("plain", "method"):
        assert found["answers"][side]["text"] == run.text(side)
    assert found["contents"] == list(SCENE.contents)
    assert found["one_batch"] is True
    assert found["method"]["params"]["alpha"] == 3.0
    grown = [len(one["answers"]["plain"]["tokens"]) for one in job.outputs()]
    assert grown == sorted(grown)
    assert len(grown) > 1


@pytest.mark.parametrize(
    ("prompt", "method", "params", "decoding", "said"),
    [
        ("", "vhr", None, None, "prompt is empty"),
        (PROMPT, "nonesuch", None, None, "not one of"),
        (PROMPT, "vhr", {"alpha": 99}, None, "from 0 to 10"),
        (PROMPT, "vhr", None, {"max_new_tokens": 100_000}, "from 1 to 128"),
        (PROMPT, "vhr", None, {"num_beams": 99}, "num_beams"),
    ],
)
def test_a_client_is_told_what_is_wrong(
    client: Client, picture: str, prompt: str, method: str, params: Any, decoding: Any, said: str
) -> None:
    with pytest.raises(Exception, match=said):
        client.predict(handle_file(picture), prompt, method, params, decoding, api_name="/compare")


def test_describe_image_takes_bytes_and_gallery_names_but_no_address(client: Client) -> None:
    buffer = io.BytesIO()
    SCENE.image.save(buffer, "PNG")
    by_bytes = client.predict(base64.b64encode(buffer.getvalue()).decode(), PROMPT, "vhr", api_name="/describe_image")
    by_name = client.predict(SCENE.name, PROMPT, "vhr", api_name="/describe_image")
    assert by_bytes == by_name
    assert by_name["answers"]["plain"]["objects"]["contradicted"]
    for address in ("http://127.0.0.1:1/a.png", "file:///etc/passwd", "/etc/passwd"):
        with pytest.raises(Exception, match="base64"):
            client.predict(address, PROMPT, "vhr", api_name="/describe_image")


def test_only_named_endpoints_are_open(client: Client) -> None:
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/compare", "/methods", "/describe_image"}
    assert set(client.predict(api_name="/methods")) >= {"vhr", "var"}


def test_uploads_are_capped_and_files_of_the_machine_are_not_served(served: tuple[Any, str]) -> None:
    address = served[1].rstrip("/")
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head + b"0" * (11 << 20) + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(urllib.request.Request(f"{address}/gradio_api/upload", body, kind))
    for path in ("/etc/passwd", str(Path(__file__).resolve())):
        with pytest.raises(urllib.error.HTTPError, match=r"403|404"):
            urllib.request.urlopen(f"{address}/gradio_api/file={path}")


def test_the_page_asks_nobody_else(served: tuple[Any, str]) -> None:
    demo, address = served
    page = urllib.request.urlopen(address).read().decode()
    assert "fonts.googleapis" not in page
    assert "cdnjs" not in page
    assert demo.analytics_enabled is False
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    config = json.loads(urllib.request.urlopen(f"{address}config").read())
    assert config["stylesheets"] == []
    assert not config.get("is_space")


def test_files_are_private_and_removed(served: tuple[Any, str]) -> None:
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert folder.stat().st_mode & 0o077 == 0
    limits = Limits()
    assert served[0].delete_cache == (1, limits.keep_seconds)
    assert (limits.look_seconds, limits.keep_seconds) == (60, 1800)
    assert limits.keep_seconds > limits.waiting * limits.seconds  # no picture goes while its run waits in the queue
    assert {p.parent.name for p in folder.rglob("*.png")} >= {"gallery"}


class Later(datetime):
    """The time at which what is uploaded now has come of age."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return datetime.now(tz) + timedelta(seconds=Limits().keep_seconds + 1)


def test_an_uploaded_picture_is_gone_after_its_time(
    served: tuple[Any, str], client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    before = set(folder.rglob("*.png"))
    path = tmp_path / "mine.png"
    SCENE.image.save(path)
    asked = (handle_file(str(path)), PROMPT, "vhr", None, {"max_new_tokens": 1})
    assert client.predict(*asked, api_name="/compare")["answers"]
    uploaded = set(folder.rglob("*.png")) - before
    assert {found.name for found in uploaded} == {"mine.png"}
    with monkeypatch.context() as clock:
        clock.setattr(gradio.route_utils, "datetime", Later)
        assert wait(lambda: not any(found.exists() for found in uploaded))
    assert (folder / "gallery" / SCENE.name).exists()  # what the page opens with is nobody's upload
    assert client.predict(*asked, api_name="/compare")["answers"]
    assert any(found.exists() for found in uploaded)  # a young file is left alone


def test_a_chosen_picture_of_the_gallery_is_young_again(tmp_path: Path) -> None:
    """As one that was just uploaded: it must outlast the queue, however long the app has been running."""
    first = gallery.renewed(tmp_path, 1)
    os.utime(first, (0, 0))
    assert gallery.renewed(tmp_path, 1 + len(gallery.pictures())) == first
    assert time.time() - first.stat().st_mtime < 60
    first.unlink()
    assert gallery.renewed(tmp_path, 1).exists()


def wait(found: Callable[[], Any], seconds: float = 20) -> Any:
    end = time.monotonic() + seconds
    while not (value := found()) and time.monotonic() < end:
        time.sleep(0.05)
    return value


def test_an_mcp_server_offers_describe_image_alone(service: Service) -> None:
    demo = ui.build(service, "tiny", [], mcp=True)
    assert [f.api_name for f in demo.fns.values() if f.api_visibility == "public"] == ["describe_image"]


@pytest.mark.parametrize(("installed", "said"), [(None, "not installed"), ("2.0.1", "needs mcp 1, and mcp 2.0.1")])
def test_mcp_without_its_package_is_one_line(
    installed: str | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(metadata, "version", version)
    assert cli.main(["--mcp", "--model", "./nowhere"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert line.endswith("pip install 'gradio[mcp]'")


@pytest.mark.skipif(not importlib.util.find_spec("mcp"), reason="mcp not installed; see docs/demo.md")
def test_an_mcp_client_describes_a_picture(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    monkeypatch.setenv("GRADIO_TEMP_DIR", os.environ.get("GRADIO_TEMP_DIR", ""))
    demo, address = cli.launch(block=False, quiet=True, device="cpu", mcp=True)
    buffer = io.BytesIO()
    SCENE.image.save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()

    async def ask() -> tuple[Any, Any, Any, Any]:
        async with (
            streamablehttp_client(f"{address}gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = (await session.list_tools()).tools
            good = await session.call_tool("describe_image", {"image": image, "method": "vhr"})
            bad = await session.call_tool("describe_image", {"image": "http://127.0.0.1:1/a.png"})
            none = await session.call_tool("describe_image", {"image": image, "method": "nonesuch"})
            return tools, good, bad, none

    try:
        tools, good, bad, none = asyncio.run(ask())
    finally:
        demo.close(verbose=False)
    assert [tool.name for tool in tools] == ["describe_image"]
    assert tools[0].inputSchema["required"] == ["image"]
    assert "training-free method" in tools[0].description
    run = list(service.run(service.request(SCENE.image, PROMPT, "vhr", {}, Decoding())))[-1]
    assert json.loads(good.content[0].text)["answers"]["method"]["text"] == run.text("method")
    assert (bad.isError, none.isError) == (True, True)
    assert "not valid base64" in bad.content[0].text
    assert "'nonesuch' is not one of" in none.content[0].text


def test_the_defaults_of_the_command_are_private() -> None:
    given = cli.parser().parse_args([])
    assert (given.host, given.share, given.mcp, given.model) == ("127.0.0.1", False, False, "tiny")


def test_an_unknown_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--model", "./nowhere"]) == 1
    assert capsys.readouterr().err.startswith("mmfix-app: cannot load model './nowhere'")


def test_a_port_that_is_none_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--port", "70000", "--model", "./nowhere"]) == 2
    assert capsys.readouterr().err == "mmfix-app: --port 70000: give a number from 1 to 65535\n"


def test_an_image_of_the_wrong_kind_through_the_api(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(Exception, match="not a PNG, JPEG or WebP"):
        client.predict(handle_file(str(path)), PROMPT, "vhr", None, None, api_name="/compare")
