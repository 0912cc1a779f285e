"""The whole flow in one process: what comes out, what gets a gradient, what is refused."""

from copy import deepcopy

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

import megatron_mimo
from megatron_mimo import MimoModel, MimoOutput, build_placement, deferred
from megatron_mimo.decoders import FlowDecoder, FlowTransformerDecoder, QueryInput, RegressionDecoder
from tests import tiny


@pytest.fixture
def model(single_process):
    torch.manual_seed(0)
    return MimoModel(tiny.mimo_config())


def without_gradient(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


def used(model, part: str) -> bool:
    return any(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if part in n)


def test_the_language_output_comes_back_bare_without_generation_tokens(single_process):
    model = MimoModel(
        tiny.mimo_config(
            modality_submodules={"audio": tiny.audio_spec()},
            special_token_ids={"audio": tiny.HEAR},
            generation_token_ids={},
            modality_loss_weights={},
        )
    )
    arguments = tiny.batch()
    arguments["input_ids"] = arguments["input_ids"].where(arguments["input_ids"] != tiny.READ, 1)
    del arguments["modality_targets"], arguments["modality_inputs"]["images"]
    outputs, loss_mask = model(**arguments)
    assert outputs.shape == arguments["input_ids"].shape
    assert loss_mask is arguments["loss_mask"]
    del arguments["labels"]
    assert model(**arguments)[0].shape == (3, 16, tiny.VOCABULARY)


def test_training_gives_a_term_for_each_decoder_and_a_gradient_to_every_parameter(model):
    outputs, loss_mask = model(**tiny.batch())
    assert isinstance(outputs, MimoOutput)
    terms = megatron_mimo.loss_terms(outputs, loss_mask)
    assert list(terms) == ["text", "images/pixels"]
    assert terms["images/pixels"].count.item() == 5 * tiny.PIXELS
    assert terms["text"].count == loss_mask.sum()
    megatron_mimo.total_loss(terms, model.loss_weights).backward()
    assert not without_gradient(model)
    for part in ("encoders", "input_projections", "decoders", "output_projections", "word_emb"):
        assert used(model, part), part


def test_the_output_half_reaches_the_language_model(model):
    outputs, _ = model(**tiny.batch())
    outputs.modalities["images"].losses["pixels"].sum.backward()
    assert used(model, "language_model.decoder.layers.0")


def test_a_shift_between_samples_is_found(model):
    """Two images of three patches, but two tokens in one sample and four in the other."""
    ids = torch.randint(0, 60, (2, 12))
    ids[0, 2:4] = ids[1, 2:6] = tiny.READ
    inputs = {"images": {"patches": {"x": torch.zeros(2, 3, tiny.PIXELS)}}}
    with pytest.raises(ValueError, match="images: sample 0 has 2 special tokens but 3 embeddings"):
        model.eval()(ids, modality_inputs=inputs)


def test_spans_that_do_not_fit_the_decoder_are_found(single_process):
    class Pairs(tiny.LinearDecoder):
        def __init__(self):
            super().__init__()
            self.rows_per_item = 3

    decoders = {"pixels": ModuleSpec(module=Pairs)}
    model = MimoModel(tiny.mimo_config(), {"images": tiny.image_spec(decoders=decoders)})
    ids = torch.randint(0, 60, (2, 12))
    ids[0, 2:4] = ids[1, 2:6] = tiny.WRITE
    with pytest.raises(ValueError, match="sample 0 has 2 generation tokens in a row.*spans of 3"):
        model(ids, modality_targets={"images": {"pixels": {"pixels": torch.zeros(6, tiny.PIXELS)}}})


def writer(params: dict, decoder: ModuleSpec, **parts) -> MimoModel:
    """A model that writes images, with `params` of their submodules."""
    parts = {"decoders": {"out": decoder}, "output_projections": [], **parts}
    kind = params.pop("kind", megatron_mimo.VisionModalitySubmodules)
    images = ModuleSpec(module=kind, params=params, submodules=parts)
    tokens = dict(special_token_ids={}, generation_token_ids={"images": tiny.WRITE})
    return MimoModel(tiny.mimo_config(modality_submodules={"images": images}, **tokens))


def flow_decoder(**params) -> ModuleSpec:
    given = dict(width=tiny.HIDDEN, target_width=4, hidden_width=8, depth=1)
    return ModuleSpec(module=FlowDecoder, params={**given, **params})


FOUR_ROWS = {
    "patches_by_flow": (dict(image_shape=(1, 4, 4)), flow_decoder()),
    "patches_by_regression": (
        dict(image_shape=(1, 4, 4)),
        ModuleSpec(module=RegressionDecoder, params=dict(width=tiny.HIDDEN, target_width=4)),
    ),
    "frames": (
        dict(kind=megatron_mimo.AudioModalitySubmodules, frames_per_clip=4),
        flow_decoder(rows_per_item=1),
    ),
}
SPLIT = torch.tensor([[1, tiny.WRITE, 2, 3], [1, tiny.WRITE, tiny.WRITE, tiny.WRITE]])
WHOLE = torch.tensor([[1, 2, 3, 4, 5], [1] + [tiny.WRITE] * 4])


@pytest.mark.parametrize("case", FOUR_ROWS)
def test_an_image_or_clip_of_rows_of_two_samples_is_refused(single_process, case):
    params, decoder = FOUR_ROWS[case]
    model = writer(dict(params), decoder)
    targets = {"images": {"out": {"target": torch.zeros(4, 4)}}}
    message = "images: sample 0 has 1 generation tokens, but one image or clip takes 4 of them"
    with pytest.raises(ValueError, match=message):
        model(SPLIT, modality_targets=targets)
    model(WHOLE, modality_targets=targets)
    outputs, _ = model.eval()(SPLIT)
    with pytest.raises(ValueError, match=message):
        model.decode(outputs)
    outputs, _ = model(WHOLE)
    assert model.decode(outputs)["images"]["out"].shape[0] == 1


def test_samples_of_two_samples_are_found_in_a_deferred_placement_too(single_process):
    params, decoder = FOUR_ROWS["patches_by_flow"]
    model = writer(dict(params), decoder).eval()
    placement = build_placement(SPLIT, {}, {"images": tiny.WRITE}, validate="deferred")
    outputs, _ = model(SPLIT, placement=placement)
    with pytest.raises(ValueError, match="images: sample 0 has 1 generation tokens, but one image"):
        model.decode(outputs)


def test_whole_items_of_patches_fill_whole_images(single_process):
    params = dict(image_shape=(1, 4, 4))
    for targets, rows in ((2, 6), (4, 3), (8, 3), (3, 12)):
        decoder = ModuleSpec(
            module=FlowTransformerDecoder,
            params=dict(
                width=tiny.HIDDEN, target_width=4, hidden_width=8, depth=1, heads=2,
                targets_per_item=targets, rows_per_item=3,
            ),
        )  # fmt: skip
        assert writer(dict(params), decoder).modality_submodules["images"].medium_of("out") == rows


@pytest.mark.parametrize("train", [True, False])
def test_queries_for_a_span_of_two_samples_are_refused(single_process, train):
    feed = ModuleSpec(module=QueryInput, params=dict(hidden_size=tiny.HIDDEN, rows_per_item=4))
    model = writer({}, flow_decoder(), generation_input=feed).train(train)
    targets = {"images": {"out": {"target": torch.zeros(4, 4)}}} if train else None
    with pytest.raises(ValueError, match="images: sample 0 has 1 generation tokens, .* takes 4 of them"):
        model(SPLIT, modality_targets=targets)


def test_one_token_may_read_and_write(single_process):
    shared = tiny.mimo_config(
        special_token_ids={"images": tiny.WRITE, "audio": tiny.HEAR},
        generation_token_ids={"images": tiny.WRITE},
    )
    model = MimoModel(shared)
    ids = torch.tensor([[1, tiny.WRITE, tiny.WRITE, 2]])
    reads = {"images": {"patches": {"x": torch.zeros(1, 2, tiny.PIXELS)}}}
    outputs, _ = model(ids, labels=ids, modality_inputs=reads)  # a batch that only reads
    assert outputs.modalities["images"].losses["pixels"].count == 0
    writes = {"images": {"pixels": {"pixels": torch.zeros(2, tiny.PIXELS)}}}
    outputs, _ = model(ids, labels=ids, modality_inputs=reads, modality_targets=writes)
    assert outputs.modalities["images"].losses["pixels"].count == 2 * tiny.PIXELS


def test_bfloat16_under_megatrons_wrapper(single_process):
    config = tiny.language_config(bf16=True, params_dtype=torch.bfloat16)
    model = MimoModel(tiny.mimo_config(tiny.language_spec(config)))
    wrapped = Float16Module(config, model)
    outputs, loss_mask = wrapped(**tiny.batch())
    terms = megatron_mimo.loss_terms(outputs, loss_mask)
    assert all(term.sum.dtype == torch.float32 for term in terms.values())
    megatron_mimo.total_loss(terms).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    ids = torch.tensor([[1, 2]])
    tiny.total(model, dict(input_ids=ids, labels=ids)).backward()  # nothing to read or write


def test_negative_labels_do_not_count_without_a_mask(model):
    ids = torch.tensor([[1, 2, 3, 4]])
    outputs, loss_mask = model(ids, labels=torch.tensor([[2, 3, -100, -100]]))
    assert loss_mask.tolist() == [[1, 1, 0, 0]]
    assert megatron_mimo.loss_terms(outputs, loss_mask)["text"].count == 2


@pytest.mark.parametrize("label", [-100, tiny.VOCABULARY, 10_000])
def test_labels_outside_the_vocabulary_that_count_are_refused(model, label):
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    labels, loss_mask = ids.clone(), torch.ones(2, 4)
    labels[1, 2:] = label
    message = r"text: sample 1 has 2 labels outside the vocabulary \(0 to 63\)\. They count in the loss"
    for train in (True, False):
        with pytest.raises(ValueError, match=message):
            model.train(train)(ids, labels=labels, loss_mask=loss_mask)
    loss_mask[1, 2:] = 0
    model(ids, labels=labels, loss_mask=loss_mask)
    if label > 0:
        with pytest.raises(ValueError, match=message):
            model(ids, labels=labels)


def test_labels_under_way_are_held_against_the_vocabulary_when_the_next_step_begins(model, monkeypatch):
    monkeypatch.setattr(deferred.Arrival, "here", lambda arrival: False)
    ids = torch.tensor([[1, 2, 3, 4]])
    model(ids, labels=torch.full_like(ids, 64))
    with pytest.raises(ValueError, match="text: sample 0 has 4 labels outside the vocabulary"):
        model(ids, labels=ids)
    model.eval()
    with pytest.raises(ValueError, match="text: sample 0 has 4 labels outside the vocabulary"):
        model(ids, labels=torch.full_like(ids, 64))


def test_logits_are_no_loss(model, single_process):
    outputs, loss_mask = model(torch.tensor([[1, 2, 3]]))
    assert list(megatron_mimo.loss_terms(outputs, loss_mask)) == ["images/pixels"]
    with pytest.raises(ValueError, match="these are logits"):
        megatron_mimo.loss_terms(outputs.language)


def test_nothing_of_a_forward_pass_stays_in_the_model(model):
    before = len(model.language_model.decoder._forward_hooks)
    arguments = tiny.batch()
    arguments["modality_targets"]["images"]["pixels"]["pixels"] = torch.zeros(5, tiny.PIXELS + 1)
    with pytest.raises(RuntimeError):
        model(**arguments)
    assert len(model.language_model.decoder._forward_hooks) == before


def test_options_of_a_decoder_that_is_not_there_are_refused(model):
    outputs, _ = model.eval()(torch.tensor([[1, tiny.WRITE]]))
    with pytest.raises(ValueError, match="names decoder 'pixel'"):
        model.decode(outputs, {"images": {"pixel": {}}})


def test_inputs_that_no_special_token_places_are_refused(single_process):
    class Own(megatron_mimo.VisionModalitySubmodules):
        def encode(self, inputs):
            return torch.zeros(1, tiny.HIDDEN)

    video = {"video": ModuleSpec(module=Own)}
    model = MimoModel(tiny.mimo_config(), video)
    with pytest.raises(ValueError, match="modality_inputs has 'video', but special_token_ids has"):
        model(torch.tensor([[1, 2]]), modality_inputs={"video": {"anything": 1}})


class Halfway(tiny.PatchEncoder):
    """An encoder whose last layer nothing reads, as of those that give an earlier layer's states."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.last = torch.nn.Linear(width, width)

    def forward(self, x):
        states = super().forward(x)
        self.last(states)
        return states


class Given(megatron_mimo.VisionModalitySubmodules):
    def encode(self, inputs):
        return super().encode(inputs)


@pytest.mark.parametrize("kind", [megatron_mimo.VisionModalitySubmodules, Given])
def test_a_trainable_layer_that_the_loss_does_not_reach_gets_zeros(kind, single_process):
    parts = tiny.image_spec(encoders={"patches": ModuleSpec(module=Halfway)}).submodules
    model = MimoModel(tiny.mimo_config(), {"images": ModuleSpec(module=kind, submodules=parts)})
    tiny.total(model, tiny.batch()).backward()
    encoder = model.modality_submodules["images"].encoders["patches"]
    assert encoder.linear.weight.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in encoder.last.parameters())


class Unread(tiny.LinearDecoder):
    """A decoder with a layer that its loss does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.nn.Linear(4, 4)


class Shown(QueryInput):
    """A generation input with a layer that its rows do not depend on."""

    def __init__(self) -> None:
        super().__init__(hidden_size=tiny.HIDDEN, rows_per_item=1)
        self.last = torch.nn.Linear(4, 4)


def test_a_trainable_layer_of_the_writing_half_that_the_loss_does_not_reach_gets_zeros(single_process):
    spec = tiny.image_spec(decoders={"pixels": Unread()}, generation_input=Shown())
    model = MimoModel(tiny.mimo_config(), {"images": spec})
    tiny.total(model, tiny.batch()).backward()
    images = model.modality_submodules["images"]
    assert images.decoders["pixels"].linear.weight.grad.any() and images.generation_input.queries.grad.any()
    for one in (images.decoders["pixels"].last, images.generation_input.last):
        assert all(p.grad is not None and not p.grad.any() for p in one.parameters())


def test_inputs_of_an_overridden_encode_may_be_called_anything(single_process):
    class Zeros(megatron_mimo.VisionModalitySubmodules):
        def encode(self, inputs):
            return torch.zeros(inputs["how many"], tiny.HIDDEN)

    model = MimoModel(tiny.mimo_config(), {"images": ModuleSpec(module=Zeros)})
    ids = torch.tensor([[1, tiny.READ, tiny.READ, 2]])
    assert model.eval()(ids, modality_inputs={"images": {"how many": 2}})[0] is not None


def test_text_only_batches_give_zero_gradients_to_every_modality(model):
    ids = torch.tensor([[1, 2, 3, 4]])
    tiny.total(model, dict(input_ids=ids, labels=ids)).backward()
    assert not without_gradient(model)
    assert not used(model, "modality_submodules")


def test_a_text_only_batch_is_what_the_bare_language_model_gives(model):
    ids = torch.randint(0, 60, (2, 9))
    positions = torch.arange(9).expand(2, 9)
    expected = model.language_model(ids, positions, None)
    torch.testing.assert_close(model(ids)[0].language, expected, rtol=0, atol=0)


def test_hidden_states_are_those_of_a_bare_language_model_run(model):
    arguments = tiny.batch()
    ids = arguments["input_ids"].clamp(0, 60)
    ids[arguments["input_ids"] == tiny.WRITE] = tiny.WRITE
    model.eval()
    outputs, _ = model(ids)
    language = model.language_model
    embedded = language.embedding(ids, None)
    rotary = language.rotary_pos_emb(ids.shape[1])
    hidden = language.decoder(embedded, None, rotary_pos_emb=rotary)
    expected = hidden.transpose(0, 1)[ids == tiny.WRITE]
    assert torch.equal(outputs.modalities["images"].hidden, expected)


def test_the_language_model_runs_once(model):
    calls = []
    model.language_model.decoder.register_forward_hook(lambda *_: calls.append(1))
    model(**tiny.batch())
    assert len(calls) == 1


def test_inference_gives_rows_and_decode_gives_samples(model):
    arguments = tiny.batch()
    del arguments["modality_targets"], arguments["labels"]
    outputs, _ = model.eval()(**arguments)
    assert outputs.modalities["images"].hidden.shape == (5, tiny.HIDDEN)
    samples = model.decode(outputs)
    assert samples["images"]["pixels"].shape == (5, tiny.PIXELS)


def test_predecessor_rule_reads_one_position_earlier(single_process):
    torch.manual_seed(0)
    decoders = {"pixels": ModuleSpec(module=tiny.LinearDecoder, params={"position_rule": "predecessor"})}
    images = {"images": tiny.image_spec(decoders=decoders), "audio": tiny.audio_spec()}
    model = MimoModel(tiny.mimo_config(), images).eval()
    ids = torch.tensor([[1, 2, tiny.WRITE, tiny.WRITE, 3]])
    language = model.language_model
    hidden = language.decoder(language.embedding(ids, None), None, rotary_pos_emb=language.rotary_pos_emb(5))
    assert torch.equal(model(ids)[0].modalities["images"].hidden, hidden[1:3, 0])


def test_attention_mask_is_honoured(model):
    ids = torch.tensor([[1, 2, 3, 4]])
    blind = ~torch.eye(4, dtype=torch.bool)[None, None]  # each token sees itself alone
    model.eval()
    masked = model(ids, attention_mask=blind)[0].language
    alone = model(ids[:, 3:])[0].language
    causal = model(ids)[0].language
    torch.testing.assert_close(masked[:, 3], alone[:, 0])
    assert not torch.allclose(causal[:, 3], masked[:, 3])


def test_replacing_submodules_at_construction(single_process):
    config = tiny.mimo_config()
    wider = tiny.image_spec(
        encoders={"patches": ModuleSpec(module=tiny.PatchEncoder, params={"width": 24})},
        input_projections=[tiny.linear(24, tiny.HIDDEN)],
    )
    model = MimoModel(config, modality_submodules={"images": wider})
    assert model.modality_submodules["images"].encoders["patches"].linear.out_features == 24
    assert config.modality_submodules["images"] is not wider
    tiny.total(model, tiny.batch()).backward()


def test_a_frozen_encoder_gets_no_gradient_and_the_rest_does(model):
    model.modality_submodules["images"].encoders.requires_grad_(False)
    tiny.total(model, tiny.batch()).backward()
    assert all("images.encoders" in name for name in without_gradient(model))


def test_one_placement_serves_collator_and_model(model):
    arguments = tiny.batch()
    placement = model.place(arguments["input_ids"])
    expected = tiny.total(model, arguments)
    assert torch.equal(tiny.total(model, {**arguments, "placement": placement}), expected)


def test_the_callers_batch_is_left_alone(model):
    arguments = tiny.batch()
    before = deepcopy(arguments)
    model(**arguments)
    assert torch.equal(before["input_ids"], arguments["input_ids"])
    flat_before, flat_after = torch.utils._pytree.tree_flatten(before), torch.utils._pytree.tree_flatten(arguments)
    assert flat_before[1] == flat_after[1]
    assert all(torch.equal(a, b) for a, b in zip(flat_before[0], flat_after[0], strict=True))


def test_nan_embeddings_pass(model):
    arguments = tiny.batch()
    arguments["modality_inputs"]["audio"]["frames"]["x"].fill_(float("nan"))
    assert tiny.total(model, arguments).isnan()


def change(**changes):
    return lambda arguments: {**arguments, **changes}


def images(x):
    return shown_images({"patches": {"x": x}})


def shown_images(inputs):
    return change(modality_inputs={**tiny.batch()["modality_inputs"], "images": inputs})


def targets(**given):
    return change(modality_targets=given)


IDS = tiny.batch()["input_ids"]
BAD_VALUES = {
    "too few embeddings": (images(torch.zeros(3, tiny.PIXELS)), "images.*sample 0.* 4 .*3"),
    "too many embeddings": (images(torch.zeros(5, tiny.PIXELS)), "images.*sample.*4.*5"),
    "no inputs": (change(modality_inputs={}), "images.*sample 0.*4.*0"),
    "unknown modality": (change(modality_inputs={"video": {"x": {}}}), "modality 'video'"),
    "unknown encoder": (shown_images({"clip": {"x": 1}}), r"modality_inputs\['images'\] has inputs for encoder 'clip'"),
    "empty batch": (change(input_ids=IDS[:0]), "empty batch"),
    "one dim": (change(input_ids=IDS[0]), r"must be \[B, S\]"),
    "labels": (change(labels=IDS[:, 1:]), r"labels has shape \[3, 15\]"),
    "loss mask": (change(loss_mask=torch.ones(3)), r"loss_mask has shape \[3\]"),
    "positions": (change(position_ids=torch.zeros(1, 16)), "position_ids has shape"),
    "attention mask": (
        change(attention_mask=torch.ones(3, 1, 16, 15, dtype=torch.bool)),
        "attention_mask has shape",
    ),
    "flat attention mask": (
        change(attention_mask=torch.ones(3, 16, dtype=torch.bool)),
        "attention_mask must be .B or 1, heads",
    ),
    "inputs that nothing places": (
        change(modality_inputs={**tiny.batch()["modality_inputs"], "video": {"x": {}}}),
        "modality 'video'",
    ),
    "no targets": (change(modality_targets={}), "images: sample 0 has 3 generation tokens but 0"),
    "another batch's placement": (
        change(
            placement=build_placement(IDS.roll(1, 1), {"images": tiny.READ, "audio": tiny.HEAR}, {"images": tiny.WRITE})
        ),
        "placement was not made from these input_ids",
    ),
    "a placement that ignores packing": (
        change(
            placement=build_placement(IDS, {"images": tiny.READ, "audio": tiny.HEAR}),
            packed_seq_params=PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=torch.tensor([0, 16]),
                cu_seqlens_kv=torch.tensor([0, 16]),
                max_seqlen_q=16,
                max_seqlen_kv=16,
            ),
        ),
        "disagree on whether sequences are packed",
    ),
    "targets without decoder": (targets(audio={"wave": {"x": 1}}), "generation_token_ids has"),
    "unknown decoder": (targets(images={"codes": {"x": 1}}), "decoder 'codes'"),
    "unknown target modality": (targets(video={"x": {}}), "modality 'video'"),
    "too few targets": (
        targets(images={"pixels": {"pixels": torch.zeros(4, tiny.PIXELS)}}),
        "images: sample 1 has 2 generation tokens but 1 target rows",
    ),
    "too many targets": (
        targets(images={"pixels": {"pixels": torch.zeros(6, tiny.PIXELS)}}),
        "images: sample 2 has 0 generation tokens but 1 target rows",
    ),
}
BAD_TYPES = {
    "ids": (change(input_ids=[[1]]), "input_ids must be a torch.Tensor"),
    "float ids": (change(input_ids=IDS.float()), "must be int64 or int32"),
    "labels": (change(labels=[[1]]), "labels must be a torch.Tensor"),
    "float mask": (change(attention_mask=torch.ones(3, 1, 16, 16)), "attention_mask must be bool"),
    "inputs": (change(modality_inputs=[1]), "modality_inputs must map"),
    "nested inputs": (change(modality_inputs={"images": torch.ones(2)}), "must map encoder"),
    "keyword": (shown_images({"patches": {"y": 1}}), r"modality_inputs\['images'\]\['patches'\] has keyword 'y'"),
    "keywords": (shown_images({"patches": torch.ones(1)}), "must map keyword"),
    "targets": (change(modality_targets={"images": {"pixels": 1}}), "must map keyword"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values_are_refused(model, case):
    mistake, message = BAD_VALUES[case]
    with pytest.raises(ValueError, match=message):
        model(**mistake(tiny.batch()))


def test_a_wrong_count_is_blamed_on_the_sample_that_has_it(model):
    """Two images of four patches, five tokens in the first sample: totals alone would blame the second."""
    ids = torch.randint(0, 60, (2, 12))
    ids[0, 2:7] = ids[1, 2:6] = tiny.READ
    inputs = {"images": {"patches": {"x": torch.zeros(2, 4, tiny.PIXELS)}}}
    with pytest.raises(ValueError, match="images: sample 0 has 5 special tokens but 4 embeddings"):
        model(ids, modality_inputs=inputs)


@pytest.mark.parametrize("case", BAD_TYPES)
def test_bad_types_are_refused(model, case):
    mistake, message = BAD_TYPES[case]
    with pytest.raises(TypeError, match=message):
        model(**mistake(tiny.batch()))


def test_widths_that_do_not_fit_are_named_at_construction(single_process):
    narrow = tiny.image_spec(input_projections=[tiny.linear(16, 8)])
    with pytest.raises(ValueError, match="'images': input_projections.0. has output width 8.*32"):
        MimoModel(tiny.mimo_config(), {"images": narrow})
    narrow = tiny.image_spec(output_projections=[tiny.linear(8, tiny.HIDDEN)])
    with pytest.raises(ValueError, match="'images': output_projections.0. has input width 8.*32"):
        MimoModel(tiny.mimo_config(), {"images": narrow})


def test_a_spec_of_something_else_is_refused(single_process):
    with pytest.raises(TypeError, match="must be the spec of a ModalitySubmodules"):
        MimoModel(tiny.mimo_config(), {"images": ModuleSpec(module=nn.Linear)})


def test_interleaving_over_two_stages_that_would_mix_messages_is_refused(single_process):
    config = tiny.language_config(
        num_layers=4,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
    )
    with pytest.raises(ValueError, match="needs overlap_p2p_comm=True"):
        MimoModel(tiny.mimo_config(tiny.language_spec(config)), vp_stage=0)
