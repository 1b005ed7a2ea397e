"""Workers use the GPUs that Ray assigned to them, and no others."""

import os

import pytest

from pipeline.runtime.workers import hide_unassigned_gpus


def test_a_worker_without_a_gpu_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    hide_unassigned_gpus([])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_worker_keeps_the_gpus_that_ray_made_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    hide_unassigned_gpus([1])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
