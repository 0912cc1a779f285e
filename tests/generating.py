"""Models and prompts that generate, and the same answers without a cache: one whole forward pass a token."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import megatron_mimo
from tests import tiny

#: Float32: the cached and the whole pass add in other orders. Found 2e-6.
LOGPROBS = 1e-4

WINDOW = 3
EXPERTS = dict(num_moe_experts=4, moe_router_topk=2, moe_token_dispatcher_type="alltoall", add_bias_linear=False)


def spread(model: torch.nn.Module) -> None:
    """Weights of a size at which every position changes what is said."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)


def language(kind: str, **changes) -> Any:
    """The spec of a language model: its kind is what the cache has to get right."""
    of_config: dict[str, dict[str, Any]] = {
        "rope": {},
        "learned": {},
        "groups": dict(num_query_groups=2),
        "qk-norm": dict(qk_layernorm=True, num_query_groups=2),
        "window": dict(window_size=(WINDOW, 0), num_layers=4, window_attn_skip_freq=2),
        "mrope": dict(mrope_section=[2, 1, 1], num_query_groups=2),
        "experts": EXPERTS,
        "hybrid": dict(num_layers=4),
        "no-rope": dict(no_rope_freq=2),
        "yarn": {},
    }
    config = tiny.language_config(**(of_config[kind] | changes))
    if kind == "hybrid":
        return tiny.hybrid_spec(config)
    if kind == "yarn":
        yarn = dict(yarn_rotary_scaling_factor=4.0, yarn_original_max_position_embeddings=16, yarn_beta_fast=32.0,
                    yarn_beta_slow=1.0, yarn_mscale=1.0, yarn_mscale_all_dim=0.5,
                    yarn_correction_range_round_to_int=True)  # fmt: skip
        for name, value in yarn.items():
            setattr(config, name, value)
    types = {"learned": "learned_absolute", "mrope": "mrope", "yarn": "yarn"}
    return tiny.language_spec(config, position_embedding_type=types.get(kind, "rope"))


def model_of(kind: str, config: Any = None, **changes) -> megatron_mimo.MimoModel:
    model = megatron_mimo.MimoModel(tiny.mimo_config(language(kind, **changes)) if config is None else config)
    spread(model)
    return model


def prompts(sections: int = 1, media: bool = True) -> list[dict[str, Any]]:
    """Four of unequal length: text, and with `media` an image, a sound, and both."""
    draw = torch.Generator().manual_seed(1)
    made: list[dict[str, Any]] = [{"input_ids": torch.randint(0, 60, (n,), generator=draw)} for n in (3, 11, 6, 8)]
    if media:
        images = {"images": {"patches": {"x": torch.randn(1, 2, tiny.PIXELS, generator=draw)}}}
        sounds = {"audio": {"frames": {"x": torch.randn(3, tiny.PIXELS, generator=draw)}}}
        for prompt, start, inputs in ((made[1], 2, images), (made[2], 1, sounds), (made[3], 5, images)):
            ids = prompt["input_ids"]
            token, count = (tiny.READ, 2) if "images" in inputs else (tiny.HEAR, 3)
            ids[start : start + count] = token
            prompt["modality_inputs"] = inputs
        made[3]["modality_inputs"] = images | {"audio": {"frames": {"x": torch.randn(2, tiny.PIXELS, generator=draw)}}}
        made[3]["input_ids"][1:3] = tiny.HEAR
    if sections > 1:
        for prompt in made:
            length = len(prompt["input_ids"])
            places = torch.arange(length).expand(sections, -1).clone()
            places[1:, length // 2 :] -= 1  # rows and columns fall behind, as after an image
            prompt["position_ids"] = places
    return made


def whole(model: megatron_mimo.MimoModel, prompt: Mapping[str, Any], ids: Tensor, sections: int = 1) -> Tensor:
    """Logits `[S, V]` of one whole forward pass over a prompt and what follows it."""
    given: dict[str, Any] = {"modality_inputs": prompt.get("modality_inputs")}
    places = prompt.get("position_ids")
    if places is not None:
        later = torch.arange(len(ids) - places.shape[1]).expand(sections, -1) + places.max() + 1
        given["position_ids"] = torch.cat([places, later], dim=1)[:, None]
    with torch.no_grad():
        output = model(ids[None], **given)[0]
    logits = output if isinstance(output, Tensor) else output.language
    return logits[0].float()


def one_by_one(
    model: megatron_mimo.MimoModel, prompt: Mapping[str, Any], count: int, sections: int = 1
) -> tuple[list[int], Tensor]:
    """Greedy tokens without a cache, and the log-probability of each in the model's own distribution."""
    ids, found = torch.as_tensor(prompt["input_ids"]), []
    training = model.training
    model.eval()
    for _ in range(count):
        logits = whole(model, prompt, ids, sections)[-1]
        sayable = logits.clone()
        sayable[tiny.WRITE] = -torch.inf
        token = sayable.argmax()
        found.append(logits.log_softmax(-1)[token])
        ids = torch.cat([ids, token[None]])
    model.train(training)
    return ids[-count:].tolist(), torch.stack(found)


def check_greedy(outputs: Sequence, expected: Sequence[tuple[list[int], Tensor]]) -> None:
    """Token for token the same, and log-probabilities to `LOGPROBS`."""
    assert [output.ids for output in outputs] == [ids for ids, _ in expected]
    for output, (_, logprobs) in zip(outputs, expected):
        torch.testing.assert_close(output.logprobs, logprobs, atol=LOGPROBS, rtol=0)
        assert (output.sampling_logprobs == 0).all()
