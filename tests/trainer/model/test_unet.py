import pytest
import torch
from pydantic import ValidationError

from trainer.model.recipe import ModelConfig
from trainer.model.unet import build_unet, use_unfused_attention

TINY = ModelConfig(latent_channels=4, context_dim=32, channels=(32, 64), attention=(2,), layers=1)


def test_any_number_of_zero_tokens_equals_one_zero_token() -> None:
    torch.manual_seed(0)
    unet = build_unet(TINY).eval()
    noisy, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    with torch.no_grad():
        with_one = unet(noisy, t, torch.zeros(2, 1, 32), return_dict=False)[0]
        with_eight = unet(noisy, t, torch.zeros(2, 8, 32), return_dict=False)[0]
        with_random = unet(noisy, t, torch.randn(2, 8, 32), return_dict=False)[0]
    torch.testing.assert_close(with_one, with_eight)
    assert (with_one - with_random).abs().max() > 1e-4


def test_unfused_attention_computes_the_same() -> None:
    torch.manual_seed(0)
    unet = build_unet(TINY).eval()
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 8, 32)
    with torch.no_grad():
        fused = unet(*inputs, return_dict=False)[0]
        before = {type(processor) for processor in unet.attn_processors.values()}
        use_unfused_attention(unet)
        torch.testing.assert_close(unet(*inputs, return_dict=False)[0], fused)
    assert not before & {type(processor) for processor in unet.attn_processors.values()}


def test_the_order_of_neighbors_does_not_matter() -> None:
    torch.manual_seed(0)
    unet = build_unet(TINY).eval()
    noisy, t, context = torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.randn(1, 5, 32)
    with torch.no_grad():
        forward = unet(noisy, t, context, return_dict=False)[0]
        backward = unet(noisy, t, context.flip(1), return_dict=False)[0]
    torch.testing.assert_close(forward, backward)


def test_context_gain_scales_only_keys_and_values_of_cross_attention() -> None:
    torch.manual_seed(0)
    plain = dict(build_unet(TINY).named_parameters())
    torch.manual_seed(0)
    scaled = dict(build_unet(TINY.model_copy(update={"context_gain": 8.0})).named_parameters())
    gains = {name: 8.0 if "attn2.to_k" in name or "attn2.to_v" in name else 1.0 for name in plain}
    assert 8.0 in gains.values()
    for name, weight in plain.items():
        torch.testing.assert_close(scaled[name], gains[name] * weight)


@pytest.mark.parametrize(
    ("change", "message"), [({"attention": (3,)}, "attention"), ({"channels": (32, 40)}, "divisible")]
)
def test_a_model_that_cannot_be_built_is_an_error(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate({**TINY.model_dump(), **change})
