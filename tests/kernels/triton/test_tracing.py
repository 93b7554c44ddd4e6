"""A decoding step of the kernels is one graph for torch.compile, which CUDA graphs need; traced without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmfix_kernels import AttentionCall, Group, HeadScale, KeyGroups, MapReplacement, MassMove, ScoreEdit
from mmfix_kernels import triton as backend

META = torch.device("meta")
MOVE = MassMove(source=Group.SINK, target=Group.IMAGE_NONSINK, share=0.6)
EDITS: dict[str, list[Any]] = {
    "nothing": [],
    "move and heads": [MOVE, HeadScale(scale=torch.ones(8, device=META))],
    "scores of a head": [ScoreEdit(group=Group.IMAGE, abs_gain=0.5, heads=(1,))],
    "map of a branch": [MapReplacement(kind="random", batch=torch.tensor([False, True]))],
}


@pytest.mark.slow
@pytest.mark.parametrize("edits", EDITS)
def test_a_decoding_step_is_one_graph_without_host_tensors(edits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)  # else launches are not recognised as such
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward  # on the meta device nothing is launched

    def step(query: Tensor, key: Tensor, value: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        call = AttentionCall(
            query=query, key=key, value=value, mask=mask, groups=KeyGroups.plain(labels), edits=EDITS[edits],
            masses="last",
        )  # fmt: skip
        assert backend.why_not(call) == ""
        attended = backend.attend(call)
        return attended.output, attended.fired

    query, key, value = (torch.empty(2, 8, n, 64, dtype=torch.float16, device=META) for n in (1, 512, 512))
    labels = torch.zeros(2, 512, dtype=torch.int8, device=META)
    mask = torch.ones(2, 1, 1, 512, dtype=torch.bool, device=META)
    torch._dynamo.reset()
    torch.compile(step, backend=keep, fullgraph=True, dynamic=False)(query, key, value, labels, mask)
    (graph,) = graphs
    nodes = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert len(nodes) == 2, "the streaming and the merging kernel"
    for node in graph.graph.nodes:
        made = node.meta.get("example_value")
        fed = node.op == "placeholder" and "batch" in node.name  # which branch an edit is for: an input, not a constant
        if isinstance(made, Tensor) and not fed:
            assert made.device.type == "meta", f"{node.name} is copied from the host at every step"
