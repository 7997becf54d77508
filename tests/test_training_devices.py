"""Where the weights of stages on several devices lie. `meta` stands for a second device: weights on
it have a place and no numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dfc.errors import DfcError
from dfc.runtime.pipeline.homes import Homes
from dfc.runtime.pipeline.rank_device import RankDevice
from dfc.runtime.pipeline.training import Trainer
from dfc.runtime.pipeline.training_state import on_host, restore, slots_of
from tests.training_models import adamw, captured, staged

TABLE = "table.weight"


def test_a_weight_is_at_home_with_its_first_stage_and_copied_for_others() -> None:
    model = staged("tied", 2)
    homes = Homes(model.weights(), model.parts, ["cpu", "meta"])
    first, second = model.parts
    on_cpu, on_meta = homes.on("cpu"), homes.on("meta")
    assert set(first.joint.weights) == set(on_cpu)
    assert set(second.joint.weights) == set(on_meta)
    assert homes.parameters[TABLE].is_cpu and on_meta[TABLE].is_meta
    assert on_cpu[TABLE].data_ptr() == homes.parameters[TABLE].data_ptr()  # no copy at home


def test_copies_follow_their_weight() -> None:
    model = staged("tied", 2)
    homes = Homes(model.weights(), model.parts, ["cpu", "meta"])
    copy = homes._copies[TABLE, "meta"] = torch.zeros_like(homes.parameters[TABLE].detach())
    with torch.no_grad():
        homes.parameters[TABLE].fill_(3)
    homes.changed()
    assert homes.on("meta")[TABLE] is copy and bool((copy == 3).all())


def test_the_models_own_weights_stay_as_they_were() -> None:
    _, args = captured("mlp")
    before = {n: p.clone() for n, p in staged("mlp", 2).weights().items()}
    with Trainer(staged("mlp", 2), optimizer=adamw, microbatches=2, devices=["cpu"] * 2) as t:
        t.step(*args)
        assert t.devices == ["cpu", "cpu"]
    assert all(torch.equal(x, before[n]) for n, x in staged("mlp", 2).weights().items())


def test_slots_are_put_where_their_parameter_is_but_for_the_count_of_steps() -> None:
    own = {"w": torch.nn.Parameter(torch.ones(3, device="meta"))}
    adam = torch.optim.Adam(own.values())
    slots = {"step": torch.tensor(7.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    state: Any = {"weights": {"w": torch.ones(3)}, "slots": {"w": slots}, "options": {}}
    restore(own, {}, slots_of(own, [adam]), state)
    held = adam.state[own["w"]]
    assert held["exp_avg"].is_meta and held["exp_avg_sq"].is_meta and held["step"].is_cpu
    assert float(held["step"]) == 7


class _Copies(TorchDispatchMode):
    """Counts what makes a tensor anew."""

    made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += func in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)
        return func(*args, **(kwargs or {}))


def test_a_state_is_copied_once_from_wherever_it_lies() -> None:
    """`cuda:0` is a place here, as PyTorch simulates it: nothing lies there."""
    with FakeTensorMode():
        away, here = torch.ones(3, device="cuda:0"), torch.ones(3)
        with _Copies() as own:
            found = on_host({"weights": {"a": away, "b": here}, "step": 3}, copy=True)
        with _Copies() as lent:
            shown = on_host({"a": away, "b": here})
    assert own.made == 2 and lent.made == 1 and found["step"] == 3
    assert all(x.is_cpu for x in (*found["weights"].values(), *shown.values()))
    parameter = {"w": torch.nn.Parameter(torch.ones(3, device="meta"))}
    adam = torch.optim.Adam(parameter.values())
    slots = {"step": torch.tensor(7.0), "exp_avg": torch.ones(3)}
    state: Any = {"weights": {"w": torch.ones(3)}, "slots": {"w": slots}, "options": {}}
    with _Copies() as put:
        restore(parameter, {}, slots_of(parameter, [adam]), state)
    assert put.made == len(slots)
    assert adam.state[parameter["w"]]["step"] is not slots["step"]


def test_a_rank_on_the_processor_has_what_its_caller_gave_on_a_device() -> None:
    with FakeTensorMode():
        away, here = torch.ones(3, device="cuda:0"), torch.ones(3)
        brought, same, number = RankDevice("cpu").here([away, here, 3])
    assert brought.is_cpu and same is here and number == 3


@pytest.mark.parametrize(
    "options, said",
    [
        ({"devices": ["cpu"]}, "1 devices are given for 2 ranks"),
        ({"devices": "tpu:0"}, "which is neither cpu nor cuda:0"),
        ({"devices": ["cpu", "cuda:0"], "sequential": True}, "on the processor alone"),
    ],
)
def test_devices_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(DfcError, match=said) as e:
        Trainer(staged("mlp", 2), optimizer=adamw, **options)
    assert e.value.code == "N053"
