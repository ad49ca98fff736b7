"""SAQ: every promise of the method, by hand, in float64. The numbered checks are those of its specification."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from callbacks.saq import SAQ
from research.learning.module import QuantModule
from research.quant.layers import quant_layers, quantized_weights
from tests.callbacks.saq_host import TASK, Record, host, images, liq, saq, weights_only
from tests.learning.tiny import LSQ, RESNET, fit, make_module, state, tiny_net


@pytest.mark.parametrize("settings", [{"case": 1}, {"case": 2}, {"case": 3}, {"adaptive": True}], ids=str)
def test_radius_zero_is_plain_training_bit_for_bit(settings: dict[str, Any]) -> None:  # check 1
    trained = []
    for mechanics in ({}, saq(rho=0.0, **settings)):
        module = make_module(mechanics, quantizer=LSQ, model=tiny_net(dropout=0.25))
        fit(module, max_epochs=1)
        trained.append(state(module.net))
    assert [name for name, value in trained[1].items() if not torch.equal(value, trained[0][name])] == []


@pytest.mark.parametrize("case", [1, 2, 3])
def test_all_perturbations_together_have_the_norm_of_the_radius(case: int) -> None:  # check 2
    module = host(saq(case=case, rho=0.3, include_weight_ranges=True))
    record = Record(module)
    record.objective(images())
    assert record.norm == pytest.approx(0.3, rel=1e-6)
    assert record.moves.keys() == {name for name, _ in module.net.named_parameters()}


def test_two_layers_of_equal_gradients_share_the_radius() -> None:  # check 2
    found = SAQ(rho=2.0).perturbation({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, -5.0])}, {}, set())
    torch.testing.assert_close(found["a"].norm(), found["b"].norm())
    assert float(found["a"].norm()) == pytest.approx(2.0**0.5)


@pytest.mark.parametrize("case", [1, 3])
def test_nothing_of_the_ascent_is_left_and_latent_weights_never_move(case: int) -> None:  # check 3
    module = host(saq(case=case, rho=5.0))
    before = state(module.net)
    record = Record(module)
    record.objective(images())
    assert all(layer.weight_offset is None for _, layer in quant_layers(module.net))
    assert all(torch.equal(p, before[name]) for name, p in module.net.named_parameters())
    latent = {f"{name}.weight" for name, _ in quant_layers(module.net)}
    assert record.states[0] is None and not latent & set(record.states[1] or {})
    assert latent <= record.moves.keys()
    for name, weight in quantized_weights(module.net).items():
        quantizer = module.net.get_submodule(name).weight_quantizer
        assert torch.equal(weight, quantizer.dequantize(quantizer.codes(module.net.get_submodule(name).weight)))


def test_case_1_is_case_3_exactly_as_far_as_nothing_is_clipped() -> None:  # check 4
    moves = {}
    for clip in (10.0, 0.05):
        for case in (1, 3):
            module = weights_only(liq(4, normalise=False, clip=clip), case=case, rho=0.2)
            record = Record(module)
            record.objective(images())
            moves[clip, case] = record.moves["conv1.weight"]
    torch.testing.assert_close(moves[10.0, 1], moves[10.0, 3], rtol=1e-9, atol=1e-14)
    clipped = module.net.conv1.weight.detach().abs() > 0.05
    assert 0 < int(clipped.sum()) < clipped.numel()
    assert not moves[0.05, 1][clipped].any()
    assert (moves[0.05, 3][clipped] != 0).float().mean() > 0.9


def test_weight_normalisation_rescales_the_perturbation_of_case_1() -> None:
    moves = []
    for case in (1, 3):
        record = Record(weights_only(liq(4, "auto", clip=50.0), case=case, rho=0.2))
        record.objective(images())
        moves.append(record.moves)
    ratio = {name: float(moves[0][name].norm() / moves[1][name].norm()) for name in moves[0]}
    spread = float(record.module.net.conv1.weight.detach().std())
    assert ratio["conv1.weight"] / ratio["fc.weight"] == pytest.approx(1 / spread, rel=1e-6)


def test_a_small_perturbation_is_rounded_away_in_case_2_only() -> None:  # check 5
    rho, losses = 1e-4, {}
    for case in (2, 3):
        module = weights_only(liq(2, normalise=False), case=case, rho=rho)
        record = Record(module)
        evaluation = record.objective(images())
        norm = float(torch.cat([g.flatten() for g in record.gradients.values()]).norm())
        losses[case] = [value.item() for value in (evaluation.terms["task"], evaluation.loss)]
    assert losses[2][1] == losses[2][0]
    assert losses[3][1] - losses[3][0] == pytest.approx(rho * norm, rel=1e-2)


def test_the_rise_over_the_radius_tends_to_the_norm_of_the_gradient() -> None:  # check 6
    errors = []
    for rho in (1e-3, 1e-5):
        record = Record(weights_only(liq(4, "auto"), rho=rho))
        evaluation = record.objective(images())
        norm = float(torch.cat([g.flatten() for g in record.gradients.values()]).norm())
        errors.append(abs((evaluation.loss - evaluation.terms["task"]).item() / rho / norm - 1))
    assert errors[1] < 1e-4
    assert errors[1] < errors[0]


def test_case_2_of_everything_is_sam() -> None:
    trained = []
    for mechanics in (saq(case=2, include_weight_ranges=True), {"sam": {"_target_": "callbacks.sam.SAM", "rho": 0.05}}):
        module = make_module(mechanics, model=tiny_net(dropout=0.25))
        fit(module, max_epochs=1)
        trained.append(state(module.net))
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("include_bn", {"bn1.weight", "bn1.bias"}),
        ("include_input_ranges", {"conv1.input_quantizer.raw_scale", "fc.input_quantizer.raw_scale"}),
        ("include_weight_ranges", {"conv1.weight_quantizer.raw_scale", "fc.weight_quantizer.raw_scale"}),
    ],
)
def test_options_say_what_is_perturbed(option: str, names: set[str]) -> None:
    perturbed = []
    for on in (False, True):
        record = Record(host(saq(**{option: on})))
        record.objective(images())
        perturbed.append(set(record.moves))
    assert perturbed[1] - perturbed[0] == names
    assert {"conv1.weight", "fc.weight", "fc.bias"} <= perturbed[0] & perturbed[1]


@pytest.mark.parametrize("case", [1, 2, 3])
def test_the_ends_alone_can_be_perturbed_as_the_released_search_does(case: int) -> None:
    record = Record(host(saq(case=case, rho=0.3, layers="ends"), model=RESNET))
    record.objective(images())
    ends = ("conv1.", "fc.")
    assert {"conv1.weight", "fc.weight", "fc.bias", "conv1.input_quantizer.raw_scale"} <= record.moves.keys()
    assert {"layer1.0.bn1.weight", "layer3.0.bn2.bias"} <= record.moves.keys()
    assert [name for name in record.moves if not name.startswith(ends) and "bn" not in name] == []
    assert record.norm == pytest.approx(0.3, rel=1e-6)


def test_the_adaptive_form_adapts_all_but_biases() -> None:
    record = Record(host(saq(adaptive=True)))
    record.objective(images())
    assert record.plain == {"fc.bias", "bn1.bias"}
    zeros = quantized_weights(record.module.net)["conv1"] == 0
    assert zeros.any() and not record.moves["conv1.weight"][zeros].any()


def test_layers_that_the_loss_does_not_see_are_left_alone() -> None:
    module = make_module(saq(rho=0.3), model={"_target_": "tests.callbacks.saq_host.Unused"}, task=TASK).double()
    for layer in (module.net.conv1, module.net.fc):
        layer.weight_quantizer.initialise(layer.weight)
        layer.input_quantizer.initialise(images()[0])
    record = Record(module)
    record.objective(images())
    assert not [name for name in record.moves if name.startswith(("idle", "norm"))]
    assert record.norm == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("case", [1, 2, 3])
def test_a_frozen_weight_does_not_move(case: int, adaptive: bool) -> None:
    module = host(saq(case=case, rho=0.3, adaptive=adaptive))
    module.net.conv1.weight.requires_grad_(False)
    record = Record(module)
    record.objective(images())
    assert "conv1.weight" not in record.moves and "fc.weight" in record.moves


def test_a_weight_that_its_quantizer_holds_moves_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = host(saq(rho=0.3))
    layer: Any = module.net.conv1
    layer.weight.requires_grad_(False)
    monkeypatch.setattr(type(layer.weight_quantizer), "owns_weight", True)
    record = Record(module)
    record.objective(images())
    assert "conv1.weight" in record.moves


@pytest.mark.parametrize(("statistics", "updates"), [("counted", 1), ("all", 2)])
def test_statistics_count_one_pass_or_all(statistics: str, updates: int) -> None:
    module, plain = host(saq(rho=5.0, statistics=statistics)), host({})
    for each in (module, plain):
        each.objective(images())
    assert int(module.net.bn1.num_batches_tracked) == updates
    assert torch.equal(module.net.bn1.running_mean, plain.net.bn1.running_mean) == (statistics == "counted")


def test_both_passes_see_one_noise_and_the_next_step_another() -> None:
    module = host(saq(adaptive=True), model=tiny_net(batchnorm=False, dropout=0.5))
    masks: list[Tensor] = []
    module.net.dropout.register_forward_hook(lambda layer, inputs, output: masks.append(output == 0))
    for _ in range(2):
        module.objective(images())
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("settings", [{"case": 1}, {"case": 2}, {"case": 3}, {"adaptive": True, "rho": 1.0}], ids=str)
def test_a_given_state_is_what_is_perturbed(settings: dict[str, Any]) -> None:
    given, moved = (weights_only(liq(3, "auto"), **settings) for _ in range(2))
    shifted = {name: p + 0.05 * torch.sin(torch.arange(p.numel()).reshape(p.shape)) for name, p in named(given)}
    with torch.no_grad():
        for name, parameter in named(moved):
            parameter.copy_(shifted[name])
    torch.testing.assert_close(given.objective(images(), shifted).loss, moved.objective(images()).loss)


def named(module: QuantModule) -> list[tuple[str, nn.Parameter]]:
    return list(module.net.named_parameters())


def test_the_rise_survives_bfloat16() -> None:
    rises = []
    for enabled in (False, True):
        module = host(saq(rho=0.2)).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            evaluation = module.objective((images()[0].float(), images()[1]))
        rises.append(float((evaluation.loss - evaluation.terms["task"]).detach()))
    assert rises[0] > 0.05
    assert rises[1] == pytest.approx(rises[0], rel=0.2)


def test_a_network_without_quantized_weights_is_refused() -> None:
    for recipe in ({}, {"input": LSQ["input"]}):
        with pytest.raises(ValueError, match=r"^callbacks\.saq: the network has no quantized weights[^\n]*$"):
            make_module(saq(), quantizer=recipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"case": 4}, "saq.case=4"),
        ({"rho": -1}, "saq.rho=-1"),
        ({"eta": -1}, "saq.eta=-1"),
        ({"statistics": "x"}, "=x"),
        ({"layers": "first"}, "saq.layers=first"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAQ(**settings)


def test_the_promise_under_ddp_depends_on_the_shared_perturbation() -> None:
    assert (SAQ().ddp, SAQ(sync_perturbation=True).ddp) == ("per_replica", "exact")
