"""SDQ as a mechanic: what it draws, when layers go down, how a search ends, and what it leaves alone."""

import itertools
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from callbacks.sdq import SDQ
from callbacks.sdq.formulas import improbabilities
from callbacks.sdq.pressure import qer, size_hinge, squared_error
from callbacks.sdq.quantizer import StochasticWidth
from research.learning.finalise import finalise
from research.learning.module import QuantModule
from research.quant.allocation import Allocation, LayerBits
from research.quant.layers import quantizers
from research.quant.quantizers import QuantizerSpec, build_quantizer
from research.runs.allocation import ALLOCATION
from research.runs.folder import RunFolder
from research.runs.logger import RunLogger
from tests.callbacks.searches import ENDS, THREE, allocation_left, on_residual, only_mechanic
from tests.learning.tiny import LSQ, RESNET, StopAt, fit, make_module, state, tiny_net

SLUG = "sdq"
OWN: dict[str, Any] = {**LSQ, "weight": {"name": "callbacks.sdq.ConstantMaxDoReFa", "bits": 4}, **ENDS}


def sdq(**options: Any) -> dict[str, Any]:
    return {SLUG: {"_target_": "callbacks.sdq.SDQ", "budget": THREE, **options}}


def searching(quantizer: dict[str, Any] | None = None, **options: Any) -> QuantModule:
    """A small residual network with ends of 8 bits, SDQ on it."""
    return on_residual(sdq(**options), quantizer)


def mechanic(module: QuantModule) -> SDQ:
    return only_mechanic(module, SDQ)


class Watch(pl.Callback):
    """Width of the higher quantizers, widths in evaluation and noise of every step."""

    def __init__(self) -> None:
        self.higher: list[list[int]] = []
        self.widths: list[Allocation] = []
        self.noise: list[list[float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
        coins = mechanic(module).coins.values()
        self.higher.append([int(coin.higher.bits) for coin in coins])
        self.widths.append(Allocation.of(module.net))
        self.noise.append([float(coin.noise) for coin in coins])


class Force(pl.Callback):
    """Sets the probability of some layers in front of every step."""

    def __init__(self, beta: float, layers: tuple[str, ...] | None = None) -> None:
        self.beta, self.layers = beta, layers

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
        for name, coin in mechanic(module).coins.items():
            if self.layers is None or name in self.layers:
                coin.beta.data.fill_(self.beta)


def inner(allocation: Allocation) -> list[LayerBits]:
    return [bits for name, bits in allocation.items() if name not in ("conv1", "fc")]


def test_below_the_threshold_a_layer_goes_down_once_and_never_below_the_least() -> None:  # check 8
    module = searching(budget=None, bits=[2, 3, 4, 8], lr=1e-6, until=0.9)
    watch = Watch()
    fit(module, callbacks=(Force(0.05), watch))
    assert [set(widths) for widths in watch.higher] == [{4}, {3}, {2}, {2}, {2}, {2}, {2}, {2}]
    assert bool(mechanic(module).state.over), "all layers at the least width"
    assert {bits.weight for bits in inner(Allocation.of(module.net))} == {2}


def test_after_a_step_down_the_probability_and_its_optimizer_start_anew() -> None:  # check 8
    module = searching(budget=None, bits=[2, 3, 4, 8], lr=1e-6, until=0.9)
    chosen, *others = mechanic(module).coins
    trainer = fit(module, max_epochs=1, limit_train_batches=1, callbacks=(Force(0.05, (chosen,)),))
    coins = mechanic(module).coins
    assert float(coins[chosen].beta) == pytest.approx(0.9)
    assert (int(coins[chosen].higher.bits), int(coins[others[0]].higher.bits)) == (4, 8)
    kept = [parameter for each in trainer.optimizers[0].optimizers for parameter in each.state]
    assert not any(parameter is coins[chosen].beta for parameter in kept)
    assert any(parameter is coins[others[0]].beta for parameter in kept)


def test_average_bits_never_increase_while_the_search_goes_on() -> None:  # check 8
    module = searching(budget=None, lr=0.9, strength=300.0, until=0.9)
    watch = Watch()
    fit(module, callbacks=(watch,))
    assert all(
        before >= after for pair in itertools.pairwise(watch.higher) for before, after in zip(*pair, strict=True)
    )
    assert sum(watch.higher[-1]) < sum(watch.higher[0])


@pytest.mark.parametrize("quantizer", [{**LSQ, **ENDS}, OWN], ids=["lsq", "own"])
def test_at_its_end_the_search_is_within_the_budget(quantizer: dict[str, Any]) -> None:
    module, watch = searching(quantizer, until=0.5), Watch()
    fit(module, callbacks=(watch,))
    assert all((seen["conv1"], seen["fc"]) == ((8, 8), (8, 8)) for seen in watch.widths)
    assert all(set(inner(seen)) == {LayerBits(8, 4)} for seen in watch.widths[:4])
    budget, found = mechanic(module).budgets[0], mechanic(module)
    assert all(budget.met(found.counts, seen) for seen in watch.widths[4:])
    assert len(set(watch.widths[4:])) == 1
    net = finalise(module)["final"]
    assert not any(isinstance(quantizer, StochasticWidth) for _, quantizer in quantizers(net))
    assert Allocation.of(net) == watch.widths[-1]
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(net(images), module.eval().net(images))
    rebuilt = finalise(searching(quantizer))["final"]  # from the configuration alone, as a finished run is read
    rebuilt.load_state_dict(net.state_dict())
    assert Allocation.of(rebuilt) == watch.widths[-1] and torch.equal(rebuilt(images), net(images))


def test_the_search_ends_as_soon_as_the_probable_widths_are_within_the_budget() -> None:
    module, watch = searching(bits=[2, 3, 4], lr=1e-6, until=0.9), Watch()
    layers = tuple(mechanic(module).coins)
    fit(module, callbacks=(Force(0.3, layers), watch))
    assert watch.higher[0] == [3] * len(layers), "decided after the first step"
    assert bool(mechanic(module).state.over) and len(set(watch.widths)) == 1


def test_a_network_within_the_budget_is_not_searched() -> None:
    module = searching(bits=[2, 3])
    fit(module, max_epochs=1, limit_train_batches=1)
    assert set(inner(Allocation.of(module.net))) == {LayerBits(3, 4)}
    assert bool(mechanic(module).state.over)
    assert all(float(coin.noise) == 0 for coin in mechanic(module).coins.values()), "nothing was drawn"


def test_the_most_probable_widths_within_the_budget_are_found() -> None:
    module = searching(bits=[2, 3, 4], search_ends=False)
    found = mechanic(module)
    found.prepare(module, [(torch.zeros(1, 3, 8, 8), torch.zeros(1))])
    generator = torch.Generator().manual_seed(0)
    for coin in found.coins.values():
        coin.beta.data.copy_(0.05 + 0.9 * torch.rand((), generator=generator))
        coin.follow()
    tables = {name: improbabilities([2, 3, 4], float(coin.beta), 0.9) for name, coin in found.coins.items()}
    best = math.inf
    fixed = {name: bits for name, bits in Allocation.of(module.net).items() if name not in tables}
    for widths in itertools.product((2, 3, 4), repeat=len(tables)):
        picked = dict(zip(tables, widths, strict=True))
        layers = {name: LayerBits(picked[name], 4) if name in picked else fixed[name] for name in found.choices}
        if found.budgets[0].met(found.counts, Allocation(layers)):
            best = min(best, sum(tables[name][width] for name, width in picked.items()))
    chosen = found.most_probable()
    assert found.budgets[0].met(found.counts, chosen)
    assert sum(tables[name][chosen[name].weight] for name in tables) == pytest.approx(best, rel=1e-9)


def test_every_step_has_its_own_draw_and_all_its_evaluations_the_same() -> None:
    runs = []
    for seed in (0, 0, 1):
        module, watch = make_module(sdq(until=0.9), seed=seed, model=RESNET, quantizer={**LSQ, **ENDS}), Watch()
        fit(module, callbacks=(watch,), accumulate_grad_batches=2)
        runs.append(watch.noise)
    assert runs[0] == runs[1] and runs[0] != runs[2]
    first, second, third = runs[0][:3]
    assert first == second and second != third
    assert len(set(first)) == len(first), "every layer draws by itself"


def test_the_term_is_the_regulariser_and_weights_get_no_gradient_of_it() -> None:
    module = searching(strength=0.5, hinge=2.0)
    found = mechanic(module)
    found.prepare(module, [(torch.zeros(1, 3, 8, 8), torch.zeros(1))])
    (term,) = found.loss_terms(None).values()  # type: ignore[arg-type]
    coins, certainty = found.coins, torch.full((len(found.coins),), 0.9)
    pairs = [(coin, found.layers[name].weight) for name, coin in coins.items()]
    expected = 0.9 * 8 + 0.1 * 6  # bits of every layer that the budget counts
    torch.testing.assert_close(term, 0.5 * qer(certainty, pairs, "weighted") + 2.0 * (expected / 3 - 1))
    gradients = torch.autograd.grad(term, list(module.net.parameters()), allow_unused=True)
    betas = [coin.beta for coin in coins.values()]
    for parameter, gradient in zip(module.net.parameters(), gradients, strict=True):
        assert (gradient is not None) == any(parameter is beta for beta in betas)


@pytest.mark.parametrize("name", ["dorefa", "callbacks.sdq.ConstantMaxDoReFa"])
def test_the_error_of_one_bit_does_not_depend_on_what_was_quantized_before(name: str) -> None:
    w = torch.randn(50, generator=torch.Generator().manual_seed(0))
    quantizer = build_quantizer(QuantizerSpec(name, 1), w.shape, None, "weight")
    expected = (w.abs() / w.abs().mean() - 1).square().sum()
    for before in (w, 10 * w):
        quantizer.codes(before)
        torch.testing.assert_close(squared_error(quantizer, w), expected)


def test_the_hinge_presses_until_the_expected_cost_is_within_the_budget() -> None:
    module = searching(bits=[2, 4], hinge=1.0)
    found = mechanic(module)
    found.prepare(module, [(torch.zeros(1, 3, 8, 8), torch.zeros(1))])
    pairs = {name: (coin.higher, coin.lower) for name, coin in found.coins.items()}
    for beta, excess in ((1.0, 1 / 3), (0.75, 1 / 6), (0.4, 0.0)):
        certainty = torch.full((len(pairs),), beta)
        value = size_hinge(certainty, pairs, Allocation.of(module.net), found.counts, found.budgets)
        torch.testing.assert_close(value, torch.tensor(excess))


def test_one_candidate_is_plain_training_bit_for_bit() -> None:
    trained = []
    for mechanics in ({}, sdq(bits=[4], budget={"kind": "average_bits", "value": 4}, search_ends=True)):
        module = make_module(mechanics, model=tiny_net(dropout=0.25))
        fit(module)
        trained.append(state(module.net))
    assert [name for name, value in trained[1].items() if not torch.equal(value, trained[0][name])] == []


def test_probabilities_have_an_optimizer_of_their_own_without_decay() -> None:
    module = searching(lr=0.03, optimizer="sgd")
    trainer = fit(module, max_epochs=1, limit_train_batches=1)
    main, own = trainer.optimizers[0].optimizers
    betas = [coin.beta for coin in mechanic(module).coins.values()]
    (group,) = own.param_groups
    assert (group["initial_lr"], group["weight_decay"], len(group["params"])) == (0.03, 0.0, len(betas))
    assert not any(p is beta for g in main.param_groups for p in g["params"] for beta in betas)


def test_a_crash_behind_a_step_down_leaves_no_trace(tmp_path: Path) -> None:
    options = {"lr": 0.9, "strength": 300.0, "budget": None, "until": 0.8}
    whole, watch = searching(**options), Watch()
    fit(whole, folder=tmp_path / "whole", callbacks=(watch,))
    assert 8 * len(watch.higher[0]) > sum(watch.higher[3]) > sum(watch.higher[7]), "down before the crash and after"
    with pytest.raises(RuntimeError, match="stopped"):
        fit(searching(**options), folder=tmp_path / "parts", callbacks=(StopAt(5),))
    pl.seed_everything(99, verbose=False)
    resumed = searching(**options)
    fit(resumed, folder=tmp_path / "parts", resume=tmp_path / "parts/checkpoints/last.ckpt")
    assert [n for n, value in state(whole).items() if not torch.equal(value, state(resumed)[n])] == []


@pytest.mark.parametrize(("total", "until", "step"), [(100, 0.6, 60), (3910, 0.6, 2346), (2, 0.6, 1), (2, 0.1, 1)])
def test_when_the_search_ends_at_the_latest(total: int, until: float, step: int) -> None:
    assert SDQ(budget=THREE, until=until).last_step(total) == step


def test_metrics_name_widths_probabilities_and_their_gradients() -> None:
    module = searching(until=0.9)
    trainer = fit(module, max_epochs=1, limit_train_batches=3)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    found = Allocation.of(module.net).metrics()
    assert {name: logged[name] for name in found} == found
    assert {"sdq/gradient_task", "sdq/gradient_regulariser"} <= logged.keys()
    assert logged["sdq/gradient_regulariser"] > 0

    open_search = searching(until=0.9)
    logged = fit(open_search, max_epochs=2, limit_train_batches=2, callbacks=(StopAfterFirstEpoch(),)).callback_metrics
    betas = {name: float(coin.beta) for name, coin in mechanic(open_search).coins.items()}
    assert {name: float(logged[f"sdq/beta/{name}"]) for name in betas} == pytest.approx(betas)
    assert float(logged["sdq/beta_mean"]) == pytest.approx(sum(betas.values()) / len(betas))
    with pytest.raises(ValueError, match=r"callbacks.sdq: .*use finalise.weights=last"):
        finalise(open_search)


class StopAfterFirstEpoch(pl.Callback):
    """Ends the fit as planned, but early."""

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        trainer.should_stop = True


def test_a_run_leaves_its_allocation_as_a_recipe_of_the_next(tmp_path: Path) -> None:
    module = searching()
    left, _ = allocation_left(module, tmp_path)
    assert left == Allocation.of(module.net)


def test_a_search_that_is_stopped_leaves_no_allocation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder.of(tmp_path, "search", {})
    folder.path.mkdir(parents=True)
    for until, left in ((0.9, False), (0.25, True)):
        module = searching(until=until)
        trainer = fit(module, callbacks=(StopAfterFirstEpoch(),))
        assert trainer.global_step == 4
        caplog.clear()
        trainer.loggers = [RunLogger(folder)]
        mechanic(module).on_train_end(trainer, module)
        assert (folder.path / ALLOCATION).exists() == left
        assert ("callbacks.sdq: the run ended before its search, without an allocation" in caplog.text) != left


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    module = searching(budget={**THREE, "value": 1.5})
    with pytest.raises(ValueError, match=r"callbacks.sdq.budget.value=1.5: feasible are 2 to 8 bits per weight"):
        fit(module, max_epochs=1)


def test_a_network_above_its_budget_is_not_deployed() -> None:
    module = searching()
    fit(module, max_epochs=1)
    for coin in mechanic(module).coins.values():
        coin.higher.bits.fill_(4)
    with pytest.raises(ValueError, match=r"callbacks.sdq.budget.value=3: the widths cost 4 bits per weight"):
        finalise(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": [0, 2]}, "bits"),
        ({"bits": []}, "bits"),
        ({"choice": "mean"}, "choice=mean"),
        ({"qer": "plain"}, "qer=plain"),
        ({"optimizer": "lion"}, "optimizer=lion"),
        ({"tau": 0.0}, "tau=0.0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"strength": -1.0}, "strength=-1.0"),
        ({"hinge": 1.0, "budget": None}, "hinge=1.0: there is no budget"),
        ({"threshold": 0.6}, ".*threshold=0.6"),
        ({"start": 1.0}, ".*start=1.0"),
        ({"until": 1.0}, "until=1.0"),
        ({"budget": {"kind": "bits", "value": 3}}, "budget.kind=bits"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"callbacks.sdq[.:]{message}"):
        SDQ(**{"budget": THREE, **options})


@pytest.mark.parametrize(
    ("quantizer", "options", "message"),
    [
        ({}, {}, "no quantized weight"),
        ({**LSQ, "weight": {"name": "ewgs", "bits": 4}}, {}, "EWGS"),
        ({**LSQ, "widths": [2, 4]}, {}, r"quantizer.widths=\[\]"),
        ({**LSQ}, {"bits": [1, 2]}, "lsq takes 2 to 8 bits"),
    ],
)
def test_networks_that_it_cannot_search_are_refused(
    quantizer: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"callbacks.sdq: .*{message}"):
        make_module(sdq(**options), model=RESNET, quantizer=quantizer)
