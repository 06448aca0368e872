"""Strict loading: each way in which weights may not be a model's is refused, and what they may differ in is not."""

import logging

import pytest
import timm
import torch
from patients import OLD_TIMM, build, differences, snapshot
from timm.models import adapt_input_conv, load_pretrained
from torch import nn

from se_surgery import ArtefactError, SurgeryError, add_se
from se_surgery.files.stem import fit_stems
from se_surgery.files.strict import checked

# What timm says about the weights of `small()`.
CFG = {"num_classes": 5, "input_size": (3, 8, 8), "first_conv": "stem", "classifier": "head.fc"}


class Small(nn.Module):
    """A stem, a norm and a head of two layers, which a model without classes does not have, as in timm's MetaFormer."""

    def __init__(self, classes=5, channels=3):
        super().__init__()
        self.num_classes = classes
        self.stem = nn.Conv2d(channels, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Sequential()
        if classes:
            self.head.add_module("hidden", nn.Linear(4, 6))
            self.head.add_module("fc", nn.Linear(6, classes))
        else:
            self.head = nn.Identity()


def weights(**changes):
    """The weights of a `Small`, some of them replaced or, with None, left out."""
    torch.manual_seed(0)
    state = {**Small().state_dict(), **{key.replace("__", "."): value for key, value in changes.items()}}
    return {key: value for key, value in state.items() if value is not None}


def refused(state, model=None, cfg=CFG, **wanted):
    """The error's text; the model is as it was."""
    model = model or Small()
    before = snapshot(model)
    with pytest.raises(ArtefactError) as caught:
        checked(state, model, cfg, **wanted)
    assert not differences(before, snapshot(model))
    assert str(caught.value).endswith("."), "the last sentence says what to do"
    return str(caught.value)


NAN = float("nan")
# What the weights have otherwise than they should, and what is said of it.
WRONG = {
    "missing": ({"norm__weight": None}, "norm.weight is missing"),
    "missing buffer": ({"norm__running_mean": None}, "norm.running_mean is missing"),
    "unknown": ({"se__fc1__weight": torch.zeros(1)}, "se.fc1.weight is not the model's"),
    "shape": ({"norm__weight": torch.ones(3)}, "norm.weight is 3 and not 4"),
    "fewer dimensions": ({"norm__num_batches_tracked": torch.zeros(1, dtype=torch.int64)}, "is 1 and not a number"),
    "transposed": ({"head__hidden__weight": torch.ones(4, 6)}, "head.hidden.weight is 4x6 and not 6x4"),
    "integer": ({"norm__weight": torch.ones(4, dtype=torch.int64)}, "norm.weight is of torch.int64 and not of"),
    "bool": ({"norm__weight": torch.ones(4, dtype=torch.bool)}, "norm.weight is of torch.bool"),
    "complex": ({"norm__weight": torch.ones(4, dtype=torch.complex64)}, "norm.weight is of torch.complex64"),
    "float8": ({"norm__weight": torch.ones(4).to(torch.float8_e4m3fn)}, "norm.weight is of torch.float8_e4m3fn"),
    "float for integer": ({"norm__num_batches_tracked": torch.tensor(1.0)}, "is of torch.float32 and not of"),
    "NaN": ({"norm__bias": torch.tensor([0.0, NAN, 0, 0])}, "norm.bias holds NaN or infinity"),
    "infinity": ({"stem__bias": torch.tensor([0.0, 0, 0, -float("inf")])}, "stem.bias holds NaN or infinity"),
    "NaN in half": ({"norm__bias": torch.full((4,), NAN).half()}, "norm.bias holds NaN or infinity"),
    "NaN statistics": ({"norm__running_mean": torch.full((4,), NAN)}, "norm.running_mean holds NaN"),
    "negative variance": ({"norm__running_var": torch.tensor([1.0, 1, 1, -1e-9])}, "is a negative variance"),
    "no tensor": ({"norm__bias": [0.0] * 4}, "norm.bias is a list and no tensor"),
    "meta": ({"norm__bias": torch.zeros(4, device="meta")}, "norm.bias has no values to read"),
    "sparse": ({"norm__bias": torch.zeros(4).to_sparse()}, "norm.bias has no values to read"),
}


@pytest.mark.parametrize("wanted", [{}, {"num_classes": 7}, {"num_classes": 0}], ids=str)
@pytest.mark.parametrize("case", WRONG)
def test_refused_whatever_the_number_of_classes(case, wanted):
    changes, message = WRONG[case]
    if wanted.get("num_classes") == 0 and "head" in next(iter(changes)):
        pytest.skip("a model without classes does not have that layer")
    text = refused(weights(**changes), Small(wanted.get("num_classes", 5)), **wanted)
    assert message in text and "1 are wrong" in text


def test_as_it_is():
    state, model = weights(), Small()
    taken = checked(state, model, CFG)
    assert taken == state and list(taken) == list(state)
    assert all(taken[key] is value for key, value in state.items())
    assert checked(weights(), Small())
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert checked({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, model)


def test_every_key_is_counted_and_five_are_named():
    text = refused({}, where="model.safetensors")
    assert text.startswith(
        "model.safetensors does not fit this Small: of 11 keys 11 are wrong (stem.weight is missing;"
    )
    assert text.count("is missing") == 5 and "; and 6 more)" in text


@pytest.mark.parametrize("state", [None, [1], torch.zeros(1)], ids=["None", "list", "tensor"])
def test_no_state_dict(state):
    assert "and no mapping of names to tensors" in refused(state)


def test_other_keys_than_strings():
    assert "3 is not the model's" in refused({**weights(), 3: torch.zeros(1)})


# Classes of the weights and of the model.
CLASSES = [(5, 7), (5, 0), (0, 5), (5, 1), (5, 5), (0, 0)]


@pytest.mark.parametrize(("saved", "wanted"), CLASSES)
def test_another_number_of_classes(saved, wanted):
    state = Small(saved).state_dict()
    if not saved:  # a head that timm would have left as it is
        state |= {key: value for key, value in weights().items() if "hidden" in key and wanted}
    assert checked(state, Small(wanted), {**CFG, "num_classes": saved}, num_classes=wanted)


def test_a_classifier_that_is_not_what_the_configuration_says():
    """timm drops it without a word, as if another number of classes had been asked for."""
    cfg = {**CFG, "num_classes": 1000}
    assert "the configuration says 1000 classes" in refused(weights(), Small(7), cfg, num_classes=7)
    assert "the configuration says 1000 classes" in refused(weights(), Small(0), cfg, num_classes=0)
    assert "head.fc.weight is 5x6 and not 1000x6" in refused(weights(), Small(1000), cfg, num_classes=1000)
    assert "head.fc.weight is missing" in refused(weights(head__fc__weight=None), Small(7), num_classes=7)
    narrow = weights(head__fc__weight=torch.zeros(5, 3))
    assert "is 5x3, which is not 7x6 but for the number of classes" in refused(narrow, Small(7), num_classes=7)


@pytest.mark.parametrize("classes", [7, 0])
def test_a_dropped_head_is_looked_at_too(classes):
    bad = weights(head__fc__bias=torch.full((5,), NAN))
    assert "head.fc.bias holds NaN" in refused(bad, Small(classes), num_classes=classes)
    bad = weights(head__fc__bias=torch.zeros(5, dtype=torch.int32))
    assert "head.fc.bias is of torch.int32" in refused(bad, Small(classes), num_classes=classes)


def test_a_dropped_head_may_have_counted_batches():
    """RepViT's classifier begins with a BatchNorm."""
    counted = weights(head__norm__num_batches_tracked=torch.tensor(3))
    assert checked(counted, Small(0), CFG, num_classes=0)
    assert "head.norm.num_batches_tracked is not the model's" in refused(counted, Small(7), num_classes=7)


def test_only_the_head_goes_with_the_classes():
    for key in ("body.weight", "headless"):
        text = refused({**weights(), key: torch.zeros(1)}, Small(0), num_classes=0)
        assert f"{key} is not the model's" in text


# Shape of the saved first convolution, channels of the images it was for, channels wanted, and whether it is taken.
STEMS = [
    ((4, 3, 3, 3), 3, 1, True),
    ((4, 3, 3, 3), 3, 5, True),
    ((4, 1, 3, 3), 1, 3, True),
    ((4, 12, 3, 3), 3, 1, True),
    ((4, 12, 3, 3), 3, 4, False),
    ((4, 3, 5, 5), 3, 1, False),
    ((3, 3, 3, 3), 3, 1, False),
    ((4, 2, 3, 3), 3, 1, False),
    ((4, 3, 3), 3, 1, False),
]


@pytest.mark.parametrize(("shape", "saved", "wanted", "taken"), STEMS, ids=str)
def test_another_number_of_channels(shape, saved, wanted, taken):
    model = Small(channels=max(shape[1] * wanted // saved, 1) if len(shape) == 4 else wanted)
    state, cfg = weights(stem__weight=torch.zeros(shape)), {**CFG, "input_size": (saved, 8, 8)}
    if taken:
        assert checked(state, model, cfg, in_chans=wanted)
    else:
        assert f"cannot be converted from {saved} to {wanted} channels" in refused(state, model, cfg, in_chans=wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "saved", "wanted"), [row[:3] for row in STEMS if row[3]], ids=str)
def test_a_stem_is_converted_as_timm_does(shape, saved, wanted, dtype):
    if OLD_TIMM and saved != 3:
        pytest.skip(f"timm {timm.__version__} converts weights for images of three channels only")
    weight = torch.randn(shape).to(dtype)
    given = {"a.weight": weight, "b.weight": weight, "a.bias": weight}
    fitted = fit_stems(given, ("a",), saved, wanted)
    assert torch.equal(fitted.pop("a.weight"), adapt_input_conv(wanted, weight, *(() if OLD_TIMM else (saved,))))
    assert fitted == {"b.weight": weight, "a.bias": weight}


def test_only_the_stem_goes_with_the_channels():
    cfg = {**CFG, "first_conv": "norm"}
    assert "stem.weight is 4x3x3x3 and not 4x1x3x3" in refused(weights(), Small(channels=1), cfg, in_chans=1)
    assert "stem.weight is 4x3x3x3 and not 4x1x3x3" in refused(weights(), Small(channels=1))


# pretrained_cfg that mean nothing.
CFGS = [
    ({"num_classes": -1}, "num_classes=-1"),
    ({"num_classes": True}, "num_classes=True"),
    ({"num_classes": "5"}, "num_classes='5'"),
    ({"num_classes": None}, "num_classes=None"),
    ({"input_size": ["3", 8, 8]}, "input_size='3'"),
    ({"input_size": {"a": 1}}, "input_size={'a': 1}"),
    ({"classifier": 3}, "classifier=3"),
    ({"classifier": [None]}, "classifier=[None]"),
    ({"first_conv": {}}, "first_conv={}"),
    ({"label_offset": 1}, "label_offset=1"),
]


@pytest.mark.parametrize(("changes", "message"), CFGS, ids=str)
def test_configurations_that_mean_nothing(changes, message):
    assert message in refused(weights(), cfg={**CFG, **changes}, num_classes=7)


def test_in_timms_own_path(caplog):
    """timm alone takes these weights, with a random SE; with the check it does not. TypeError would be asked again."""
    model = add_se(build("test_resnet"), init="paper")
    cfg = {**model.pretrained_cfg, "source": None, "file": None, "hf_hub_id": None}
    state = {key: value for key, value in model.state_dict().items() if "layer2.0.se" not in key}
    fresh = add_se(build("test_resnet", num_classes=7), init="paper")

    def load(state, **options):
        load_pretrained(fresh, {**cfg, "state_dict": dict(state)}, num_classes=7, **options)

    def check(state, model):
        return checked(state, model, cfg, num_classes=7)

    with caplog.at_level(logging.CRITICAL):
        load(state)
        before = snapshot(fresh)
        with pytest.raises(SurgeryError, match=r"layer2\.0\.se\.fc1\.weight is missing"):
            load(state, filter_fn=check)
        assert not differences(before, snapshot(fresh))
        load(model.state_dict(), filter_fn=check)
    for key, value in model.state_dict().items():
        assert key.startswith("fc.") or torch.equal(fresh.state_dict()[key], value)


# Networks whose head or stem is special, with the arguments they are asked for with.
SPECIAL = {
    "head of two layers": ("convformer_s18", {"num_classes": 0}),
    "stem of three convolutions, one channel": ("resnet26d", {"in_chans": 1, "num_classes": 3}),
    "space to depth": ("tresnet_m", {"in_chans": 1}),
    "two heads": ("test_resnet", {"num_classes": 3, "in_chans": 6}),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_what_timm_converts_is_taken(case):
    name, wanted = SPECIAL[case]
    with torch.device("meta"):
        saved, asked = timm.create_model(name), timm.create_model(name, **wanted)
    state = {key: torch.zeros_like(value, device="cpu") for key, value in saved.state_dict().items()}
    assert checked(state, asked, saved.pretrained_cfg, **wanted)
    state.pop(next(key for key in state if "bn" in key or "norm" in key))
    with pytest.raises(ArtefactError, match="is missing"):
        checked(state, asked, saved.pretrained_cfg, **wanted)
