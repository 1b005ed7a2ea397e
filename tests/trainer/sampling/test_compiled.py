"""Compiled sampling: the network is compiled once for all numbers of tokens, and its latents are the same."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.trainer.tiny_run import ROWS, write_run
from trainer.sampling.denoising import CONTEXT_STEP
from trainer.sampling.recipe import ComputeConfig
from trainer.sampling.request import Request
from trainer.sampling.sampler import Sampler

COMPUTE = ComputeConfig(device="cpu", workers=1, threads=1)
PLAIN = Request(prompt="a circle", database="green", k=2, guidance=2.0, steps=2)


@pytest.fixture(scope="module")
def samplers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sampler, Sampler]]:
    """The same model without and with compilation."""
    root, trained = write_run(tmp_path_factory.mktemp("compiled"))
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        # Recompilations do not depend on the backend, and generating code takes minutes.
        patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        compiled = Sampler.open(root, trained, COMPUTE.model_copy(update={"compile": True}))
    yield Sampler.open(root, trained, COMPUTE), compiled
    torch.compiler.reset()


def latents(sampler: Sampler, request: Request) -> torch.Tensor:
    [batch] = sampler.plan([request])
    with torch.inference_mode():
        return sampler._denoise(batch)


def num_graphs() -> int:
    """Graphs that torch has compiled so far."""
    return int(counters["stats"]["unique_graphs"])


def test_other_numbers_of_tokens_and_weights_compile_nothing_and_change_nothing(
    samplers: tuple[Sampler, Sampler],
) -> None:
    plain, compiled = samplers
    before = num_graphs()
    torch.testing.assert_close(latents(compiled, PLAIN), latents(plain, PLAIN), atol=1e-4, rtol=0)
    after = num_graphs()
    assert after > before
    [batch] = plain.plan([PLAIN])
    first = batch.items[0].neighbors[0].image_id
    changes: list[dict[str, Any]] = [
        {"k": 1},
        {"k": 7},
        {"k": ROWS},
        {"mode": "text", "database": ""},
        {"mode": "neighbors"},
    ]
    changes += [{"weights": ((first, 3.0),)}, {"negative_prompt": "grey"}, {"scheduler": "dpm++"}]
    for change in changes:
        request = replace(PLAIN, **change)
        torch.testing.assert_close(latents(compiled, request), latents(plain, request), atol=1e-4, rtol=0)
        assert num_graphs() == after, change
    assert ROWS + 1 <= CONTEXT_STEP
