"""Compiled sampling: the network is compiled once for all threads and numbers of tokens, and computes the same."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from tests.trainer.tiny_run import ROWS, write_run
from trainer.sampling.denoising import CONTEXT_STEP
from trainer.sampling.recipe import ComputeConfig
from trainer.sampling.request import Request
from trainer.sampling.sampler import Sampler

COMPUTE = ComputeConfig(device="cpu", batch_size=1, workers=2, threads=1)
PLAIN = Request(prompt="a circle", database="green", k=2, guidance=2.0, steps=2)


@pytest.fixture(scope="module")
def samplers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sampler, Sampler]]:
    """The same model without and with compilation."""
    root, trained = write_run(tmp_path_factory.mktemp("compiled"))
    torch.compiler.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(COMPUTE.threads)  # of the test's thread too: for each number a network is compiled
    with pytest.MonkeyPatch.context() as patch:
        # Recompilations do not depend on the backend, and generating code takes minutes.
        patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        compiled = Sampler.open(root, trained, COMPUTE.model_copy(update={"compile": True}))
    yield Sampler.open(root, trained, COMPUTE), compiled
    torch.set_num_threads(threads)
    torch.compiler.reset()


def latents(sampler: Sampler, request: Request) -> torch.Tensor:
    [batch] = sampler.plan([request])
    with torch.inference_mode():
        return sampler._denoise(batch)


def num_graphs() -> int:
    """Graphs that torch has compiled so far."""
    return int(counters["stats"]["unique_graphs"])


def test_threads_and_numbers_of_tokens_and_weights_share_a_network_and_change_nothing(
    samplers: tuple[Sampler, Sampler],
) -> None:
    plain, compiled = samplers
    before = num_graphs()
    requests = [replace(PLAIN, seed=seed) for seed in range(4)]
    for first, second in zip(compiled.sample(requests), plain.sample(requests), strict=True):
        assert np.abs(np.subtract(first.picture, second.picture, dtype=int)).max() <= 1
    after = num_graphs()
    assert after > before
    torch.testing.assert_close(latents(compiled, PLAIN), latents(plain, PLAIN), atol=1e-4, rtol=0)
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
