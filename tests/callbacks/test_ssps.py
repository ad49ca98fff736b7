"""SSPS as a mechanic: what it picks, when cells are fixed, how a search ends, and what it leaves alone."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from callbacks.ssps import SSPS
from callbacks.ssps.quantizer import SearchCell
from research.learning.finalise import finalise
from research.learning.module import QuantModule
from research.quant.allocation import Allocation, LayerBits
from research.quant.calibrate import calibrate
from research.quant.layers import quantizers
from research.quant.passes import passes
from tests.callbacks.searches import ENDS, THREE, allocation_left, on_residual, only_mechanic
from tests.learning.tiny import LSQ, RESNET, StopAt, fit, make_data, make_module, state, tiny_net

SLUG = "ssps"
BOPS = {"kind": "bops", "value": 1.2e6}
BOTH: dict[str, Any] = {"budget": [THREE, BOPS], "bits": [2, 3, 8], "input_bits": [2, 4, 8], "grad": "sampled"}
"""Inputs are searched too."""


def ssps(**options: Any) -> dict[str, Any]:
    return {SLUG: {"_target_": "callbacks.ssps.SSPS", "budget": THREE, "bits": [2, 3, 4, 8], **options}}


def searching(quantizer: dict[str, Any] | None = None, **options: Any) -> QuantModule:
    """A small residual network with ends of 8 bits, SSPS on it."""
    return on_residual(ssps(**options), quantizer)


def mechanic(module: QuantModule) -> SSPS:
    return only_mechanic(module, SSPS)


def prepared(**options: Any) -> SSPS:
    """The mechanic, its costs known, its logits drawn, on a calibrated network."""
    found = mechanic(searching(**options))
    calibrate(found.module.net, [torch.randn(8, 3, 8, 8)])
    found.prepare(found.module, [(torch.zeros(1, 3, 8, 8), torch.zeros(1))])
    generator = torch.Generator().manual_seed(0)
    for cell in found.cells.values():
        cell.alpha.data.copy_(2 * torch.randn(len(cell.alpha), generator=generator))
        cell.follow()
    return found


def trained(found: SSPS) -> SSPS:
    """As in a fit, for calls outside of one."""
    found.module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    return found


class Watch(pl.Callback):
    """Of every step: picks, logits, which cells are fixed, widths in evaluation, noise."""

    def __init__(self) -> None:
        self.picks: list[list[int]] = []
        self.alpha: list[list[torch.Tensor]] = []
        self.fixed: list[list[bool]] = []
        self.widths: list[Allocation] = []
        self.noise: list[list[float]] = []
        self.tau: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
        cells = mechanic(module).cells.values()
        self.picks.append([int(cell.pick) for cell in cells])
        self.alpha.append([cell.alpha.detach().clone() for cell in cells])
        self.fixed.append([bool(cell.fixed) for cell in cells])
        self.widths.append(Allocation.of(module.net))
        self.noise.append([float(value) for cell in cells for value in cell.noise])
        self.tau.append(float(next(iter(cells)).tau))


def inner(allocation: Allocation) -> list[LayerBits]:
    return [bits for name, bits in allocation.items() if name not in ("conv1", "fc")]


@pytest.mark.parametrize("widths", [[2, 8], [2, 3, 4, 5, 6, 8]])
@pytest.mark.parametrize("grad", ["all", "sampled"])
def test_one_convolution_per_layer_for_any_number_of_candidates(  # check 1
    widths: list[int], grad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"count": 0}
    original = torch.nn.functional.conv2d

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        calls["count"] += 1
        return original(*arguments, **options)

    module = searching(bits=widths, input_bits=widths, grad=grad, search_ends=True)
    monkeypatch.setattr(torch.nn.functional, "conv2d", counted)
    module.net.train()(torch.randn(2, 3, 8, 8)).sum().backward()
    assert calls["count"] == sum(isinstance(layer, torch.nn.Conv2d) for layer in module.net.modules())


@pytest.mark.parametrize("grad", ["all", "sampled"])
def test_a_step_is_the_network_with_the_picked_widths_set_by_hand(grad: str) -> None:  # check 2
    found = prepared(**{**BOTH, "grad": grad})
    net, images = found.module.net.eval(), torch.randn(4, 3, 8, 8)
    by_hand: dict[str, int | torch.Tensor] = {}
    for row, (name, cell) in enumerate(found.cells.items()):
        cell.noise.fill_(0.0)
        cell.noise[row % len(cell.noise)] = 9.0
        by_hand[f"{name}_quantizer"] = int(cell.widths[row % len(cell.noise)])
        cell.train()
    picked = net(images)
    net.eval()
    with passes(net, bits=by_hand):
        assert torch.equal(net(images), picked)
    assert not torch.equal(net(images), picked)


@pytest.mark.parametrize("options", [{}, BOTH], ids=["weights", "both"])
def test_cells_are_fixed_one_after_another_and_never_change_again(options: dict[str, Any]) -> None:  # check 6
    module, watch = searching(until=0.8, warmup=0.2, lr=0.3, **options), Watch()
    optimizer: Any = fit(module, callbacks=(watch,)).optimizers[0]
    found, counts = mechanic(module), [sum(fixed) for fixed in watch.fixed]
    assert counts == sorted(counts) and counts[:3] == [0] * 3 and 0 < counts[3] < counts[4]
    assert counts[-2:] == [len(found.cells)] * 2 and found.over
    for row, cell in enumerate(found.cells.values()):
        since = [fixed[row] for fixed in watch.fixed].index(True)
        assert len({picks[row] for picks in watch.picks[since:]}) == 1
        assert all(torch.equal(alpha[row], watch.alpha[since][row]) for alpha in watch.alpha[since:])
        assert watch.picks[-1][row] == int(cell.index)
    kept = [parameter for each in optimizer.optimizers for parameter in each.state]
    assert not any(parameter is cell.alpha for parameter in kept for cell in found.cells.values())


def test_the_more_certain_cells_are_fixed_first_at_their_most_probable_width() -> None:
    found = trained(prepared(budget={**THREE, "value": 8}))
    p = {name: cell.probabilities.tolist() for name, cell in found.cells.items()}
    order = sorted(p, key=lambda name: -max(p[name]))
    for due in range(1, len(order) + 1):
        found.fix(due)
        fixed = [name for name, cell in found.cells.items() if bool(cell.fixed)]
        assert set(fixed) == set(order[:due])
    for name, cell in found.cells.items():
        assert int(cell.index) == max(range(4), key=p[name].__getitem__)


def test_a_choice_that_would_leave_no_room_for_the_rest_is_taken_down() -> None:
    found = trained(prepared(bits=[2, 8]))
    first, *others = found.cells
    share = {row.name: row.weights for row in found.counts.layers}
    whole = sum(share[name.removesuffix(".weight")] for name in found.cells)
    assert 6 * share[first.removesuffix(".weight")] < whole < 6 * share["layer3.0.conv2"]
    for name, cell in found.cells.items():
        cell.alpha.data.copy_(torch.tensor([0.0, 9.0 if name in (first, "layer3.0.conv2.weight") else 1.0]))
        cell.follow()
    found.fix(1)
    assert int(found.cells[first].bits) == 8
    found.fix(2)
    chosen = found.cells["layer3.0.conv2.weight"]
    assert bool(chosen.fixed) and int(chosen.bits) == 2
    found.fix(len(found.cells))
    assert found.within(Allocation.of(found.module.net))
    assert all(found.within(found.at({name: int(found.cells[name].index)})) for name in others)


@pytest.mark.parametrize("rounds", [1, 25])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_resnet20_ends_within_its_bit_operations(rounds: int, seed: int) -> None:  # check 8
    budget = {"kind": "bops", "value": 0.64e9, "convention": {"first_last": "fixed8"}}
    mechanics = ssps(budget=budget, bits=[2, 3, 4, 5, 6, 8], input_bits=[2, 3, 4, 5, 6, 8], rounds=rounds)
    module = make_module(mechanics, model={"_target_": "research.models.resnet20"})
    found = trained(mechanic(module))
    found.prepare(module, [(torch.zeros(1, 3, 32, 32), torch.zeros(1))])
    generator = torch.Generator().manual_seed(seed)
    for cell in found.cells.values():
        cell.alpha.data.copy_(torch.randn(6, generator=generator))
        cell.follow()
    limit, most = found.budgets[0].value, len(found.cells)
    assert most == 36 and found.budgets[0].cost(found.counts, Allocation.of(module.net)) > limit
    for due in range(-(-most // rounds), most + 1, -(-most // rounds)):
        found.fix(due)
    cost = found.budgets[0].cost(found.counts, Allocation.of(module.net))
    assert found.over and 0.95 * limit < cost <= limit


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "dorefa"])
@pytest.mark.parametrize("options", [{}, BOTH], ids=["weights", "both"])
def test_at_its_end_the_search_is_plain_quantizers_within_the_budget(quantizer: str, options: dict[str, Any]) -> None:
    inputs = {"dorefa": "pact"}.get(quantizer, quantizer)
    recipe = {"weight": {"name": quantizer, "bits": 4}, "input": {"name": inputs, "bits": 4}, **ENDS}
    module, watch = searching(recipe, until=0.5, **options), Watch()
    fit(module, callbacks=(watch,))
    assert all((seen["conv1"], seen["fc"]) == ((8, 8), (8, 8)) for seen in watch.widths)
    assert len(set(watch.widths[4:])) == 1 and mechanic(module).within(watch.widths[4])
    net = finalise(module)["final"]
    assert not any(isinstance(quantizer, SearchCell) for _, quantizer in quantizers(net))
    assert Allocation.of(net) == watch.widths[-1]
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(net(images), module.eval().net(images))
    rebuilt = finalise(searching(recipe, **options))["final"]  # from the configuration alone, as a finished run is read
    rebuilt.load_state_dict(net.state_dict())
    assert Allocation.of(rebuilt) == watch.widths[-1] and torch.equal(rebuilt(images), net(images))


def test_every_step_has_its_own_picks_and_all_its_evaluations_the_same() -> None:
    runs = []
    for seed in (0, 0, 1):
        module, watch = make_module(ssps(until=0.9), seed=seed, model=RESNET, quantizer={**LSQ, **ENDS}), Watch()
        fit(module, callbacks=(watch,), accumulate_grad_batches=2)
        runs.append(watch.noise)
    assert runs[0] == runs[1] and runs[0] != runs[2]
    first, second, third = runs[0][:3]
    assert first == second and second != third
    assert len(set(first)) == len(first), "every candidate of every layer by itself"


def test_in_the_warm_up_logits_rest_and_widths_are_drawn() -> None:
    module, watch = searching(warmup=0.5, until=0.9, lr=0.5, pick="argmax", strength=100.0), Watch()
    fit(module, callbacks=(watch,))
    assert not any(alpha.any() for step in watch.alpha[:4] for alpha in step)
    assert all(alpha.any() for alpha in watch.alpha[4])
    assert len({index for step in watch.picks[:4] for index in step}) > 1, "drawn"
    assert any(watch.noise[3]) and not any(watch.noise[4]), "the most probable ones afterwards"
    assert {bits.weight for bits in inner(watch.widths[0])} == {8}, "evaluation takes the widest of equal ones"


def test_the_temperature_falls_until_the_end_of_the_search() -> None:
    module, watch = searching(warmup=0.0, until=0.5, tau_start=4.0, tau_end=2.0), Watch()
    fit(module, callbacks=(watch,))
    assert watch.tau == [4.0, 3.5, 3.0, 2.5] + [2.0] * 4


def test_the_term_is_the_constraint_and_weights_get_no_gradient_of_it() -> None:
    found = prepared(strength=0.5)
    found.module.progress.step, found.module.progress.total = 50, 100
    for cell in found.cells.values():
        cell.alpha.data.zero_()
    (term,) = found.loss_terms(None).values()  # type: ignore[arg-type]
    torch.testing.assert_close(term, torch.tensor(0.5 * (17 / 4 / 3 - 1) ** 2))
    parameters = list(found.module.net.parameters())
    gradients = torch.autograd.grad(term, parameters, allow_unused=True)
    logits = [cell.alpha for cell in found.cells.values()]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert (gradient is not None) == any(parameter is alpha for alpha in logits)
    trained(found).fix(1)
    (name,) = [name for name, cell in found.cells.items() if bool(cell.fixed)]
    share = {row.name: row.weights for row in found.counts.layers}
    whole = sum(share[each.removesuffix(".weight")] for each in found.cells)
    mean = 17 / 4 + (float(found.cells[name].bits) - 17 / 4) * share[name.removesuffix(".weight")] / whole
    assert float(found.ratios().detach()) == pytest.approx(mean / 3), "a fixed cell counts with its hard cost"


@pytest.mark.parametrize(("step", "part"), [(9, None), (10, 0.0), (20, 0.5), (30, 1.0), (50, 1.0)])
def test_the_constraint_rises(step: int, part: float | None) -> None:
    found = prepared(ramp=0.4, warmup=0.1, until=0.6)
    found.module.progress.step, found.module.progress.total = step, 100
    terms = found.loss_terms(None)  # type: ignore[arg-type]
    whole = max(float(found.ratios().detach()) - 1, 0.0) ** 2
    assert [float(term.detach()) for term in terms.values()] == ([] if part is None else pytest.approx([part * whole]))


def test_a_strong_constraint_brings_the_expected_cost_to_the_budget() -> None:
    module = searching(warmup=0.0, until=0.95, rounds=1, lr=0.2, strength=1e4)
    data = make_data(options={"train": 8 + 8 * 40, "test": 16})
    ratios: list[float] = []

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, host: Any, *arguments: Any) -> None:
            ratios.append(float(mechanic(host).ratios().detach()))

    fit(module, data, max_epochs=1, limit_val_batches=0, callbacks=(Keep(),))
    assert ratios[0] == pytest.approx(17 / 4 / 3) and 0.9 < ratios[37] < 1.05


@pytest.mark.parametrize("inputs", [None, [4]])
def test_one_candidate_is_plain_training_bit_for_bit(inputs: list[int] | None) -> None:  # check 7
    runs = []
    budget = {"kind": "average_bits", "value": 4}
    for mechanics in ({}, ssps(bits=[4], input_bits=inputs, budget=budget, search_ends=True)):
        module = make_module(mechanics, model=tiny_net(dropout=0.25))
        fit(module)
        runs.append(state(module.net))
    assert [name for name, value in runs[1].items() if not torch.equal(value, runs[0][name])] == []


def test_logits_have_an_adam_of_their_own() -> None:
    module = searching(lr=0.03, weight_decay=1e-3)
    optimizer: Any = fit(module, max_epochs=1, limit_train_batches=1).optimizers[0]
    main, own = optimizer.optimizers
    logits = [cell.alpha for cell in mechanic(module).cells.values()]
    (group,) = own.param_groups
    assert isinstance(own, torch.optim.Adam) and len(group["params"]) == len(logits)
    assert (group["initial_lr"], group["weight_decay"], group["betas"]) == (0.03, 1e-3, (0.5, 0.999))
    assert not any(p is alpha for g in main.param_groups for p in g["params"] for alpha in logits)


@pytest.mark.parametrize("options", [{}, BOTH], ids=["weights", "both"])
def test_a_crash_among_the_fixed_cells_leaves_no_trace(options: dict[str, Any], tmp_path: Path) -> None:
    options = {**options, "lr": 0.3, "until": 0.9}
    whole, watch = searching(**options), Watch()
    fit(whole, folder=tmp_path / "whole", callbacks=(watch,))
    assert 0 < sum(watch.fixed[3]) < sum(watch.fixed[5]) < len(watch.fixed[5]), "fixed before the crash and after"
    with pytest.raises(RuntimeError, match="stopped"):
        fit(searching(**options), folder=tmp_path / "parts", callbacks=(StopAt(5),))
    pl.seed_everything(99, verbose=False)
    resumed = searching(**options)
    fit(resumed, folder=tmp_path / "parts", resume=tmp_path / "parts/checkpoints/last.ckpt")
    assert [n for n, value in state(whole).items() if not torch.equal(value, state(resumed)[n])] == []


def test_metrics_name_widths_certainties_and_the_expected_cost() -> None:
    module = searching()
    logged = {
        name: float(value)
        for name, value in fit(module, max_epochs=2, callbacks=(StopAfterFirstEpoch(),)).callback_metrics.items()
    }
    found = mechanic(module)
    widths = Allocation.of(module.net).metrics()
    assert {name: logged[name] for name in widths} == widths
    certainties = {name: float(cell.probabilities.detach().max()) for name, cell in found.cells.items()}
    assert {name: logged[f"ssps/certainty/{name}"] for name in certainties} == pytest.approx(certainties)
    assert logged["ssps/open"] == sum(not bool(cell.fixed) for cell in found.cells.values()) > 0
    assert logged["ssps/expected_cost/0"] == pytest.approx(float(found.ratios().detach()))
    assert logged["ssps/entropy"] == pytest.approx(
        sum(float(torch.special.entr(cell.probabilities.detach()).sum()) for cell in found.cells.values())
    )
    with pytest.raises(ValueError, match=r"callbacks.ssps: .*use finalise.weights=last"):
        finalise(module)


class StopAfterFirstEpoch(pl.Callback):
    """Ends the fit as planned, but early."""

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        trainer.should_stop = True


def test_a_run_leaves_its_allocation_as_a_recipe_of_the_next(tmp_path: Path) -> None:
    module = searching(**BOTH)
    left, _ = allocation_left(module, tmp_path)
    assert left == Allocation.of(module.net)


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    module = searching(budget={**THREE, "value": 1.5})
    with pytest.raises(ValueError, match=r"callbacks.ssps.budget.value=1.5: feasible are 2 to 8 bits per weight"):
        fit(module, max_epochs=1)


def test_a_network_above_its_budget_is_not_deployed() -> None:
    module = searching()
    fit(module, max_epochs=1)
    for cell in mechanic(module).cells.values():
        cell.fix(2)
    with pytest.raises(ValueError, match=r"callbacks.ssps.budget.value=3: the widths cost 4 bits per weight"):
        finalise(module)
