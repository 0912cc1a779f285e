"""What encoders are given and give: inputs that say too little or twice, rows by item, precisions that differ."""

import re
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from megatron_mimo import EncodedRows, MimoModel, VisionModalitySubmodules
from tests import tiny


class Flat(tiny.PatchEncoder):
    """[N, PIXELS] -> [N, width]: the rows of all items, one after the other."""

    def forward(self, x):
        return super().forward(x)


class Counting(Flat):
    """The same, which tells the rows of each item: four."""

    def forward(self, x):
        return EncodedRows(super().forward(x), [4] * (len(x) // 4))


class PackedInput(Flat):
    """The same for a packed batch of one."""

    def forward(self, x):
        return super().forward(x)[None]


class ClassToken(Flat):
    """[n, s, PIXELS] -> [n, 1 + s, width]."""

    def forward(self, x):
        return super().forward(torch.cat([x[:, :1], x], dim=1))


def reader(encoder: type, name: str = "patches", **params) -> MimoModel:
    spec = tiny.image_spec(encoders={name: ModuleSpec(module=encoder, params=params)})
    return MimoModel(tiny.mimo_config(), {"images": spec}).eval()


def reading(*counts: int) -> torch.Tensor:
    """Ids of as many samples, each of which reads that many rows."""
    ids = torch.randint(0, 60, (len(counts), 12))
    for sample, count in enumerate(counts):
        ids[sample, 2 : 2 + count] = tiny.READ
    return ids


def images(**given) -> dict:
    return {"images": {"patches": given}}


def test_the_examples_of_the_reading_page_print_what_it_says():
    page, printed = (Path(__file__).parents[2] / "docs" / "reading.md").read_text(), []
    names = {"print": printed.append}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, names)
    said = re.findall(r"print\(.*\)  # (.*)", page)
    assert [str(list(one) if isinstance(one, torch.Size) else one) for one in printed] == said and len(said) == 3


# Rows of each item


@pytest.mark.parametrize("told", ["by the encoder", "by the batch", "by a tensor of the batch"])
def test_flat_rows_are_compared_sample_by_sample_where_their_items_are_told(told, single_process):
    rows = {"by the encoder": {}, "by the batch": {"rows_per_item": [4, 4]}}
    beside = rows.get(told, {"rows_per_item": torch.tensor([4, 4])})
    model = reader(Counting if told == "by the encoder" else Flat)
    inputs = images(x=torch.randn(8, tiny.PIXELS), **beside)
    with pytest.raises(ValueError, match="images: sample 0 has 3 special tokens but 4 embeddings"):
        model(reading(3, 5), modality_inputs=inputs)
    found, _ = model(ids := reading(4, 4), modality_inputs=inputs)
    expected, _ = reader_like(model)(ids, modality_inputs=images(x=torch.as_tensor(inputs["images"]["patches"]["x"])))
    assert torch.equal(found.language, expected.language)


def reader_like(model: MimoModel) -> MimoModel:
    plain = reader(Flat)
    plain.load_state_dict(model.state_dict())
    return plain


def test_what_is_not_known_of_flat_rows_is_said_and_no_sample_is_blamed_for_sure(single_process):
    with pytest.raises(
        ValueError, match=r"Which sample is wrong is not known \(tokens of each: \[3, 4\]\).*EncodedRows"
    ):
        reader(Flat)(reading(3, 4), modality_inputs=images(x=torch.randn(8, tiny.PIXELS)))


def test_the_rows_of_a_packed_batch_of_one_are_not_taken_for_one_item(single_process):
    reader(PackedInput)(reading(3, 5), modality_inputs=images(x=torch.randn(8, tiny.PIXELS)))


@pytest.mark.parametrize(
    ("encoder", "tokens", "rows", "causes"),
    [
        (tiny.PatchEncoder, (4, 2), 4, "span that truncation cut"),
        (ClassToken, (4, 4), 4, "class token that the encoder keeps"),
        (tiny.PatchEncoder, (2, 2), 4, "padding of audio"),
        (tiny.PatchEncoder, (4, 5), 4, "placeholder that the model sampled"),
    ],
)
def test_a_count_that_does_not_fit_comes_with_its_usual_causes(encoder, tokens, rows, causes, single_process):
    with pytest.raises(ValueError, match=causes):
        reader(encoder)(reading(*tokens), modality_inputs=images(x=torch.randn(2, rows, tiny.PIXELS)))


@pytest.mark.parametrize(
    ("told", "error", "message"),
    [
        ([3, 4], ValueError, r"rows_per_item \[3, 4\] adds up to 7, but it returned 8 rows"),
        ([9, -1], ValueError, r"adds up to 8, but it returned 8 rows"),
        ([4.0, 4.0], TypeError, "must be a list of ints on the host"),
        (8, TypeError, "must be a list of ints on the host, one for each item, found 8"),
        (torch.ones(2), TypeError, "must be a list of ints on the host"),
    ],
)
def test_counts_of_rows_that_are_none_are_refused(told, error, message):
    one = VisionModalitySubmodules({"patches": Flat()})
    with pytest.raises(error, match=message):
        one.encode({"patches": {"x": torch.zeros(8, tiny.PIXELS), "rows_per_item": told}})


def test_an_encoders_own_input_of_that_name_stays_its_own():
    class Own(nn.Module):
        def forward(self, x, rows_per_item):
            return x[: sum(rows_per_item)]

    found = VisionModalitySubmodules({"a": Own()}).encode_items(
        {"a": {"x": torch.zeros(8, 4), "rows_per_item": [3, 2]}}
    )
    assert found.rows.shape == (5, 4) and found.rows_per_item is None


def test_an_overridden_encode_may_tell_the_rows_of_each_item():
    class Told(VisionModalitySubmodules):
        def encode(self, inputs):
            return EncodedRows(super().encode(inputs), [3, 5])

    found = Told({"patches": Flat()}).encode_items({"patches": {"x": torch.zeros(8, tiny.PIXELS)}})
    assert found.rows_per_item == [3, 5] and found.rows.shape == (8, 16)


# Inputs


class Anything(nn.Module):
    def forward(self, **inputs):
        return inputs["x"]


@pytest.mark.parametrize("names", [("pixel_values", "images"), ("x", "images"), ("pixel_values", "x")])
def test_one_input_under_two_names_is_refused(names):
    one = VisionModalitySubmodules({"a": Flat()})
    with pytest.raises(ValueError, match=f"'{names[0]}' and '{names[1]}', which are both 'x' of Flat"):
        one.encode({"a": dict.fromkeys(names, torch.zeros(1, tiny.PIXELS))})


def test_encode_says_what_is_missing():
    one = VisionModalitySubmodules({"a": Flat(), "b": Flat()})
    with pytest.raises(ValueError, match=r"inputs is empty: expected inputs of at least one .* \['a', 'b'\]"):
        one.encode({})
    with pytest.raises(TypeError, match=r"inputs\['a'\] lacks \['x'\], which Flat needs; found \[\]"):
        one.encode({"a": {}})
    assert VisionModalitySubmodules({"a": Anything()}).encode({"a": {"x": torch.zeros(1, 2)}}).shape == (1, 2)


@pytest.mark.parametrize("beside", [{}, {"interpolate_pos_encoding": True}])
def test_zero_images_are_absent_with_an_encoder_of_hugging_face(beside, single_process):
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = reader(CLIPVisionModel, "clip", config=config)
    ids = reading(0, 0)
    expected, _ = model(ids, labels=ids)
    none = {"images": {"clip": {"pixel_values": torch.zeros(0, 3, 8, 8), **beside}}}
    found, _ = model.train()(ids, labels=ids, modality_inputs=none)
    assert torch.equal(found.language, expected.language)
    found.language.sum().backward()
    assert all(p.grad is not None for p in model.modality_submodules["images"].encoders.parameters())


class Convolution(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).flatten(2).transpose(1, 2)


def test_images_of_bytes_are_refused_by_name_where_an_encoder_cannot_take_them():
    one = VisionModalitySubmodules({"a": Convolution(3, 4, 2)})
    with pytest.raises(TypeError, match=r"encoder 'a' \(Convolution\) cannot compute with \['x'\] of dtype uint8"):
        one.encode({"a": {"x": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)}})
    with pytest.raises(RuntimeError, match="Expected 3D"):  # what else goes wrong inside an encoder is its own
        one.encode({"a": {"x": torch.zeros(4)}})


def test_rows_of_whole_numbers_are_refused():
    one = VisionModalitySubmodules({"a": nn.Flatten(2)})
    with pytest.raises(TypeError, match="encoder 'a' returned torch.uint8; expected floating-point rows"):
        one.encode({"a": {"input": torch.zeros(1, 2, 2, dtype=torch.uint8)}})


@pytest.mark.parametrize("name", ["vit.large", "vit/large", "", "keys", "training"])
@pytest.mark.parametrize("key", ["encoders", "decoders"])
def test_names_that_torch_cannot_register_are_refused(key, name):
    with pytest.raises(ValueError, match=f"'{name}' cannot name a"):
        VisionModalitySubmodules(**{key: {name: tiny.LinearDecoder()}})
    with pytest.raises(ValueError, match=f"'{name}' cannot name one of the {key} of modality_submodules"):
        tiny.mimo_config(modality_submodules={"images": tiny.image_spec(**{key: {name: ModuleSpec(tiny.Decoder)}})})


# Several encoders


def two(combine=None, **more) -> VisionModalitySubmodules:
    """The specification's two encoders, 4 and 2 rows an image of other sizes."""
    encoders = {"clip_encoder": Convolution(3, 8, 2, 2), "vit_encoder": Convolution(3, 8, 4, 4)}
    return VisionModalitySubmodules(encoders, combine=combine, **more)


def seen(count: int, other: int | None = None) -> dict:
    other = count if other is None else other
    return {
        "clip_encoder": {"pixel_values": torch.randn(count, 3, 4, 4)},
        "vit_encoder": {"images": torch.randn(other, 3, 4, 8)},
    }


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_specifications_two_encoders_run_for_any_number_of_images(count):
    one, inputs = two(), seen(count)
    found = one.encode_items(inputs)
    parts = [one.encode({name: given}).unflatten(0, (count, -1)) for name, given in inputs.items()]
    assert torch.equal(found.rows, torch.cat(parts, dim=1).flatten(0, 1))
    assert found.rows_per_item == [4 + 2] * count
    if count == 1:
        assert torch.equal(found.rows, two_like(one, "concatenate").encode(inputs))


def two_like(one: VisionModalitySubmodules, combine: str) -> VisionModalitySubmodules:
    other = two(combine)
    other.load_state_dict(one.state_dict())
    return other


def test_encoders_of_different_numbers_of_images_are_refused_at_the_first_batch():
    with pytest.raises(ValueError, match="combine=None .* Set combine='concatenate'"):
        two().encode(seen(2, 3))
    assert two("concatenate").encode(seen(2, 3)).shape == (2 * 4 + 3 * 2, 8)


def test_ragged_rows_of_two_encoders_follow_each_other_item_by_item_where_they_are_told():
    one = VisionModalitySubmodules({"a": Anything(), "b": Anything()})
    given = {
        "a": {"x": torch.zeros(4, 2), "rows_per_item": [1, 3]},
        "b": {"x": torch.ones(3, 2), "rows_per_item": [2, 1]},
    }
    found = one.encode_items(given)
    assert found.rows[:, 0].tolist() == [0, 1, 1, 0, 0, 0, 1]
    assert found.rows_per_item == [3, 4]
    with pytest.raises(ValueError, match="differ in width"):
        one.encode({**given, "b": {"x": torch.ones(3, 5), "rows_per_item": [2, 1]}})


# Precision


def in_dtypes(encoder: torch.dtype, projection: torch.dtype) -> MimoModel:
    model = MimoModel(tiny.mimo_config())
    for one in model.modality_submodules.values():
        one.encoders.to(encoder), one.input_projections.to(projection), one.output_projections.to(projection)
    return model


@pytest.mark.parametrize("projection", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("encoder", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_modules_of_different_precision_are_cast_where_they_meet(encoder, projection, autocast, single_process):
    model, batch = in_dtypes(encoder, projection), tiny.batch()
    exact = MimoModel(tiny.mimo_config())
    exact.load_state_dict(model.state_dict())  # copies, in float32
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = tiny.total(model, batch)
        outputs, _ = model.eval()(batch["input_ids"], modality_inputs=batch["modality_inputs"])
        samples = model.decode(outputs)["images"]["pixels"]
        found.backward()  # inside, since Megatron's own layers know autocast on a GPU alone
    # bf16 has 8 bits: a relative error of 2**-8 each in a few casts of a loss of about 4.
    torch.testing.assert_close(found.float(), tiny.total(exact, batch), rtol=2**-6, atol=0)
    assert samples.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.modality_submodules.parameters())


def test_rows_of_a_generation_input_are_cast_to_the_language_models(single_process):
    from megatron_mimo.decoders import QueryInput

    feed = ModuleSpec(module=QueryInput, params=dict(hidden_size=tiny.HIDDEN, rows_per_item=1))
    model = MimoModel(tiny.mimo_config(), {"images": tiny.image_spec(generation_input=feed)})
    model.modality_submodules["images"].generation_input.bfloat16()
    assert tiny.total(model, tiny.batch()).isfinite()
