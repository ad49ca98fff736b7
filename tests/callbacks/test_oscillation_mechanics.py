"""The mechanics against oscillation in a fit: what they see, what they leave alone, and what is deployed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from callbacks.oscillation import OscillationDampening, OscillationFreezing, OscillationTracker
from callbacks.oscillation.dampening import dampening_loss
from callbacks.oscillation.frozen import used_codes
from research.deploy import load_artifact, save_artifact
from research.deploy.deployed import deployed_weights
from research.learning.finalise import finalise
from research.learning.module import QuantModule
from research.quant.batchnorm import reestimate_batchnorm
from research.quant.calibrate import calibrate
from research.quant.oscillation import start, track
from tests.learning.tiny import LSQ, RESNET, SGD, fit, make_module, state, tiny_net

NOISY = tiny_net(dropout=0.25)
FAST = {**SGD, "lr": 0.5, "momentum": 0.5}
TWO_BITS: dict[str, Any] = {"weight": {**LSQ["weight"], "bits": 2}}


def config(slug: str, **options: Any) -> dict[str, Any]:
    kind = {
        "oscillation_dampening": "OscillationDampening",
        "oscillation_freezing": "OscillationFreezing",
        "oscillation_tracker": "OscillationTracker",
    }[slug]
    return {slug: {"_target_": f"callbacks.oscillation.{kind}", **options}}


EAGER = config("oscillation_freezing", threshold_start=0.2, threshold_final=0.2, warmup=0.0, momentum=0.5)
SAM = {"sam": {"_target_": "callbacks.sam.SAM", "rho": 0.05}}


def named(module: QuantModule, slug: str) -> Any:
    return next(mechanic for mechanic in module.active if mechanic.slug == slug)


class Watch(pl.Callback):
    """Keeps the codes that every layer uses: at the start and after every step."""

    def __init__(self, slug: str) -> None:
        self.slug = slug
        self.codes: dict[str, list[Tensor]] = {}

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.codes = {name: [used_codes(layer)] for name, layer in named(module, self.slug).layers.items()}

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
        for name, layer in named(module, self.slug).layers.items():
            self.codes[name].append(used_codes(layer))


def trained(mechanics: dict[str, Any], callbacks: tuple[pl.Callback, ...] = (), **settings: Any) -> QuantModule:
    """Two epochs, four steps and an evaluation each, at a rate that makes codes oscillate."""
    module = make_module(mechanics, **{"optimizer": FAST, "quantizer": TWO_BITS, **settings})
    fit(module, max_epochs=2, callbacks=callbacks)
    return module


@pytest.mark.parametrize("other", [{}, SAM], ids=["alone", "sam"])
def test_the_tracker_looks_once_a_step_and_never_in_evaluations_or_second_passes(other: dict[str, Any]) -> None:
    watch = Watch("oscillation_tracker")
    module = trained({**other, **config("oscillation_tracker", momentum=0.1)}, (watch,))
    total = 0
    for name, history in named(module, "oscillation_tracker").histories.items():
        first, *later = watch.codes[name]
        assert len(later) == 8
        expected = start(first)
        for codes in later:
            expected = track(expected, codes, 0.1)
        assert torch.equal(history.frequency, expected.frequency)
        assert torch.equal(history.oscillations.long(), expected.oscillations.long())
        total += int(history.oscillations.sum())
    assert total > 0


def test_training_with_the_tracker_is_training_without_it() -> None:
    plain, measured = (
        trained(mechanics, model=NOISY) for mechanics in ({}, config("oscillation_tracker", momentum=0.5))
    )
    after = state(measured.net)
    assert all(torch.equal(value, after[name]) for name, value in state(plain.net).items())


def test_the_tracker_sees_frozen_codes_stand_still() -> None:
    moving, frozen = (trained({**mechanics, **config("oscillation_tracker")}) for mechanics in ({}, EAGER))
    for name, layer in named(frozen, "oscillation_freezing").layers.items():
        seen = named(frozen, "oscillation_tracker").histories[name].codes
        assert torch.equal(seen.int(), used_codes(layer))
    few, many = (named(module, "oscillation_tracker").fraction("oscillations") for module in (frozen, moving))
    assert 0 < float(few) <= float(many)


def test_what_is_logged() -> None:
    mechanics = {**EAGER, **config("oscillation_tracker", limit=0.0), **config("oscillation_dampening")}
    module = make_module(mechanics, optimizer=FAST, quantizer=TWO_BITS)
    metrics = fit(module, max_epochs=2).callback_metrics
    histories = named(module, "oscillation_tracker").histories.values()
    oscillated, weights = (sum(int(x) for x in xs) for xs in zip(
        *((int((h.oscillations > 0).sum()), h.codes.numel()) for h in histories), strict=True))  # fmt: skip
    assert float(metrics["oscillation_tracker/ever_oscillated"]) == pytest.approx(oscillated / weights)
    assert float(metrics["oscillation_tracker/oscillating"]) == pytest.approx(oscillated / weights)
    assert 0 < float(metrics["oscillation_freezing/frozen"]) < 1
    assert float(metrics["oscillation_freezing/threshold"]) == pytest.approx(0.2)
    assert float(metrics["oscillation_dampening/strength"]) == pytest.approx(0.1)


# -- freezing ------------------------------------------------------------------------------------------------------


def test_a_frozen_code_stays_for_the_rest_of_the_run() -> None:
    class Frozen(Watch):
        masks: list[dict[str, Tensor]] = []

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
            super().on_train_batch_end(trainer, module)
            histories = named(module, self.slug).histories
            self.masks.append({name: history.frozen.clone() for name, history in histories.items()})

    watch = Frozen("oscillation_freezing")
    module = trained(EAGER, (watch,))
    for name, history in named(module, "oscillation_freezing").histories.items():
        assert bool(history.frozen.any()) and not bool(history.frozen.all())
        for step, mask in enumerate(masks[name] for masks in watch.masks):
            assert torch.equal(watch.codes[name][step + 1][mask], history.frozen_codes[mask].int())
            assert bool(history.frozen[mask].all())


def deployable(mechanics: dict[str, Any], **settings: Any) -> QuantModule:
    """A trained residual network whose frozen weights have drifted far from their codes."""
    module = trained(mechanics, model=RESNET, **settings)
    with torch.no_grad():
        for name, layer in named(module, "oscillation_freezing").layers.items():
            history = named(module, "oscillation_freezing").histories[name]
            history.frozen.view(-1)[:3] = True
            history.frozen_codes.view(-1)[:3] = 1
            layer.weight[history.frozen] = -3.0
            assert int((used_codes(layer) != layer.weight_quantizer.codes(layer.weight)).sum()) >= 3
    return module


@pytest.mark.parametrize("quantizer", [TWO_BITS, {"weight": {"name": "ewgs", "bits": 2}}], ids=["lsq", "ewgs"])
def test_the_artifact_holds_the_frozen_codes(quantizer: dict[str, Any], tmp_path: Path) -> None:
    module = deployable(EAGER, quantizer=quantizer)
    images = torch.randn(8, 3, 8, 8)
    net = finalise(module)["final"]
    outputs = net(images)
    assert torch.equal(outputs, module.eval()(images))
    assert torch.equal(net.conv1.weight, module.net.conv1.weight), "latent weights stay"
    save_artifact(net, RESNET, tmp_path)
    loaded = load_artifact(tmp_path)
    assert torch.equal(loaded(images), outputs)
    weights = deployed_weights(loaded)
    for name, layer in named(module, "oscillation_freezing").layers.items():
        assert torch.equal(weights[name][1].stored_codes.int(), used_codes(layer))


def test_frozen_codes_outlive_the_reestimation_of_batchnorm() -> None:
    module = deployable(EAGER)
    net = finalise(module, [torch.randn(16, 3, 8, 8)])["final"]
    assert not torch.equal(net.bn1.running_mean, module.net.bn1.running_mean)
    assert torch.equal(net.conv1.quantized_weight(), module.net.conv1.quantized_weight())


def statistics(module: QuantModule, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the batch-norm: those that training keeps, and re-estimated ones."""
    net = module.plain_copy()
    reestimate_batchnorm(net, [images])
    kept, estimated = (torch.cat([bn.running_mean, bn.running_var]) for bn in (module.net.bn1, net.bn1))
    return kept, estimated


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "free"])
def test_the_statistics_of_frozen_weights_converge_to_the_reestimated_ones(frozen: bool) -> None:  # cheap check 8
    module = trained(EAGER)
    if frozen:
        for name, layer in named(module, "oscillation_freezing").layers.items():
            history = named(module, "oscillation_freezing").histories[name]
            history.frozen_codes.copy_(used_codes(layer))
            history.frozen.fill_(True)
    batch = (torch.rand(8, 3, 8, 8), torch.arange(8) % 4)
    weights = [module.net.conv1.weight, module.net.fc.weight]
    before = weights[0].detach().clone()
    optimizer = torch.optim.SGD(weights, lr=0.5, weight_decay=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        module.train().objective(batch).loss.backward()
        optimizer.step()
    assert not torch.equal(weights[0], before), "the latent weights go on drifting"
    kept, estimated = statistics(module, batch[0])
    assert torch.allclose(kept, estimated, rtol=1e-5, atol=1e-6) == frozen


def test_the_settings_of_noise_tempering_and_freezing_go_together() -> None:
    tempering = {"noise_tempering": {"_target_": "callbacks.noise_tempering.NoiseTempering"}}
    module = deployable({**EAGER, **tempering})
    images = torch.randn(8, 3, 8, 8)
    assert torch.equal(finalise(module)["final"](images), module.eval()(images))


def test_a_low_threshold_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    mechanic = OscillationFreezing(momentum=0.1, threshold_final=0.05)
    mechanic.on_fit_start(None, None)  # type: ignore[arg-type]
    assert "oscillation_freezing.threshold_final=0.05: one oscillation counts 0.1" in caplog.text


# -- dampening -----------------------------------------------------------------------------------------------------


def test_the_term_of_all_layers_is_in_the_loss() -> None:
    recipe = {**LSQ, "rules": [{"match": "@last", "weight": {"bits": 8}}]}
    module = make_module(config("oscillation_dampening", strength_start=0.5), quantizer=recipe)
    evaluation = module.objective((torch.rand(8, 3, 8, 8), torch.arange(8) % 4))
    layers: list[Any] = [module.net.conv1, module.net.fc]
    expected = [dampening_loss(x.weight, x.weight_quantizer.scale, *x.weight_quantizer.limits()) for x in layers]
    torch.testing.assert_close(evaluation.terms["oscillation_dampening"], 0.5 * sum(expected))
    torch.testing.assert_close(evaluation.loss, sum(evaluation.terms.values()))


def dampened(*others: dict[str, Any]) -> tuple[QuantModule, tuple[Tensor, Tensor]]:
    """A calibrated host with the strength 0.5, and a batch."""
    mechanics = config("oscillation_dampening", strength_start=0.5)
    module = make_module({**mechanics, **{slug: one for other in others for slug, one in other.items()}})
    batch = (torch.rand(8, 3, 8, 8), torch.arange(8) % 4)
    calibrate(module.net, [batch[0]])
    return module, batch


def terms_by_hand(net: Any) -> Tensor:
    layers = [(layer.weight, layer.weight_quantizer) for layer in (net.conv1, net.fc)]
    return 0.5 * torch.stack([dampening_loss(w, q.scale, *q.limits()) for w, q in layers]).sum()


def moved_copy(module: QuantModule, state: dict[str, Tensor]) -> Any:
    net = copy.deepcopy(module.net)
    net.load_state_dict(state, strict=False)
    return net


def test_the_term_is_that_of_the_weights_and_scales_of_the_evaluation() -> None:
    module, batch = dampened()
    plain = [module.objective(batch, given).terms["oscillation_dampening"] for given in (None, {})]
    assert all(torch.equal(term, plain[0]) for term in plain)
    torch.testing.assert_close(plain[0], terms_by_hand(module.net))
    moved = {name: (1.3 * p).detach().requires_grad_() for name, p in module.net.named_parameters() if p.ndim != 1}
    evaluation = module.objective(batch, moved)
    term, own = evaluation.terms["oscillation_dampening"], module.net.fc.weight
    expected = moved_copy(module, moved)
    by_hand = terms_by_hand(expected)
    torch.testing.assert_close(term, by_hand)
    torch.testing.assert_close(evaluation.loss, evaluation.terms["task"] + by_hand)
    assert not torch.allclose(term, plain[0])
    slope, none = torch.autograd.grad(term, [moved["fc.weight"], own], allow_unused=True)
    torch.testing.assert_close(slope, torch.autograd.grad(by_hand, expected.fc.weight)[0])
    assert slope.any() and none is None
    assert torch.equal(module.objective(batch).terms["oscillation_dampening"], plain[0]), "nothing stays behind"


def test_both_evaluations_of_a_sam_step_have_terms_of_their_own() -> None:
    module, batch = dampened({"sam": {**SAM["sam"], "rho": 0.5}})
    first = module.evaluate(batch).loss + terms_by_hand(module.net)
    moves = named(module, "sam").perturbation(module, first)
    moved = {name: p.detach() + moves[name] for name, p in module.net.named_parameters() if name in moves}
    one, other = terms_by_hand(module.net), terms_by_hand(moved_copy(module, moved))
    assert not torch.allclose(one, other, rtol=0.05)
    evaluation = module.objective(batch)
    torch.testing.assert_close(evaluation.terms["oscillation_dampening"], one)
    torch.testing.assert_close(evaluation.loss, module.evaluate(batch, moved).loss + other)


def test_it_pulls_weights_to_the_centres_of_their_bins() -> None:
    distance = {}
    for strength in (0.0, 20.0):
        module = make_module(config("oscillation_dampening", strength=strength, warmup=0.0), quantizer=TWO_BITS)
        fit(module, max_epochs=4)
        layer: Any = module.net.conv1
        distance[strength] = float((layer.weight_quantizer(layer.weight) - layer.weight).abs().mean())
    assert distance[20.0] < 0.5 * distance[0.0]


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OscillationDampening(strength=-1), "oscillation_dampening.strength=-1: use 0 or more"),
        (lambda: OscillationDampening(warmup=1.0), "oscillation_dampening.warmup=1.0: use 0 or more and less than 1"),
        (lambda: OscillationDampening(aggregation="max"), "aggregation=max: use one of kernel_mean, sum, mean"),  # type: ignore[arg-type]
        (lambda: OscillationFreezing(threshold_final=0.2), "threshold_start=0.1, threshold_final=0.2: use"),
        (lambda: OscillationFreezing(momentum=0), "oscillation_freezing.momentum=0: use more than 0"),
        (lambda: OscillationFreezing(freeze_to="last"), "freeze_to=last: use one of average, current"),  # type: ignore[arg-type]
        (lambda: OscillationTracker(limit=1), "oscillation_tracker.limit=1: use 0 or more"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("slug", "quantizer", "message"),
    [
        ("oscillation_tracker", {"weight": {"name": "lsq", "bits": 8}}, "max_bits=4: no layer"),
        ("oscillation_tracker", {**LSQ, "widths": [2, 4]}, "quantizer.widths=\\[\\]"),
        ("oscillation_freezing", {**LSQ, "fold_bn": 2}, "quantizer.fold_bn=none"),
        (
            "oscillation_dampening",
            {"weight": {"name": "dorefa", "bits": 4}},
            "DoReFa quantizer of conv1 .* use quant",
        ),
    ],
)
def test_networks_that_do_not_fit_are_refused(slug: str, quantizer: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^callbacks\.{slug}.*{message}"):
        make_module(config(slug), quantizer=quantizer)
